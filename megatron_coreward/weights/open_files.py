"""How many files a process may open, which are mostly its connections to others."""

import contextlib
import resource
import socket
import sys

from megatron_coreward.errors import RunError

OTHER_FILES = 512  # libraries, logs, Ray
# Megatron makes some 20 groups, and gloo connects all members of each: up to 10 connections to every other rank, with
# data parallelism alone. Weight syncs and exports have groups of their own.
CONNECTIONS = 16


def allow_connections(processes: int) -> None:
    """Raises this process's limit of open files to what connections to `processes` others need, as far as it may.

    The usual limit of 1,024 is too little for some 80 data-parallel ranks, and the system lets a process raise it up to
    the hard limit. Nothing is lowered.

    Raises:
        RunError: the hard limit, which an administrator has set, is below one connection to each.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ceiling = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    if ceiling < processes:
        raise RunError(
            f"{socket.gethostname()}: a process may open {ceiling:,} files (ulimit -Hn), and {processes:,} processes "
            f"connect to each other; allowed: {OTHER_FILES + CONNECTIONS * processes:,} or more, by the hard limit of "
            "every node (LimitNOFILE of systemd, limits.conf, docker run --ulimit nofile=...)"
        )
    wanted = min(ceiling, OTHER_FILES + CONNECTIONS * processes)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # if the system refuses, what is opened beyond it says so
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
