"""`kernels="fast"`: weights stay packed in memory, the logits are those of exact products but for rounding."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from airstream import ArgumentError, AutoModel, BudgetError, CheckpointError, Plan, UnsupportedError
from airstream.checkpoint.formats import open_checkpoint
from airstream.cli import main
from airstream.codecs import library, team
from airstream.codecs.products import StoredRows, make_dense
from airstream.codecs.rates import _product_seconds
from airstream.compat.packed_linear import NF4_LEVELS, PackedLinear
from airstream.repacking.repack import repack
from airstream.reporting.units import MIB
from tests.conftest import least_memory, smallest_budget, stream
from tests.model.test_lifecycle import MEASURE
from tests.stand_ins.comparing import BF16, FP32, greedy, logits, prompts
from tests.stand_ins.interrupts import Interrupts
from tests.stand_ins.quantized_models import LARGE, write_torchao
from tests.stand_ins.tiny_gguf import write_tiny_gguf
from tests.stand_ins.tiny_models import TINY, TinyModel, write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the packages of formats
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3}
FAST = {"kernels": "fast", "max_context": 64}
CODECS = ("lossless", "nf4", "int8", "int4", "fp8")
BY_CODEC = pytest.mark.parametrize("codec", CODECS)

Packed = Callable[[str], Path]


def packer(root: Path, entry: TinyModel) -> Packed:
    """`packed(codec)`: the model `entry`, packed so; as it was if the codec is "plain"."""

    @functools.cache
    def folder_of(codec: str) -> Path:
        folder = root / codec
        if codec == "plain":
            write_model(entry, folder, BF16)
        else:
            repack(folder_of("plain"), folder, codec=codec)
        return folder

    return folder_of


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return packer(tmp_path_factory.mktemp("fast"), TinyModel("llama", {**TINY["llama"].fields, **WIDE}))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Of a model whose layers are large enough for a kernel's count of memory to show them."""
    return packer(tmp_path_factory.mktemp("large"), LARGE)


