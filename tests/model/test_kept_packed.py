"""Weights that are made dense stay packed in memory where that pays, and every pass makes them: the same logits."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from airstream.loading.machine import Machine
from airstream.loading.options import LoadOptions
from airstream.loading.prepare import prepare
from airstream.plan.plan import Plan
from airstream.plan.planner import make_plan
from airstream.plan.request import HOST
from airstream.plan.text import change_of
from airstream.plan.tiers import DEVICE_RUNTIME_BYTES
from airstream.plan.whatif import with_advice
from airstream.rates.facts import Rate
from airstream.repacking.repack import repack
from tests.conftest import STREAMING, least_memory, simulated_accelerator, stream
from tests.model.test_lifecycle import MEASURE
from tests.stand_ins.comparing import BF16, greedy, logits, prompts
from tests.stand_ins.quantized_models import LARGE
from tests.stand_ins.tiny_gguf import TINY_GGUF, TinyGguf, write_tiny_gguf
from tests.stand_ins.tiny_models import TINY, TinyModel, write_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of the packages of formats
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WIDE = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 6}
CODECS = ("int4", "fp8", "lossless")
BY_CODEC = pytest.mark.parametrize("codec", CODECS)
WHERE = pytest.mark.parametrize(
    ("codec", "device"),
    [(codec, device) for codec in CODECS for device in ("cpu", "sim:0") if (codec, device) != ("lossless", "sim:0")],
)
"""Where weights stay packed: of lossless ones an accelerator keeps what it has made."""
SLOW_DISK, FAST_DISK = (Rate(per_second, "of a test") for per_second in (1e6, 1e12))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kept")
    write_model(TinyModel("llama", {**TINY["llama"].fields, **WIDE}), root / "plain", BF16)
    write_model(TinyModel("llama", {**TINY["llama"].fields, **WIDE, "num_hidden_layers": 24}), root / "deep", BF16)
    made_of = dict.fromkeys(CODECS, "plain") | {"lossless": "deep"}  # few layers would not be worth the ring
    return {codec: repack(root / made_of[codec], root / codec, codec=codec, progress=False) for codec in CODECS}


@pytest.fixture(autouse=True)
def _small_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models are so small that what stays would be read along, for what does not."""
    monkeypatch.setattr("airstream.layout.slab.MAX_GAP_BYTES", 0)


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights are worth their while: it takes longer to read a weight than to make it."""
    monkeypatch.setattr("airstream.loading.machine.Machine.rates", with_disk(SLOW_DISK))


def with_disk(disk: Rate) -> Any:
    measured = Machine.rates

    def rates(self: Machine, *arguments: Any) -> Any:
        return replace(measured(self, *arguments), disk=disk, host_copy=disk)

    return rates


def plan_for(folder: Path, device: str, more: int, disk: Rate) -> Plan:
    prepared = prepare(folder, LoadOptions(device=device, **STREAMING, max_memory=memory(folder, device, more)))
    assert prepared.request.hardware is not None
    hardware = replace(prepared.request.hardware, disk=disk, host_copy=disk)
    return make_plan(prepared.facts, replace(prepared.request, hardware=hardware))


def memory(folder: Path, device: str, more: int) -> dict[Any, int]:
    """So many bytes more than the least where it computes."""
    where = 0 if device != "cpu" else HOST
    return {tier: least + more * (tier == where) for tier, least in least_memory(folder, device, **STREAMING).items()}


@WHERE
def test_logits_are_those_of_the_resident_model(
    folders: dict[str, Path], slow_disk: None, codec: str, device: str
) -> None:
    folder, inputs = folders[codec], [prompts(1, 1), prompts(2, 7)]
    stands_for = folder.with_name("deep") if codec == "lossless" else folder  # transformers cannot load that
    reference = AutoModelForCausalLM.from_pretrained(stands_for, dtype=BF16)
    expected = [logits(reference, each) for each in inputs]
    kinds = set()
    for more in (0, 400_000, 800_000, 1_500_000, 3_000_000, 6_000_000, 40_000_000):
        with ExitStack() as stack:
            sim = stack.enter_context(simulated_accelerator()) if device != "cpu" else None
            model = stack.enter_context(stream(folder, device, max_memory=memory(folder, device, more)))
            plan = model.plan
            for each, wanted in zip(inputs * 2, expected * 2, strict=True):
                assert torch.equal(logits(model, each), wanted)
            assert torch.equal(greedy(model, inputs[0]), greedy(reference, inputs[0]))
            kinds.add((plan.packed_bytes > 0, plan.streamed_bytes > 0))
            if sim is not None:
                assert sim.peak_bytes <= plan.tiers["0"].peak_bytes - DEVICE_RUNTIME_BYTES
                model.close()
                assert sim.races == []
    assert {(False, True), (True, True), (False, False)} <= kinds  # all streamed, some packed, all dense


@WHERE
def test_what_stays_packed_is_read_once(folders: dict[str, Path], slow_disk: None, codec: str, device: str) -> None:
    folder = folders[codec]
    with ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(simulated_accelerator())
        whole = next(
            plan
            for more in range(0, 40_000_000, 500_000)
            if (plan := plan_for(folder, device, more, SLOW_DISK)).packed_bytes and not plan.streamed_bytes
        )
        budget = {int(tier) if tier.isdigit() else tier: each.budget_bytes for tier, each in whole.tiers.items()}
        model = stack.enter_context(stream(folder, device, max_memory=budget))
        assert model.plan.packed_bytes > 0
        logits(model, prompts(1, 3))
        read = model.stats.streamed_bytes
        logits(model, prompts(1, 3))
        assert model.stats.streamed_bytes == read > 0


@BY_CODEC
def test_what_is_dense_takes_no_room_for_what_it_is_made_of(folders: dict[str, Path], codec: str) -> None:
    facts = prepare(folders[codec], LoadOptions(device="cpu", **STREAMING)).facts
    taken = sum(group.nbytes for batch in facts.batchings[1] for group in batch.groups)
    layers = facts.arithmetic.weight_bytes - facts.arithmetic.head_bytes
    assert layers <= taken <= 1.15 * layers  # pages, and scales


@BY_CODEC
def test_a_fast_disk_leaves_the_processor_less_to_do(folders: dict[str, Path], codec: str) -> None:
    slow, fast = (plan_for(folders[codec], "cpu", 3_000_000, disk) for disk in (SLOW_DISK, FAST_DISK))
    assert slow.packed_bytes > 0 == fast.packed_bytes
    assert slow.made_bytes > 0
    assert slow.read_bytes < fast.read_bytes


@WHERE
def test_more_memory_never_means_more_seconds(folders: dict[str, Path], codec: str, device: str) -> None:
    with ExitStack() as stack:
        if device != "cpu":
            stack.enter_context(simulated_accelerator())
        seconds = []
        for more in range(0, 24_000_000, 2_000_000):
            expected = plan_for(folders[codec], device, more, SLOW_DISK).prediction
            assert expected is not None
            seconds.append(expected.decode_seconds)
    assert all(later <= 1.02 * sooner for sooner, later in pairwise(seconds))


def test_a_change_of_plan_says_what_becomes_of_weights(folders: dict[str, Path]) -> None:
    with simulated_accelerator():
        plans = [plan_for(folders["fp8"], "sim:0", more, SLOW_DISK) for more in range(0, 40_000_000, 1_000_000)]
    whole = [plan for plan in plans if not plan.streamed_bytes]
    packed, dense = whole[0], whole[-1]
    assert packed.packed_bytes > 0 == dense.packed_bytes
    assert "made dense in every pass" in change_of(dense, packed)
    assert "streamed" not in change_of(dense, packed)
    assert not change_of(packed, dense)
    assert "of resident weights are streamed" in change_of(packed, plans[0])


ON_A_SLOW_DISK = """
from dataclasses import replace
from airstream.loading.machine import Machine
from airstream.rates.facts import Rate
measured = Machine.rates
slow = Rate(1e6, "of a test")
Machine.rates = lambda self, *given: replace(measured(self, *given), disk=slow, host_copy=slow)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the peak")
@BY_CODEC
def test_the_peak_stays_within_the_plan(tmp_path: Path, codec: str) -> None:
    write_model(LARGE, tmp_path / "plain", BF16)
    folder = repack(tmp_path / "plain", tmp_path / codec, codec=codec, progress=False)
    options: dict[str, Any] = {"layers_per_batch": 1, "max_context": 128, "page_cache": False}
    more = 60_000_000 if codec == "lossless" else 40_000_000
    budget = sum(least_memory(folder, **(STREAMING | options)).values()) + more
    assert plan_with(folder, budget, options).packed_bytes > 20_000_000
    code = ON_A_SLOW_DISK + MEASURE.replace("tokens=28", "tokens=4")
    call = [sys.executable, "-c", code, str(folder), str(budget), "exact"]
    result = subprocess.run(call, capture_output=True, text=True, check=True)
    measured = json.loads(result.stdout.splitlines()[-1])
    assert measured["ring"] < measured["rise"] <= measured["planned"]


