"""What can go wrong, from end to end: one error of the right class, with name, numbers and remedy; nothing left."""

from __future__ import annotations

import ast
import errno
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.core_model_loading import Transpose, WeightConverter

from airstream import AutoModel
from airstream.compat import mapped_conversion
from airstream.compat.building import finish_loading
from airstream.errors import (
    AirstreamError,
    ArgumentError,
    BudgetError,
    CheckpointError,
    CheckpointNotFoundError,
    ClosedError,
    ReadError,
    UnsupportedError,
)
from airstream.model import conversion
from airstream.model.absent import Absent
from airstream.plan import planner
from airstream.plan.facts import ModelFacts
from airstream.plan.request import Request
from airstream.transfer import files
from tests.conftest import STREAMING, least_memory
from tests.stand_ins.limits import fail_from_within
from tests.stand_ins.process import descriptors, reader_threads

CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
PROMPT = torch.tensor([[5, 17, 42, 7, 23]])
NUM_TOKENS = 6
SHARD_BYTES = 700_000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of several shards."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        if tensor.dim() > 1 and "embed" not in name:
            tensor.mul_(8)  # so that the tokens depend on every layer
    folder = tmp_path_factory.mktemp("original")
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    assert len(list(folder.glob("*.safetensors"))) >= 4
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def expected(original: Path) -> torch.Tensor:
    """The tokens that transformers generates."""
    return tokens_of(AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32))


def tokens_of(model: Any) -> torch.Tensor:
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=NUM_TOKENS, do_sample=False)


def load(folder: Path, **options: Any) -> Any:
    """Streamed from the disk for every token: nothing but the smallest ring, around the page cache."""
    settings = STREAMING | {"page_cache": False, "max_context": 128, "max_batch_size": 1} | options
    settings.setdefault("max_memory", least_memory(folder, **settings))
    return AutoModel.from_pretrained(folder, device="cpu", **settings)


@pytest.fixture(autouse=True)
def _nothing_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    assert reader_threads() == []
    assert descriptors(tmp_path) == []


def refused(folder: Path, error: type[AirstreamError], *said: str, **options: Any) -> str:
    """`folder` cannot be loaded: exactly `error`, whose message says all of `said`; nothing is left at that moment."""
    with pytest.raises(AirstreamError) as caught:
        AutoModel.from_pretrained(folder, **({"device": "cpu", "page_cache": False} | options))
    message = str(caught.value)
    assert type(caught.value) is error, f"{type(caught.value).__name__}: {message}"
    for words in said:
        assert words in message
    assert reader_threads() == []
    assert descriptors(folder) == []
    return message


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def shard_of(folder: Path, tensor: str) -> Path:
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / str(weight_map[tensor])


