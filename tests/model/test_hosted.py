"""Packed weights wait in host memory packed: fewer bytes wait, and fewer cross; the logits are those of the CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from airstream.layout.tensors import TensorSpec
from airstream.reporting.probe import H2D
from airstream.transfer.accelerator import AcceleratorBackend
from airstream.transfer.files import PAGE_BYTES
from tests.conftest import STREAMING, least_memory, on_accelerator, simulated_accelerator, stream
from tests.stand_ins.comparing import BF16, greedy, logits, prompts
from tests.stand_ins.threads import InThread
from tests.stand_ins.tiny_gguf import write_tiny_gguf

File = Callable[[str, str], Path]
PINNABLE = pytest.mark.parametrize("is_pinnable", [True, False], ids=["pinned", "refused"])


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> File:
    root = tmp_path_factory.mktemp("gguf")

    @functools.cache
    def file_of(name: str, quant: str) -> Path:
        (folder := root / f"{name}-{quant}").mkdir()
        return write_tiny_gguf(name, folder / "model.gguf", quant)

    return file_of


@pytest.fixture(scope="module")
def resident(gguf: File) -> Callable[[str, str], Any]:
    """As transformers loads it, in bfloat16."""

    @functools.cache
    def model_of(name: str, quant: str) -> Any:
        file = gguf(name, quant)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=BF16)
        return on_accelerator(model.eval())

    return model_of


@pytest.fixture
def allocated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of host memory that have been allocated for weights."""
    sizes: list[int] = []
    allocate = AcceleratorBackend.allocate_host
    monkeypatch.setattr(
        AcceleratorBackend, "allocate_host", lambda self, nbytes: sizes.append(nbytes) or allocate(self, nbytes)
    )
    return sizes


def packed_bytes(spec: TensorSpec) -> int:
    """What `spec`, or what it is made of, takes as it is stored, if it is packed."""
    pieces = [piece for stored in spec.stored for piece in stored.pieces]
    return sum(each.nbytes if each.cast is None or each.cast.is_blocks else each.target_bytes for each in pieces)


@PINNABLE
@pytest.mark.parametrize(
    ("name", "quant", "ratio"),
    [
        ("llama", "Q4_0", 18 / 64),  # some rows are dealt out
        ("llama", "Q8_0", 34 / 64),
        ("llama", "BF16", 1.0),
        ("qwen2moe", "Q4_0", 18 / 64),  # experts are merged of two tensors
        ("gemma2", "Q6_K", 210 / 512),  # norms are made by a converter
        ("gpt2", "Q4_0", 18 / 64),
    ],
)
def test_fewer_bytes_wait_and_fewer_cross(
    gguf: File, resident: Any, allocated: list[int], name: str, quant: str, ratio: float, is_pinnable: bool
) -> None:
    """By the ratio of the blocks, from pinned memory and from other; the plan has what is allocated."""
    expected = logits(resident(name, quant), prompts(2, 9))
    with simulated_accelerator(is_pinnable=is_pinnable) as sim:
        options = STREAMING | {"prefetch_batches": 0, "dtype": BF16}
        memory = least_memory(gguf(name, quant), "sim:0", **options) | {"cpu": 1 << 30}
        with stream(gguf(name, quant), "sim:0", **options, max_memory=memory) as model:
            assert model.plan.read_bytes == model.plan.resident_bytes == 0, "all of it waits on the host"
            for _ in range(2):
                assert torch.equal(logits(model, prompts(2, 9)), expected)
            model.measure_link()
            before = sim.h2d_bytes
            crossed = model.measure_link().nbytes
            assert sim.h2d_bytes - before == crossed
            with model.profile() as profile:
                assert torch.equal(logits(model, prompts(2, 9)), expected)
            assert [each.costs.host_bytes for each in profile.passes] == [crossed]
            assert profile.total.links[H2D].nbytes == crossed
            names = [each for batch in model.plan.batches for each in batch.hosted]
            specs = [model._engine._parts.specs[each] for each in names]
            assert crossed == sum(map(packed_bytes, specs))
            assert crossed == pytest.approx(ratio * sum(spec.nbytes for spec in specs), rel=0.03)
            assert sum(allocated) == model.plan.hosted_bytes == model.plan.tiers["cpu"].items["hosted weights"]
            assert crossed <= sum(allocated) < crossed + 2 * PAGE_BYTES * sum(len(spec.stored) for spec in specs)
        assert sim.races == []


@PINNABLE
def test_groups_move_between_the_device_the_host_and_the_disk(gguf: File, resident: Any, is_pinnable: bool) -> None:
    """What a long prompt takes from the device waits on the host or comes from disk, and returns after it."""
    reference, file = resident("llama", "Q4_0"), gguf("llama", "Q4_0")
    options = STREAMING | {"max_batch_size": 1, "max_context": None, "dtype": BF16}
    with simulated_accelerator(is_pinnable=is_pinnable) as sim:
        least = least_memory(file, "sim:0", **options)
        memory = {0: least[0] + 800_000, "cpu": least["cpu"] + 150_000}
        with stream(file, "sim:0", **options, max_memory=memory) as model:
            for tokens, is_long in ((12, False), (250, True), (250, True), (12, False), (250, True), (12, False)):
                assert torch.equal(logits(model, prompts(1, tokens)), logits(reference, prompts(1, tokens)))
                plan = model.plan
                assert (plan.hosted_bytes > 0, plan.read_bytes > 0, plan.resident_bytes > 0) == (is_long, is_long, True)
                hosted = model._engine._store._hosted.values()
                assert sum(each.memory.nbytes for each in hosted) == plan.hosted_bytes
                assert plan.tiers["cpu"].peak_bytes <= memory["cpu"]
        assert sim.races == []


@PINNABLE
def test_threads_that_generate_at_once(gguf: File, resident: Any, is_pinnable: bool) -> None:
    """Part of each layer stays, part waits packed, part comes from disk packed, all through one scratch."""
    reference, file = resident("llama", "Q4_0"), gguf("llama", "Q4_0")
    shapes = [(1, 7), (1, 9), (2, 5)]
    expected = [greedy(reference, prompts(*shape)) for shape in shapes]
    with simulated_accelerator(is_pinnable=is_pinnable) as sim:
        least = least_memory(file, "sim:0", **STREAMING, dtype=BF16)
        memory = least | {"cpu": least["cpu"] + 150_000}
        with stream(file, "sim:0", dtype=BF16, max_memory=memory) as model:
            assert model.plan.resident_bytes
            assert model.plan.hosted_bytes
            assert model.plan.read_bytes
            threads = [InThread(functools.partial(greedy, model, prompts(*shape))) for shape in shapes]
            for thread, tokens in zip(threads, expected, strict=True):
                assert torch.equal(thread.finish().result, tokens), thread.error
        assert sim.races == []
