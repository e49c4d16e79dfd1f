"""Memory for one value at a time, used again when the value is gone."""


class Scratch:
    """Lends the same memory again and again; where something still uses it, new memory instead, and the old stays with its user.

    Memory in use is several times faster than new memory, which the kernel has to clear first. And where pieces of many sizes are
    taken and freed, holes stay between them, by which a process grows to a multiple of what it holds.
    """

    def __init__(self) -> None:
        self._block = bytearray(1)

    def lend(self, size: int) -> memoryview:
        """``size`` bytes of any content, lent for as long as there is a tensor, an array or a view of them."""
        if len(self._block) < size or self._is_lent():
            self._block = bytearray(max(size, 1))
        return memoryview(self._block)[:size]

    def _is_lent(self) -> bool:
        try:  # Memory that is lent cannot change its size.
            self._block.append(self._block.pop())
        except BufferError:
            return True
        return False
