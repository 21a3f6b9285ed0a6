"""The ways in which a run ends early, and their exit statuses."""


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
