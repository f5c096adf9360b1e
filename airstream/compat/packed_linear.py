"""This puts linear modules into a model that multiply with their weights as these are stored: `kernels="fast"`.

transformers' own modules take dense weights, so that packed ones are made dense in every pass. These do not: what is
packed stays packed in memory, and a product reads no more bytes than that. It rounds otherwise (`codecs.products`).

It knows modules. It refuses to know where weights come from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from airstream.codecs.library import has_kernels
from airstream.codecs.products import FEW, RowFormat, StoredRows, multiply, panel_dtype
from airstream.errors import UnsupportedError

__all__ = ["PackedLinear", "put_packed_linears"]


NF4_LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    dtype=torch.float32,
    device="cpu",
)  # fmt: skip
"""The numbers of 4-bit NormalFloat (Dettmers et al. 2023, QLoRA, appendix E)."""


class PackedLinear(nn.Linear):
    """A linear module on the CPU whose weight may be rows of bytes, `packed`, as `row_format` says, if it does.

    `weight` has no values then: it is what other code reads a dtype and a shape from. Nothing has a gradient.
    """

    row_format: RowFormat | None = None
    stored_as = "a weight"

    def hold(
        self, how: RowFormat, stored_as: str, scales: tuple[int, ...] = (), dtype: torch.dtype = torch.float32
    ) -> None:
        """From now on the weight is rows of bytes, with `scales` of such a shape, if any. It is on the meta device.

        Args:
            stored_as: which tensor of which file that is, for messages.
        """
        self.__dict__["weight"] = self.weight.detach()
        del self._parameters["weight"]
        self.register_parameter("packed", _on_meta((self.out_features, how.row_bytes), torch.uint8))
        if scales:
            self.register_parameter("packed_scale", _on_meta(scales, dtype))
        self.row_format, self.stored_as = how, stored_as

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another weight in the place of a packed one, which the next product would not look at.

        Raises:
            UnsupportedError: it is another one.
        """
        if name != "weight" or self.row_format is None:
            super().__setattr__(name, value)
        elif value is not self.__dict__.get("weight"):
            raise UnsupportedError(
                f'kernels="fast" multiplies with {self.stored_as} as it is stored, and is given another weight '
                f"{_shape_of(value)} in its place: leave kernels= out"
            )

    @property
    def hidden_numbers(self) -> int:
        """How many more numbers the weight has than its parameters."""
        if self.row_format is None:
            return 0
        kept = sum(each.numel() for name, each in self._parameters.items() if each is not None and name != "bias")
        return self.out_features * self.in_features - kept

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - as nn.Linear has it
        """`input` (..., columns) times the transposed weight, and the bias: (..., rows), in the dtype of `input`."""
        _refuse_what_kernels_cannot(self, input)
        if self.row_format is None and self.weight.shape != (self.out_features, self.in_features):
            return super().forward(input)  # torch.func.functional_call puts others in its place: torch judges them
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))  # noqa: A001 - as above
        vectors = input.reshape(-1, self.in_features)
        how = self.row_format or _dense_format(self, len(vectors))
        if how is None:
            return super().forward(input)
        numbers = self._parameters["packed" if self.row_format else "weight"]
        assert numbers is not None
        table = NF4_LEVELS if how.kind == "nf4" else None
        scales = self._parameters.get("packed_scale")
        weight = StoredRows(how, self.out_features, numbers.detach(), scales, table, self.stored_as)
        return multiply(weight, vectors, self.bias).view(*input.shape[:-1], self.out_features)


def _refuse_what_kernels_cannot(module: PackedLinear, vectors: torch.Tensor) -> None:
    """Raise where a kernel would give something else than torch, which it does not know of, or nothing.

    Raises:
        UnsupportedError: the message says what is asked for.
    """
    asked = None
    if not vectors.is_floating_point():
        asked = f"products with numbers in {vectors.dtype}"
    elif torch._C._get_tracing_state() is not None:
        asked = "a trace of them"
    elif torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        asked = "a transform or derivative of them"
    elif vectors.requires_grad and torch.is_grad_enabled():
        raise UnsupportedError(
            'kernels="fast" computes without gradients, and one is asked for: leave it out, or compute under '
            "torch.no_grad()"
        )
    elif module.row_format is not None and _width(vectors) != module.in_features:
        raise UnsupportedError(
            f"vectors of {_width(vectors)} numbers cannot be multiplied with {module.stored_as}, a weight "
            f"[{module.out_features}, {module.in_features}]: their last dimension has to be {module.in_features}"
        )
    elif module.row_format is not None and module._parameters.get("weight") is not None:
        asked = "another weight in the place of one that stays packed"
    if asked is not None:
        raise UnsupportedError(
            f'kernels="fast" multiplies with weights as they are stored, and is asked for {asked}: leave kernels= out'
        )


def _width(vectors: torch.Tensor) -> int:
    return vectors.shape[-1] if vectors.dim() else 0


def _shape_of(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else f"({type(value).__name__})"


def _on_meta(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def _dense_format(module: nn.Linear, count: int) -> RowFormat | None:
    """How a dense weight is multiplied with `count` vectors: None if torch does that well."""
    if is_traceable_wrapper_subclass(module.weight):
        return None  # of torchao: it says a dtype, and has other memory
    if module.weight.dtype != torch.bfloat16 or not module.weight.is_contiguous():
        return None
    if count > FEW and panel_dtype(torch.bfloat16) == torch.bfloat16 and not module.weight.is_meta:
        return None  # on the meta device it is measured what the others take
    return RowFormat("bf16", module.in_features, 2 * module.in_features)


def check_fast(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a device or dtype for which there are no kernels, or a machine on which they were not compiled.

    Raises:
        UnsupportedError: the message has the remedy.
    """
    if device.type != "cpu":
        raise UnsupportedError(
            f'kernels="fast" computes on the CPU, not on device="{device}": leave it out, or load with device="cpu"'
        )
    if dtype == torch.float64:
        raise UnsupportedError(
            'kernels="fast" sums up in float32, and dtype=float64 asks for more: leave one of them out'
        )
    if not has_kernels():
        raise UnsupportedError(
            'kernels="fast" takes kernels that were not compiled when airstream was installed: install a C compiler '
            "(gcc or clang) and then airstream once more, or leave it out"
        )


def packed_formats(model: PreTrainedModel) -> dict[str, RowFormat]:
    """How the rows are stored that modules of `model` multiply with, by the name of each parameter."""
    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, PackedLinear))
    return {f"{name}.packed": module.row_format for name, module in modules if module.row_format is not None}


def put_packed_linears(model: PreTrainedModel) -> None:
    """Let every plain linear module of `model`, which is on the meta device, be a `PackedLinear`, in its place."""
    for module in model.modules():
        if type(module) is nn.Linear:  # a class of its own may do more with its weight
            module.__class__ = PackedLinear


def take_packed_linears_out(model: PreTrainedModel) -> None:
    """Let them be plain again, for whoever looks for plain ones: their weights are still dense."""
    packed: list[nn.Module] = [module for module in model.modules() if type(module) is PackedLinear]
    for module in packed:
        module.__class__ = nn.Linear
