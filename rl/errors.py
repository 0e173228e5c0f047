"""The two ways in which a command can fail without being a bug. Standard library only: the command line imports it first."""


class WrongWords(ValueError):
    """What was asked for makes no sense as written: exit status 2, one or two lines, no traceback."""


class ConfigError(WrongWords):
    """A setting that does not exist, has the wrong type, or cannot be combined with the others."""


class UnknownName(WrongWords):
    """No algorithm or environment has this name."""


class RunError(RuntimeError):
    """The work failed for a reason worth one or two lines and no traceback (a damaged checkpoint, NaN three times over): status 1."""
