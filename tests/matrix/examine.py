"""One architecture: a tiny checkpoint of it, written, streamed, and compared with the resident model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from airstream import AutoModel
from airstream.compat.weights import tied_names
from airstream.model.absent import Absent
from airstream.model.row_table import RowTable
from tests.conftest import least_memory
from tests.matrix.cases import Case
from tests.matrix.configs import PART_OF, tiny_config
from tests.matrix.inputs import batch_of, in_dtype, inputs_of
from tests.stand_ins.tiny_models import tell_weights_apart

FP32 = torch.float32
NEW_TOKENS = 6
ONLY_CALLED = ("gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody", "diffusion_gemma")
"""Types that generate for another model only, or not from a prompt alone."""

PICTURES = ("pixel_values", "flattened_patches")
"""What pictures are called among inputs."""

STREAMING: dict[str, Any] = {"layers_per_batch": 1, "prefetch_batches": 1, "max_context": 64, "max_batch_size": 2}


def write(auto_class: str, model_type: str, folder: Path, dtype: torch.dtype = FP32) -> None:
    """A tiny random checkpoint of `model_type` in `dtype`, as `save_pretrained` writes it, to `folder`."""
    config = tiny_config(model_type)
    torch.manual_seed(0)
    auto = getattr(transformers, auto_class)
    if model_type in PART_OF and auto_class == "AutoModelForCausalLM":
        model = auto._model_mapping[type(config)]._from_config(getattr(config, PART_OF[model_type]), dtype=dtype)
    else:
        model = auto.from_config(config, dtype=dtype)
    tell_weights_apart(model)
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):  # zaya's: transformers loads its last value, and then sets it to this
            buffer[-1] = -1.0
    model.save_pretrained(folder)


@dataclass(frozen=True)
class Verdict:
    """What came out for one type.

    Attributes:
        model_class: that was streamed.
        units: that were streamed, each of them alone.
        streamed_share: of the weights, per pass.
        generates: greedy tokens were compared too.
        has_image: was among what it was given.
        has_batch: two sequences, the second one padded on the left, were compared and generated from too.
    """

    model_class: str
    units: int
    streamed_share: float
    generates: bool
    has_image: bool
    has_batch: bool


class UnableError(Exception):
    """transformers itself cannot compute what was to be compared."""


@torch.no_grad()
def examine(case: Case, folder: Path, dtype: torch.dtype = FP32) -> Verdict:
    """Write, stream and compare; raises an AssertionError that says what differs.

    Raises:
        UnableError: the resident model does not compute in `dtype` on a CPU, or rounds away what its picture says.
    """
    auto_class, model_type = case.auto_class, case.model_type
    write(auto_class, model_type, folder, dtype)
    with AutoModel.from_pretrained(
        folder, device="cpu", max_memory=least_memory(folder, **STREAMING), **STREAMING
    ) as model:
        reference = getattr(transformers, type(model).__name__).from_pretrained(folder, dtype=dtype)
        reference.eval()
        generates = model.can_generate() and model_type not in ONLY_CALLED
        calls = [in_dtype(inputs, dtype) for inputs in inputs_of(auto_class, model_type, reference)]
        batch = in_dtype(batch_of(auto_class, model_type, reference) or {}, dtype)
        has_batch = bool(batch) and is_able(reference, batch, generates)
        if dtype != FP32 and not all(is_able(reference, inputs, generates) for inputs in calls):
            raise UnableError(f"{type(model).__name__} does not compute in {dtype}")
        most, misplaced = watch(model), watch_places(model, reference)
        for inputs in [*calls, batch] if has_batch else calls:
            expected = seeded(reference, inputs)
            assert tells_something(expected)
            if not sees(reference, inputs, expected):
                assert dtype != FP32, "what is said does not depend on the picture"
                raise UnableError(f"its tiny model tells no pictures apart in {dtype}")
            assert_same(seeded(model, inputs), expected)
            assert most() == 1, f"{most()} streamed layers were in memory at once"
        if generates:
            for inputs in [calls[0], batch] if has_batch else calls[:1]:
                assert_same(greedy(model, inputs), greedy(reference, inputs))
        assert misplaced == {}, "weights lie elsewhere within a cache line than those of the resident model"
        plan = model.plan
        return Verdict(
            model_class=type(model).__name__,
            units=sum(len(batch.units) for batch in plan.batches),
            streamed_share=round(plan.streamed_bytes / plan.checkpoint_bytes, 3),
            generates=generates,
            has_image=any(name in call for call in calls for name in PICTURES),
            has_batch=has_batch,
        )


def is_able(reference: Any, inputs: Mapping[str, Any], generates: bool) -> bool:
    """Whether transformers itself takes `inputs`: not every type takes padding, or is computed in every dtype."""
    try:
        expected = seeded(reference, inputs)
        if generates:
            greedy(reference, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AttributeError, AssertionError):
        return False
    return tells_something(expected)


def seeded(model: Any, inputs: Mapping[str, Any]) -> Any:
    """A forward pass; some models hash at random."""
    torch.manual_seed(0)
    return model(**inputs)


def greedy(model: Any, inputs: Mapping[str, Any]) -> Any:
    """Tokens, and the logits that they were taken from: of the prompt's last position alone, first of all."""
    torch.manual_seed(0)
    inputs = {name: value for name, value in inputs.items() if name != "decoder_input_ids"}
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    outputs = model.generate(**inputs, **length, do_sample=False, return_dict_in_generate=True, output_logits=True)
    if isinstance(outputs, torch.Tensor):  # of types that generate in their own way
        return outputs
    return {name: outputs[name] for name in ("sequences", "logits") if name in outputs}