def rewrite(shard: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(shard)
    change(tensors)
    shard.unlink()
    save_file(tensors, shard)


# ----------------------------------------------------------------------------------------- checkpoints that are broken


def test_the_checkpoint_itself_is_fine(checkpoint: Path, expected: torch.Tensor) -> None:
    with load(checkpoint) as model:
        assert len(descriptors(checkpoint)) == (len(shards(checkpoint)) if sys.platform == "linux" else 0)
        assert torch.equal(tokens_of(model), expected)
        assert model.stats.streamed_bytes > 3 * model.plan.streamed_bytes, "it was not streamed"


@pytest.mark.parametrize("num_missing", [1, 10_000])
def test_a_truncated_shard(checkpoint: Path, num_missing: int) -> None:
    shard = shards(checkpoint)[1]
    size = shard.stat().st_size
    os.truncate(shard, size - num_missing)
    refused(checkpoint, CheckpointError, str(shard), f"{size:,}", f"{size - num_missing:,}", "Download it again")


def test_a_missing_shard(checkpoint: Path) -> None:
    shard = shards(checkpoint)[2]
    shard.unlink()
    refused(checkpoint, CheckpointNotFoundError, str(shard), "missing", "Download")


def test_a_missing_tensor(checkpoint: Path) -> None:
    name = "model.layers.2.self_attn.v_proj.weight"
    rewrite(shard_of(checkpoint, name), lambda tensors: tensors.pop(name))
    refused(checkpoint, CheckpointError, repr(name), shard_of(checkpoint, name).name, "Download")


def test_a_tensor_that_neither_index_nor_shards_have(checkpoint: Path) -> None:
    name = "model.layers.2.self_attn.v_proj.weight"
    rewrite(shard_of(checkpoint, name), lambda tensors: tensors.pop(name))
    index = checkpoint / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    del table["weight_map"][name]
    index.write_text(json.dumps(table))
    refused(checkpoint, CheckpointError, repr(name), "lacks 1 of the 39", "config.json")


def test_a_tensor_of_the_wrong_shape(checkpoint: Path) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    rewrite(shard_of(checkpoint, name), lambda tensors: tensors.update({name: torch.zeros(128, 256)}))
    refused(checkpoint, CheckpointError, repr(name), "[128, 256]", "[256, 128]", "config.json")


def test_more_layers_in_the_config_than_there_are_weights(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=6)
    refused(checkpoint, CheckpointError, "lacks 18 of the 57", "'model.layers.4.", "config.json")


def edit_config(folder: Path, **changes: Any) -> None:
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


@pytest.mark.parametrize("place", [0, 8, 9, 60])
def test_a_corrupt_header(checkpoint: Path, place: int) -> None:
    shard = shards(checkpoint)[0]
    raw = bytearray(shard.read_bytes())
    raw[place : place + 4] = b"\xff\xfe\xff\xfe"
    shard.write_bytes(raw)
    refused(checkpoint, CheckpointError, str(shard), "Download it again")


def test_a_shard_that_git_lfs_did_not_fetch(checkpoint: Path) -> None:
    shard = shards(checkpoint)[0]
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 988097824\n")
    refused(checkpoint, CheckpointError, str(shard), "git-lfs", "git lfs install")


def test_an_index_that_points_elsewhere(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards(checkpoint)[0].name, "../../secret.safetensors"))
    refused(checkpoint, CheckpointError, "'../../secret.safetensors'", str(index))


def test_pickled_weights_that_are_none(checkpoint: Path) -> None:
    for file in [*shards(checkpoint), checkpoint / "model.safetensors.index.json"]:
        file.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"pickle")
    refused(checkpoint, CheckpointError, str(checkpoint / "pytorch_model.bin"), "is text", "Download it again")


def test_no_weights_at_all(checkpoint: Path) -> None:
    for file in [*shards(checkpoint), checkpoint / "model.safetensors.index.json"]:
        file.unlink()
    refused(checkpoint, CheckpointNotFoundError, str(checkpoint), "model.safetensors")


def test_no_folder(checkpoint: Path) -> None:
    refused(checkpoint / "gone", CheckpointNotFoundError, str(checkpoint / "gone"))


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refused(checkpoint, CheckpointNotFoundError, str(checkpoint), "config.json")


GARBAGE = ["", "{", "\0\0\0", "[]", "null", "7", '{"model_type": 5}', '{"model_type": "llama", "hidden_size": "many"}']


@pytest.mark.parametrize("text", GARBAGE)
def test_a_config_that_is_garbage(checkpoint: Path, text: str) -> None:
    """The checkpoint is corrupt; that a model is not supported would send people looking in the wrong place."""
    (checkpoint / "config.json").write_text(text)
    refused(checkpoint, CheckpointError, str(checkpoint / "config.json"))


@pytest.mark.parametrize("config", [{}, {"model_type": "no_such_model"}], ids=str)
def test_a_config_of_something_else(checkpoint: Path, config: dict[str, Any]) -> None:
    (checkpoint / "config.json").write_text(json.dumps(config))
    refused(checkpoint, UnsupportedError)


def test_weights_of_another_model(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "vit"}))
    refused(checkpoint, CheckpointError, "ViTModel", "config.json belongs to it")


# ------------------------------------------------------------------------------------------------- disks that fail


PREADV = pytest.mark.skipif(not files.HAS_PREADV, reason="there is no preadv to fail")


