"""`PeagleError`, the exception whose message is written for users."""


class PeagleError(ValueError):
    """Input that can't be used, or a file, disk or server that the user must fix.

    The message is one paragraph: what happened, in which file, row or field, and what to do. The command line prints
    it without a traceback and exits with status 1; in Python it is an ordinary `ValueError`.
    """

    def __init__(self, message: str = ""):
        # When a loader worker fails, PyTorch raises its exception again with the worker's traceback before the message.
        _, found, own = message.rpartition(f".{type(self).__name__}: ")
        super().__init__(own.strip() if found and "Original Traceback (most recent call last)" in message else message)
