"""The cluster that `RAY_ADDRESS` names: is it an address, and does anything answer there?

Ray itself tries for minutes to reach an address that is dead, and says so in a traceback.
"""

import os
import re
import socket
from collections.abc import Iterator

CONNECT_S = 5.0
ALLOWED = "HOST:PORT of the head node (port 6379 unless it was given another), or auto for a cluster of this machine"
_ADDRESS = re.compile(r"(?:ray://)?(?:\[(?P<v6>[0-9A-Fa-f:.]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>\d{1,5})")


def problems(limit_s: float = CONNECT_S) -> Iterator[str]:
    """What is wrong with `RAY_ADDRESS`; nothing if it is not set."""
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address == "auto":
        return
    found = _ADDRESS.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 65536:
        yield f"RAY_ADDRESS: found {address!r}; allowed: {ALLOWED}; unset it to run on this machine alone"
        return
    host, port = found["v6"] or found["host"], int(found["port"])
    hosts = [host]
    if host in ("127.0.0.1", "::1", "localhost"):  # a head node may listen on the address of its host alone
        hosts.append(socket.gethostname())
    errors = [error for name in hosts if (error := _connect(name, port, limit_s)) is not None]
    if len(errors) == len(hosts):
        yield (
            f"RAY_ADDRESS: nothing answers at {address} within {limit_s:g} s ({errors[0]}); start the cluster "
            "(`ray start --head`), name the one that runs, or unset RAY_ADDRESS to run on this machine alone"
        )


def _connect(host: str, port: int, limit_s: float) -> str | None:
    """Why a connection could not be made; None: it could."""
    try:
        socket.create_connection((host, port), timeout=limit_s).close()
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None
