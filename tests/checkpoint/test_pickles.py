"""Pickled checkpoints: streamed as they lie, equal to transformers' to the bit; hostile ones refused, and not run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from airstream import AutoModel, CheckpointError, CheckpointNotFoundError
from airstream.checkpoint.formats import has_weights, open_checkpoint
from airstream.checkpoint.names import PICKLE_FILE, PICKLE_INDEX
from airstream.checkpoint.pickles import tensors as pickles
from airstream.checkpoint.pickles import unpickle as unpickle_module
from airstream.checkpoint.pickles.tensors import ScatteredTensor, read_pickle
from airstream.layout.pieces import TORCH_DTYPES
from tests.conftest import WriteTiny, stream
from tests.stand_ins.comparing import BF16, FP16, FP32, assert_equal
from tests.stand_ins.limits import limited

Save = Callable[..., Path]
Tensors = Mapping[str, torch.Tensor]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def save(tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Save:
    """`save(name, dtype)`: the tiny model `name`, its weights pickled; the cache folder is one of this test's own."""
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))

    def write(
        name: str,
        dtype: torch.dtype = FP32,
        change: Callable[[Tensors], Tensors] = dict,
        shards: int = 1,
        **options: Any,
    ) -> Path:
        source, folder = tiny(name, dtype), tmp_path / "pickled"
        folder.mkdir()
        for file in source.iterdir():
            if "safetensors" not in file.name:
                shutil.copy(file, folder)
        weights = dict(change(weights_of(source)))
        if shards == 1:
            torch.save(weights, folder / PICKLE_FILE, **options)
            return folder
        places = {}
        for number in range(shards):
            part = dict(list(weights.items())[number::shards])
            file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
            torch.save(part, folder / file, **options)
            places |= dict.fromkeys(part, file)
        (folder / PICKLE_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
        return folder

    return write


def resident(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


LEGACY: dict[str, Any] = {"_use_new_zipfile_serialization": False}


# ------------------------------------------------------------------------------------------------------------ exactness


@pytest.mark.parametrize(
    ("name", "shards", "dtype"),
    [
        ("llama", 1, FP16),
        ("llama", 1, FP32),
        ("llama", 3, BF16),
        ("mixtral", 1, BF16),
        ("mixtral", 1, FP16),
        ("mixtral", 3, FP32),
        ("gpt2", 1, BF16),
        ("gpt2", 3, FP32),
    ],
)
def test_streamed_as_it_lies(save: Save, name: str, shards: int, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(name, dtype, shards=shards)
    with stream(folder) as model:
        assert_equal(model, resident(folder, dtype))
    assert not (tmp_path / "cache" / "gathered").exists(), "no copy was made"


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_files_from_before_torch_1_6(save: Save, name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(name, dtype, **LEGACY)
    assert (folder / PICKLE_FILE).read_bytes()[:2] == b"\x80\x02"
    with stream(folder) as model:
        assert_equal(model, resident(folder, dtype))
    assert not (tmp_path / "cache" / "gathered").exists(), "no copy was made"


@pytest.mark.parametrize("stored", [FP32, BF16], ids=str)
def test_casts(save: Save, stored: torch.dtype) -> None:
    folder = save("llama", stored)
    dtype = BF16 if stored == FP32 else FP32
    with stream(folder, dtype=dtype) as model:
        assert_equal(model, resident(folder, dtype))


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_tied_weights_in_one_storage(save: Save, options: dict[str, Any]) -> None:
    folder = save("llama-tied", BF16, lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"]}, **options)
    index = open_checkpoint(folder)
    assert index["lm_head.weight"].offset == index["model.embed_tokens.weight"].offset
    with stream(folder) as model:
        assert_equal(model, resident(folder, BF16))


def test_parameters_and_state_dicts_with_attributes(save: Save) -> None:
    def as_parameters(weights: Tensors) -> Tensors:
        changed = OrderedDict(
            (name, torch.nn.Parameter(tensor, requires_grad=False)) for name, tensor in weights.items()
        )
        changed._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]  # as torch does
        next(iter(changed.values())).note = "kept by torch"  # type: ignore[attr-defined]
        return changed

    folder = save("llama", FP32, as_parameters)
    torch.save(as_parameters(torch.load(folder / PICKLE_FILE)), folder / PICKLE_FILE)
    with stream(folder) as model:
        assert_equal(model, resident(folder, FP32))


def test_views_of_one_storage(save: Save) -> None:
    """As fused weights are split: contiguous parts of a larger storage."""

    def views(weights: Tensors) -> Tensors:
        one = torch.cat([tensor.reshape(-1) for tensor in weights.values()])
        parts = one.split([tensor.numel() for tensor in weights.values()])
        return {name: part.view(weights[name].shape) for name, part in zip(weights, parts, strict=True)}

    folder = save("llama", FP32, views)
    assert len(open_checkpoint(folder).files) == 1
    with stream(folder) as model:
        assert_equal(model, resident(folder, FP32))


def transposed(weights: Tensors) -> Tensors:
    return {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in weights.items()}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("shards", [1, 2])
def test_transposed_weights_are_rearranged_once(
    save: Save, shards: int, options: dict[str, Any], tmp_path: Path, tiny: WriteTiny
) -> None:
    folder = save("llama", BF16, transposed, shards=shards, **options)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    original = weights_of(tiny("llama", BF16))
    index = open_checkpoint(folder)
    assert index.keys() == original.keys()
    for name, stored in index.items():
        raw = bytearray(stored.file.read_bytes()[stored.offset : stored.end])
        tensor = torch.frombuffer(raw, dtype=TORCH_DTYPES[stored.dtype]).view(stored.shape)
        assert torch.equal(tensor, original[name]), name
    copies = list((tmp_path / "cache" / "gathered").glob("*/*.safetensors"))
    assert len(copies) == 1
    made = copies[0].stat().st_mtime_ns
    with stream(folder) as model, stream(tiny("llama", BF16)) as plain:
        inputs = {"input_ids": torch.arange(3, 12)[None]}
        assert torch.equal(model(**inputs).logits, plain(**inputs).logits)
    assert copies[0].stat().st_mtime_ns == made, "made once"
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before, "the original is only read"
    assert copies[0].stat().st_size < sum(t.nbytes for t in original.values()) + (64 << 10)


def test_big_endian_numbers_are_turned_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRSTREAM_CACHE", str(tmp_path / "cache"))
    weights = {"f": torch.randn(3, 5), "h": torch.randn(7).half(), "c": torch.randn(2, dtype=torch.complex64)}
    torch.save(weights, tmp_path / "little.pt")
    with zipfile.ZipFile(tmp_path / "little.pt") as little, zipfile.ZipFile(tmp_path / PICKLE_FILE, "w") as big:
        for entry in little.infolist():
            data = little.read(entry)
            if "/data/" in entry.filename:
                width = {60: 4, 14: 2, 16: 4}[len(data)]
                data = b"".join(data[start : start + width][::-1] for start in range(0, len(data), width))
            big.writestr(entry.filename, b"big" if entry.filename.endswith("byteorder") else data)
    loaded = torch.load(tmp_path / PICKLE_FILE)
    index = open_checkpoint(tmp_path)
    for name, tensor in weights.items():
        raw = bytearray(index[name].file.read_bytes()[index[name].offset : index[name].end])
        assert torch.equal(torch.frombuffer(raw, dtype=tensor.dtype).view(tensor.shape), tensor)
        assert torch.equal(loaded[name], tensor), "torch agrees on what the file holds"


# --------------------------------------------------------------------------------------------------- what is in a file

TYPES = list(dict.fromkeys(TORCH_DTYPES.values()))


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_every_tensor_is_where_it_is_said_to_be(tmp_path: Path, options: dict[str, Any]) -> None:
    weights = {str(dtype): (torch.arange(6).view(2, 3) % 2).to(dtype) for dtype in TYPES}
    base = torch.arange(40.0)
    weights |= {"scalar": torch.tensor(7), "empty": torch.zeros(0, 5), "view": base[3:9].view(2, 3), "rest": base[9:]}
    file = tmp_path / PICKLE_FILE
    torch.save(weights, file, **options)
    stored, scattered = read_pickle(file)
    raw = file.read_bytes()
    assert [tensor.name for tensor in stored] == list(weights)
    assert scattered == []
    for tensor in stored:
        expected = weights[tensor.name]
        assert (TORCH_DTYPES[tensor.dtype], tensor.shape) == (expected.dtype, tuple(expected.shape))
        assert raw[tensor.offset : tensor.end] == bytes(expected.contiguous().view(-1).view(torch.uint8).tolist())


def test_strides_that_do_not_matter(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(4, 3)[:, :1].t(), "x": torch.zeros(3, 4).t()}, tmp_path / "w.bin")
    stored, scattered = read_pickle(tmp_path / "w.bin")
    assert stored == []
    assert {tensor.name: tensor.stride for tensor in scattered} == {"w": (1, 3), "x": (1, 4)}
    torch.save({"w": torch.zeros(3).as_strided((1, 3, 1), (77, 1, 99))}, tmp_path / "w.bin")
    assert read_pickle(tmp_path / "w.bin")[0][0].shape == (1, 3, 1)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("view", ["neg", "conj"])
def test_elements_that_are_not_as_they_lie(tmp_path: Path, view: str, options: dict[str, Any]) -> None:
    """torch notes beside the storage that they are negated or conjugated, and does so whenever they are looked at."""
    numbers = torch.view_as_complex(torch.arange(1.0, 5).view(2, 2))
    odd = {"neg": numbers.conj().imag, "conj": numbers.conj()}[view]
    torch.save({"w": odd}, tmp_path / "w.bin", **options)
    assert torch.equal(torch.load(tmp_path / "w.bin")["w"], odd)
    with pytest.raises(CheckpointError, match=r"w\.bin .* negated or conjugated: save it after"):
        read_pickle(tmp_path / "w.bin")
    torch.save({"w": odd.resolve_neg().resolve_conj().contiguous()}, tmp_path / "w.bin", **options)
    assert [tensor.name for tensor in read_pickle(tmp_path / "w.bin")[0]] == ["w"]


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_weights_beside_what_training_leaves(tmp_path: Path, key: str) -> None:
    torch.save({"epoch": 3, "lr": 0.1, key: {"w": torch.ones(2)}, "moments": [torch.zeros(9)]}, tmp_path / "model.pth")
    assert list(open_checkpoint(tmp_path)) == ["w"]
    torch.save({"epoch": 3, key: {"w": torch.ones(2)}, "m": [torch.zeros(9)]}, tmp_path / "model.pth", **LEGACY)
    assert list(open_checkpoint(tmp_path)) == ["w"]


def test_safetensors_go_before_pickles(tiny: WriteTiny, tmp_path: Path) -> None:
    shutil.copytree(tiny("llama", FP32), tmp_path / "both")
    (tmp_path / "both" / PICKLE_FILE).write_bytes(b"not looked at")
    assert {file.suffix for file in open_checkpoint(tmp_path / "both").files} == {".safetensors"}


def test_what_trainers_leave_is_not_taken_for_weights(tmp_path: Path) -> None:
    for name in ("optimizer.bin", "training_args.bin", "rng_state_0.pth"):
        (tmp_path / name).write_bytes(b"x")
    assert not has_weights(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint: .*pytorch_model\.bin"):
        open_checkpoint(tmp_path)


def test_parts_of_several_gpus_are_told_apart(tmp_path: Path) -> None:
    for number in range(2):
        torch.save({"w": torch.zeros(2)}, tmp_path / f"consolidated.{number:02}.pth")
    with pytest.raises(CheckpointError, match=r"'w' is in two files, .*several, convert"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_missing_and_a_tensor_that_is(save: Save) -> None:
    folder = save("llama", shards=2)
    places = json.loads((folder / PICKLE_INDEX).read_text())
    places["weight_map"]["gone"] = next(iter(places["weight_map"].values()))
    (folder / PICKLE_INDEX).write_text(json.dumps(places))
    with pytest.raises(CheckpointError, match=r"'gone' is missing"):
        open_checkpoint(folder)
    assert has_weights(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    assert not has_weights(folder)
    with pytest.raises(CheckpointNotFoundError, match=r"00002-of-00002\.bin is missing"):
        open_checkpoint(folder)


# ------------------------------------------------------------------------------------------------------------- hostile


class Code:
    """What a hostile file has in it."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._made_by = (function, arguments)

    def __reduce__(self) -> Any:
        return self._made_by


HARMLESS = {"w": torch.zeros(2, 3)}


def archive(file: Path, pickled: bytes, records: Mapping[str, bytes] | None = None, **options: Any) -> Path:
    """A file as torch lays it out."""
    with zipfile.ZipFile(file, "w", **options) as out:
        out.writestr("m/data.pkl", pickled)
        for name, data in ({"data/0": bytes(24)} if records is None else records).items():
            out.writestr(f"m/{name}", data)
    return file


def refused(file: Path, said: str) -> str:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=said) as caught:
            read_pickle(file)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert str(file) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch executed",), r"(posix|nt)\.system"),
        (eval, ("open('executed', 'w')",), r"__builtin__\.eval|builtins\.eval"),
        (bytearray, (1 << 40,), "bytearray"),
        (torch.Tensor, (1 << 40,), "nothing of it was executed"),
        (torch.zeros, (1 << 40,), r"__builtin__\.getattr"),  # on the way to a function of C
    ],
)
def test_code_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, arguments: Any, named: str, options: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / PICKLE_FILE
    torch.save({"w": Code(function, *arguments)}, file, **options)
    assert "executed" in refused(file, named).lower()
    assert not (tmp_path / "executed").exists()
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError):
        AutoModel.from_pretrained(tmp_path, device="cpu")
    assert not (tmp_path / "executed").exists()


def pickled_tensor(
    elements: int = 6, shape: Any = (2, 3), stride: Any = (3, 1), offset: int = 0, cls: str = "FloatStorage"
) -> bytes:
    """The pickle of one tensor, with any claim."""
    raw = io.BytesIO()
    pickler = pickle._Pickler(raw, protocol=2)  # type: ignore[attr-defined]  # the one in Python: it writes what it is told
    made = Code(torch._utils._rebuild_tensor_v2, _Id(cls, elements), offset, shape, stride, False, OrderedDict())
    pickler.persistent_id = lambda thing: thing.saved if isinstance(thing, _Id) else None
    pickler.dump({"w": made})
    return raw.getvalue()


class _Id:
    def __init__(self, cls: str, elements: int) -> None:
        self.saved = ("storage", getattr(torch, cls), "0", "cpu", elements)


def test_the_forger_can_write_what_is_right(tmp_path: Path) -> None:
    """Else the tests below would pass for the wrong reason."""
    (tensor,), _ = read_pickle(archive(tmp_path / "m.bin", pickled_tensor()))
    assert (tensor.name, tensor.shape, tensor.nbytes) == ("w", (2, 3), 24)


CLAIMS = {
    "more elements than the record": {"elements": 7},
    "far more": {"elements": 1 << 50},
    "a negative number": {"elements": -6},
    "a shape beyond the storage": {"shape": (3, 3)},
    "an absurd shape": {"shape": (1 << 40, 1 << 40)},
    "an offset beyond it": {"offset": 1},
    "a negative offset": {"offset": -1},
    "strides beyond it": {"stride": (4, 1)},
    "one element a billion times": {"shape": (1 << 30, 1), "stride": (0, 1)},
    "a negative stride": {"stride": (3, -1)},
    "strides of another shape": {"stride": (1,)},
    "a size that is text": {"shape": ("2", 3)},
    "a size that is a bool": {"shape": (True, 3)},
    "a thousand dimensions": {"shape": (1,) * 1000, "stride": (1,) * 1000},
    "another type": {"cls": "DoubleStorage"},
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_claims_that_the_file_does_not_hold(tmp_path: Path, claim: dict[str, Any]) -> None:
    refused(archive(tmp_path / "m.bin", pickled_tensor(**claim)), "storage|does not fit|not a pickle of weights")


def test_a_storage_that_is_not_there(tmp_path: Path) -> None:
    refused(archive(tmp_path / "m.bin", pickled_tensor(), {}), "is not in the file")


BOMBS = {
    "nested tuples": b")" + b"\x85" * 300_000,
    "nested tuples as a key": b"})" + b"\x85" * 300_000 + b"K\x01s",
    "a memo far away": b"}r\xff\xff\xff\xff",
    "a text of four gigabytes": b"X\xff\xff\xff\xff",
    "an unknown instruction": b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f",
    "a name without end": b"c" + b"x" * 300_000,
    "a stack that is empty": b"t",
    "the end is missing": b"}",
    "another protocol": b"\x80\x04}",
    "not a dictionary": b"K\x01",
    "no tensors": b"}",
}


@pytest.mark.parametrize("code", BOMBS.values(), ids=BOMBS)
def test_pickles_that_are_none(tmp_path: Path, code: bytes) -> None:
    stop = b"." if code not in (b"}",) else b""
    with pytest.raises(CheckpointError, match=r"m\.bin"):
        read_pickle(archive(tmp_path / "m.bin", b"\x80\x02" + code + stop))


def test_an_endless_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickle_module, "MAX_WORK", 1000)
    refused(archive(tmp_path / "m.bin", b"\x80\x02" + b"]" * 2000 + b"."), "more instructions than any")


# Everything here counts work in the file's own units: none of these ends within a test's time if work is not counted.
PAIR = b"X\1\0\0\0aX\1\0\0\0b\x86"  # ("a", "b")
EVER_LARGER = b"K\1q\0" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(200))
"""A tuple of two tuples, each of which is the same two tuples, and so on: 2**200 numbers for whoever looks at all."""

ORDERED = b"ccollections\nOrderedDict\nq\1"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\nq\1"
SAME = b"ctorch\nSize\nq\1"
FROM_TYPE = b"ctorch._tensor\n_rebuild_from_type_v2\nq\3"
LONG = b"(" + PAIR + b"q\0" + b"h\0" * 99_999
"""A hundred thousand pairs, not yet a list or a tuple."""

AGAIN = 50_000
WORK = {
    "called": EVER_LARGER + b")R.",
    "a type of element": EVER_LARGER + b"q\xff" + b"ctorch._utils\n_rebuild_tensor_v3\n(K\1K\1)))K\0h\xfftR.",
    "a key": b"}" + EVER_LARGER + b"K\1s.",
    "the whole": EVER_LARGER + b".",
    "a dictionary's pairs": ORDERED + EVER_LARGER + b"\x85R.",
    "arguments": SAME + EVER_LARGER + b"R.",
    "a storage": EVER_LARGER + b"Q.",
    "a storage of it": b"(X\7\0\0\0storage" + EVER_LARGER + b"h\x10h\x10h\x10tQ.",
    "a storage called it": b"(" + EVER_LARGER + b"h\x10h\x10h\x10h\x10tQ.",
    "a tensor of it": TENSOR + b"(" + EVER_LARGER + b"h\x10h\x10h\x10tR.",
    "one list, again and again": ORDERED + b"]" + LONG + b"e\x85q\2" + b"h\1h\2R0" * AGAIN + b"}.",
    "one tuple, again and again": SAME + LONG + b"tq\2" + b"h\1h\2R0" * AGAIN + b"}.",
    "one storage, again and again": LONG + b"tq\2" + b"h\2Q0" * AGAIN + b"}.",
    "one shape, again and again": TENSOR + b"K\1K\1" + LONG + b"th\1\x87q\2" + b"h\1h\2R0" * AGAIN + b"}.",
    "a class of its own": FROM_TYPE + ORDERED + b"]" + LONG + b"e\x85q\4h\1K\1h\4\x87q\2" + b"h\3h\2R0" * AGAIN + b"}.",
    "a class of a class": FROM_TYPE + b"h\3K\1)\x87q\2" + b"h\3h\2R0" * AGAIN + b"}.",
    "dictionaries": b"}" * (4 << 20) + b".",
    "lists in marks": b"(]" * (2 << 20) + b".",
    "texts": b"X\1\0\0\0a" * (1 << 20) + b".",
    "wide texts": (b"X\0\0\x0f\0" + "\U0001f600".encode() + b"a" * 983_036) * 9 + b".",
    "names": b"ctorch.nn.parameter\nParameter\n" * 300_000 + b".",
    "storages": b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0aK\0K\1tq\0" + b"h\0Q" * 500_000 + b".",
}


@pytest.mark.parametrize("options", ["archive", "legacy"])
@pytest.mark.parametrize("case", WORK)
def test_work_is_counted(tmp_path: Path, case: str, options: str) -> None:
    code, file = b"\x80\x02" + WORK[case], tmp_path / "m.bin"
    if options == "archive":
        archive(file, code)
    else:
        file.write_bytes(b"".join(pickle.dumps(n, 2) for n in (pickles.MAGIC_NUMBER, 1001, {})) + code)
    with limited(), pytest.raises(CheckpointError, match=r"m\.bin") as caught:
        read_pickle(file)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("place", [0, 1, 2, 4])
def test_work_is_counted_in_every_part_of_an_old_file(tmp_path: Path, place: int) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "m.bin", **LEGACY)
    with (tmp_path / "m.bin").open("rb") as stream:
        parts = [unpickled_bytes(stream) for _ in range(5)]
    parts[place] = b"\x80\x02" + b"](" + b"K\1" * 300_000 + b"e."
    (tmp_path / "m.bin").write_bytes(b"".join(parts))
    refused(tmp_path / "m.bin", "more instructions than any")


def unpickled_bytes(stream: Any) -> bytes:
    start = stream.tell()
    unpickle_module.unpickle(stream, Path("m.bin"))
    end = stream.tell()
    stream.seek(start)
    return bytes(stream.read(end - start))


def test_a_directory_of_nothing_but_names(tmp_path: Path) -> None:
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *(0,) * 15, 0)
    entries = entry * (30 << 20 // len(entry))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, len(entries), 30, 0)
    (tmp_path / "m.bin").write_bytes(b"PK\3\4".ljust(30, b"\0") + entries + end)
    refused(tmp_path / "m.bin", r"m\.bin")


def test_as_many_tensors_as_a_file_may_have(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i // 999}.mlp.experts.{i % 999}.down_proj.weight": torch.zeros(1) for i in range(15_000)}
    torch.save(tensors, tmp_path / PICKLE_FILE)
    with limited():
        assert len(read_pickle(tmp_path / PICKLE_FILE)[0]) == 15_000


def test_a_bomb_of_zeros(tmp_path: Path) -> None:
    file = tmp_path / "m.bin"
    archive(file, bytes(50 << 20), compression=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 20
    refused(file, "'m/data.pkl' is compressed")


def test_records_that_are_compressed(tmp_path: Path) -> None:
    with zipfile.ZipFile(archive(tmp_path / "m.bin", pickled_tensor(), {}), "a", zipfile.ZIP_DEFLATED) as out:
        out.writestr("m/data/0", bytes(24))
    refused(tmp_path / "m.bin", "'m/data/0' is compressed")


def change_directory(file: Path, name: bytes, place: int, value: bytes) -> None:
    """Change a field of the entry of `name` in the directory at the end of the file."""
    raw = bytearray(file.read_bytes())
    entry = raw.rindex(name) - 46
    assert raw[entry : entry + 4] == b"PK\x01\x02"
    raw[entry + place : entry + place + len(value)] = value
    file.write_bytes(raw)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (42, struct.pack("<I", 0), "overlaps|not where the directory says"),
        (42, struct.pack("<I", 0x7FFFFFFF), "not a complete archive"),
        (24, struct.pack("<I", 1 << 30), "overlaps|two sizes"),
        (20, struct.pack("<II", 1 << 30, 1 << 30), "behind the data"),
    ],
)
def test_records_elsewhere_than_said(tmp_path: Path, place: int, value: bytes, said: str) -> None:
    file = archive(tmp_path / "m.bin", pickled_tensor())
    change_directory(file, b"m/data/0", place, value)
    refused(file, said)


def test_two_records_of_one_name(tmp_path: Path) -> None:
    file = archive(tmp_path / "m.bin", pickled_tensor())
    with zipfile.ZipFile(file, "a") as out, pytest.warns(UserWarning, match="Duplicate"):
        out.writestr("m/data/0", bytes(24))
    refused(file, "two records")


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
def test_a_file_that_ends_too_early(tmp_path: Path, options: dict[str, Any]) -> None:
    file = tmp_path / PICKLE_FILE
    torch.save({"a": torch.randn(100), "b": torch.randn(100)}, file, **options)
    whole = file.read_bytes()
    for size in (0, 1, 3, 30, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        refused(file, "complete archive|truncated|torch.save|not a pickle|corrupt|is empty|is text|zip archive")


def test_what_is_something_else(tmp_path: Path) -> None:
    file = tmp_path / PICKLE_FILE
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n")
    refused(file, "git lfs pull")
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("holiday/photo.jpg", b"x")
    refused(file, "a zip archive: unpack it")
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("a/data/0", b"x")
    refused(file, r"no data\.pkl")
    file.write_bytes(pickle.dumps({"w": 1}, protocol=2))
    refused(file, "not a checkpoint that torch.save has written")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    refused(file, "TorchScript")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / PICKLE_FILE


@pytest.fixture(scope="module", params=[{}, LEGACY], ids=["zip", "legacy"])
def whole(request: pytest.FixtureRequest, scratch: Path) -> Iterator[bytes]:
    torch.save(
        {"a": torch.randn(2, 3), "b": torch.zeros(3, 2).t(), "c": torch.ones(2).half()}, scratch, **request.param
    )
    return scratch.read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_mutated_files(scratch: Path, whole: bytes, data: st.DataObject) -> None:
    """Anything but a CheckpointError fails the test, and so does a tensor that is not wholly inside the file."""
    raw = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(raw)))
        raw[place : place + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    scratch.write_bytes(raw)
    try:
        stored, scattered = read_pickle(scratch)
    except CheckpointError as error:
        assert str(scratch) in str(error)  # noqa: PT017 - whether there is one depends on what was drawn
    else:
        placed: list[Any] = [*stored, *scattered]
        assert all(0 <= tensor.offset <= tensor.offset + tensor.nbytes <= len(raw) for tensor in placed)
        assert all(isinstance(tensor, ScatteredTensor) or tensor.nbytes <= 24 for tensor in placed)