class Disk:
    """Counts the reads of files of weights, and lets some of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_reads = 0
        self.num_failed = 0
        self._fail_at = -1
        self._num_failures = 0
        self._bad_place: tuple[int, int] | None = None
        self._one_place = False
        self._real = os.preadv
        self._lock = threading.Lock()
        monkeypatch.setattr(os, "preadv", self._preadv)

    def fail_after(self, num_reads: int, times: int = 1, one_place: bool = False) -> None:
        """After so many more reads, so many fail: whichever comes, or whatever reads where the first one did."""
        with self._lock:
            self._fail_at, self._num_failures = self.num_reads + num_reads, times
            self.num_failed, self._bad_place, self._one_place = 0, None, one_place

    def recover(self) -> None:
        self.fail_after(0, times=0)

    def _preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        with self._lock:
            self.num_reads += 1
            fails = self._num_failures > 0 and self.num_reads > self._fail_at
            if fails and self._one_place:
                place = (os.fstat(descriptor).st_ino, offset)
                self._bad_place = self._bad_place or place
                fails = place == self._bad_place
            self._num_failures -= fails
            self.num_failed += fails
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(descriptor, buffers, offset)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@PREADV
@pytest.mark.parametrize("num_reads", [0, 1, 4, 9, 17, 30])
def test_a_read_error_in_the_middle_of_generation(
    checkpoint: Path, expected: torch.Tensor, disk: Disk, num_reads: int
) -> None:
    with load(checkpoint) as model:
        assert torch.equal(tokens_of(model), expected)
        disk.fail_after(num_reads, times=1_000_000, one_place=True)
        with pytest.raises(ReadError, match=os.strerror(errno.EIO)) as caught:
            tokens_of(model)
        # Once ahead and once when it was needed, for each of the layers that have a part of the page.
        assert 1 <= disk.num_failed <= 4
        assert re.search(r"reading [\d,]+ bytes at [\d,]+ of ", str(caught.value))
        assert any(str(shard) in str(caught.value) for shard in shards(checkpoint))
        assert all(isinstance(parameter, Absent) for parameter in model.model.layers.parameters()), (
            "weights are still in place"
        )
        disk.recover()
        for _ in range(2):
            assert torch.equal(tokens_of(model), expected)


@PREADV
def test_a_single_error_while_reading_ahead_is_noticed_by_nobody(
    checkpoint: Path, expected: torch.Tensor, disk: Disk
) -> None:
    with load(checkpoint) as model:
        assert torch.equal(tokens_of(model), expected)
        streamer = model._engine._executor.streamer

        to_fail = list[int]()

        def until_nothing_is_read(*_: object) -> None:
            end = time.monotonic() + 10
            while streamer._reading.num_reading and time.monotonic() < end:
                time.sleep(0.001)

        def let_the_next_reads_fail(*_: object) -> None:
            if to_fail:
                disk.fail_after(to_fail.pop())

        for layer in model.model.layers:  # so that nobody waits for what fails
            layer.self_attn.register_forward_pre_hook(until_nothing_is_read)
        model.model.layers[0].self_attn.register_forward_pre_hook(let_the_next_reads_fail)
        for num_reads in (0, 1, 2):
            to_fail.append(num_reads)
            assert torch.equal(tokens_of(model), expected)
            assert disk.num_failed == 1


@PREADV
def test_a_disk_that_stays_broken_and_recovers(checkpoint: Path, expected: torch.Tensor, disk: Disk) -> None:
    with load(checkpoint) as model:
        disk.fail_after(0, times=1_000_000)
        for _ in range(3):
            with pytest.raises(ReadError):
                tokens_of(model)
        disk.recover()
        assert torch.equal(tokens_of(model), expected)


@PREADV
def test_a_read_error_while_loading(checkpoint: Path, disk: Disk) -> None:
    """What is outside of the layers is read then; all else comes with the first pass."""
    disk.fail_after(0)
    refused(checkpoint, ReadError, str(checkpoint), os.strerror(errno.EIO))


@pytest.mark.parametrize("page_cache", [False, True])
def test_a_file_that_is_truncated_while_it_is_streamed(
    checkpoint: Path, expected: torch.Tensor, page_cache: bool
) -> None:
    shard = shard_of(checkpoint, "model.layers.2.mlp.up_proj.weight")
    content = shard.read_bytes()
    with load(checkpoint, page_cache=page_cache) as model:
        assert torch.equal(tokens_of(model), expected)
        os.truncate(shard, len(content) // 3)
        told = r"the file ends after|replaced or changed"
        for _ in range(2):
            with pytest.raises((ReadError, CheckpointError), match=told) as caught:
                tokens_of(model)
            assert str(shard) in str(caught.value)
        with shard.open("r+b") as stream:
            stream.write(content)
        with pytest.raises(CheckpointError, match="replaced or changed"):  # who knows what it is now
            tokens_of(model)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_direct_reads(
    checkpoint: Path, expected: torch.Tensor, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("there are no direct reads to refuse")
    real, num_refused = os.open, 0

    def refusing(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        nonlocal num_refused
        if flags & os.O_DIRECT:
            num_refused += 1
            raise OSError(code, os.strerror(code))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)
    with load(checkpoint, page_cache=False) as model:
        assert num_refused == len(shards(checkpoint))
        assert torch.equal(tokens_of(model), expected)


def test_a_shard_that_vanishes_between_planning_and_loading(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, shard = finish_loading, shards(checkpoint)[-1]

    def vanishing(*arguments: Any) -> None:
        shard.unlink()
        real(*arguments)

    monkeypatch.setattr("airstream.auto.finish_loading", vanishing)
    refused(checkpoint, CheckpointNotFoundError, str(shard))


# ----------------------------------------------------------------------------------------- conversions that fail


def store_transposed(folder: Path, stored_as: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every layer's down_proj lie transposed in the checkpoint, under that name, as some mixtures' experts do."""
    for number in range(CONFIG.num_hidden_layers):
        name = f"model.layers.{number}.mlp.down_proj.weight"
        stored = name.replace("down_proj", stored_as)
        shard, index = shard_of(folder, name), folder / "model.safetensors.index.json"
        tensors = load_file(shard)
        tensors[stored] = tensors.pop(name).t().contiguous()
        save_file(tensors, shard)
        index.write_text(index.read_text().replace(f'"{name}"', f'"{stored}"'))
    converter = WeightConverter([f"mlp.{stored_as}.weight"], ["mlp.down_proj.weight"], operations=[Transpose(0, 1)])
    monkeypatch.setattr(mapped_conversion, "get_model_conversion_mapping", lambda _: [converter])


