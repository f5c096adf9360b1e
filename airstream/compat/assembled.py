"""This handles weights that are objects: made of several packed tensors, with attributes that say how to compute.

Such objects, and the modules that hold them, are changed by a forward pass: scales move from the one to the other, or
the weight is replaced by one that is packed in another way. A layer that is streamed has to begin as it was loaded
every time, so what a pass has changed is undone after it; nothing outside the slab grows from pass to pass either.

It knows what a pass may change. It refuses to know when a pass is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from airstream.compat.as_built import AsBuilt
from airstream.errors import CheckpointError

EXPANDED_ITEM_BYTES, REPACKED_ITEM_BYTES, INT8_ITEM_BYTES = 4, 10, 24
"""Bytes per element that computing with a packed weight takes for a moment: it is expanded, to float32 at most. Where
the CPU has instructions for bfloat16, bitsandbytes instead packs 4-bit weights in another order, by way of int32.
bitsandbytes' 8-bit products were measured with 4M elements: 306 MiB where 4 bytes would have given 152."""

REPACKED_SHARE = 9 / 16
"""Bytes per element of a weight packed in that order, with a scale in bfloat16 for every 64 elements or more."""


class Assembled:
    """A weight made of views of a slab, ready to be put into its module, and what undoes a forward pass.

    Attributes:
        tensor: what the module is to hold.
    """

    def __init__(self, tensor: torch.Tensor, module: nn.Module) -> None:
        self.tensor = tensor
        self._data = tensor.data if is_of_bitsandbytes(tensor) else None
        holders = [tensor, *_plain_objects(tensor), *_plain_objects(module)] if self._data is not None else []
        self._attributes = [(vars(holder), dict(vars(holder))) for holder in holders]
        _assembled[id(tensor)] = self  # which keeps the tensor, so that no other one has its number

    def restore(self) -> None:
        """Make it, and what its module computes with, what they were before a forward pass. Takes microseconds."""
        if self._data is not None:
            self.tensor.data = self._data
        for attributes, original in self._attributes:
            attributes.clear()
            attributes.update(original)


_assembled: WeakValueDictionary[int, Assembled] = WeakValueDictionary()
"""By the number of the tensor of each."""


def make_as_loaded(tensor: torch.Tensor | None) -> None:
    """Make `tensor`, if it is a packed weight, what it was before a pass: bitsandbytes writes it into a state dict so,
    but where it has packed it otherwise for the CPU, it puts back the numbers, and not the scales.
    """
    if (assembled := _assembled.get(id(tensor))) is not None:
        assembled.restore()


def assemble(model: AsBuilt, name: str, build: Callable[[], torch.Tensor]) -> Assembled:
    """What `build` puts together for parameter `name` of `model`, without the traces that building leaves in `model`.

    Raises:
        CheckpointError: the tensors it is made of do not go together.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    with _unchanged(module), _unchanged(module._parameters[leaf]):
        try:
            tensor = build()
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the packed tensors of {name!r} do not go together: {type(error).__name__}: {error}. "
                "Download the checkpoint again"
            ) from error
    _check_shape(name, tensor, module)
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    return Assembled(tensor, module)


def said_of_packing(weight: torch.Tensor) -> Mapping[str, Any]:
    """What `weight`, which has no values yet, says of how it is going to be packed: adapters' packages ask for it."""
    if not is_of_bitsandbytes(weight):
        return {}
    plain = (bool, int, str, torch.dtype, type(None))
    return {name: value for name, value in vars(weight).items() if isinstance(value, plain) and name[0] != "_"}


def is_packed_alone(parameter: torch.Tensor) -> bool:
    """Whether the module of `parameter` computes with packed weights, and with no others."""
    return type(parameter).__name__ == "Params4bit"


def expansion_bytes(model: AsBuilt, name: str, on_cpu: bool) -> int:
    """What a forward pass with the packed parameter `name` takes besides, for a moment."""
    module = model.get_submodule(name.rpartition(".")[0])
    if type(module).__name__ == "Linear8bitLt":
        return _elements(module) * INT8_ITEM_BYTES
    return _elements(module) * (REPACKED_ITEM_BYTES if on_cpu and _is_repacked(module) else EXPANDED_ITEM_BYTES)


def growth_bytes(model: AsBuilt, name: str, on_cpu: bool) -> int:
    """What the packed parameter `name` takes besides once a forward pass has computed with it, until it is restored."""
    module = model.get_submodule(name.rpartition(".")[0])
    return int(_elements(module) * REPACKED_SHARE) if on_cpu and _is_repacked(module) else 0


def _elements(module: nn.Module) -> int:
    return getattr(module, "in_features", 0) * getattr(module, "out_features", 0)


def _is_repacked(module: nn.Module) -> bool:
    """Whether bitsandbytes packs the weight in another order when it is first used, if that is on a CPU."""
    return bool(getattr(module, "support_avx512bf16_for_cpu", False))


def _check_shape(name: str, tensor: torch.Tensor, module: nn.Module) -> None:
    """4-bit weights carry the shape they are expanded to; a wrong one would be found in the middle of a pass."""
    state = getattr(tensor, "quant_state", None)
    shape = tuple(state.shape) if state is not None else tuple(tensor.shape)
    expected = (getattr(module, "out_features", None), getattr(module, "in_features", None))
    if None not in expected and shape not in (expected, expected[::-1]):
        raise CheckpointError(
            f"tensor {name!r} is packed from shape {list(shape)}, the model needs {list(expected)}: "
            "config.json and the weights do not belong together"
        )


def is_of_bitsandbytes(thing: torch.Tensor | nn.Module) -> bool:
    """Whether its class is one of bitsandbytes'."""
    return type(thing).__module__.partition(".")[0] == "bitsandbytes"


def _plain_objects(owner: Any) -> Iterator[Any]:
    """Attributes of `owner` that hold attributes of their own, and are neither tensors nor modules."""
    for value in vars(owner).values():
        if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor | nn.Module | type):
            yield value


@contextmanager
def _unchanged(owner: Any) -> Iterator[None]:
    """Put the attributes of `owner` back."""
    original = dict(vars(owner))
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(original)
