"""Checkpoints packed without loss: every bit comes back, by every way, and what is damaged is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import airstream
from airstream import ArgumentError, CheckpointError
from airstream.checkpoint.packed_tensors import KEY
from airstream.checkpoint.safetensors import open_safetensors
from airstream.cli import main
from airstream.repacking.manifest import MANIFEST, read_manifest
from tests.conftest import Resident, WriteTiny, simulated_accelerator, stream
from tests.stand_ins.comparing import BF16, FP32, assert_equal, greedy, logits, prompts

NAMES = (
    "llama-sharded", "llama-tied", "gemma3", "phi3", "gpt2", "falcon", "bloom", "opt", "qwen3_moe", "mixtral",
    "deepseek_v3", "gpt_oss",
)  # fmt: skip
"""Tied, merged, split, transposed and interleaved weights, and such with biases."""


@pytest.fixture(scope="module")
def packed(tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`packed(name)`: the tiny checkpoint in bfloat16, packed without loss, made when first asked for."""
    root = tmp_path_factory.mktemp("packed")

    def folder_of(name: str) -> Path:
        out = root / name
        return out if out.exists() else airstream.repack(tiny(name, BF16), out, codec="lossless", progress=False)

    return folder_of


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


# ----------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_the_original_to_the_bit(packed: Callable[[str], Path], resident: Resident, name: str) -> None:
    reference = resident(name, BF16, BF16)
    with stream(packed(name)) as model:
        assert_equal(model, reference)
    with stream(packed(name), max_memory="4GiB") as model:  # all of it stays
        assert_equal(model, reference)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_in_another_dtype(packed: Callable[[str], Path], resident: Resident, name: str) -> None:
    with stream(packed(name), dtype=FP32) as model:
        assert_equal(model, resident(name, BF16, FP32))


@pytest.mark.parametrize("name", ["llama-sharded", "qwen3_moe", "gpt2"])
@pytest.mark.parametrize("hosted", ["0", "4GiB"])
def test_on_an_accelerator(packed: Callable[[str], Path], tiny: WriteTiny, name: str, hosted: str) -> None:
    options: dict[str, Any] = {} if hosted == "0" else {"max_memory": {0: "4GiB", "cpu": hosted}}
    with simulated_accelerator() as sim:
        with stream(packed(name), "sim:0", **options) as model, stream(tiny(name, BF16), "sim:0", **options) as plain:
            ids = prompts(2, 9)
            assert torch.equal(logits(model, ids), logits(plain, ids))
            assert torch.equal(greedy(model, ids), greedy(plain, ids))
        assert sim.races == []


def test_fewer_bytes_are_read(packed: Callable[[str], Path], tiny: WriteTiny) -> None:
    with stream(packed("llama")) as model, stream(tiny("llama", BF16)) as plain:
        sizes = [sum(batch.read_bytes for batch in each.plan.batches) for each in (model, plain)]
    assert 0.7 < sizes[0] / sizes[1] < 0.85


@pytest.mark.parametrize("name", ["llama-sharded", "gpt_oss"])
def test_unpacked_again_it_is_the_original(
    packed: Callable[[str], Path], tiny: WriteTiny, tmp_path: Path, name: str
) -> None:
    out = airstream.repack(packed(name), tmp_path / "out", progress=False)
    original, again = weights_of(tiny(name, BF16)), weights_of(out)
    assert original.keys() == again.keys()
    assert all(torch.equal(original[key].view(torch.int8), again[key].view(torch.int8)) for key in original)
    assert all(KEY not in metadata_of(file) for file in out.glob("*.safetensors"))


def test_packed_once_more_nothing_changes(packed: Callable[[str], Path], tmp_path: Path) -> None:
    out = airstream.repack(packed("llama"), tmp_path / "out", codec="lossless", progress=False)
    before, after = open_safetensors(packed("llama")), open_safetensors(out)
    alike = [replace(tensor, file=out, offset=0) for index in (before, after) for tensor in index.values()]
    assert alike[: len(before)] == alike[len(before) :]
    first, second = weights_of(packed("llama")), weights_of(out)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_does_not_become_smaller_stays_plain(tiny: WriteTiny, tmp_path: Path) -> None:
    out = airstream.repack(tiny("llama", FP32), tmp_path / "out", codec="lossless", progress=False)
    index = open_safetensors(out)
    assert all(tensor.block is None for tensor in index.values())
    original = weights_of(tiny("llama", FP32))
    assert all(torch.equal(tensor, original[name]) for name, tensor in weights_of(out).items())