def fast_modules(model: Any) -> list[PackedLinear]:
    return [each for each in model.modules() if isinstance(each, PackedLinear) and each.row_format is not None]


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Within a few roundings to bfloat16 of the largest one."""
    return bool((found.float() - expected.float()).abs().max() <= 0.03 * expected.float().abs().max())


def in_float64(plain: Path, model: Any) -> Any:
    """The model of `plain` with the numbers that the packed weights of `model`, all in memory, stand for."""
    reference = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float64)
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear) and module.row_format is not None:
            dense = torch.empty(module.out_features, module.in_features)
            scales, table = module._parameters.get("packed_scale"), NF4_LEVELS
            make_dense(StoredRows(module.row_format, len(dense), module.packed.detach(), scales, table), 0, dense)
            reference.get_submodule(name).weight.data = dense.double()
    return reference


@BY_CODEC
def test_logits_are_as_close_to_the_truth_as_exact_ones(packed: Packed, codec: str) -> None:
    inputs = [prompts(1, 1), prompts(1, 5), prompts(2, 20)]
    with stream(packed(codec), max_context=64) as model:
        exact = [logits(model, each) for each in inputs]
        assert not fast_modules(model)
    with stream(packed(codec), **FAST, max_memory="1GiB") as model:
        fast = [logits(model, each) for each in inputs]
        assert len(fast_modules(model)) == 21 + (codec == "lossless")  # its head is packed, too
        reference = in_float64(packed("plain"), model)
    truth = [logits(reference, each) for each in inputs]
    errors = [
        [(each.double() - true).abs().mean() for each, true in zip(found, truth, strict=True)]
        for found in (fast, exact)
    ]
    assert sum(errors[0]) <= 1.1 * sum(errors[1]), errors


@BY_CODEC
def test_it_is_the_same_to_the_bit_however_little_memory_there_is(packed: Packed, codec: str) -> None:
    inputs = prompts(2, 12)
    with stream(packed(codec), **FAST, max_memory="1GiB") as model:
        assert not model.plan.streamed_bytes
        roomy = greedy(model, inputs), logits(model, inputs)
    with stream(packed(codec), **FAST) as model:
        assert model.plan.streamed_bytes
        assert torch.equal(greedy(model, inputs), roomy[0])
        assert torch.equal(logits(model, inputs), roomy[1])


def test_lossless_weights_in_float32_are_as_exact_as_float32(packed: Packed) -> None:
    inputs = prompts(2, 12)
    reference = AutoModelForCausalLM.from_pretrained(packed("plain"), dtype=torch.float64)
    expected = logits(reference, inputs)
    for codec in ("plain", "lossless"):
        with stream(packed(codec), **FAST, dtype=FP32) as model:
            assert (logits(model, inputs).double() - expected).abs().max() < 1e-4 * expected.abs().max()


def test_dense_weights_are_multiplied_by_the_kernel_too(packed: Packed) -> None:
    inputs = prompts(1, 3)
    with stream(packed("plain"), max_context=64) as model:
        exact = logits(model, inputs)
    with stream(packed("plain"), **FAST) as model:
        assert not fast_modules(model)
        assert close(logits(model, inputs), exact)


@pytest.mark.parametrize("quant", ["Q4_0", "Q8_0", "Q6_K"])
def test_gguf_stays_packed(tmp_path: Path, quant: str) -> None:
    """Also where rows are dealt out, as those of queries and keys are."""
    file = write_tiny_gguf("llama", tmp_path / "model.gguf", quant)
    inputs = prompts(2, 12)
    with stream(file, max_context=64) as model:
        exact, dense_bytes = logits(model, inputs), model.plan.resident_bytes
    with stream(file, **FAST) as model:
        assert fast_modules(model)
        assert model.plan.resident_bytes < 0.6 * dense_bytes
        found = logits(model, inputs)
        assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()  # it computes in float32


def test_the_plan_names_it_and_counts_packed_bytes(packed: Packed) -> None:
    exact = AutoModel.plan(packed("int4"), device="cpu", max_context=64)
    fast = AutoModel.plan(packed("int4"), device="cpu", **FAST)
    assert exact.kernels == "exact"
    assert "kernels" not in str(exact)
    assert fast.kernels == "fast"
    assert "round otherwise" in str(fast)
    assert Plan.from_json(fast.to_json()) == fast
    assert fast.resident_bytes < exact.resident_bytes / 2
    assert fast.prediction is None or fast.prediction.decode_seconds > 0


@pytest.mark.parametrize("codec", ["nf4", "int4"])
def test_a_refusal_names_fast_kernels_where_they_would_fit(
    large: Packed, codec: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path))
    known = {"max_context": 64, "device": "cpu"}
    (exact,), (fast,) = (least_memory(large(codec), **(known | more)).values() for more in ({}, FAST))
    assert fast < exact
    for folder, asked in ((large(codec), {}), (large("plain"), {"compression": codec})):
        for ask in (AutoModel.from_pretrained, AutoModel.plan):
            for budget, is_named in ((exact - 1, True), (fast - MIB, False)):
                with pytest.raises(BudgetError) as refusal:
                    ask(folder, **known, **asked, max_memory=budget)
                assert ('With kernels="fast" it would fit' in str(refusal.value)) is is_named
    words = ["plan", str(large(codec)), "--max-context", "64", "--device", "cpu", "--max-memory", str(exact - 1)]
    assert main(words) == 1
    assert "With --kernels fast it would fit" in capsys.readouterr().err
    assert main([*words, "--kernels", "fast"]) == 0
    assert not any(tmp_path.rglob("*.safetensors"))  # nothing has been packed


@pytest.mark.parametrize("codec", ["plain", "lossless"])
def test_a_packed_lm_head_is_streamed_like_a_dense_one(packed: Packed, codec: str) -> None:
    with stream(packed(codec), **FAST) as model:
        assert model.plan.head == "streamed"
        assert model.plan.batches[-1].units == ("lm_head",)
        head = model.get_submodule("lm_head")
        assert (head.row_format is not None) is (codec == "lossless")
        inputs = prompts(2, 12)
        streamed = logits(model, inputs)
    with stream(packed(codec), **FAST, max_memory="1GiB") as model:
        assert model.plan.head == "resident"
        assert torch.equal(logits(model, inputs), streamed)


def test_a_packed_weight_has_a_shape_and_no_values(packed: Packed) -> None:
    plain = AutoModelForCausalLM.from_pretrained(packed("plain"))
    with stream(packed("int4"), **FAST) as model:
        weight = model.model.layers[0].mlp.up_proj.weight
        assert (weight.shape, weight.dtype, weight.device.type) == ((384, 256), BF16, "cpu")
        for read in (lambda: weight * 2, weight.clone, weight.tolist):
            with pytest.raises(UnsupportedError):
                read()
        assert model.num_parameters() == plain.num_parameters()
        assert model.num_parameters(exclude_embeddings=True) == plain.num_parameters(exclude_embeddings=True)
        assert model.get_memory_footprint() < 0.6 * plain.get_memory_footprint()


def test_what_has_no_kernel_is_exact(packed: Packed, tmp_path: Path) -> None:
    """Scales that are quantised themselves: transformers' own modules compute, and the bits are theirs."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=BF16
    )
    AutoModelForCausalLM.from_pretrained(packed("plain"), quantization_config=config).save_pretrained(tmp_path)
    inputs = prompts(1, 12)
    with stream(tmp_path, max_context=64) as model:
        exact = model.model(**inputs).last_hidden_state
    with stream(tmp_path, **FAST) as model:
        assert not fast_modules(model)
        assert torch.equal(model.model(**inputs).last_hidden_state, exact)


