"""Byte plans are right: what they say lies where, put together, is the model that transformers loads."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)
from transformers.core_model_loading import Transpose, WeightConverter

from airstream.checkpoint.safetensors import open_safetensors
from airstream.checkpoint.stored import StoredTensor
from airstream.codecs.block_types import BLOCK_TYPES
from airstream.codecs.library import has_kernels
from airstream.compat import mapped_conversion
from airstream.compat.building import build_on_meta
from airstream.compat.mapped_conversion import MappedConversion
from airstream.errors import CheckpointError
from airstream.layout import slab as slab_module
from airstream.layout.byte_plan import read_specs
from airstream.layout.pieces import TORCH_DTYPES
from airstream.layout.slab import MAX_GAP_BYTES, Slab, kept_specs, pack
from airstream.layout.tensors import TensorSpec
from airstream.layout.tracing import KnownConversions, trace
from airstream.reporting.probe import Probe, now
from airstream.transfer.accelerator import AcceleratorBackend
from airstream.transfer.cpu import CpuBackend
from airstream.transfer.files import PAGE_BYTES
from airstream.transfer.landing import HostLanding, Staging
from airstream.transfer.packing import CPU_PACKING, HOST_PACKING, Packing
from airstream.transfer.piece import Cast, Piece
from airstream.transfer.reader import Reader
from airstream.transfer.unpacking import unpack

BOTH = [CpuBackend.packing, AcceleratorBackend.packing]
BOTH_PACKINGS = pytest.mark.parametrize("packing", BOTH, ids=["in place", "aligned"])

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
CONFIGS: Mapping[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SHAPE, **EXPERTS),
    "gpt2": GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4),
}
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def write_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, shard_bytes: int = 1 << 30) -> Path:
    """A checkpoint as transformers writes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`checkpoint(name, dtype)`: a folder, written once and never changed."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name, dtype="float32": write_model(root / f"{name}-{dtype}", CONFIGS[name], STORED[dtype]))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """One to be damaged."""
    return write_model(tmp_path, CONFIGS["llama"], torch.float32)


def on_meta(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, **changes)
    return build_on_meta(AutoModelForCausalLM._model_mapping[type(config)], config, dtype, None)


def specs_of(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> dict[str, TensorSpec]:
    return read_specs(on_meta(folder, dtype, **changes), open_safetensors(folder), dtype)


def bytes_of(pieces: Iterable[Piece], nbytes: int) -> bytes:
    """What `pieces` make of their files."""
    memory = bytearray(nbytes)
    for piece in pieces:
        raw = piece.file.read_bytes()[piece.offset : piece.offset + piece.nbytes]
        if piece.cast is not None and raw:
            numbers = torch.frombuffer(bytearray(raw), dtype=getattr(torch, piece.cast.source))
            raw = numbers.to(getattr(torch, piece.cast.target)).view(torch.uint8).numpy().tobytes()
        memory[piece.target : piece.target + len(raw)] = raw
    return bytes(memory)


def value_of(raw: bytes, spec: TensorSpec) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=spec.dtype).view(spec.shape)


# ------------------------------------------------------------------------------------------------------- byte plans


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", CONFIGS)
def test_byte_plans_make_the_model_that_transformers_loads(
    checkpoint: Any, name: str, stored: str, dtype: torch.dtype
) -> None:
    folder = checkpoint(name, stored)
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    specs = specs_of(folder, dtype)
    assert specs.keys() == resident.keys()
    for key, value in resident.items():
        spec = specs[key]
        assert (spec.name, spec.dtype, spec.shape) == (key, value.dtype, tuple(value.shape))
        assert spec.nbytes == value.nbytes
        assert torch.equal(value_of(bytes_of(spec.pieces, spec.nbytes), spec), value), key


def test_pieces_fill_a_tensor_without_gap_or_overlap(checkpoint: Any) -> None:
    for spec in specs_of(checkpoint("qwen3_moe")).values():
        end = 0
        for piece in sorted(spec.pieces, key=lambda piece: piece.target):
            assert piece.target == end
            end += piece.target_bytes
        assert end == spec.nbytes


def test_merged_experts_are_read_expert_by_expert(checkpoint: Any) -> None:
    specs = specs_of(checkpoint("qwen3_moe"))
    merged = specs["model.layers.0.mlp.experts.gate_up_proj"]
    assert merged.shape == (12, 2 * 32, 128)
    assert len(merged.pieces) == 2 * 12
    assert {piece.nbytes for piece in merged.pieces} == {32 * 128 * 4}


def test_a_sharded_checkpoint_has_the_same_bytes(checkpoint: Any, tmp_path: Path) -> None:
    sharded = write_model(tmp_path, CONFIGS["qwen3_moe"], torch.float32, shard_bytes=100_000)
    assert len(open_safetensors(sharded).files) > 3
    whole = specs_of(checkpoint("qwen3_moe"))
    for name, spec in specs_of(sharded).items():
        assert bytes_of(spec.pieces, spec.nbytes) == bytes_of(whole[name].pieces, spec.nbytes), name


def test_tied_weights_are_the_same_bytes(checkpoint: Any) -> None:
    specs = specs_of(checkpoint("tied"))
    assert specs["lm_head.weight"].pieces == specs["model.embed_tokens.weight"].pieces
    assert specs["lm_head.weight"].name == "lm_head.weight"


def test_tied_weights_stored_under_the_other_name(checkpoint: Any, tmp_path: Path) -> None:
    tensors = load_file(checkpoint("tied") / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save(tmp_path, tensors, checkpoint("tied"))
    specs = specs_of(tmp_path)
    assert specs["lm_head.weight"].pieces == specs["model.embed_tokens.weight"].pieces


def save(folder: Path, tensors: Mapping[str, torch.Tensor], like: Path) -> None:
    """A checkpoint of `tensors` with the config of `like`."""
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((like / "config.json").read_text())


def test_a_converter_that_computes_is_left_for_later(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposing moves elements, not rows: the raw tensor is read, and the converter run on it each time."""
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(llama / "model.safetensors")
    stored = tensors[name].t().contiguous()
    save(llama, tensors | {name: stored}, llama)
    transposed = WeightConverter(
        ["layers.0.mlp.down_proj.weight"], ["layers.0.mlp.down_proj.weight"], operations=[Transpose(0, 1)]
    )
    monkeypatch.setattr(mapped_conversion, "get_model_conversion_mapping", lambda _: [transposed])
    model = on_meta(llama)
    spec = read_specs(model, open_safetensors(llama), torch.float32)[name]
    assert spec.pieces == ()
    assert spec.made_by is not None
    (raw,) = spec.made_by.sources
    assert raw.shape == tuple(stored.shape)
    value = value_of(bytes_of(raw.pieces, raw.nbytes), raw)
    made = MappedConversion(model).convert(spec.made_by.name, [(raw.name, spec.made_by.patterns[0], value)])
    assert torch.equal(made[name], tensors[name])
    slab = pack([spec], CpuBackend.packing)
    assert slab.conversions == (spec.made_by,)
    assert slab.nbytes >= spec.nbytes + raw.nbytes


