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
