"""`runtime_of` chooses the runtime of a device: torch's own, but for types of devices that have another one.

It knows types of devices. It refuses to know what runtimes are used for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from airstream.transfer.base import Runtime
from airstream.transfer.torch_runtime import TorchRuntime

RUNTIMES: dict[str, Callable[[torch.device], Runtime]] = {}
"""Runtimes of device types that torch's own streams and events do not serve, by type."""


def runtime_of(device: torch.device) -> Runtime:
    """The operations of `device`, which must be there."""
    return RUNTIMES.get(device.type, TorchRuntime)(device)
