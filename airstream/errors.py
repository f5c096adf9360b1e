"""These are the errors that airstream raises on purpose.

All of them are `AirstreamError`; each also is the built-in that a caller would have caught anyway, so existing
`except` clauses keep working:

    AirstreamError
    ├── ArgumentError (ValueError)          an argument is unknown, malformed or contradicts another
    ├── BudgetError (MemoryError)           the memory that was named cannot hold what has to be held
    ├── CheckpointError (ValueError)        the checkpoint is incomplete, corrupt or does not fit the model
    │   └── CheckpointNotFoundError (+ FileNotFoundError)
    ├── DiskSpaceError (OSError)            the disk has not enough room for what is about to be written
    ├── ReadError (OSError)                 the disk failed while weights were being read
    ├── ClosedError (RuntimeError)          the model was used after `close()`
    └── UnsupportedError (RuntimeError)     a streamed model cannot do this; the message says what to do instead
"""

from __future__ import annotations

__all__ = [
    "AirstreamError",
    "ArgumentError",
    "BudgetError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClosedError",
    "DiskSpaceError",
    "ReadError",
    "UnsupportedError",
]


CLOSED = "the model is closed: load it again with from_pretrained()"
"""What whoever comes too late is told, wherever in the model they are."""

FORGOTTEN = (
    "the model that this is a part of is closed, for nobody held it any more: load it again with from_pretrained(), "
    "and keep the model for as long as its parts are used"
)
"""What they are told if nobody has closed it."""


class AirstreamError(Exception):
    """The root of everything airstream raises on purpose."""


class ArgumentError(AirstreamError, ValueError):
    """An argument is unknown, malformed, or contradicts another one; the message names it."""


class BudgetError(AirstreamError, MemoryError):
    """The budget cannot hold what has to be in memory; the message has the numbers and one that could."""


class CheckpointError(AirstreamError, ValueError):
    """The checkpoint is incomplete, corrupt, or does not fit the model; the message names the file or the tensor."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no checkpoint, or one of its files is missing."""

    def __str__(self) -> str:  # OSError would print its first argument's repr
        return str(self.args[0]) if self.args else ""


class DiskSpaceError(AirstreamError, OSError):
    """The disk has not enough room for what is about to be written; nothing was."""


class ReadError(AirstreamError, OSError):
    """The disk failed while weights were being read; the message names the file and the byte range."""


class ClosedError(AirstreamError, RuntimeError):
    """The model was used after `close()`."""


class UnsupportedError(AirstreamError, RuntimeError):
    """A streamed model cannot do this; the message says what to do instead."""
