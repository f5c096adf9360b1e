"""A region is a place in the ring and what is in it. It knows who uses it, not how it is filled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch


class Work(Protocol):
    """What is being done to fill a region."""

    def cancel(self) -> None:
        """Give up what has not been read yet."""


@dataclass(slots=True)
class Region:
    """A layer batch in the ring. If nothing of the batch is streamed, it takes no room there.

    Attributes:
        memory: the bytes of the batch on the device, as a uint8 tensor.
        offset: where in the ring it lies.
        fresh: True after a fill; whoever makes something of the bytes in place, once, sets it to False.
        filling: reads are under way.
        work: they, once all of them have been begun.
        users: the threads that wait for it, or took a lease of it, once for each time. Without any, it stays intact
            until its place is needed.
        read_bytes, host_bytes: the bytes that came from disk and host memory to fill it, until they are reported.
        error: the error that kept it from being filled.
        is_being_changed: something is being made of the bytes in place; after an interrupt, for good.
    """

    batch: int
    offset: int
    memory: torch.Tensor
    fresh: bool = True
    filling: bool = True
    users: list[int] = field(default_factory=list)
    read_bytes: int = 0
    host_bytes: int = 0
    work: Work | None = None
    error: BaseException | None = None
    is_being_changed: bool = False

    @property
    def holds_batch(self) -> bool:
        """Whether the batch is in it, or on its way."""
        return self.error is None and not self.is_being_changed
