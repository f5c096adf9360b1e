"""Repacked checkpoints: the same tensors, each layer one run of bytes on a page, whole or not there."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import airstream
from airstream import AirstreamError, ArgumentError, CheckpointError, DiskSpaceError
from airstream.checkpoint.safetensors import open_safetensors
from airstream.checkpoint.stored import StoredTensor
from airstream.cli import main
from airstream.layout import shards as plan_module
from airstream.layout.parts import Kind
from airstream.layout.shards import Member, Order, plan_shards
from airstream.layout.slab import pack
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from airstream.repacking import repack as repack_module
from airstream.repacking import ways
from airstream.repacking.files import parse_layers
from airstream.repacking.manifest import JOURNAL, MANIFEST, read_manifest
from airstream.repacking.way import Way
from airstream.reporting import units as units_module
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.packing import packing_of
from tests.checkpoint.test_pickles import Save, resident, save, transposed, weights_of  # noqa: F401 - `save` is a fixture
from tests.conftest import WriteTiny, stream
from tests.stand_ins.comparing import BF16, FP32, assert_equal

LAYER = "model.layers.{}."


def state_of(folder: Path) -> dict[str, Any]:
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.iterdir()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ----------------------------------------------------------------------------------------------------------- the result


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("llama-sharded", BF16), ("llama-tied", FP32), ("mixtral", BF16), ("gpt2", FP32), ("gpt_oss", BF16)],
)
def test_the_same_model(tiny: WriteTiny, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    source, out = tiny(name, dtype), tmp_path / "out"
    before = state_of(source)
    assert airstream.repack(source, out, progress=False) == out
    assert state_of(source) == before, "the original is only read"
    assert equal(weights_of(out), weights_of(source))
    small = [file for file in source.iterdir() if "safetensors" not in file.name]
    assert len(small) > 2
    assert all((out / file.name).read_bytes() == file.read_bytes() for file in small)
    reference = resident(out, dtype)
    loaded, original = reference.state_dict(), resident(source, dtype).state_dict()
    assert all(torch.equal(loaded[key], original[key]) for key in original)
    with stream(out) as model:
        assert_equal(model, reference)
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


@pytest.mark.parametrize("name", ["llama-sharded", "mixtral"])
def test_each_layer_is_one_run_on_a_page(tiny: WriteTiny, tmp_path: Path, name: str) -> None:
    out = airstream.repack(tiny(name, BF16), tmp_path / "out", progress=False)
    index = open_safetensors(out)
    for layer in range(4):
        tensors = sorted((t for t in index.values() if t.name.startswith(LAYER.format(layer))), key=lambda t: t.offset)
        assert len({tensor.file for tensor in tensors}) == 1
        assert tensors[0].offset % PAGE_BYTES == 0
        assert all(one.end == other.offset for one, other in itertools.pairwise(tensors))
        names = [tensor.name.rpartition(".")[0].rpartition(".")[2] for tensor in tensors]
        assert names[0] == "q_proj", "in the order of the model"
        assert names[-1] == "post_attention_layernorm"
    if name == "llama-sharded":
        layers = prepare(out, LoadOptions(device="cpu")).parts.of(Kind.LAYER)
        assert [len(pack(layer.specs, packing_of(torch.device("cpu"))).pieces) for layer in layers] == [1] * 4


def test_pickles_become_safetensors(save: Save, tmp_path: Path) -> None:  # noqa: F811
    folder = save("llama-tied", FP32, lambda w: transposed({**w, "lm_head.weight": w["model.embed_tokens.weight"]}))
    out = airstream.repack(folder, tmp_path / "out", progress=False)
    assert "lm_head.weight" in weights_of(out), "rearranged tensors are not known to be the same"
    reference = resident(out, FP32)
    assert torch.equal(reference.lm_head.weight, resident(folder, FP32).lm_head.weight)
    with stream(out) as model:
        assert_equal(model, reference)


def test_weights_tied_in_one_storage_are_written_once(save: Save, tmp_path: Path) -> None:  # noqa: F811
    folder = save("llama-tied", FP32, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"]})
    out = airstream.repack(folder, tmp_path / "out", progress=False)
    assert "lm_head.weight" not in weights_of(out)
    with stream(out) as model:
        assert_equal(model, resident(folder, FP32))


def test_the_manifest_vouches_for_every_file(tiny: WriteTiny, tmp_path: Path) -> None:
    source = tiny("llama-sharded", BF16)
    out = airstream.repack(source, tmp_path / "out", progress=False)
    manifest = read_manifest(out)
    assert manifest is not None
    assert {file.name for file in out.iterdir()} == {*manifest["files"], MANIFEST}
    for name, entry in manifest["files"].items():
        data = (out / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry["bytes"], entry["sha256"])
    sources = {entry["name"]: entry["bytes"] for entry in manifest["source"]}
    assert sources == {file.name: file.stat().st_size for file in source.glob("*.safetensors")}


def test_what_the_model_does_not_use_is_kept(tiny: WriteTiny, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = shutil.copytree(tiny("llama", BF16), tmp_path / "source")
    extra = weights_of(source) | {"mtp.weight": torch.ones(3)}
    save_file(extra, source / "model.safetensors", {"format": "pt"})
    assert equal(weights_of(airstream.repack(source, tmp_path / "out", progress=False)), extra)
    part = airstream.repack(source, tmp_path / "part", layers="0:4", progress=False)
    assert weights_of(part).keys() == extra.keys() - {"mtp.weight"}


# ---------------------------------------------------------------------------------------------------------- some layers


@pytest.mark.parametrize(
    ("layers", "has_embeddings", "has_head"),
    [
        ("1:3", False, False),
        (":2", True, False),
        ("2:", False, True),
        (range(1, 2), False, False),
        ((0, 4), True, True),
    ],
)
def test_some_layers(tiny: WriteTiny, tmp_path: Path, layers: Any, has_embeddings: bool, has_head: bool) -> None:
    source = tiny("llama", BF16)
    out = airstream.repack(source, tmp_path / "out", layers=layers, progress=False)
    first, end = parse_layers(layers, 4) or (0, 0)
    wanted = {name for name in weights_of(source) if name.startswith(tuple(LAYER.format(n) for n in range(first, end)))}
    wanted |= {"model.embed_tokens.weight"} if has_embeddings else set()
    wanted |= {"model.norm.weight", "lm_head.weight"} if has_head else set()
    assert equal(weights_of(out), {name: tensor for name, tensor in weights_of(source).items() if name in wanted})
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest["layers"] == [first, end]
    with pytest.raises(CheckpointError, match="is a part") if wanted != weights_of(source).keys() else stream(out):
        stream(out)


def test_the_last_layers_bring_what_the_head_is_tied_to(tiny: WriteTiny, tmp_path: Path) -> None:
    out = airstream.repack(tiny("llama-tied", BF16), tmp_path / "out", layers="3:", progress=False)
    assert {name for name in weights_of(out) if "layers" not in name} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


@pytest.mark.parametrize("layers", ["3:2", "2:2", "0:5", "-1:2", "a:b", "5", "", "1:2:3", 7, range(0, 4, 2), (1,)])
def test_layers_that_are_not_there(layers: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r'has layers 0 to 3; "2:4" would be layers 2 to 3, "0:2" would be layers 0 to'
    ):
        parse_layers(layers, 4)


SIZES = st.lists(st.integers(0, 3 * PAGE_BYTES), min_size=1, max_size=4)


@given(layers=st.lists(SIZES, min_size=1, max_size=6), shard_bytes=st.integers(1, 20 * PAGE_BYTES))
def test_any_sizes(layers: list[list[int]], shard_bytes: int) -> None:
    names = [[f"layers.{n}.t{k}" for k in range(len(sizes))] for n, sizes in enumerate(layers)]
    members, offset = [], 0
    for layer, sizes in zip(names, layers, strict=True):
        for name, size in zip(layer, sizes, strict=True):
            members.append(Member(StoredTensor(name, Path("f"), offset, size, "U8", (size,)), name))
            offset += size + 1
    order = Order([n for layer in names for n in layer], [[f"layers.{n}" for n in range(len(layers))]], {})
    shards = plan_shards(reversed(members), order, None, shard_bytes)
    assert sorted(tensor.name for shard in shards for tensor in shard.tensors) == sorted(order.names)
    for shard in shards:
        ends = itertools.accumulate(tensor.nbytes for tensor in shard.tensors)
        starts = {tensor.name: end - tensor.nbytes for tensor, end in zip(shard.tensors, ends, strict=True)}
        held = {tensor.name.split(".")[1] for tensor in shard.tensors}
        assert len(held) == 1 or shard.nbytes <= shard_bytes
        for layer in held:
            own = [place for name, place in starts.items() if name.split(".")[1] == layer]
            assert len(own) == len(layers[int(layer)]), "a layer is in one file"
            assert min(own) % PAGE_BYTES == 0


# ------------------------------------------------------------------------------------------------- what can go wrong


def test_where_it_may_not_write(tiny: WriteTiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny("llama", BF16), tmp_path / "source")
    before = state_of(source)
    (tmp_path / "link").symlink_to(source)
    for out in (source, source / "inside", tmp_path / "link" / "inside", tmp_path / "x" / ".." / "source"):
        with pytest.raises(ArgumentError, match="is inside the checkpoint"):
            airstream.repack(source, out, progress=False)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArgumentError, match="is not empty"):
        airstream.repack(source, tmp_path / "used", progress=False)
    assert (tmp_path / "used" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ArgumentError, match="is a file"):
        airstream.repack(source, tmp_path / "used" / "thesis.txt", progress=False)
    assert state_of(source) == before
    assert {path.name for path in tmp_path.iterdir()} == {"source", "link", "used"}, "no lock is left, either"


NO_TARGETS: dict[str, tuple[Callable[[Path], object], str]] = {
    "loop": (lambda out: out.symlink_to(out.name), "is a link that leads in a circle"),
    "into a loop": (lambda out: (out.with_name("x").symlink_to("x"), out.symlink_to("x")), "leads in a circle"),
    "pipe": (os.mkfifo, "is a pipe"),
    "link to a file": (lambda out: (out.with_name("x").touch(), out.symlink_to("x")), "is a file"),
    "in a file": (lambda out: (out.with_name("x").touch(), out.symlink_to("x/y")), "is in no folder: '.*x' is a file"),
}


@pytest.mark.parametrize("name", NO_TARGETS)
def test_a_target_that_can_be_no_folder_is_refused_before_anything_is_read(tmp_path: Path, name: str) -> None:
    make, said = NO_TARGETS[name]
    make(tmp_path / "out")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ArgumentError, match=f"{re.escape(str(tmp_path / 'out'))} {said}|out is .*{said}"):
        airstream.repack("not/looked/for", tmp_path / "out", progress=False)
    assert {path.name for path in tmp_path.iterdir()} == before
    with pytest.raises(ArgumentError, match="/ is not empty"):
        airstream.repack("not/looked/for", "/", progress=False)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_followed_to_an_empty_folder_or_to_nothing(tiny: WriteTiny, tmp_path: Path, is_there: bool) -> None:
    link, real = tmp_path / "link", tmp_path / "disk" / "real"
    link.symlink_to("disk/real")
    if is_there:
        real.mkdir(parents=True)
    assert airstream.repack(tiny("llama", BF16), link, progress=False) == real
    assert link.is_symlink()
    assert read_manifest(link) is not None
    assert [path.name for path in real.parent.iterdir()] == ["real"]
    report = repack_module.repack_and_report(tiny("llama", BF16), link, progress=False)
    assert report.is_old


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "x" * 239, "x" * 201])
def test_a_name_as_long_as_names_may_be(
    tiny: WriteTiny, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what a run that was stopped has left there is found again."""
    failing_at(4, KeyboardInterrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        airstream.repack(tiny("llama", BF16), tmp_path / name, progress=False)
    begun = failing_at(99, KeyboardInterrupt, monkeypatch)
    airstream.repack(tiny("llama", BF16), tmp_path / name, progress=False)
    assert len(begun) == 2
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(ArgumentError, match="longer than names may be"):
        airstream.repack("not/looked/for", tmp_path / f"{name}{'x' * 60}", progress=False)


def test_a_path_that_has_no_room_for_a_folder_beside_it(tiny: WriteTiny, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["x" * 100] * ((4080 - len(str(tmp_path))) // 101))
    out = deep.with_name("x" * (100 + 4090 - len(str(deep))))
    with pytest.raises(ArgumentError, match=r"cannot be written .*File name too long"):
        airstream.repack(tiny("llama", BF16), out, progress=False)


@pytest.mark.parametrize("codec", [None, "lossless"])
def test_a_part_says_that_it_is_one(tiny: WriteTiny, tmp_path: Path, codec: str | None) -> None:
    for layers in ("1:3", "0:2", "2:"):
        part = airstream.repack(tiny("llama", BF16), tmp_path / layers, layers=layers, codec=codec, progress=False)
        for use in (airstream.AutoModel.plan, airstream.AutoModel.from_pretrained):
            with pytest.raises(CheckpointError, match=r"is a part of a model, its layers \d to \d alone"):
                use(part, device="cpu")
        (part / MANIFEST).write_text("[]")
        with pytest.raises(CheckpointError, match=r"lacks .* Download it again"):
            airstream.AutoModel.plan(part, device="cpu")


def test_an_empty_folder_may_be_there_and_a_second_run_changes_nothing(tiny: WriteTiny, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    airstream.repack(tiny("llama", BF16), out, progress=False)
    before = state_of(out)
    airstream.repack(tiny("llama", BF16), out, progress=False)
    assert state_of(out) == before
    for source, options, said in (
        (tiny("llama", BF16), {"layers": "0:2"}, "same checkpoint with all layers, not with layers 0 to 1: use it"),
        (tiny("llama", BF16), {"shard_size": "1GiB"}, None),
        (tiny("llama", FP32), {}, "is a repack of another checkpoint, or of this one before it was changed: use"),
    ):
        if said is None:
            airstream.repack(source, out, progress=False, **options)  # makes the same files
            continue
        with pytest.raises(ArgumentError, match=said):
            airstream.repack(source, out, progress=False, **options)
    assert state_of(out) == before


def test_files_of_other_sizes_are_told_as_that(
    tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(units_module, "LEAST_SHARD", 1)
    monkeypatch.setattr(plan_module, "PAGE_BYTES", 1)  # so that one file may hold layers of these sizes
    airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    with pytest.raises(
        ArgumentError, match=r"same checkpoint already, in files of other sizes \(shard_size=...\): use"
    ):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", shard_size=1, progress=False)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (1, '1 B, .*name 1.0 MiB at least; did you mean "1GiB"'),
        ("4096", 'did you mean "4096MiB"'),
        ("512KiB", "at least$"),
    ],
)
def test_a_size_of_files_that_none_can_keep_to(tmp_path: Path, size: int | str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        airstream.repack("not/looked/for", tmp_path / "out", shard_size=size)


REFUSALS = [
    (errno.ENOSPC, r"the disk of \S+ is full: repacking needs .* KiB more, .* are free\. Free some"),
    (errno.EDQUOT, r"your quota on the disk of \S+ is used up: .*\. Free some"),
    (errno.EFBIG, r"a file in \S+ may not become so large \(the file system .*\): .*\. Name another disk"),
]


@pytest.mark.parametrize(("code", "said"), REFUSALS, ids=[errno.errorcode[code] for code, _ in REFUSALS])
@pytest.mark.parametrize("number", [0, 1, 3, 9, 30])
def test_a_disk_that_refuses_says_why(tiny: WriteTiny, tmp_path: Path, code: int, said: str, number: int) -> None:
    """And a hidden folder is left only if another run can go on from it."""
    with pytest.MonkeyPatch.context() as patch:
        full_at(number, patch, code)
        with pytest.raises(DiskSpaceError, match=said):
            airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ([".out-repacking"] if list((tmp_path / ".out-repacking").glob("*.safetensors")) else [])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that takes no files")
def test_where_no_file_can_be_made_nobody_else_is_blamed(tiny: WriteTiny) -> None:
    with pytest.raises(ArgumentError, match="/proc/out cannot be written"):
        airstream.repack(tiny("llama", BF16), "/proc/out", progress=False)


LIMITED = """
import resource, sys
from airstream.cli import main

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(["repack", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs `ulimit -f`")
def test_a_limit_of_file_sizes_is_told_before_anything_is_written(tiny: WriteTiny, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tiny("llama", BF16)), str(tmp_path / "out")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert re.search(
        r"repacking writes a file of [0-9.]+ KiB, and this process may write none above 19.5 KiB", run.stderr
    )
    assert "ulimit -f unlimited" in run.stderr
    assert "--shard-size" in run.stderr
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small(tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(DiskSpaceError, match=r"needs [0-9.]+ KiB of disk; 9\.8 KiB are free"):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def failing_at(number: int, error: Callable[[], BaseException], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make the writing of the `number`th file fail; gives the names of those that have been begun."""
    begun: list[str] = []

    def way_of(*asked: Any) -> Way:
        way = ways.way_of(*asked)

        def write(file: Path, *others: Any) -> str:
            begun.append(file.name)
            if len(begun) == number:
                file.with_name(file.name + ".part").write_bytes(b"half")
                raise error()
            return way.write(file, *others)

        return replace(way, write=write)

    monkeypatch.setattr(repack_module, "way_of", way_of)
    return begun


def test_it_goes_on_where_it_was(tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tiny("llama", BF16), tmp_path / "out"
    expected = state_of(airstream.repack(source, tmp_path / "whole", progress=False))
    failing_at(4, KeyboardInterrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        airstream.repack(source, out, progress=False)
    assert not out.exists()
    work = tmp_path / ".out-repacking"
    finished = sorted(work.glob("model-*.safetensors"))
    assert len(finished) == 3
    finished[1].write_bytes(finished[1].read_bytes()[:-1] + b"\xff")  # what a power cut may leave
    begun = failing_at(99, KeyboardInterrupt, monkeypatch)
    report = repack_module.repack_and_report(source, out, progress=False)
    assert begun == [finished[1].name, "model-00004-of-00005.safetensors", "model-00005-of-00005.safetensors"]
    assert report.kept_files == 2
    assert str(report).endswith("; 2 of them a run before had finished")
    assert {name: data for name, (_, data) in state_of(out).items()} == {
        name: data for name, (_, data) in expected.items()
    }
    assert not work.exists()


def test_a_full_disk_keeps_what_is_finished(tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_at(3, lambda: OSError(28, "No space left on device"), monkeypatch)
    with pytest.raises(DiskSpaceError, match=r"is full: repacking needs [0-9.]+ KiB more, .* are free\. .* goes on"):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    begun = failing_at(99, KeyboardInterrupt, monkeypatch)
    airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    assert len(begun) == 3


WRITES: list[tuple[Any, str]] = [
    (Path, "open"), (Path, "mkdir"), (Path, "replace"), (os, "fsync"), (Path, "write_bytes"),
]  # fmt: skip
"""What a disk that is full may refuse."""


def full_at(number: int | None, patch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> list[str]:
    """Make the `number`th call that writes fail; gives those that were made, by name."""
    calls: list[str] = []

    def refusing(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            reads = name == "open" and not {"w", "wb"} & {*arguments[1:], *options.values()}
            if not reads:
                calls.append(name)
                if len(calls) - 1 == number:
                    raise OSError(code, os.strerror(code))
            return real(*arguments, **options)

        return call

    for owner, name in WRITES:
        patch.setattr(owner, name, refusing(getattr(owner, name), name))
    return calls


def test_a_disk_that_is_full_at_any_write(tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error with numbers, whichever call finds it; and the next run goes on."""
    source, prepared = tiny("llama", BF16), []
    real = repack_module.prepare
    monkeypatch.setattr(repack_module, "prepare", lambda *a: prepared[0] if prepared else real(*a))
    prepared.append(repack_module.prepare(source, LoadOptions(device="cpu")))
    with pytest.MonkeyPatch.context() as patch:
        calls = full_at(None, patch)
        expected = state_of(airstream.repack(source, tmp_path / "whole", progress=False))
    assert set(calls) == {name for _, name in WRITES}
    for number in range(len(calls)):
        out = tmp_path / f"out{number}"
        with pytest.MonkeyPatch.context() as patch:
            full_at(number, patch)
            with pytest.raises(DiskSpaceError, match=r"needs [0-9.]+ \w+ more, [0-9.]+ \w+ are free"):
                airstream.repack(source, out, progress=False)
        if number % 10 == 0 or number > len(calls) - 5:
            made = state_of(airstream.repack(source, out, progress=False))
            assert {name: data for name, (_, data) in made.items()} == {n: data for n, (_, data) in expected.items()}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_folder_that_cannot_be_written(tiny: WriteTiny, tmp_path: Path, code: int) -> None:
    source = tiny("llama", BF16)
    for number in (0, 1, 7, 20):
        with pytest.MonkeyPatch.context() as patch:
            full_at(number, patch, code)
            with pytest.raises(ArgumentError, match=rf"out cannot be written .*{os.strerror(code)}"):
                airstream.repack(source, tmp_path / "out", progress=False)


def test_what_another_source_left_is_not_taken_over(
    tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing_at(4, KeyboardInterrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    begun = failing_at(99, KeyboardInterrupt, monkeypatch)
    airstream.repack(tiny("qwen2", BF16), tmp_path / "out", progress=False)
    assert len(begun) == 5
    assert equal(weights_of(tmp_path / "out"), weights_of(tiny("qwen2", BF16)))


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("codec", [None, "lossless"])
def test_a_process_that_is_killed(
    tiny: WriteTiny, tmp_path: Path, codec: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real thing: killed while it writes, run again, equal."""
    source, out = tiny("llama", BF16), tmp_path / "out"
    options: dict[str, Any] = {"codec": codec, "progress": False}
    monkeypatch.setattr(repack_module, "parse_shard_size", lambda _: 1 << 17)  # packed layers do not begin on pages
    code = (
        "import sys, time, airstream; from airstream.repacking import repack as r\n"
        "r.parse_shard_size = lambda _: 1 << 17\n"
        "w = r._Repack._note; r._Repack._note = lambda *a: (w(*a), time.sleep(0.15))\n"
        "airstream.repack(sys.argv[1], sys.argv[2], **eval(sys.argv[3]))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(source), str(out), repr(options)], env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    work = tmp_path / ".out-repacking"
    deadline = time.monotonic() + 60
    while not list(work.glob("model-00002*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert (work / JOURNAL).is_file()
    assert not out.exists()
    airstream.repack(source, out, **options)
    assert state_of(out).keys() == state_of(airstream.repack(source, tmp_path / "whole", **options)).keys()
    assert airstream.verify(out, progress=False).is_sound
    shutil.rmtree(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_at_once(tiny: WriteTiny, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".out-repacking.lock"), pytest.raises(ArgumentError, match="another process"):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)


IN_THE_WAY: dict[str, Callable[[Path, Path], object]] = {
    "is a link": lambda work, other: work.symlink_to(other),
    "is no folder": lambda work, _: work.write_text("kept"),
    "is a folder that no repack has begun": lambda work, other: shutil.copytree(other, work),
    "is a folder with another one in it, 'inner'": lambda work, other: (
        shutil.copytree(other, work / "inner"),
        (work / JOURNAL).write_text("{}"),
    ),
}
"""What somebody may have made of the name under which a repack is under way: beside a folder of theirs."""


def small_files(folder: Path) -> list[tuple[str, str]]:
    """Every file in `folder` but those of `out`, and what is in it."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and folder / "out" not in file.parents]
    return [(str(file), file.read_text()) for file in files]


@pytest.mark.parametrize("said", IN_THE_WAY)
def test_what_no_repack_has_made_is_not_touched(tiny: WriteTiny, tmp_path: Path, said: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter.txt").write_text("kept")
    work = tmp_path / ".out-repacking"
    IN_THE_WAY[said](work, precious)
    before = small_files(tmp_path)
    with pytest.raises(ArgumentError, match=rf"\.out-repacking, .* {said}: remove it, or name another folder"):
        airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    assert small_files(tmp_path) == before
    shutil.move(work, tmp_path / "elsewhere")
    out = airstream.repack(tiny("llama", BF16), tmp_path / "out", progress=False)
    shutil.move(tmp_path / "elsewhere", work)
    assert airstream.repack(tiny("llama", BF16), out, progress=False) == out  # it is there already
    assert small_files(tmp_path) == before


def test_an_incomplete_checkpoint_is_not_repacked(tiny: WriteTiny, tmp_path: Path) -> None:
    source = shutil.copytree(tiny("llama", BF16), tmp_path / "source")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AirstreamError, match="truncated"):
        airstream.repack(source, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- command line


def test_the_command_line(tiny: WriteTiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["repack", str(tiny("llama", BF16)), str(out), "--layers", "1:3", "--shard-size", "1GiB"]) == 0
    out_text, err = capsys.readouterr()
    assert out_text.strip() == str(out)
    assert re.match(r"2 files of weights, [0-9.]+ KiB, in [0-9.]+ m?s\nNext, prove it whole:\n", err), err
    assert err.endswith(f" verify {out}\n")
    assert main(["repack", str(tiny("llama", BF16)), str(out), "--layers", "1:3"]) == 0
    assert f"{out} is this repack already (2 files of weights, " in capsys.readouterr().err
    assert len(load_file(next(out.glob("model*.safetensors")))) == 9
    assert main(["repack", str(tiny("llama", BF16)), str(out), "--layers", "9:"]) == 1
    assert "has layers 0 to 3" in capsys.readouterr().err


def test_transformers_finds_nothing_odd(tiny: WriteTiny, tmp_path: Path) -> None:
    out = airstream.repack(tiny("mixtral", FP32), tmp_path / "out", progress=False)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    places = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert places.keys() == weights_of(out).keys()