def test_large_matrices_are_packed_and_vectors_are_not(packed: Callable[[str], Path]) -> None:
    blocks = {name: tensor.block for name, tensor in open_safetensors(packed("llama")).items()}
    assert {name for name, block in blocks.items() if block is None} == {name for name in blocks if "norm" in name}
    assert len(blocks) > 20


def test_the_manifest_has_the_codec(packed: Callable[[str], Path], tiny: WriteTiny) -> None:
    manifest = read_manifest(packed("llama"))
    assert manifest is not None
    assert manifest["codec"] == "lossless"
    airstream.repack(tiny("llama", BF16), packed("llama"), codec="lossless", progress=False)  # it is there already
    with pytest.raises(ArgumentError, match="the same checkpoint with codec='lossless', not with no codec"):
        airstream.repack(tiny("llama", BF16), packed("llama"), progress=False)


@pytest.mark.parametrize("codec", ["loseless", "zip", "", 4])
def test_a_codec_that_is_not_there(tiny: WriteTiny, tmp_path: Path, codec: Any) -> None:
    with pytest.raises(ArgumentError, match=r"codec=.* is not a codec: .*[Tt]here is 'lossless'"):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", codec=codec, progress=False)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- what begins where no number may


def shifted(folder: Path, copy: Path, by: int) -> Path:
    """A copy of `folder` in which every tensor begins `by` bytes later: the header ends with spaces, as it may."""
    shutil.copytree(folder, copy)
    for file in copy.glob("*.safetensors"):
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        file.write_bytes((end - 8 + by).to_bytes(8, "little") + raw[8:end] + b" " * by + raw[end:])
    return copy


def with_lines(folder: Path, copy: Path, line: int) -> Path:
    """A copy of packed `folder` that says of all tensors that they began at byte `line` of a cache line."""
    shutil.copytree(folder, copy)
    (copy / MANIFEST).unlink()
    for file in copy.glob("*.safetensors"):
        raw = file.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8:end])
        entries = json.loads(header["__metadata__"][KEY])
        header["__metadata__"][KEY] = json.dumps({name: {**said, "line": line} for name, said in entries.items()})
        text = json.dumps(header, separators=(",", ":")).encode().ljust(end - 8)
        assert len(text) == end - 8
        file.write_bytes(raw[:8] + text + raw[end:])
    return copy


@pytest.mark.parametrize(("name", "by"), [("llama-sharded", 1), ("gpt2", 3), ("qwen3_moe", 5)])
def test_a_checkpoint_whose_numbers_begin_at_odd_offsets(tiny: WriteTiny, tmp_path: Path, name: str, by: int) -> None:
    folder = shifted(tiny(name, BF16), tmp_path / "shifted", by)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    made = airstream.repack(folder, tmp_path / "out", codec="lossless", progress=False)
    assert not any((tensor.resident_offset or 0) % 2 for tensor in open_safetensors(made).values())
    again = shifted(made, tmp_path / "again", by)
    for each in (folder, made, again):
        with stream(each) as model:
            assert_equal(model, reference)


@pytest.mark.parametrize("budget", [{}, {"max_memory": "4GiB"}], ids=["streamed", "resident"])
@pytest.mark.parametrize(("name", "line"), [("llama", 53), ("qwen3_moe", 1)])
def test_a_line_where_no_number_may_begin_counts_as_none(
    packed: Callable[[str], Path], tmp_path: Path, name: str, line: int, budget: dict[str, Any]
) -> None:
    """Such are in what was packed from checkpoints whose numbers begin at odd offsets, and are computed like these."""
    odd, none = (with_lines(packed(name), tmp_path / f"line{each}", each) for each in (line, 0))
    ids = prompts(2, 9)
    with stream(odd, **budget) as model, stream(none, **budget) as plain:
        assert torch.equal(logits(model, ids), logits(plain, ids))
    assert airstream.verify(odd, progress=False).faults == ()


# ------------------------------------------------------------------------------------------------------ what is damaged


def with_flipped_bit(folder: Path, copy: Path, name: str, at: float) -> Path:
    """A copy of `folder` in which one bit of tensor `name` is another one, and without a manifest to notice it by."""
    shutil.copytree(folder, copy)
    (copy / MANIFEST).unlink()
    tensor = open_safetensors(copy)[name]
    data = bytearray(tensor.file.read_bytes())
    data[tensor.offset + int(at * tensor.nbytes)] ^= 4
    tensor.file.write_bytes(data)
    return copy


