"""This makes weights dense that are kept as small integers in 32-bit words, as GPTQ, AWQ and AutoRound store them.

A linear layer of `inputs` and `outputs` features, in groups of inputs that share a scale and a zero, is four tensors:

- qweight: GPTQ (bits * inputs / 32, outputs), AWQ (inputs, bits * outputs / 32), int32
- qzeros: (groups, bits * outputs / 32), int32
- scales: (groups, outputs), float16 or bfloat16
- g_idx: (inputs,), int32, the group of each input; without it, groups are equally long runs of inputs

Its weight is scale * (integer - zero), in the dtype of the scales: what the reference kernels of AutoGPTQ, AutoAWQ and
GPTQModel multiply with. It knows how integers lie in words. It refuses to know what a checkpoint says about itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming

WEIGHT, NAMES = ".weight", (".qweight", ".qzeros", ".scales", ".g_idx")
WORD_BITS, BYTE_BITS = 32, 8
CHUNK_ELEMENTS = 1 << 19
"""Made dense at a time, so that what lies between packed and dense stays in a core's cache."""

CUTS_FUSED_WEIGHTS = hasattr(ConversionOps, "supports_many_to_many")
"""Whether this transformers lets an operation of ours make several weights of several tensors; 5.17 does not."""

Tensors = Mapping[str, "list[torch.Tensor] | torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one format packs integers.

    Attributes:
        zero_offset: what zeros are stored less than they are.
        packs_outputs: a word holds integers of several outputs, not of several inputs; and in the order of AWQ.
    """

    zero_offset: int = 0
    packs_outputs: bool = False


GPTQ, GPTQ_V2, AWQ = Layout(zero_offset=1), Layout(), Layout(packs_outputs=True)


class UnpackIntegers(ConversionOps):  # type: ignore[misc]  # transformers has no types
    """The first operation of a converter of transformers: packed tensors in, dense weights (outputs, inputs) out."""

    supports_many_to_many = True  # four tensors of one fused weight, which the next operation cuts into several

    def __init__(self, layout: Layout, is_only: bool) -> None:
        self._layout = layout
        self._is_only = is_only

    def convert(self, input_dict: Tensors, source_patterns: list[str], **kwargs: Any) -> dict[str, Any]:
        """The dense weights, by the pattern of each, or by the full name if this is the only operation."""
        dense = {}
        for pattern in source_patterns:
            stem = pattern.removesuffix(NAMES[0])
            if stem != pattern:
                parts = [_as_list(input_dict.get(stem + name)) for name in NAMES]
                dense[pattern] = [self._weight(*each) for each in _together(parts)]
        return {kwargs["full_layer_name"]: dense.popitem()[1][0]} if self._is_only else dense

    def _weight(
        self, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None
    ) -> torch.Tensor:
        return dequantize(self._layout, qweight, qzeros, scales, g_idx)


def with_unpacking(mapping: Iterable[Any], layout: Layout) -> list[Any]:
    """`mapping`, a model's renames and converters of checkpoint keys, for packed weights as well as for dense ones."""
    extended: list[Any] = []
    for entry in mapping:
        extended.append(entry)
        sources, targets = list(entry._original_source_patterns), list(entry._original_target_patterns)
        if isinstance(entry, WeightRenaming) or not all(name.endswith(WEIGHT) for name in sources):
            continue
        if len(targets) > 1 and not CUTS_FUSED_WEIGHTS:
            continue  # such a checkpoint lacks tensors, then, and is refused
        packed = [name.removesuffix(WEIGHT) + end for name in sources for end in NAMES]
        operations = [UnpackIntegers(layout, is_only=False), *entry.operations]
        extended.append(_scoped_like(entry, WeightConverter(packed, targets, operations)))
    return [*extended, WeightConverter(list(NAMES), WEIGHT, [UnpackIntegers(layout, is_only=True)])]


def _scoped_like(entry: WeightConverter, converter: WeightConverter) -> WeightConverter:
    for scope in ("scope_prefix", "base_model_prefix"):
        if hasattr(entry, scope):  # not in every transformers
            setattr(converter, scope, getattr(entry, scope))
    return converter


def dequantize(
    layout: Layout, qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor | None
) -> torch.Tensor:
    """The dense weight (outputs, inputs) in the dtype of `scales`; tensors as in this module's description.

    Raises:
        ValueError: their shapes do not go together.
    """
    groups, outputs = scales.shape
    bits = qzeros.shape[1] * WORD_BITS // outputs
    inputs = qweight.shape[0] if layout.packs_outputs else qweight.shape[0] * WORD_BITS // bits
    expected = (inputs, qzeros.shape[1]) if layout.packs_outputs else (inputs * bits // WORD_BITS, outputs)
    are_known = bits == 4 if layout.packs_outputs else 2 <= bits <= BYTE_BITS
    if not are_known or tuple(qweight.shape) != expected or qzeros.shape[0] != groups:
        raise ValueError(f"qweight {qweight.shape}, qzeros {qzeros.shape} and scales {scales.shape} do not match")
    group_of = _group_of_input(g_idx, inputs, groups)
    zeros = _unpack_zeros(qzeros, bits, layout.zero_offset)
    zeros = (_in_awq_order(zeros) if layout.packs_outputs else zeros).t().float()
    factors = scales.t().float()
    weight = torch.empty((outputs, inputs), dtype=scales.dtype, device=scales.device)
    words = qweight.t().contiguous()  # a row is an output, or some of them
    rows_per_word = WORD_BITS // bits if layout.packs_outputs else 1
    step = max(1, CHUNK_ELEMENTS // (inputs * rows_per_word))
    for begin in range(0, len(words), step):
        packed = words[begin : begin + step]
        rows = slice(begin * rows_per_word, (begin + len(packed)) * rows_per_word)
        integers = _awq_rows(packed, bits) if layout.packs_outputs else _unpack_words(packed, bits)
        _scale_into(weight[rows], integers, zeros[rows], factors[rows], group_of)
    return weight


def _scale_into(
    out: torch.Tensor,
    integers: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group_of: torch.Tensor | None,
) -> None:
    """`out` (rows, inputs) = scales * (integers - zeros), which are (rows, groups).

    In float32 the product of a half-precision number and an integer is exact, so it is rounded once, as it is in half
    precision, whose arithmetic is slower on CPUs.
    """
    numbers = integers.float()
    if group_of is None:
        grouped = numbers.view(*zeros.shape, -1)
        grouped.sub_(zeros[:, :, None]).mul_(scales[:, :, None])
    else:
        numbers.sub_(zeros.index_select(1, group_of)).mul_(scales.index_select(1, group_of))
    out.copy_(numbers)


def _group_of_input(g_idx: torch.Tensor | None, inputs: int, groups: int) -> torch.Tensor | None:
    """The group of each input; None if groups are equally long runs. On a GPU, finding that out would wait for it."""
    if inputs % groups and g_idx is None:
        raise ValueError(f"{inputs} numbers cannot be {groups} groups of one length")
    if g_idx is None or (
        g_idx.device.type == "cpu"
        and inputs % groups == 0
        and torch.equal(g_idx, torch.arange(inputs, dtype=g_idx.dtype, device="cpu") // (inputs // groups))
    ):
        return None
    return g_idx


def _unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(rows, words) int32 -> (rows, integers) uint8: a row's integers are one string of bits, lowest first."""
    octets = words.contiguous().view(torch.uint8)
    if bits == BYTE_BITS:
        return octets
    mask = (1 << bits) - 1
    if bits == 4:
        pairs = octets.to(torch.int16)  # each half byte to a byte of its own: three times as fast as `torch.stack`
        return (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)
    if bits == 2:
        parts = [octets >> shift & mask for shift in range(0, BYTE_BITS, bits)]
        return torch.stack(parts, dim=-1).flatten(1)
    eight = octets.view(len(octets), -1, bits).long()  # eight integers in as many bytes as one has bits
    string = sum((eight[:, :, place] << BYTE_BITS * place for place in range(bits)), torch.zeros_like(eight[:, :, 0]))
    return torch.stack([string >> bits * place & mask for place in range(BYTE_BITS)], dim=-1).flatten(1).to(torch.uint8)


def _unpack_zeros(qzeros: torch.Tensor, bits: int, offset: int) -> torch.Tensor:
    """(groups, outputs) uint8, with `offset` added to each.

    It is added to whole words, so that a zero of 0, for which GPTQModel borrowed from the next one, comes out right;
    but not where an integer is in two words.
    """
    if WORD_BITS % bits:
        return _unpack_words(qzeros, bits) + offset
    ones = sum(offset << place for place in range(0, WORD_BITS - 1, bits))
    return _unpack_words(qzeros + ones, bits)


# AWQ: the eight integers of a word are those of outputs 0, 2, 4, 6, 1, 3, 5, 7, lowest bits first.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _in_awq_order(integers: torch.Tensor) -> torch.Tensor:
    """(rows, outputs) as they lie in words -> in the order of outputs."""
    places = torch.tensor(
        [_AWQ_ORDER.index(output) for output in range(len(_AWQ_ORDER))], device=integers.device, dtype=torch.long
    )
    return integers.view(len(integers), -1, len(_AWQ_ORDER))[:, :, places].flatten(1)


def _awq_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """(words, inputs) int32 -> (outputs, inputs) uint8."""
    mask = (1 << bits) - 1
    parts = [words >> bits * _AWQ_ORDER.index(output) & mask for output in range(len(_AWQ_ORDER))]
    return torch.stack([part.to(torch.uint8) for part in parts], dim=1).flatten(0, 1)


def _as_list(value: Sequence[torch.Tensor] | torch.Tensor | None) -> list[torch.Tensor] | None:
    return [value] if isinstance(value, torch.Tensor) else None if value is None else list(value)


def _together(parts: Sequence[list[torch.Tensor] | None]) -> list[tuple[Any, ...]]:
    """The tensors of each weight. `parts`: by name, those of all weights; g_idx may be missing."""
    *needed, g_idx = parts
    if any(part is None for part in needed):
        raise KeyError("qweight, qzeros and scales belong together")
    lists = [part for part in needed if part is not None]
    return list(zip(*lists, g_idx if g_idx is not None else [None] * len(lists[0]), strict=True))
