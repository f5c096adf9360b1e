"""Checkpoints that are quantised when they are written anew: as the libraries write them, and streamed to the bit."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, TorchAoConfig
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

import airstream
from airstream import ArgumentError, UnsupportedError
from airstream.cli import main
from airstream.repacking import repack as repack_module
from airstream.repacking import ways
from airstream.repacking import write_quantised as write_module
from airstream.repacking.manifest import read_manifest
from tests.checkpoint.test_pickles import weights_of
from tests.compat.test_quantising import packages
from tests.conftest import WriteTiny, stream
from tests.repacking.test_repack import equal, state_of
from tests.stand_ins.comparing import BF16, FP16, FP32, assert_equal
from tests.stand_ins.quantized_models import LARGE
from tests.stand_ins.tiny_models import TINY, TinyModel, tiny_tokenizer, write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # what transformers and the formats' packages warn of is theirs
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2}
"""Wide enough for every format: two blocks of FP8 at least, groups of 128 columns; a weight is several strips."""

WIDER: Mapping[str, Mapping[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 128, "head_dim": 64},
    "deepseek_v3": {"moe_intermediate_size": 128},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
}
BY_CODEC = pytest.mark.parametrize("codec", ["nf4", "int8", "fp8", "int4"])


@pytest.fixture
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`wide(name, dtype, **fields)`: a checkpoint of that architecture, wide enough for every format."""

    def folder_of(name: str, dtype: torch.dtype, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        entry = TINY[name]
        write_model(
            TinyModel(entry.model_type, {**entry.fields, **WIDE, **WIDER.get(name, {}), **fields}), folder, dtype
        )
        tiny_tokenizer().save_pretrained(folder)
        return folder

    return folder_of


@pytest.fixture(autouse=True)
def in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several strips of every weight, though these are small."""
    monkeypatch.setattr(write_module, "STRIP_BYTES", 1)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


# ------------------------------------------------------------------------------------------- what the libraries write


def _by_transformers(config: Callable[[torch.dtype], Any]) -> Callable[[Path, Path, torch.dtype], None]:
    def write(source: Path, out: Path, dtype: torch.dtype) -> None:
        settings = config(dtype)
        AutoModelForCausalLM.from_pretrained(source, quantization_config=settings).save_pretrained(out)

    return write


def _nf4(dtype: torch.dtype) -> Any:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _int8(_: torch.dtype) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _by_compressed_tensors(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Rounded to nearest, in groups of 128: the package is told the scales, and does the rest with the model."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import save_file

    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights}
    settings = {"config_groups": {"group_0": group}, "ignore": ["lm_head"], "format": "pack-quantized"}
    model = AutoModelForCausalLM.from_pretrained(source)
    apply_quantization_config(model, QuantizationConfig(**settings, quantization_status="frozen"))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            groups = module.weight.view(module.weight.shape[0], -1, 128)
            module.weight_scale.data = groups.abs().amax(-1) / 7.5  # -8 to 7
    config = QuantizationConfig(**settings, quantization_status="compressed")
    ModelCompressor(quantization_config=config).compress_model(model)
    out.mkdir()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({"quantization_config": json.loads(config.model_dump_json())}))


REFERENCES: Mapping[str, Callable[[Path, Path, torch.dtype], None]] = {
    "nf4": _by_transformers(_nf4),
    "int8": _by_transformers(_int8),
    "fp8": _by_transformers(lambda _: FineGrainedFP8Config()),
    "int4": _by_compressed_tensors,
}
"""By codec, what writes a quantised checkpoint of the whole model in memory."""

CASES = [
    *((codec, "llama", dtype) for codec in REFERENCES for dtype in (BF16, FP16, FP32)),
    *((codec, "qwen2", BF16) for codec in REFERENCES),
    ("fp8", "mixtral", BF16),
    ("fp8", "qwen3_moe", BF16),
]


@pytest.mark.parametrize(("codec", "name", "dtype"), CASES)
def test_it_is_what_the_library_writes(
    wide: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    codec: str,
    name: str,
    dtype: torch.dtype,
) -> None:
    """Every tensor, to the byte; and what config.json and the headers say."""
    packages(codec)
    source, out, reference = wide(name, dtype), tmp_path / "out", tmp_path / "reference"
    airstream.repack(source, out, codec=codec, progress=False)
    with monkeypatch.context() as patch:  # it refuses to quantise on a CPU, which its operations can
        patch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)
        REFERENCES[codec](source, reference, dtype)
    made, expected = weights_of(out), _apart(load_file(reference / "model.safetensors"))
    assert made.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (made[key].dtype, made[key].shape) == (tensor.dtype, tensor.shape), key
        own, others = (each.contiguous().flatten().view(torch.uint8) for each in (made[key], tensor))
        assert torch.equal(own, others), key
    assert config_of(out)["quantization_config"] == config_of(reference)["quantization_config"]
    _assert_headers_say(out, reference)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the scales of each expert under its own name: transformers writes them as they are in the model."""
    names = ("w1", "w3", "w2") if any("block_sparse_moe" in key for key in tensors) else ("gate", "up", "down")
    gate, up, down = (name if name[0] == "w" else f"{name}_proj" for name in names)
    apart = dict[str, torch.Tensor]()
    for key, tensor in tensors.items():
        stem, _, end = key.rpartition(".")
        if end == "gate_up_proj_scale_inv":
            halves = {gate: tensor.chunk(2, 1)[0], up: tensor.chunk(2, 1)[1]}
        elif end == "down_proj_scale_inv":
            halves = {down: tensor}
        else:
            apart[key] = tensor
            continue
        for name, scales in halves.items():
            apart |= {f"{stem}.{n}.{name}.weight_scale_inv": each for n, each in enumerate(scales)}
    return apart


def _assert_headers_say(out: Path, reference: Path) -> None:
    """Every file of `out` says of its packed weights what the one of `reference` does."""
    with safe_open(reference / "model.safetensors", "pt") as file:
        expected = {key: said for key, said in file.metadata().items() if '"_type": "Tensor"' not in said}
    expected.pop("tensor_names", None)
    files = list(out.glob("*.safetensors"))
    assert files
    for each in files:
        with safe_open(each, "pt") as file:
            said = file.metadata()
        names = json.loads(said.pop("tensor_names", "[]"))
        assert sorted(names) == sorted(key for key in said if key != "format")
        assert said == expected


@pytest.mark.parametrize(
    ("codec", "name", "dtype"),
    [*CASES, ("fp8", "deepseek_v3", BF16), *((codec, "llama-tied", BF16) for codec in REFERENCES)],
)
def test_streamed_as_transformers_loads_it(
    wide: Callable[..., Path], tmp_path: Path, codec: str, name: str, dtype: torch.dtype
) -> None:
    packages(codec)
    source, out = wide(name, dtype), tmp_path / "out"
    before = state_of(source)
    assert airstream.repack(source, out, codec=codec, progress=False) == out
    assert state_of(source) == before
    assert sum(each.stat().st_size for each in out.glob("*.safetensors")) < sum(
        each.stat().st_size for each in source.glob("*.safetensors")
    )
    dense = [key for key in weights_of(source) if not key.endswith("proj.weight") and ".experts." not in key]
    assert len(dense) > 4
    kept, original = weights_of(out), weights_of(source)
    assert all(torch.equal(kept[key], original[key]) for key in dense), "all but linear weights keep their bytes"
    with stream(out) as model:
        assert not model.plan.batches[0].resident
        assert_equal(model, AutoModelForCausalLM.from_pretrained(out).eval())
    assert airstream.verify(out, deep=True, progress=False).faults == ()
    assert read_manifest(out)["codec"] == codec  # type: ignore[index]


# --------------------------------------------------------------------------------------------------- what is left out


def test_what_a_format_has_no_place_for_stays(wide: Callable[..., Path], tmp_path: Path) -> None:
    """Keys and values of one head have 64 rows, half a block."""
    source = wide("llama", BF16, num_key_value_heads=1)
    out = airstream.repack(source, tmp_path / "out", codec="fp8", progress=False)
    types = {key: tensor.dtype for key, tensor in weights_of(out).items() if key.endswith("_proj.weight")}
    assert {key.split(".")[-2] for key, dtype in types.items() if dtype == BF16} == {"k_proj", "v_proj"}
    skipped = config_of(out)["quantization_config"]["modules_to_not_convert"]
    assert skipped == sorted(["lm_head", *(f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "kv")])
    with stream(out) as model:
        assert_equal(model, AutoModelForCausalLM.from_pretrained(out).eval())


@pytest.mark.parametrize(
    ("name", "codec", "said"),
    [
        ("mixtral", "nf4", r"experts of MixtralForCausalLM.* one format only, 'fp8'"),
        ("mixtral", "int4", r"experts of MixtralForCausalLM.* one format only, 'fp8'"),
        ("gpt_oss", "fp8", r"tensor '.*experts.*' \[4, 384, 256\] cannot be quantised .*all experts are one tensor"),
        ("gpt2", "nf4", r"nn\.Linear.* no layer of GPT2LMHeadModel has one"),
    ],
)
def test_what_cannot_be_quantised(wide: Callable[..., Path], tmp_path: Path, name: str, codec: str, said: str) -> None:
    packages(codec)
    with pytest.raises(UnsupportedError, match=said):
        airstream.repack(wide(name, BF16), tmp_path / "out", codec=codec, progress=False)
    assert not list(tmp_path.iterdir())


def test_too_narrow_for_any_block(tiny: WriteTiny, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"takes weights .* 128 rows and of 128 columns, and no layer of Llama"):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", codec="fp8", progress=False)


def test_quantised_already(wide: Callable[..., Path], tmp_path: Path) -> None:
    packed = airstream.repack(wide("llama", BF16), tmp_path / "packed", codec="fp8", progress=False)
    with pytest.raises(UnsupportedError, match=r"packed is quantised already \(fp8\), so codec='fp8' .*: name"):
        airstream.repack(packed, tmp_path / "out", codec="fp8", progress=False)
    again = airstream.repack(packed, tmp_path / "again", progress=False)
    assert equal(weights_of(again), weights_of(packed)), "without a codec it is a checkpoint like any other"


def test_a_codec_that_is_not_there(tiny: WriteTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny("llama", BF16)
    with pytest.raises(ArgumentError, match=r"codec='int-8' is not a codec: did you mean 'int8'\?"):
        airstream.repack(source, tmp_path / "out", codec="int-8", progress=False)
    with pytest.raises(SystemExit) as stopped:
        main(["repack", str(source), str(tmp_path / "out"), "--codec", "int-8"])
    assert stopped.value.code == 2
    assert "--codec: 'int-8' is not a codec: did you mean 'int8'?" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------- dtypes and parts


@BY_CODEC
@pytest.mark.parametrize("said", ["bfloat16", None])
def test_the_dtype_that_the_config_says(
    wide: Callable[..., Path], tmp_path: Path, codec: str, said: str | None
) -> None:
    """Weights are stored in float16: all are cast before, as when the checkpoint is loaded; or it is said."""
    packages(codec)
    source, same = wide("llama", FP16), tmp_path / "same"
    (source / "config.json").write_text(json.dumps({**config_of(source), "dtype": said}))
    out = airstream.repack(source, tmp_path / "out", codec=codec, progress=False)
    assert config_of(out)["dtype"] == (said or "float16")
    AutoModelForCausalLM.from_pretrained(source, dtype=said or "float16").save_pretrained(same)
    expected = airstream.repack(same, tmp_path / "expected", codec=codec, progress=False)
    assert equal(weights_of(out), weights_of(expected))
    resident = AutoModelForCausalLM.from_pretrained(out).eval()
    assert resident.dtype == (BF16 if said else FP16)
    with stream(out) as model:
        assert_equal(model, resident)


@BY_CODEC
def test_some_layers(wide: Callable[..., Path], tmp_path: Path, codec: str) -> None:
    packages(codec)
    source = wide("llama", BF16)
    whole = weights_of(airstream.repack(source, tmp_path / "whole", codec=codec, progress=False))
    part = weights_of(airstream.repack(source, tmp_path / "part", codec=codec, layers="1:2", progress=False))
    expected = {key: tensor for key, tensor in whole.items() if ".layers.0." not in key and "embed" not in key}
    assert equal(part, expected)


# ------------------------------------------------------------------------------------------------ killed, and in memory


@BY_CODEC
def test_it_goes_on_where_it_was(
    wide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    packages(codec)
    source, out = wide("llama", BF16, num_hidden_layers=4), tmp_path / "out"
    expected = state_of(airstream.repack(source, tmp_path / "whole", codec=codec, progress=False))
    real, written = write_module._write, []

    def killed(*arguments: Any) -> None:
        written.append(arguments)
        if len(written) > 60:
            raise KeyboardInterrupt
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(write_module, "_write", killed)
        with pytest.raises(KeyboardInterrupt):
            airstream.repack(source, out, codec=codec, progress=False)
    assert not out.exists()
    finished = list((tmp_path / ".out-repacking").glob("*.safetensors"))
    assert 0 < len(finished) < len([name for name in expected if name.endswith(".safetensors")])
    airstream.repack(source, out, codec=codec, progress=False)
    assert {name: data for name, (_, data) in state_of(out).items()} == {n: data for n, (_, data) in expected.items()}


def test_another_codec_takes_nothing_over(
    wide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages("nf4")
    source, out = wide("llama", BF16), tmp_path / "out"
    expected = state_of(airstream.repack(source, tmp_path / "whole", codec="fp8", progress=False))
    real, work = ways.write_quantised, tmp_path / ".out-repacking"

    def write(file: Path, *others: Any, **more: Any) -> str:
        if list(work.glob("*.safetensors")):
            raise KeyboardInterrupt
        return real(file, *others, **more)

    with monkeypatch.context() as patch:
        patch.setattr(ways, "write_quantised", write)
        with pytest.raises(KeyboardInterrupt):
            airstream.repack(source, out, codec="nf4", progress=False)
    assert len(list(work.glob("*.safetensors"))) == 1
    report = repack_module.repack_and_report(source, out, codec="fp8", progress=False)
    assert report.kept_files == 0
    assert {name: data for name, (_, data) in state_of(out).items()} == {n: data for n, (_, data) in expected.items()}


def test_only_what_is_missing_is_made(
    wide: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = wide("llama", BF16, num_hidden_layers=4), tmp_path / "out"
    real, begun = ways.write_quantised, list[str]()

    def write(file: Path, *others: Any, **more: Any) -> str:
        begun.append(file.name)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return real(file, *others, **more)

    monkeypatch.setattr(ways, "write_quantised", write)
    with pytest.raises(KeyboardInterrupt):
        airstream.repack(source, out, codec="fp8", progress=False)
    report = repack_module.repack_and_report(source, out, codec="fp8", progress=False)
    assert report.kept_files == 2
    assert len(begun) == len(set(begun)) + 1 == report.num_files + 1
    assert repack_module.repack_and_report(source, out, codec="fp8", progress=False).is_old
    with pytest.raises(ArgumentError, match=r"the same checkpoint with codec='fp8', not with no codec"):
        airstream.repack(source, out, progress=False)


MEASURE = """
import sys, psutil, torch
import airstream

def peak():
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return int(fields["VmHWM"].split()[0]) << 10

torch.set_num_threads(2)
small, large, out, codec = sys.argv[1:]
airstream.repack(small, out + "-small", codec=codec, progress=False)  # imports what it takes
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
before = psutil.Process().memory_info().rss
airstream.repack(large, out, codec=codec, progress=False)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
@BY_CODEC
def test_a_few_rows_are_in_memory(wide: Callable[..., Path], tmp_path: Path, codec: str) -> None:
    """Layers have 32 MiB: less than one is taken, of that most by a strip of 1 MiB and what quantising makes of it."""
    packages(codec)
    large = tmp_path / "large"
    write_model(TinyModel("llama", {**LARGE.fields, "num_hidden_layers": 3}), large, BF16)
    arguments = [str(wide("llama", BF16)), str(large), str(tmp_path / "out"), codec]
    result = subprocess.run([sys.executable, "-c", MEASURE, *arguments], capture_output=True, text=True, check=True)
    assert int(result.stdout.splitlines()[-1]) < 32 << 20


def test_the_packages_of_formats_say_nothing_of_their_own(tiny: WriteTiny, tmp_path: Path) -> None:
    """Such as which kernels could not be downloaded: whether repacked or loaded."""
    packages("nf4")
    source, made = tiny("llama", BF16), tmp_path / "made"
    code = (
        "import sys, airstream\n"
        "if sys.argv[2:]: airstream.repack(sys.argv[1], sys.argv[2], codec='nf4', progress=False)\n"
        "else: airstream.AutoModel.from_pretrained(sys.argv[1], device='cpu', progress=False).close()"
    )
    for words in ([source, made], [made]):
        run = subprocess.run([sys.executable, "-W", "ignore", "-c", code, *words], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "")


@BY_CODEC
def test_a_state_dict_after_a_pass_is_the_checkpoints(wide: Callable[..., Path], tmp_path: Path, codec: str) -> None:
    """Also where bitsandbytes has packed a weight that stays in memory otherwise, for the CPU: it puts back a part."""
    airstream.repack(wide("llama", BF16), tmp_path / "out", codec=codec, progress=False)
    ids = torch.tensor([[3, 4, 5, 6]])
    with stream(tmp_path / "out", max_memory="1GiB") as model:
        before = model(ids).logits
        taken = {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        assert torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    files = (tmp_path / "out").glob("*.safetensors")
    stored = {name: value for file in files for name, value in load_file(file).items()}
    if codec == "nf4":  # the others are made dense, or have names of their own
        packed = [name for name in stored if ".layers." in name and "quant" not in name]
        assert packed
        assert all(torch.equal(taken[name], stored[name]) for name in packed)
