"""The one exception that a user is meant to read."""


class PeagleError(ValueError):
    """Input that cannot be used, or a state of the disk that needs the user.

    The message is one paragraph: it names the file, row or field that is wrong and says what to do. The command line
    prints it without a traceback and exits with status 1; in Python it is an ordinary `ValueError`.
    """

    def __init__(self, message: str = ""):
        # torch raises a loader worker's exception again, with the worker's traceback before the message.
        _, found, own = message.rpartition(f".{type(self).__name__}: ")
        super().__init__(own.strip() if found and "Original Traceback (most recent call last)" in message else message)