def test_a_gradient_is_refused(packed: Packed) -> None:
    with stream(packed("int4"), **FAST, max_memory="1GiB") as model:
        states = torch.randn(1, 256, requires_grad=True)
        with torch.enable_grad(), pytest.raises(UnsupportedError, match="gradient"):
            fast_modules(model)[0](states)
    alone = PackedLinear(8, 8)
    with pytest.raises(UnsupportedError, match="without gradients"):
        alone(torch.randn(1, 8, requires_grad=True))


def test_it_is_refused_where_it_cannot_be(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match='neither "exact"'):
        stream(packed("plain"), kernels="quick")
    monkeypatch.setattr(library, "library", lambda _="blocks": None)
    with pytest.raises(UnsupportedError, match="C compiler"):
        stream(packed("plain"), **FAST)


@pytest.mark.usefixtures("sim")
def test_it_is_refused_on_an_accelerator(packed: Packed) -> None:
    with pytest.raises(UnsupportedError, match="computes on the CPU, not on device="):
        stream(packed("plain"), device="privateuseone", **FAST)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
@pytest.mark.parametrize(
    ("codec", "kernels"), [("lossless", "fast"), ("int4", "fast"), ("int4", "exact"), ("fp8", "exact")]
)
def test_the_peak_stays_within_the_plan(large: Packed, codec: str, kernels: str) -> None:
    """Of a prompt, for which rows are made dense, and of single tokens."""
    folder = large(codec)
    options = {"layers_per_batch": 1, "max_context": 128, "page_cache": False, "kernels": kernels}
    budget = str(smallest_budget(folder, **options)["cpu"])
    call = [sys.executable, "-c", MEASURE.replace("tokens=28", "tokens=4"), str(folder), budget, kernels]
    result = subprocess.run(call, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["rise"] > measured["ring"]
    assert measured["rise"] <= measured["planned"]


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    """What torch takes for granted in the whole process, as it does while any model is built."""
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(FP32)


@pytest.mark.parametrize(("dtype", "device"), [(BF16, "cpu"), (torch.float64, "meta")], ids=str)
@pytest.mark.parametrize("kernels", ["exact", "fast"])
@BY_CODEC
def test_what_torch_takes_for_granted_changes_nothing(
    packed: Packed, codec: str, kernels: str, dtype: torch.dtype, device: str
) -> None:
    few, many = prompts(1, 3), prompts(2, 12)
    _product_seconds.cache_clear()
    with stream(packed(codec), max_context=64, kernels=kernels) as model:
        expected = logits(model, few), logits(model, many)
        with defaults(dtype, device):
            model.model.layers[1].mlp(torch.ones((1, 1, 256), dtype=BF16, device="cpu"))
            if device == "cpu":  # transformers' own code makes tensors on the default device
                assert torch.equal(logits(model, few), expected[0])
                assert torch.equal(logits(model, many), expected[1])
    _product_seconds.cache_clear()
    with defaults(dtype, "cpu"), stream(packed(codec), max_context=64, kernels=kernels) as model:
        assert torch.equal(logits(model, few), expected[0])


Tensors = dict[str, torch.Tensor]
UP = "model.layers.1.mlp.up_proj."


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(tensor.shape[::-1])


OTHERWISE: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "fp8 of another kind": ("fp8", "weight", lambda it: it.float().to(torch.float8_e5m2)),
    "fp8 in bytes": ("fp8", "weight", lambda it: it.view(torch.uint8)),
    "fp8, turned": ("fp8", "weight", turned),
    "fp8, scales by rows": ("fp8", "weight_scale_inv", lambda it: it.repeat_interleave(2, 0)),
    "int8 in bytes without sign": ("int8", "_weight_qdata", lambda it: it.view(torch.uint8)),
    "int8, turned": ("int8", "_weight_qdata", turned),
    "int4, turned": ("int4", "weight_packed", turned),
    "int4, flat": ("int4", "weight_packed", torch.flatten),
    "int4, flat scales": ("int4", "weight_scale", torch.flatten),
    "int4, half the scales": ("int4", "weight_scale", lambda it: it[:, :1].contiguous()),
    "nf4, flat": ("nf4", "weight", torch.flatten),
    "nf4 in another dtype": ("nf4", "weight", lambda it: it.view(torch.int8)),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_stored_otherwise_is_what_exact_kernels_take_it_for(packed: Packed, tmp_path: Path, name: str) -> None:
    codec, end, change = OTHERWISE[name]
    folder = tmp_path / "other"
    shutil.copytree(packed(codec), folder)
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            tensors, metadata = (
                dict(zip(names := list(opened.keys()), map(opened.get_tensor, names), strict=True)),
                opened.metadata(),
            )
        if UP + end in tensors:
            save_file(tensors | {UP + end: change(tensors[UP + end])}, file, metadata=metadata)

    def found(kernels: str) -> torch.Tensor | str:
        try:
            with stream(folder, max_context=64, kernels=kernels) as model:
                return logits(model, prompts(1, 5))
        except CheckpointError as error:
            return str(error)

    exact, fast = found("exact"), found("fast")
    if isinstance(exact, str) or isinstance(fast, str):
        assert exact == fast
    else:
        assert close(fast, exact)


@pytest.mark.parametrize("name", ["Float8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_objects_that_no_kernel_takes_compute_themselves(tmp_path: Path, name: str) -> None:
    pytest.importorskip("torchao")
    write_torchao(tmp_path, name)
    with stream(tmp_path, max_context=64) as model:
        expected = logits(model, prompts(1, 5))
    with stream(tmp_path, **FAST) as model:
        assert close(logits(model, prompts(1, 5)), expected)


@pytest.mark.parametrize("kernels", ["exact", "fast"])
def test_a_model_works_on_after_an_interrupt(packed: Packed, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the threads beside it were writing."""
    monkeypatch.setattr(team, "MIN_SHARE", 1)
    ids = prompts(1, 3)
    with torch.no_grad(), stream(packed("int4"), max_context=64, kernels=kernels) as model:
        expected = logits(model, ids)
        interrupts = Interrupts(lambda: logits(model, ids), 60)
        num_interrupted = 0
        for place, count in interrupts.places:
            num_interrupted += interrupts.at(place, count)
            torch.set_grad_enabled(False)  # torch's own `with` may have been interrupted
            assert torch.equal(logits(model, ids), expected), place
        assert num_interrupted > len(interrupts.places) / 2, "the case is not what it is meant to be"


ASKED: dict[str, tuple[str, Callable[[PackedLinear], Any]]] = {
    "whole numbers": ("torch.int64", lambda module: module(torch.ones(1, 256, dtype=torch.long))),
    "a trace": ("a trace", lambda module: torch.jit.trace(module, torch.ones(1, 256, dtype=BF16))),
    "vmap": ("a transform", lambda module: torch.func.vmap(module)(torch.ones(3, 1, 256, dtype=BF16))),
    "a gradient": ("one is asked for", lambda module: module(torch.ones(1, 256, dtype=BF16, requires_grad=True))),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_kernels_cannot_do_is_refused(packed: Packed, name: str) -> None:
    said, ask = ASKED[name]
    with stream(packed("int8"), **FAST, max_memory="1GiB") as model:
        model(**prompts(1, 2))
        with pytest.raises(UnsupportedError, match=rf'kernels="fast" .*{said}'):
            ask(model.model.layers[1].mlp.up_proj)


def test_another_weight_is_not_ignored(packed: Packed) -> None:
    with stream(packed("int8"), **FAST, max_memory="1GiB") as model:
        model(**prompts(1, 2))
        module = model.model.layers[1].mlp.up_proj
        with pytest.raises(UnsupportedError, match=r"another weight|cannot be"):  # noqa: PT012 - either may notice
            module.weight = torch.nn.Parameter(torch.zeros(384, 256, dtype=BF16))
            model(**prompts(1, 2))


@pytest.mark.parametrize("shape", [(384, 256), (3, 256), (384, 255), (3,)], ids=str)
def test_another_weight_for_one_call_is_refused_and_leaves_the_module_as_it_was(
    packed: Packed, shape: tuple[int, ...]
) -> None:
    """Silently ignored, as it was, it left a module that refused every later call."""
    with stream(packed("int8"), **FAST, max_memory="1GiB") as model:
        expected = logits(model, prompts(1, 2))
        module = model.model.layers[1].mlp.up_proj
        other = {"weight": torch.ones(shape, dtype=BF16)}
        with pytest.raises(UnsupportedError, match=rf"up_proj.*another weight {re.escape(str(list(shape)))}.*kernels="):
            torch.func.functional_call(module, other, (torch.ones(1, 256, dtype=BF16),))
        assert torch.equal(logits(model, prompts(1, 2)), expected)


@pytest.mark.parametrize("shape", [(3, 256), (384, 256), (384, 64), (3,)], ids=str)
def test_another_dense_weight_for_one_call_is_what_torch_takes_it_for(shape: tuple[int, ...]) -> None:
    module, given = PackedLinear(256, 384, bias=False, dtype=BF16), torch.ones(1, 256, dtype=BF16)
    other = {"weight": torch.ones(shape, dtype=BF16)}

    def call(called: torch.nn.Module) -> torch.Tensor | str:
        try:
            with torch.no_grad():
                return torch.func.functional_call(called, other, (given,))
        except RuntimeError as error:
            return str(error)

    found, expected = call(module), call(torch.nn.Linear(256, 384, bias=False, dtype=BF16))
    if isinstance(expected, str):
        assert found == expected
    else:
        assert isinstance(found, torch.Tensor)
        assert close(found, expected)


def test_vectors_of_another_width_are_refused(packed: Packed) -> None:
    with stream(packed("int8"), **FAST, max_memory="1GiB") as model:
        model(**prompts(1, 2))
        for shape in ((1, 255), (2, 128), ()):
            with pytest.raises(UnsupportedError, match=r"cannot be multiplied with .*up_proj.* \[384, 256\].* be 256"):
                model.model.layers[1].mlp.up_proj(torch.ones(shape, dtype=BF16))


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "a slice": lambda weight: weight[:2],
    "a copy": lambda weight: weight.clone(),
    "in another dtype": lambda weight: weight.float(),
    "a product": lambda weight: weight * 2,
    "a list": lambda weight: weight.tolist(),
    "its memory": lambda weight: weight.untyped_storage(),
}


@pytest.mark.parametrize("codec", ["lossless", "int4", "int8", "nf4"])
@pytest.mark.parametrize("name", READS)
def test_what_gives_the_values_of_a_packed_weight_is_said(packed: Packed, codec: str, name: str) -> None:
    """It is what does give them: a copy without `kernels=`, but where that is refused, too."""
    key = "model.layers.0.mlp.up_proj.weight"
    with stream(packed(codec), **FAST) as model, pytest.raises(UnsupportedError) as raised:
        READS[name](model.get_submodule(key.removesuffix(".weight")).weight)
    is_object = codec in ("int8", "nf4")
    assert ("safetensors.safe_open reads the packed ones" in str(raised.value)) is is_object
    assert ("without kernels=: there weight.clone() reads" in str(raised.value)) is not is_object
    with stream(packed(codec), max_context=64) as model:
        weight = model.get_submodule(key.removesuffix(".weight")).weight
        if not is_object:
            assert weight.clone().shape == (384, 256)
            return
        with pytest.raises(UnsupportedError) as raised:
            READS[name](weight)
        assert "clone()" not in str(raised.value), "which is refused as well"
        assert "safe_open" in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, BF16])
def test_autocast_means_what_it_means_elsewhere(packed: Packed, dtype: torch.dtype) -> None:
    with stream(packed("int4"), max_context=64) as model, torch.autocast("cpu", dtype):
        expected = model(**prompts(1, 5)).logits
    with stream(packed("int4"), **FAST) as model, torch.autocast("cpu", dtype):
        found = model(**prompts(1, 5)).logits
    assert found.dtype == expected.dtype
    assert close(found, expected)


def test_float64_is_refused(packed: Packed) -> None:
    with pytest.raises(UnsupportedError, match="dtype=float64 asks for more"):
        stream(packed("plain"), **FAST, dtype=torch.float64)


def test_a_damaged_block_is_named(packed: Packed, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(packed("lossless"), folder)
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = open_checkpoint(folder)[name]
    with Path(tensor.file).open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff" * 4096)
    said = r"safetensors: tensor .*up_proj.* is damaged.* anew"
    with stream(folder, **FAST) as model, pytest.raises(CheckpointError, match=said):
        model(**prompts(1, 2))
