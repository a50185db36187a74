"""Errors whose message is complete: what was found, what was expected, and the way out.

The command line prints them in one line and exits with their status, 2 for most; anything else is a
bug and keeps its trace.
"""

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: saved after a signal, the same command goes on


class UserError(Exception):
    """Something the user gave cannot work; the message says what to change."""

    status = 2


class ConfigError(UserError):
    """A key, a value, or a combination of values of a config is wrong."""


class DataError(UserError):
    """A source, a tokenizer, or a document cannot be read."""


class CheckpointError(UserError):
    """A checkpoint or a workdir cannot be read or written."""


class TrainingError(UserError):
    """Training cannot go on, such as after a loss that is not a number."""


class CompileError(UserError):
    """A program cannot be compiled for the machine that is asked for."""


class HostError(UserError):
    """Another process of the run is not there, or no longer; the same command may work again."""

    status = 69  # EX_UNAVAILABLE of sysexits.h
