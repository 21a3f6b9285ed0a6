"""A port for ranks to meet at, some seconds from now."""

import random
import socket
from pathlib import Path

FIRST, LAST = 20000, 32767
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port that is free on all of this host's addresses, and that the system hands out to nobody by itself.

    Between asking and listening lie seconds in which libraries are imported. A port from the system's own range, which
    is what binding to port 0 gives, may belong to somebody's connection by then.
    """
    last = LAST
    if _RANGE.exists():
        last = min(LAST, int(_RANGE.read_text().split()[0]) - 1)
    chance = random.SystemRandom()  # whatever seeds a run has set
    for _ in range(1000 if last > FIRST else 0):
        port = chance.randint(FIRST, last)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
