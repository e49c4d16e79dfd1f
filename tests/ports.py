"""Ports for processes that meet at one a test gives them."""

import random
import socket

# Below those that the kernel gives to connections, of which it may give one away before it is listened on.
_RANGE = range(20_000, 32_000)


def free_port() -> int:
    """A port of this host that nothing listens on, and that no connection is given before a test's processes do.

    Raises:
        OSError: none of many tried is free.
    """
    draw = random.SystemRandom()  # Test processes that were forked, or seeded alike, must not draw the same.
    for _ in range(100):
        with socket.socket() as probe:
            port = draw.choice(_RANGE)
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {_RANGE.start} to {_RANGE.stop - 1} in 100 tries")
