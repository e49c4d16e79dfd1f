"""Philox4x64-10 in Python's integers, as Salmon et al. 2011 define it: what random bits of ours are held against."""

from collections.abc import Iterator
from itertools import count, islice

WORD = (1 << 64) - 1


def block(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """The four 64-bit words of one counter value."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        left, right = a * 0xD2E7470EE14C6C93, c * 0xCA5A826395121157
        a, b, c, d = (right >> 64) ^ b ^ k, right & WORD, (left >> 64) ^ d ^ m, left & WORD
        k, m = (k + 0x9E3779B97F4A7C15) & WORD, (m + 0xBB67AE8584CAA73B) & WORD
    return [a, b, c, d]


def words(key: tuple[int, int], number: int) -> list[int]:
    """The first words of the stream; its counter starts at 1."""
    stream: Iterator[int] = (word for low in count(1) for word in block((low, 0, 0, 0), key))
    return list(islice(stream, number))
