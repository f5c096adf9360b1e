"""This makes one error of what the system, torch and drivers say when they refuse memory.

It knows how a refusal looks, how much was asked for, and of which memory. It refuses to know what for: that is in the
plan.
"""

from __future__ import annotations

import dis
import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from airstream.errors import AirstreamError, BudgetError
from airstream.reporting.units import format_bytes

_TORCH_ON_CPU = re.compile(r"DefaultCPUAllocator: .*?(\d+) bytes", re.DOTALL)
"""What torch says where it raises no class of its own."""

_ON_DEVICE = re.compile(r"out of memory", re.IGNORECASE)
"""What drivers say where they are asked past torch's allocator."""


class ShortageError(BudgetError):
    """Memory was refused.

    Attributes:
        asked: how much, in words.
        is_on_host: whether the host's memory was refused, or else a device's.
    """

    def __init__(self, asked: str, is_on_host: bool) -> None:
        self.asked = asked
        self.is_on_host = is_on_host
        where = "host" if is_on_host else "device"
        super().__init__(
            f"{asked} of {where} memory could not be allocated: there is not so much. Name a smaller max_memory, or "
            "end what else uses it"
        )


@contextmanager
def allocating(nbytes: int, is_on_host: bool) -> Iterator[None]:
    """Around what takes so much memory at once, and does nothing else.

    Raises:
        ShortageError: it was refused.
    """
    try:
        yield
    except (OSError, OverflowError, MemoryError, torch.OutOfMemoryError) as error:
        raise ShortageError(format_bytes(nbytes), is_on_host) from error


def shortage_in(error: BaseException) -> ShortageError | None:
    """The shortage that `error` tells of, if it does."""
    if isinstance(error, ShortageError):
        return error
    if isinstance(error, AirstreamError) or _is_said_by_python(error):
        return None
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return ShortageError("some more", is_on_host=True)
    if not isinstance(error, RuntimeError):
        return None
    if on_cpu := _TORCH_ON_CPU.search(str(error)):
        return ShortageError(format_bytes(int(on_cpu[1])), is_on_host=True)
    if isinstance(error, torch.OutOfMemoryError) or _ON_DEVICE.search(str(error)):
        asked = re.search(r"[Tt]ried to allocate ([\d.]+ [KMGT]iB)", str(error))
        return ShortageError(asked[1] if asked else "some more", is_on_host=False)
    return None


def _is_said_by_python(error: BaseException) -> bool:
    """Whether a `raise` statement has made `error`, in a hook or a processor of the user's: then it is theirs.

    The system, torch and drivers refuse memory from within calls.
    """
    innermost = error.__traceback__
    while innermost is not None and innermost.tb_next is not None:
        innermost = innermost.tb_next
    if innermost is None:
        return False
    return dis.opname[innermost.tb_frame.f_code.co_code[innermost.tb_lasti]] == "RAISE_VARARGS"