def assert_same(actual: Any, expected: Any) -> None:
    """Every tensor of two outputs, caches aside."""
    found = dict(tensors_of(actual))
    wanted = dict(tensors_of(expected))
    assert wanted, "an output without tensors"
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        is_same = torch.allclose(found[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert is_same, f"{name} differs by {(found[name] - tensor).abs().max()}"


def tells_something(output: Any) -> bool:
    """Whether values differ: equal results would mean nothing if all were."""
    tensors = (tensor for _, tensor in tensors_of(output) if tensor.is_floating_point() and tensor.numel() > 1)
    return any(bool(tensor[tensor.isfinite()].std() > 1e-3) for tensor in tensors)


def sees(model: Any, inputs: Mapping[str, Any], output: Any) -> bool:
    """Whether logits would be others if the picture in `inputs`, if there is one, were: else none was compared."""
    name = next((name for name in PICTURES if name in inputs), None)
    if name is None:
        return True
    picture = inputs[name].clone()
    picture[..., 2:] *= -1  # where a patch lies may come first
    other = dict(tensors_of(seeded(model, {**inputs, name: picture})))
    differences = (other[key] - tensor for key, tensor in tensors_of(output) if key.startswith(".logits"))
    return any(bool(difference[difference.isfinite()].abs().max() > 1e-3) for difference in differences)


def tensors_of(output: Any, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(output, torch.Tensor):
        yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from tensors_of(value, f"{name}.{key}")
    elif isinstance(output, (tuple, list)):
        for number, value in enumerate(output):
            yield from tensors_of(value, f"{name}.{number}")


def watch(model: Any) -> Any:
    """Counts, whenever a unit runs, the units whose streamed tensors are in place; gives the most there ever were."""
    modules = [model.get_submodule(unit) for batch in model.plan.batches for unit in batch.units]
    stays = {name for batch in model.plan.batches for name in batch.resident}
    paths = [unit for batch in model.plan.batches for unit in batch.units]
    streamed = [
        {name for name in missing_from(module) if f"{path}.{name}" not in stays}
        for module, path in zip(modules, paths, strict=True)
    ]
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        in_place = (bool(names - missing_from(module)) for module, names in zip(modules, streamed, strict=True))
        most = max(most, sum(in_place))

    for module in modules:
        module.register_forward_pre_hook(look)
    return lambda: most


def watch_places(model: Any, reference: Any) -> dict[str, Any]:
    """Gets, whenever a module runs, the weights that start elsewhere within a cache line than those of `reference`.

    That decides in which order kernels of some processors add up; here it is seen on all. Strides are compared, too.
    """
    tied = {name.rpartition(".")[0] for name in tied_names(reference)}
    biases = [getattr(reference.get_submodule(name), "bias", None) for name in tied]
    # transformers pads the biases beside tied weights, which copies them; what is added last can lie anywhere.
    padded = {bias.data_ptr() for bias in biases if bias is not None}
    misplaced: dict[str, Any] = {}
    resident = dict(reference.named_modules())

    def look(module: torch.nn.Module, path: str) -> None:
        expected = dict(own_tensors(resident[path]))
        for name, tensor in own_tensors(module):
            other = expected[name]
            if other.data_ptr() in padded:
                continue
            place, wanted = place_of(tensor), place_of(other)
            if tensor.numel() > 1 and place != wanted:
                misplaced[f"{path}.{name}"] = (place, wanted)

    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda module, _, path=path: look(module, path))
    return misplaced


def place_of(tensor: torch.Tensor) -> tuple[int, list[int]]:
    """Where within a cache line it starts, and its strides, but for those of dimensions of size one."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    return tensor.data_ptr() % 64, [stride for stride, size in steps if size > 1]


def own_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of `module` itself, but for tables that are left on disk."""
    for name, tensor in module.named_parameters(recurse=False):
        if not isinstance(tensor, RowTable):
            yield name, tensor


def missing_from(module: Any) -> set[str]:
    """The tensors of `module` that are not in memory."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name for name, tensor in tensors if tensor.is_meta or isinstance(tensor, Absent)}
