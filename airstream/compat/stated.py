"""This holds what a config says of packed weights against the shapes of the tensors that hold them.

Shapes alone tell how many bits an integer has and how many share a scale, so that a config that says something else
goes unnoticed: the checkpoint and its config are of two models then, and one of them is wrong. It knows which shapes
tell what. It refuses to know how numbers are made of integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from airstream.checkpoint.stored import StoredTensor
from airstream.errors import CheckpointError

Index = Mapping[str, StoredTensor]
Settings = Mapping[str, Any]
Fault = tuple[StoredTensor, str, str]
"""A tensor, what it says, and what the config says instead."""

WORD_BITS = 32
OVERRIDES = ("dynamic", "extra_config")
"""Where GPTQModel and AutoRound say of some layers that they are packed in another way."""

NAMES: Mapping[str, tuple[str, ...]] = {"bits": ("bits", "w_bit"), "group_size": ("group_size", "q_group_size")}
"""What writers call a number."""


def check_stated(settings: Settings, method: str, index: Index) -> None:
    """Refuse tensors of a checkpoint quantised by `method` that are not as its `settings` say.

    Raises:
        CheckpointError: the message names the file, the tensor and the field.
    """
    for stored, own, said in CHECKS.get(method, _nothing)(settings, index):
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name!r} {list(stored.shape)} has {own}, but quantization_config in "
            f"config.json says {said}: they do not belong together"
        )


def check_stated_numbers(settings: Settings) -> None:
    """Refuse `settings` whose numbers are none, lest a comparison with them means nothing.

    Raises:
        ValueError: the message names the field.
    """
    for path, said in _all_settings(settings):
        for name in (name for names in NAMES.values() for name in names):
            if (value := said.get(name)) is not None and type(value) is not int:
                raise ValueError(f"{path}{name} is {str(value)[:100]!r}, and no whole number")


def _nothing(_: Settings, __: Index) -> Iterator[Fault]:
    return iter(())


def _integers(settings: Settings, index: Index) -> Iterator[Fault]:
    """GPTQ, AWQ, AutoRound: qzeros is (groups, bits * outputs / 32), scales is (groups, outputs)."""
    for stem, qzeros in _ending(index, ".qzeros"):
        qweight, scales, g_idx = (index.get(stem + end) for end in (".qweight", ".scales", ".g_idx"))
        for stored in filter(None, (qweight, qzeros, g_idx)):
            if stored.dtype != "I32" and (stored is not g_idx or stored.dtype != "I64"):
                yield stored, f"numbers of type {stored.dtype}", f"{settings.get('quant_method')}, which packs I32"
        if qweight is None or scales is None or len(qweight.shape) != 2 or len(scales.shape) != 2:
            continue  # which is refused where they are put together
        groups, outputs = scales.shape
        bits = qzeros.shape[-1] * WORD_BITS // (outputs or 1)
        yield from _unlike(qzeros, f"{bits} bits", bits, settings, "bits")
        is_awq = qweight.shape[1] != outputs
        inputs = qweight.shape[0] if is_awq else qweight.shape[0] * WORD_BITS // (bits or 1)
        said = [size for size in _stated(settings, "group_size") if groups == _groups(inputs, size)]
        own = f"{groups} groups of {-(-inputs // (groups or 1))} inputs"
        yield from () if said else _unlike(scales, own, None, settings, "group_size")


def _groups(inputs: int, group_size: int) -> int:
    return -(-inputs // group_size) if group_size > 0 else 1


def _unlike(stored: StoredTensor, own: str, value: int | None, settings: Settings, name: str) -> Iterator[Fault]:
    """A fault if `settings` say anything of `name`, and never `value`."""
    said = _stated(settings, name)
    if said and value not in said:
        yield stored, own, f"{name}={' or '.join(map(str, said))}"


def _stated(settings: Settings, name: str) -> list[int]:
    """What is said of `name`, of all layers or of some."""
    said = (each.get(spelled) for _, each in _all_settings(settings) for spelled in NAMES[name])
    return list(dict.fromkeys(value for value in said if value is not None))


def _all_settings(settings: Settings) -> Iterator[tuple[str, Settings]]:
    yield "quantization_config.", settings
    for field in OVERRIDES:
        inner = settings.get(field)
        for key, said in inner.items() if isinstance(inner, Mapping) else ():
            if isinstance(said, Mapping):
                yield f"quantization_config.{field}[{key[:100]!r}].", said


def _compressed(settings: Settings, index: Index) -> Iterator[Fault]:
    """compressed-tensors: a row of weight_packed and one of weight_scale tell how many bits share a scale."""
    groups = settings.get("config_groups")
    named = groups.values() if isinstance(groups, Mapping) else ()
    said = [group.get("weights") or {} for group in named if isinstance(group, Mapping)]
    if not said or len(said) < len(named) or any(each.get("strategy") != "group" for each in said):
        return  # it names a scheme, or a scale for each row, which tells nothing
    stated = {int(each["num_bits"]) * int(each["group_size"]) for each in said}
    for stem, packed in _ending(index, ".weight_packed"):
        scale = index.get(stem + ".weight_scale")
        if scale is None or len(packed.shape) != 2 or len(scale.shape) != 2 or not scale.shape[1]:
            continue
        if scale.shape[0] != packed.shape[0]:
            yield scale, f"other rows than {packed.name!r} {list(packed.shape)}", "strategy=group"
        own = packed.shape[1] * WORD_BITS // scale.shape[1]
        if own not in stated:
            numbers = " or ".join(f"num_bits={each['num_bits']}, group_size={each['group_size']}" for each in said)
            yield packed, f"{own} bits for each of {scale.shape[1]} scales of a row", numbers


def _bitsandbytes(settings: Settings, index: Index) -> Iterator[Fault]:
    """bitsandbytes: what belongs to a weight of 8 bits is called otherwise than what belongs to one of 4."""
    for bits, end, other in ((8, ".SCB", "load_in_4bit"), (4, ".absmax", "load_in_8bit")):
        if settings.get(other) or settings.get(f"_{other}"):
            for _, stored in _ending(index, end):
                yield stored, f"scales of weights of {bits} bits", f"{other}=true"


def _ending(index: Index, end: str) -> Iterator[tuple[str, StoredTensor]]:
    for name, stored in index.items():
        if name.endswith(end):
            yield name.removesuffix(end), stored


CHECKS: Mapping[str, Callable[[Settings, Index], Iterator[Fault]]] = {
    **dict.fromkeys(("gptq", "awq", "auto-round"), _integers),
    "compressed-tensors": _compressed,
    "bitsandbytes": _bitsandbytes,
}
"""By format. What transformers finds out from shapes itself, as of fp8, or from the tensors, is not here."""
