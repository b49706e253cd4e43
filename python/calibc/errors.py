"""Errors of calibc, one class per family: who must act. Each has the exit code of the command line."""

from __future__ import annotations


class CalibcError(Exception):
    """Any error of calibc."""

    exit_code: int = 70


class Usage(CalibcError, ValueError):
    """An argument that cannot be."""

    exit_code = 2


class BadInput(CalibcError, ValueError):
    """Traces, spec, masks, tensors or bundle are wrong, or not for each other."""

    exit_code = 3


class Environment(CalibcError, RuntimeError):
    """This machine lacks something: NVRTC, the driver, a GPU."""

    exit_code = 4


class NotForThisGpu(Environment):
    """The bundle has no kernel for this GPU, or none of the wanted kind."""


class FileSystem(CalibcError, OSError):
    """The file system refused."""

    exit_code = 5


class Internal(CalibcError, RuntimeError):
    """A bug of calibc; please report it."""

    exit_code = 70


__all__ = ["BadInput", "CalibcError", "Environment", "FileSystem", "Internal", "NotForThisGpu", "Usage"]