def plan_with(folder: Path, budget: int, options: dict[str, Any]) -> Plan:
    prepared = prepare(folder, LoadOptions(device="cpu", **options, max_memory={"cpu": budget}))
    assert prepared.request.hardware is not None
    hardware = replace(prepared.request.hardware, disk=SLOW_DISK, host_copy=SLOW_DISK)
    return make_plan(prepared.facts, replace(prepared.request, hardware=hardware))


@pytest.mark.parametrize(("form", "is_advised"), [("plain", True), ("int4", False), ("fp8", False), ("lossless", True)])
def test_fewer_bytes_are_advised_where_layers_have_many(folders: dict[str, Path], form: str, is_advised: bool) -> None:
    folder = folders["int4"].with_name(form)
    prepared = prepare(folder, LoadOptions(device="cpu", **STREAMING, max_memory=memory(folder, "cpu", 0)))
    assert prepared.request.hardware is not None
    request = replace(
        prepared.request, hardware=replace(prepared.request.hardware, disk=SLOW_DISK, host_copy=SLOW_DISK)
    )
    advised = with_advice(make_plan(prepared.facts, request), prepared.facts, request).would_help
    assert ("4-bit weights" in advised) is is_advised


def test_a_plan_says_so(folders: dict[str, Path]) -> None:
    plan = plan_for(folders["int4"], "cpu", 3_000_000, SLOW_DISK)
    assert "of that, made dense in every pass" in str(plan)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.peak_bytes[HOST] <= plan.tiers[HOST].budget_bytes


@pytest.mark.parametrize("quant", ["Q4_0", "Q6_K"])
def test_blocks_of_gguf_stay_packed_too(
    tmp_path: Path, slow_disk: None, monkeypatch: pytest.MonkeyPatch, quant: str
) -> None:
    monkeypatch.setitem(TINY_GGUF, "llama", TinyGguf({**TINY_GGUF["llama"].fields, "block_count": 12}))
    file = write_tiny_gguf("llama", tmp_path / "model.gguf", quant)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    expected, kinds = logits(reference, prompts(2, 7)), set()
    for more in (0, 1_000_000, 3_000_000, 6_000_000, 40_000_000):
        with stream(file, max_memory=memory(file, "cpu", more)) as model:
            assert torch.equal(logits(model, prompts(2, 7)), expected)
            assert torch.equal(logits(model, prompts(2, 7)), expected)
            kinds.add((model.plan.packed_bytes > 0, model.plan.streamed_bytes > 0))
    assert {(False, True), (True, True), (False, False)} <= kinds