# ---------------------------------------------------------------------------------- checkpoints that do not fit


def test_a_missing_tensor_is_named(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save(llama, tensors, llama)
    with pytest.raises(CheckpointError, match=r"lacks 1 of the 30 tensors .*'model\.layers\.1\.mlp\.up_proj\.weight'"):
        specs_of(llama)


def test_many_missing_tensors_are_counted(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save(llama, {name: value for name, value in tensors.items() if ".layers.2." not in name}, llama)
    with pytest.raises(CheckpointError, match=r"lacks 9 of the 30 tensors.*'model\.layers\.2\.") as caught:
        specs_of(llama)
    assert len(str(caught.value)) < 500


def test_a_tensor_of_another_shape_is_named_with_both_shapes(llama: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        specs_of(llama, intermediate_size=320)
    assert "'model.layers.0.mlp." in str(caught.value)
    assert "256" in str(caught.value)
    assert "320" in str(caught.value)


def test_the_same_number_of_elements_in_another_shape_is_refused(llama: Path) -> None:
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors = load_file(llama / "model.safetensors")
    save(llama, tensors | {name: tensors[name].view(128, 64)}, llama)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight' has shape \[128, 64\].* needs \[64, 128\]"):
        specs_of(llama)


@pytest.mark.parametrize("damage", ["one missing", "one too small", "all missing", "one of another shape"])
def test_experts_that_do_not_make_the_merged_tensor_are_named(checkpoint: Any, tmp_path: Path, damage: str) -> None:
    like = checkpoint("qwen3_moe")
    tensors = load_file(like / "model.safetensors")
    experts = [name for name in tensors if name.startswith("model.layers.1.mlp.experts.")]
    name = "model.layers.1.mlp.experts.10.up_proj.weight"
    if damage == "one missing":
        del tensors[name]
    elif damage == "one too small":
        tensors[name] = tensors[name][:16].clone()
    elif damage == "one of another shape":
        tensors[name] = tensors[name].t().contiguous()
    else:
        tensors = {name: value for name, value in tensors.items() if name not in experts}
    save(tmp_path, tensors, like)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.experts\.(gate_up|down)_proj"):
        specs_of(tmp_path)


def test_tensors_that_the_model_has_no_place_for_are_left_alone(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    save(llama, tensors | {"model.layers.3.eh_proj.weight": torch.zeros(2), "rotary.inv_freq": torch.zeros(2)}, llama)
    assert len(specs_of(llama)) == 30


# ------------------------------------------------------------------------------------------------------------ slabs


def layer(specs: Mapping[str, TensorSpec], number: int) -> list[TensorSpec]:
    return [spec for name, spec in specs.items() if f".{number}." in name.split("mlp")[0]]


@BOTH_PACKINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt2"])
def test_a_slab_read_by_its_pieces_holds_every_tensor(
    checkpoint: Any, name: str, dtype: torch.dtype, packing: Packing
) -> None:
    folder = checkpoint(name, "float32")
    resident = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).state_dict()
    specs = layer(specs_of(folder, dtype), 1)
    assert len(specs) > 5
    slab = pack(specs, packing)
    backend = CpuBackend(chunk_bytes=16384)
    memory = backend.allocate(slab.nbytes)
    with Reader(open_safetensors(folder).files, direct=True, chunk_bytes=16384) as reader:
        reader.read(slab.pieces, backend.landing(memory))
        assert reader.bytes_read == slab.read_bytes
    for spec in specs:
        start = slab.offsets[spec.name]
        assert torch.equal(memory[start : start + spec.nbytes].view(spec.dtype).view(spec.shape), resident[spec.name])


@BOTH_PACKINGS
def test_a_dense_layer_is_one_read(checkpoint: Any, packing: Packing) -> None:
    for number in range(3):
        specs = layer(specs_of(checkpoint("llama", "bfloat16"), torch.bfloat16), number)
        slab = pack(specs, packing)
        assert len(slab.pieces) == 1
        assert slab.read_bytes == sum(spec.nbytes for spec in specs)
        assert slab.nbytes <= slab.read_bytes + 2 * PAGE_BYTES


def test_a_dense_layer_lands_in_place(checkpoint: Any) -> None:
    """Direct reads demand that memory and file agree about the place within a page."""
    for number in range(3):
        (piece,) = pack(layer(specs_of(checkpoint("llama")), number), CpuBackend.packing).pieces
        assert (piece.target - piece.offset) % PAGE_BYTES == 0


def test_neighbouring_layers_are_one_read_too(checkpoint: Any) -> None:
    specs = specs_of(checkpoint("llama"))
    assert len(pack([*layer(specs, 0), *layer(specs, 1)], CpuBackend.packing).pieces) == 1


# --------------------------------------------------------------------------- slabs of any tensors, wherever they lie

FILE_BYTES = 60_000
DTYPES = [torch.uint8, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("raw")
    for number in range(2):
        (folder / f"{number}.bin").write_bytes(random.Random(number).randbytes(FILE_BYTES))
    return sorted(folder.iterdir())


@st.composite
def tensors(draw: st.DrawFn) -> list[tuple[torch.dtype, list[tuple[int, int, int]], bool]]:
    """(dtype, pieces as (file, offset, nbytes), whether bfloat16 is cast to float32) of each; no bytes used twice."""
    ends, made = [0, 0], []
    for _ in range(draw(st.integers(1, 8))):
        cast = draw(st.integers(0, 5)) == 0
        dtype = torch.bfloat16 if cast else draw(st.sampled_from(DTYPES))
        pieces = []
        for _ in range(draw(st.sampled_from([1, 1, 1, 3]))):
            file = draw(st.integers(0, 1))
            gap = draw(st.sampled_from([0, 0, 0, 1, 2, 8, 100, 3000, 4096]))
            nbytes = draw(st.integers(1, 400)) * dtype.itemsize * draw(st.sampled_from([1, 1, 4]))
            if ends[file] + gap + nbytes <= FILE_BYTES:
                pieces.append((file, ends[file] + gap, nbytes))
                ends[file] += gap + nbytes
        if pieces:
            made.append((torch.float32 if cast else dtype, pieces, cast))
    return draw(st.permutations(made))


def spec_of(
    name: str, dtype: torch.dtype, places: Sequence[tuple[int, int, int]], cast: bool, files: list[Path]
) -> TensorSpec:
    pieces, target = [], 0
    for file, offset, nbytes in places:
        piece = Piece(files[file], offset, nbytes, target, Cast("bfloat16", "float32", 2, 4) if cast else None)
        pieces.append(piece)
        target += piece.target_bytes
    return TensorSpec(name, dtype, (target // dtype.itemsize,), tuple(pieces))


@settings(max_examples=200, deadline=None)
@given(made=tensors(), packing=st.sampled_from(BOTH), max_gap=st.sampled_from([0, 100, 3500, MAX_GAP_BYTES]))
def test_any_tensors_pack(files: list[Path], made: list[Any], packing: Packing, max_gap: int) -> None:
    specs = [spec_of(f"t{number}", dtype, places, cast, files) for number, (dtype, places, cast) in enumerate(made)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slab_module, "MAX_GAP_BYTES", max_gap)
        slab = pack(specs, packing)
    assert slab.nbytes % PAGE_BYTES == 0
    assert slab.specs == tuple(specs)
    assert_apart([(slab.offsets[spec.name], spec.nbytes) for spec in specs], slab)
    assert_apart([(piece.target, piece.target_bytes) for piece in slab.pieces], slab)
    raw = bytes_of(slab.pieces, slab.nbytes)
    for spec in specs:
        start = slab.offsets[spec.name]
        assert start % (packing.alignment or spec.dtype.itemsize) == 0
        assert raw[start : start + spec.nbytes] == bytes_of(spec.pieces, spec.nbytes)
    if packing.follows_file and all(is_plain(spec) for spec in specs):
        assert all((slab.offsets[spec.name] - spec.pieces[0].offset) % PAGE_BYTES == 0 for spec in specs)
    needed = sum(piece.nbytes for spec in specs for piece in spec.pieces)
    assert needed <= slab.read_bytes <= needed + max_gap * sum(len(spec.pieces) for spec in specs)


@pytest.mark.skipif(not has_kernels(), reason="no kernels were compiled")
@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(1, 60), min_size=1, max_size=3), min_size=1, max_size=4),
    gap=st.integers(0, 5000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    keeps=st.booleans(),
)
def test_blocks_land_at_the_end_of_their_numbers(
    files: list[Path], counts: list[list[int]], gap: int, dtype: torch.dtype, keeps: bool
) -> None:
    """They are unpacked there, or, where others stay, of those: to the bits that are there where they are decoded."""
    block, specs, offset = BLOCK_TYPES["Q8_0"], [], 0
    cast = Cast(block, str(dtype).removeprefix("torch."), block.nbytes, block.elements * dtype.itemsize)
    for number, several in enumerate(counts):
        pieces, target = [], 0
        for count in several:
            pieces.append(Piece(files[0], offset := offset + gap, count * block.nbytes, target, cast))
            target, offset = target + pieces[-1].target_bytes, offset + pieces[-1].nbytes
        specs.append(TensorSpec(f"t{number}", dtype, (target // dtype.itemsize,), tuple(pieces)))
    kept = kept_specs(specs[:1], CPU_PACKING) if keeps else []
    slab = pack(specs, CPU_PACKING, beside={spec.name for spec in kept})
    assert len(slab.unpackings) == sum(len(spec.pieces) for spec in specs)
    assert_apart([(piece.target, piece.nbytes) for piece in slab.pieces], slab)
    assert_apart([(slab.offsets[spec.name], spec.nbytes) for spec in specs], slab)
    alone = {spec.pieces[0].offset for spec in specs if len(spec.pieces) == 1}
    assert all(
        (each.start - each.piece.offset) % PAGE_BYTES == 0
        for each in slab.unpackings
        if each.piece.offset in alone and not each.kept
    )

    memory, expected = torch.zeros(slab.nbytes, dtype=torch.uint8), pack(specs, HOST_PACKING)
    decoded = torch.zeros(expected.nbytes, dtype=torch.uint8)
    with Reader(files, direct=True, chunk_bytes=16384) as reader:
        reader.read(slab.pieces, HostLanding(memory, Staging(16384)))
        reader.read(expected.pieces, HostLanding(decoded, Staging(16384)))
    raw = {
        spec.name: torch.frombuffer(bytearray(bytes_of(spec.pieces, spec.nbytes)), dtype=torch.uint8) for spec in kept
    }
    unpack(slab.unpackings, memory, raw, Probe(), now)
    for spec in specs:
        ours, theirs = slab.offsets[spec.name], expected.offsets[spec.name]
        assert torch.equal(memory[ours : ours + spec.nbytes], decoded[theirs : theirs + spec.nbytes])


def is_plain(spec: TensorSpec) -> bool:
    """Whether it can lie in memory as it lies in its file."""
    piece, *more = spec.pieces
    return not more and piece.cast is None and piece.offset % spec.dtype.itemsize == 0


def assert_apart(spans: list[tuple[int, int]], slab: Slab) -> None:
    end = 0
    for start, nbytes in sorted(spans):
        assert start >= end
        end = start + nbytes
    assert end <= slab.nbytes


def side_by_side(gap: int, file: str = "a", cast: Cast | None = None) -> list[TensorSpec]:
    """Two tensors of 1 KiB, the second `gap` bytes behind the first, or in another file."""
    first = TensorSpec("first", torch.float32, (256,), (Piece(Path("a"), 1024, 1024, 0),))
    return [first, replace(first, name="second", pieces=(Piece(Path(file), 2048 + gap, 1024, 0, cast),))]


@BOTH_PACKINGS
@pytest.mark.parametrize(
    ("gap", "num_reads"), [(0, 1), (256, 1), (MAX_GAP_BYTES, 1), (MAX_GAP_BYTES + 256, 2), (1 << 30, 2)]
)
def test_a_small_gap_is_read_along_and_a_large_one_is_not(packing: Packing, gap: int, num_reads: int) -> None:
    slab = pack(side_by_side(gap), packing)
    assert len(slab.pieces) == num_reads
    assert slab.read_bytes == 2048 + (gap if num_reads == 1 else 0)
    assert slab.nbytes <= slab.read_bytes + 4 * PAGE_BYTES


@BOTH_PACKINGS
def test_what_lies_in_another_file_or_is_cast_is_a_read_of_its_own(packing: Packing) -> None:
    assert len(pack(side_by_side(0, file="b"), packing).pieces) == 2
    assert len(pack(side_by_side(0, cast=Cast("float16", "float32", 2, 4)), packing).pieces) == 2


def test_tensors_are_sorted_as_they_lie_in_the_file() -> None:
    first, second = side_by_side(0)
    assert pack([second, first], CpuBackend.packing).pieces == pack([first, second], CpuBackend.packing).pieces


def test_an_odd_place_in_the_file_does_not_misalign_a_tensor() -> None:
    """safetensors aligns its data to 8 bytes at best; hand-made files do not even do that."""
    spec = TensorSpec("odd", torch.float32, (256,), (Piece(Path("a"), 1027, 1024, 0),))
    for packing in BOTH:
        assert pack([spec], packing).offsets["odd"] % 4 == 0


def test_every_stored_type_is_known_to_torch() -> None:
    from airstream.checkpoint.stored import ITEM_BYTES

    assert {name: dtype.itemsize for name, dtype in TORCH_DTYPES.items()} == ITEM_BYTES


def test_a_config_of_another_model_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    save(tmp_path, load_file(checkpoint("gpt2") / "model.safetensors"), checkpoint("llama"))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    with pytest.raises(CheckpointError, match=r"lacks 30 of the 30 tensors of LlamaForCausalLM"):
        specs_of(tmp_path)


def test_sizes_are_products() -> None:
    assert TensorSpec("x", torch.bfloat16, (3, 5, 7), ()).nbytes == math.prod((3, 5, 7, 2))
    assert TensorSpec("scalar", torch.float64, (), ()).nbytes == 8


# ------------------------------------------------------------------------------------- what converters do to places


class OneConverter:
    """A `KeyConversion` of a model that wants one thing made of one tensor, as `make` does it."""

    keeps_views = False

    def __init__(self, make: Callable[[torch.Tensor], Any]) -> None:
        self._make = make

    def unpacks(self, pattern: str | None) -> bool:
        return False

    def source_dtype(self, pattern: str | None, stored: torch.dtype, wanted: torch.dtype) -> torch.dtype:
        return wanted

    def scratch_bytes(self, elements: int) -> int:
        return 0

    def convert(
        self, _: str, sources: Sequence[tuple[str, str, torch.Tensor]], into: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        return dict(self._make(sources[0][2]))


ROWS, COLUMNS, IN_FILE = 5, 12, 1024 + 40
"""Rows of 48 bytes in float32: no number of them but four is of cache lines."""

Make = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]

CONVERTERS: Mapping[str, tuple[Make, Mapping[str, tuple[int, bool]]]] = {
    "hands it on": (lambda whole: {"out": whole}, {"out": (IN_FILE, True)}),
    "makes it contiguous, which it is": (lambda whole: {"out": whole.contiguous()}, {"out": (IN_FILE, True)}),
    "drops the last rows": (lambda whole: {"out": whole[:3]}, {"out": (IN_FILE, True)}),
    "drops the first rows": (lambda whole: {"out": whole[2:]}, {"out": (IN_FILE + 2 * 48, True)}),
    "cuts": (
        lambda whole: {"out": whole[:2], "rest": whole[2:]},
        {"out": (IN_FILE, True), "rest": (IN_FILE + 96, True)},
    ),
    "copies": (lambda whole: {"out": whole.clone()}, {"out": (0, True)}),
    "copies and cuts": (
        lambda whole: dict(zip(("out", "rest"), whole.flip(0).split((2, 3)), strict=True)),
        {"out": (0, True), "rest": (96, True)},
    ),
    "turns": (lambda whole: {"out": whole.t().contiguous()}, {"out": (0, False)}),
    "changes it where it lies": (lambda whole: {"out": whole.add_(1)}, {"out": (IN_FILE, False)}),
}
"""What a converter does; by what comes out: where a resident model has it, and whether it is bytes of the file."""


@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("kind", CONVERTERS)
def test_what_a_converter_hands_on_lies_where_the_file_has_it(kind: str, stored: str) -> None:
    """Where transformers casts, it allocates: parts of that lie as far behind a cache line as they begin in it."""
    make, expected = CONVERTERS[kind]
    nbytes = ROWS * COLUMNS * (4 if stored == "F32" else 2)
    index = {"in": StoredTensor("in", Path("a"), IN_FILE, nbytes, stored, (ROWS, COLUMNS))}
    targets = {name: value.to("meta") for name, value in make(torch.zeros(ROWS, COLUMNS)).items()}
    wanted = dict.fromkeys(targets, torch.float32)
    specs = trace(OneConverter(make), "out", [("in", "a pattern")], index, targets, wanted, KnownConversions())  # type: ignore[arg-type]
    assert {spec.name for spec in specs} == expected.keys()
    for spec in specs:
        place, is_bytes = expected[spec.name]
        cast = IN_FILE if stored == "BF16" and place >= IN_FILE else 0
        assert spec.line_offset == (place - cast) % 64
        assert (spec.made_by is None) is is_bytes
        packed = pack([spec], CpuBackend.packing)
        assert packed.offsets[spec.name] % 64 == spec.line_offset
        assert pack([spec], AcceleratorBackend.packing).offsets[spec.name] % 256 == 0
