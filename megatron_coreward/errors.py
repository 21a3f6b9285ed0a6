"""The ways in which a run ends early, their exit statuses, and what the machine's own errors mean for people."""

import errno
from pathlib import Path

_REMEDIES = {
    "make room there, or choose another place": (errno.ENOSPC, errno.EDQUOT),
    "make it writable for this user, or choose another place": (errno.EROFS, errno.EACCES, errno.EPERM),
    "choose a shorter name or path": (errno.ENAMETOOLONG,),
    "something else has this name: move it away, or choose another place": (
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENOTEMPTY,
    ),
    "something on the way to it is missing or was removed meanwhile": (errno.ENOENT, errno.ESTALE),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
    "the disk or the network file system fails: see the system's log": (errno.EIO,),
    "the links lead to each other: remove one": (errno.ELOOP,),
}


class InputError(ValueError):
    """Bad input from the user: one message that names the key or the file, what was found and what is allowed.

    Raised before anything is spent; the command line prints it and exits with status 2.
    """


class RunError(RuntimeError):
    """A run that had started cannot go on; the command line prints it and exits with status 1."""


class HaltedError(RunError):
    """A run has halted itself on purpose, and is not to be started again as it is.

    The command line prints it and exits with status 3.
    """


def environment_problem(error: OSError, path: Path | str | None = None) -> str:
    """`/data/run/rollouts: No space left on device; make room there, or choose another place`.

    Args:
        path: what was read or written, if the error does not name it, or names a temporary file beside it.
    """
    named = error.filename is not None and not (path is not None and str(error.filename).endswith(".tmp"))
    where = error.filename if named else path
    what = error.strerror or str(error) or type(error).__name__
    remedy = next((words for words, numbers in _REMEDIES.items() if error.errno in numbers), None)
    return "; ".join(filter(None, [f"{where}: {what}" if where is not None else what, remedy]))
