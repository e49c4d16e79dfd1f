"""How a kernel cuts its work, by measurement."""

from functools import lru_cache
from typing import NamedTuple

_MULTIPROCESSORS = 132  # of an H100 or H200; a constant, so that every GPU adds up in the same order


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up. Triton's own, which kernels may call too, takes the CPU 4 µs."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def rank_block(ranks: int) -> int:
    """The ranks of a tile that holds them all: a power of two, and as many as a product takes at least."""
    return max(16, power_of_2(ranks))


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

    @property
    def options(self) -> dict[str, int]:
        """What a kernel of such tiles is launched with."""
        return {
            "block_t": self.tokens,
            "block_n": self.features,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def splits(self, tokens: int, columns: int, resident: int, sums: int) -> tuple[int, int]:
        """(number of runs of tokens, tokens of a run) for programs of one run and one of ``columns`` column tiles each.

        Args:
            resident: the programs that a multiprocessor holds at a time.
            sums: of how many tokens the operands are as large as a program's sums, written and read again.
        """
        return _splits(self.tokens, tokens, columns, resident, sums)


@lru_cache(maxsize=1024)
def _splits(block: int, tokens: int, columns: int, resident: int, sums: int) -> tuple[int, int]:
    """The split that takes least time: whole waves of programs, each of which fills its pipeline, loops and stores its sums."""
    best = None
    for wanted in range(1, max(1, tokens // max(256, 2 * block)) + 1):
        run = cdiv(tokens, wanted * block) * block
        splits = cdiv(tokens, run)
        waves = cdiv(columns * splits, _MULTIPROCESSORS * resident)
        cost = waves * (run + 2 * block + sums)
        if best is None or cost < best[0]:
            best = cost, splits, run
    assert best is not None
    return best[1:]


def adds_a_wave(tokens: int, columns: int, more: int) -> bool:
    """Whether ``more`` columns of the result make a large GEMM run a wave of cuBLAS's usual tiles longer."""
    rows = cdiv(tokens, 256)
    waves, longer = (cdiv(rows * cdiv(n, 128), _MULTIPROCESSORS) for n in (columns, columns + more))
    return longer > waves