@pytest.mark.parametrize("stored_as", ["down_proj_transposed", "down_proj"])
def test_a_conversion_that_computes(
    checkpoint: Path, expected: torch.Tensor, stored_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another name than the model's, and under the same."""
    store_transposed(checkpoint, stored_as, monkeypatch)
    with load(checkpoint) as model:
        assert torch.equal(tokens_of(model), expected)


def test_a_conversion_that_fails_is_done_again(
    checkpoint: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had been read, but not converted when the call failed, must not pass for weights in the next call."""
    store_transposed(checkpoint, "down_proj_transposed", monkeypatch)
    real, failures = conversion.convert_slab, list[MemoryError]()

    def convert_slab(*arguments: Any) -> None:
        if failures:
            fail_from_within(failures.pop())
        real(*arguments)

    monkeypatch.setattr(conversion, "convert_slab", convert_slab)
    with load(checkpoint) as model:
        assert torch.equal(tokens_of(model), expected)
        failures.append(MemoryError("no room to convert"))
        with pytest.raises(BudgetError, match="could not be allocated"):
            tokens_of(model)
        assert torch.equal(tokens_of(model), expected)


# --------------------------------------------------------------------------------------------- batches left out


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
def test_the_base_model_alone_never_asks_for_the_streamed_lm_head(
    original: Path, checkpoint: Path, prefetch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order in which batches are asked for is then not the one in which they are listed."""
    expected = AutoModelForCausalLM.from_pretrained(original).model(PROMPT).last_hidden_state
    frames = planner._frames

    def with_the_head_streamed(facts: ModelFacts, request: Request) -> Iterator[planner._Frame]:
        return (frame for frame in frames(facts, request) if not frame.head_resident)

    monkeypatch.setattr(planner, "_frames", with_the_head_streamed)
    with load(checkpoint, prefetch_batches=prefetch, max_context=64) as model:
        assert model.plan.prefetch_batches == prefetch
        assert model.plan.head == "streamed"
        for _ in range(10):
            assert torch.equal(model.model(PROMPT).last_hidden_state, expected)


# ------------------------------------------------------------------------------------------------------ the arguments


def test_a_budget_that_is_too_small(checkpoint: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    real, opened = files.WeightFile.__init__, list[Path]()

    def init(self: files.WeightFile, path: Path, *rest: Any) -> None:
        opened.append(path)
        real(self, path, *rest)

    monkeypatch.setattr(files.WeightFile, "__init__", init)
    message = refused(checkpoint, BudgetError, str(checkpoint), "1.0 MiB", "'model.layers.", max_memory="1MiB")
    assert opened == [], "weights were opened before the budget was found to be too small"
    match = re.search(r"max_memory=(\{.*\})", message)
    assert match, message
    with AutoModel.from_pretrained(checkpoint, device="cpu", max_memory=ast.literal_eval(match[1])) as model:
        assert torch.equal(tokens_of(model), expected)


def test_a_workload_that_is_too_large_for_the_budget(checkpoint: Path) -> None:
    budget = AutoModel.plan(checkpoint, device="cpu", max_context=64).peak_bytes["cpu"]
    refused(checkpoint, BudgetError, "64 x 4,096 tokens", max_memory=budget, max_context=4096, max_batch_size=64)


def test_a_prompt_beyond_the_budget_is_refused_before_it_runs(checkpoint: Path, expected: torch.Tensor) -> None:
    budget = AutoModel.plan(checkpoint, device="cpu", max_context=64).peak_bytes["cpu"]
    with load(checkpoint, max_memory=budget, max_context=64) as model:
        with pytest.raises(BudgetError, match=r"1 x 100,000 tokens.*max_memory leaves.*raise max_memory"):
            model(torch.ones(1, 100_000, dtype=torch.long))
        assert torch.equal(tokens_of(model), expected)


def test_an_unknown_argument(tmp_path: Path) -> None:
    refused(tmp_path / "gone", ArgumentError, "'max_memmory'", "did you mean 'max_memory'?", max_memmory="4GiB")
    with pytest.raises(ArgumentError, match="'prefetch': did you mean 'prefetch_batches'"):
        AutoModel.plan(tmp_path / "gone", prefetch=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_memory": {0: "4GiB"}}, ["max_memory names 0", "cpu"]),
        ({"max_memory": {"disk": "4GiB"}}, ["max_memory names 'disk'", "cpu"]),
        ({"max_memory": {"cpu": "plenty"}}, ["max_memory['cpu']='plenty'", "4GiB"]),
        ({"device": "warp"}, ["device='warp'"]),
        ({"device": "cuda:99"}, ["device='cuda:99'", "torch finds"]),
        ({"dtype": "int4"}, ["dtype='int4'", "bfloat16"]),
        ({"prefetch_batches": -1}, ["prefetch_batches=-1", "at least 0"]),
    ],
    ids=str,
)
def test_arguments_are_refused_before_the_checkpoint_is_looked_for(
    tmp_path: Path, options: dict[str, Any], said: list[str]
) -> None:
    refused(tmp_path / "gone", ArgumentError, *said, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_this_machine_does_not_have(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **_: None
    )  # other tests may have simulated one
    refused(checkpoint, ArgumentError, "device='cuda:0'", "torch finds", 'device="cpu"', device="cuda:0")


@pytest.mark.parametrize("how", ["set_default_device", "with"])
def test_a_default_device_without_values(checkpoint: Path, how: str) -> None:
    """It is the process that is set so, not the checkpoint that is wrong."""
    with ExitStack() as undo:
        if how == "with":
            undo.enter_context(torch.device("meta"))
        else:
            undo.callback(torch.set_default_device, None)
            torch.set_default_device("meta")
        with pytest.raises(UnsupportedError, match=r"default device is meta.*set_default_device"):
            AutoModel.from_pretrained(checkpoint, device="cpu", max_context=64)


def test_a_closed_model(checkpoint: Path) -> None:
    model = load(checkpoint)
    model.close()
    model.close()
    assert reader_threads() == []
    assert descriptors(checkpoint) == []
    with pytest.raises(ClosedError, match=r"from_pretrained"):
        tokens_of(model)
    with pytest.raises(ClosedError):
        model(PROMPT)
