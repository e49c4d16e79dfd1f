"""How a kernel cuts its work, by measurement."""

from typing import NamedTuple


class Tile(NamedTuple):
    """The piece of one program, and how it runs.

    Attributes:
        tokens, features: rows and columns of a tile.
        warps: of 32 threads.
        stages: of the software pipeline over the loop.
    """

    tokens: int
    features: int
    warps: int
    stages: int

    def splits(self, tokens: int, columns: int, programs: int) -> tuple[int, int]:
        """(number of runs of tokens, tokens of a run) that make about ``programs`` programs of ``columns`` column tiles."""
        # A run is long enough for its sums to be few beside what it reads.
        wanted = max(1, min(-(-tokens // max(256, 2 * self.tokens)), -(-programs // columns)))
        run = -(-tokens // (wanted * self.tokens)) * self.tokens
        return -(-tokens // run), run