@pytest.mark.parametrize("at", [0.0, 0.3, 0.5, 0.7])
def test_a_flipped_bit_is_found(packed: Callable[[str], Path], tmp_path: Path, at: float) -> None:
    name = "model.layers.2.mlp.down_proj.weight"
    damaged = with_flipped_bit(packed("llama"), tmp_path / "damaged", name, at)
    report = airstream.verify(damaged, progress=False)
    (fault,) = report.faults
    assert f"tensor {name!r}, 1 block of " in fault


def test_what_the_disk_gives_back_otherwise_is_found_at_once(
    tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from airstream.repacking import packer

    real = packer.encode

    def wrong(numbers: torch.Tensor, block: Any, bases: Any) -> torch.Tensor:
        raw = real(numbers, block, bases)
        raw[-1 - raw.numel() // 2] ^= 1
        return raw

    monkeypatch.setattr(packer, "encode", wrong)
    with pytest.raises(airstream.ReadError, match="though it was just written"):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", codec="lossless", progress=False)
    assert not (tmp_path / "out").exists()


def entry(
    codec: str = "bf16x12", shape: Any = (8, 64), elements: Any = 64, line: Any = 0, **more: Any
) -> Mapping[str, Any]:
    return {
        "codec": codec,
        "shape": list(shape) if isinstance(shape, tuple) else shape,
        "elements": elements,
        "line": line,
        **more,
    }


MALFORMED: Mapping[str, Any] = {
    "not JSON": "{",
    "a list": "[]",
    "nested": "[" * 10_000,
    "no object": {"w": 7},
    "no line": {"w": {"codec": "bf16x12"}},
    "a line that is none": {"w": entry(line=64)},
    "another codec": {"w": entry("bf16x13")},
    "a codec that is a list": {"w": entry([])},  # type: ignore[arg-type]
    "another shape": {"w": entry(shape=(8, 65))},
    "rows that are cut": {"w": entry(shape=(16, 32))},
    "negative": {"w": entry(shape=(-8, -64))},
    "enormous": {"w": entry(shape=(1 << 62, 64))},
    "a shape that is a text": {"w": entry(shape="88")},
    "no numbers in a block": {"w": entry(elements=0)},
    "another number of them": {"w": entry(elements=96)},
    "too many of them": {"w": entry(elements=1 << 20)},
    "a fraction of them": {"w": entry(elements=64.0)},
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_description_that_is_malformed(tmp_path: Path, name: str) -> None:
    said = MALFORMED[name]
    blocks = torch.zeros(8, 8 + 96 + 12, dtype=torch.uint8)
    text = said if isinstance(said, str) else json.dumps(said)
    save_file({"w": blocks}, tmp_path / "model.safetensors", metadata={KEY: text})
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*airstream\.packed"):
        open_safetensors(tmp_path)


def test_the_description_that_these_are_made_of_is_sound(tmp_path: Path) -> None:
    save_file(
        {"w": torch.zeros(8, 116, dtype=torch.uint8)}, tmp_path / "model.safetensors", {KEY: json.dumps({"w": entry()})}
    )
    tensor = open_safetensors(tmp_path)["w"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == ("BF16", (8, 64), 928)


def test_blocks_of_another_type_than_bytes(tmp_path: Path) -> None:
    save_file(
        {"w": torch.zeros(8, 58, dtype=torch.int16)}, tmp_path / "model.safetensors", {KEY: json.dumps({"w": entry()})}
    )
    with pytest.raises(CheckpointError, match="it is stored as I16"):
        open_safetensors(tmp_path)


def test_a_hostile_block_is_one_error(packed: Callable[[str], Path], tmp_path: Path) -> None:
    copy = shutil.copytree(packed("llama"), tmp_path / "hostile")
    index = open_safetensors(copy)
    blocks = ((tensor, tensor.block) for tensor in index.values() if ".layers." in tensor.name and tensor.block)
    tensor, block = next((tensor, block) for tensor, block in blocks if block.name == "bf16x11")
    data = bytearray(tensor.file.read_bytes())
    codes = tensor.offset + 8 + block.elements
    data[codes : tensor.offset + block.nbytes] = b"\xff" * (block.nbytes - 8 - block.elements)
    tensor.file.write_bytes(data)
    with stream(copy) as model, pytest.raises(CheckpointError, match=rf"{tensor.file.name}, of .*block 0 of bf16x11"):
        logits(model, prompts(1, 4))


def test_what_cannot_be_packed_is_told(tiny: WriteTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for dtype, is_told in ((FP32, True), (BF16, False)):
        for _ in range(2):  # made, and there already
            assert main(["repack", str(tiny("llama", dtype)), str(tmp_path / str(dtype)), "--codec", "lossless"]) == 0
            assert ("as they were: only bfloat16" in capsys.readouterr().err) == is_told
