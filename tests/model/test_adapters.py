"""Adapters beside a streamed model compute what they compute beside a resident one, within the same budget."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from airstream import ArgumentError, AutoModel, BudgetError, CheckpointError, CheckpointNotFoundError, UnsupportedError
from airstream.model.absent import Absent
from airstream.plan.planner import smallest_plan
from tests.conftest import Resident, WriteTiny, on_accelerator, stream
from tests.stand_ins.comparing import greedy, logits, prompts
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.streamers import After
from tests.stand_ins.threads import InThread

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # PEFT asks transformers for it
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
]

BF16, FP32 = torch.bfloat16, torch.float32
IDS = prompts(1, 12)
Write = Callable[..., Path]

KINDS: Mapping[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "everywhere": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
}


@pytest.fixture(scope="session")
def adapter(tiny: WriteTiny, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """`adapter(name, dtype, seed, **config)`: the folder of an adapter of that tiny model, with random weights."""
    root = tmp_path_factory.mktemp("adapters")

    @functools.cache
    def written(name: str, dtype: torch.dtype, seed: int, config: tuple[tuple[str, Any], ...]) -> Path:
        folder = root / str(len(list(root.iterdir())))
        base = AutoModelForCausalLM.from_pretrained(tiny(name, dtype))
        torch.manual_seed(seed)
        settings = {key: list(value) if isinstance(value, tuple) else value for key, value in config}
        lora = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(base, lora)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter).mul_(0.02))
        model.save_pretrained(folder)
        return folder

    def write(name: str, dtype: torch.dtype, seed: int = 1, **config: Any) -> Path:
        frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
        return written(name, dtype, seed, tuple(sorted(frozen.items())))

    return write


def assert_equal(model: Any, reference: Any) -> None:
    """Logits of two prompts, and a few tokens."""
    for inputs in (prompts(1, 12), prompts(2, 9)):
        assert torch.equal(logits(model, inputs), logits(reference, inputs))
    assert torch.equal(greedy(model, inputs, 4), greedy(reference, inputs, 4))


def fresh(folder: Path) -> Any:
    """The resident model, to be changed."""
    return AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)


def with_adapter(folder: Path, adapter: Path, **options: Any) -> Any:
    """The resident model with an adapter, by PEFT alone; without options, as `load_adapter` of transformers."""
    options = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True} | options
    return peft.PeftModel.from_pretrained(fresh(folder), adapter, **options)


def least_memory_with(folder: Path, adapter: Path, device: str = "cpu") -> dict[int | str, int]:
    """The smallest max_memory that will do, to the byte, once the adapter is loaded."""
    with stream(folder, device, max_memory="1GiB") as model:
        model.load_adapter(adapter)
        peaks = smallest_plan(model._engine.plans.facts, model._engine.plans.request).peak_bytes
    return {int(tier) if tier.isdigit() else tier: nbytes for tier, nbytes in peaks.items()}


def stream_for(folder: Path, adapter: Path, device: str = "cpu") -> Any:
    """Streamed within so little memory that no weight stays once the adapter is loaded."""
    return stream(folder, device, max_memory=least_memory_with(folder, adapter, device))


# ---------------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_load_adapter(tiny: WriteTiny, resident: Resident, adapter: Write, kind: str, dtype: torch.dtype) -> None:
    folder, lora = tiny("llama", dtype), adapter("llama", dtype, **KINDS[kind])
    reference = fresh(folder)
    reference.load_adapter(str(lora))
    with stream_for(folder, lora) as model:
        model.load_adapter(lora)
        assert not any(batch.resident for batch in model.plan.batches)
        assert_equal(model, reference)
    without = logits(resident("llama", dtype, dtype), IDS)
    assert (logits(reference, IDS) - without).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_model(tiny: WriteTiny, adapter: Write, kind: str, low_cpu_mem_usage: bool) -> None:
    folder, lora = tiny("llama", BF16), adapter("llama", BF16, **KINDS[kind])
    options = {"autocast_adapter_dtype": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    reference = with_adapter(folder, lora, **options)
    with stream(folder, max_memory="64MiB") as base:
        assert_equal(peft.PeftModel.from_pretrained(base, lora, **options), reference)


@pytest.mark.parametrize("kind", ["everywhere", "lm_head", "whole modules"])
def test_on_an_accelerator(tiny: WriteTiny, adapter: Write, sim: SimDevice, kind: str) -> None:
    folder, lora = tiny("llama", BF16), adapter("llama", BF16, **KINDS[kind])
    with stream_for(folder, lora, "sim:0") as model:
        model.load_adapter(lora)
        assert {parameter.device for parameter in model.parameters()} == {torch.device("sim:0")}
        assert_equal(model, on_accelerator(with_adapter(folder, lora)))


def test_peft_model_on_an_accelerator(tiny: WriteTiny, adapter: Write, sim: SimDevice) -> None:
    folder, lora = tiny("llama", BF16), adapter("llama", BF16, **KINDS["everywhere"])
    with stream(folder, "sim:0", max_memory={0: "1GiB", "cpu": "1GiB"}) as base:
        model = peft.PeftModel.from_pretrained(base, lora, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        assert_equal(model, on_accelerator(with_adapter(folder, lora)))


OTHERS = {
    "gpt2": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
    "llama-tied": {"target_modules": ["q_proj", "embed_tokens"]},
    "qwen3_moe": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "phi3": {"target_modules": "all-linear", "use_rslora": True},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(tiny: WriteTiny, adapter: Write, name: str) -> None:
    """Transposed weights, tied ones, single parameters of merged experts."""
    folder, lora = tiny(name, FP32), adapter(name, FP32, **OTHERS[name])
    with stream_for(folder, lora) as model:
        model.load_adapter(lora)
        assert_equal(model, with_adapter(folder, lora))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_dora(tiny: WriteTiny, adapter: Write, dtype: torch.dtype) -> None:
    """It looks at whole weights: while it computes they are there, when it is loaded they are not."""
    folder, lora = tiny("llama", dtype), adapter("llama", dtype, target_modules=["q_proj", "down_proj"], use_dora=True)
    with stream_for(folder, lora) as model:
        model.load_adapter(lora)
        assert_equal(model, with_adapter(folder, lora))
    refused = pytest.raises(UnsupportedError, match=r"load_adapter.* or PEFT's low_cpu_mem_usage=True")
    with stream(folder, max_memory="64MiB") as base, refused:
        peft.PeftModel.from_pretrained(base, lora)
    with stream(folder, max_memory="64MiB") as base:
        assert_equal(
            peft.PeftModel.from_pretrained(base, lora, low_cpu_mem_usage=True),
            with_adapter(folder, lora, autocast_adapter_dtype=True),
        )


# ------------------------------------------------------------------------------------------------------------ several


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", FP32)


@pytest.fixture
def first(adapter: Write) -> Path:
    return adapter("llama", FP32, target_modules=["q_proj", "v_proj"])


@pytest.fixture
def second(adapter: Write) -> Path:
    return adapter("llama", FP32, seed=2, target_modules=["q_proj", "up_proj", "lm_head"])


def test_several_adapters(folder: Path, resident: Resident, first: Path, second: Path) -> None:
    base = resident("llama", FP32, FP32)
    with stream(folder, max_memory="64MiB") as model:
        model.load_adapter(first, adapter_name="a")
        model.load_adapter(second, adapter_name="b")
        assert model.active_adapters() == ["b"]
        assert_equal(model, with_adapter(folder, second))
        model.set_adapter("a")
        assert_equal(model, with_adapter(folder, first))
        model.disable_adapters()
        assert_equal(model, base)
        model.enable_adapters()
        assert_equal(model, with_adapter(folder, first))
        model.set_adapter(["a", "b"])
        both = with_adapter(folder, first)
        both.load_adapter(second, "b", autocast_adapter_dtype=False)
        both.base_model.set_adapter(["default", "b"])
        assert_equal(model, both)
        model.delete_adapter("b")
        model.set_adapter("a")
        assert_equal(model, with_adapter(folder, first))
        model.delete_adapter("a")
        assert not hasattr(model, "peft_config")
        assert_equal(model, base)
        model.load_adapter(second)
        assert_equal(model, with_adapter(folder, second))
        assert not any(parameter.requires_grad for parameter in model.parameters())


CHANGES: dict[str, Callable[[Any], Any]] = {
    "another": lambda model: model.set_adapter("b"),
    "both": lambda model: model.set_adapter(["a", "b"]),
    "none": lambda model: model.disable_adapters(),
    "delete": lambda model: model.delete_adapter("a"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_no_generation_changes_its_adapter_half_way(
    folder: Path, first: Path, second: Path, change: Callable[[Any], Any]
) -> None:
    """One that another thread asks to change waits until it has ended."""
    others: list[InThread] = []
    with stream(folder, max_memory="64MiB") as model:

        def ask() -> None:
            others.append(InThread(lambda: change(model)))
            others[0].join(0.5)

        model.load_adapter(second, adapter_name="b")
        model.load_adapter(first, adapter_name="a")
        options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        expected = model.generate(**IDS, **options).logits
        changed = model.generate(**IDS, streamer=After(ask), **options).logits
        assert all(map(torch.equal, changed, expected))
        assert others[0].finish(120).error is None
        assert not torch.equal(model(**IDS).logits[:, -1], expected[0]), "now it has"


def test_several_adapters_of_a_peft_model(folder: Path, resident: Resident, first: Path, second: Path) -> None:
    base, reference = resident("llama", FP32, FP32), with_adapter(folder, first)
    reference.load_adapter(second, "b")
    with stream(folder, max_memory="64MiB") as streamed:
        model = peft.PeftModel.from_pretrained(streamed, first)
        assert_equal(model, reference)
        model.load_adapter(second, "b")
        for name in ("b", "default"):
            model.set_adapter(name)
            reference.set_adapter(name)
            assert_equal(model, reference)
        with model.disable_adapter():
            assert_equal(model, base)
        mixed = prompts(3, 9) | {"adapter_names": ["b", "__base__", "default"]}
        reference.eval()
        assert torch.equal(model(**mixed).logits, reference(**mixed).logits)
        for each in (model, reference):
            each.add_weighted_adapter(["default", "b"], [0.7, 0.3], "both", combination_type="cat")
            each.set_adapter("both")
        assert_equal(model, reference)
        model.delete_adapter("both")
        model.set_adapter("b")
        reference.set_adapter("b")
        assert_equal(model, reference)
        assert model.unload() is streamed
        assert_equal(streamed, base)
        assert not streamed.plan.tiers["cpu"].items["adapters"]


# ------------------------------------------------------------------------------------------------------------- memory


def test_bytes_count_and_come_back(folder: Path, first: Path) -> None:
    nbytes = sum(tensor.nbytes for tensor in load_file(first / "adapter_model.safetensors").values())
    budget = {name: need + 100_000 for name, need in least_memory_with(folder, first).items()}
    with stream(folder, max_memory=budget) as model:
        before = model.plan
        model.load_adapter(first)
        assert model.plan.tiers["cpu"].items["adapters"] == nbytes
        assert model.plan.tiers["cpu"].peak_bytes <= budget["cpu"]
        assert model.plan.resident_bytes < before.resident_bytes
        assert "adapters" in str(model.plan)
        model.delete_adapter("default")
        model(**IDS)
        assert model.plan == before


def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was(
    folder: Path, resident: Resident, first: Path, second: Path
) -> None:
    with stream(folder) as model:
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(BudgetError, match=r"adapters .* max_memory gives .* smallest budget that would do"):
            model.load_adapter(first)
        assert [name for name, _ in model.named_modules()] == names
        assert_equal(model, resident("llama", FP32, FP32))
    with stream_for(folder, first) as model:
        model.load_adapter(first, "a")
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(BudgetError, match="adapters"):
            model.load_adapter(second, "b")
        assert [name for name, _ in model.named_modules()] == names
        assert model.active_adapters() == ["a"]
        assert_equal(model, with_adapter(folder, first))


def test_a_peft_model_that_does_not_fit_is_refused_when_called(folder: Path, resident: Resident, first: Path) -> None:
    with stream(folder) as streamed:
        model = peft.PeftModel.from_pretrained(streamed, first)
        for _ in range(2):
            with pytest.raises(BudgetError, match="adapters"):
                model.generate(**IDS, max_new_tokens=2)
        assert_equal(model.unload(), resident("llama", FP32, FP32))


def test_plans_change_after_loading(folder: Path, first: Path) -> None:
    """Modules have other names by then."""
    budget = least_memory_with(folder, first)["cpu"] - 4_550_000
    reference = with_adapter(folder, first)
    with stream(folder, max_memory=budget, max_context=None, max_batch_size=1) as model:
        model.load_adapter(first)
        assert torch.equal(greedy(model, IDS), greedy(reference, IDS))
        short = model.plan
        assert torch.equal(greedy(model, prompts(3, 17), 100), greedy(reference, prompts(3, 17), 100))
        assert model.plan.resident_bytes < short.resident_bytes
        assert torch.equal(greedy(model, IDS), greedy(reference, IDS))


def test_adapters_stay_and_weights_go(folder: Path, first: Path) -> None:
    with stream_for(folder, first) as model:
        model.load_adapter(first)
        model(**IDS)
        for layer in model.model.layers:
            kinds = {"lora_" in name: isinstance(tensor, Absent) for name, tensor in layer.named_parameters()}
            assert kinds == {True: False, False: True}


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("is_resident", [False, True])
@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_and_unload(),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.model.model.layers[0].self_attn.q_proj.merge(),
    ],
)
def test_merging_is_refused(
    folder: Path, resident: Resident, first: Path, merge: Callable[[Any], Any], is_resident: bool
) -> None:
    reference = with_adapter(folder, first)
    with stream(folder, max_memory="64MiB" if is_resident else least_memory_with(folder, first)) as streamed:
        if is_resident:
            streamed(**IDS)
        model = peft.PeftModel.from_pretrained(streamed, first)
        with pytest.raises(UnsupportedError, match="merge it into the checkpoint"):
            merge(model)
        assert_equal(model, reference)
        assert_equal(model.unload(), resident("llama", FP32, FP32))


@pytest.mark.parametrize("is_lazy", [False, True])
def test_merging_what_peft_has_just_put_in_is_refused(folder: Path, first: Path, second: Path, is_lazy: bool) -> None:
    """Nobody has told us of these wrappers yet: the weight itself notices, and no call computes with it."""
    with stream(folder, max_memory="64MiB") as streamed:
        streamed(**IDS)
        model = peft.PeftModel.from_pretrained(streamed, first)
        model.load_adapter(second, "b", low_cpu_mem_usage=is_lazy)
        model.set_adapter("b")
        merge = model.base_model.model.model.layers[0].mlp.up_proj.merge
        for change in (merge, lambda: model(**IDS), lambda: model.unload()(**IDS)):
            with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj\.weight' has been replaced"):
                change()


def test_training_is_refused(folder: Path, first: Path) -> None:
    with stream(folder, max_memory="64MiB") as model:
        for options in ({"is_trainable": True}, {"hotswap": True}):
            with pytest.raises(UnsupportedError, match="Fine-tune the checkpoint"):
                model.load_adapter(first, **options)
        with pytest.raises(UnsupportedError, match="fine-tune the checkpoint"):
            peft.PeftModel.from_pretrained(model, first).train()


def spoilt(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """A copy of the adapter with other weights."""
    target.mkdir()
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors")
    return target


Q = "base_model.model.model.layers.1.self_attn.q_proj"
SPOILT: Mapping[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "lacks": (lambda tensors: tensors.pop(f"{Q}.lora_A.weight"), r"lacks 1 .*layers\.1\.self_attn\.q_proj\.lora_A"),
    "has more": (
        lambda tensors: tensors.update({f"{Q.replace('1', '9')}.lora_A.weight": torch.zeros(4, 64)}),
        "1 tensor that the model has no place for",
    ),
    "has another shape": (
        lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.zeros(4, 63)}),
        "does not fit this model.*size mismatch",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_of_another_model(folder: Path, resident: Resident, first: Path, tmp_path: Path, kind: str) -> None:
    change, message = SPOILT[kind]
    with stream(folder, max_memory="64MiB") as model:
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            model.load_adapter(spoilt(first, tmp_path / "spoilt", change))
        assert_equal(model, resident("llama", FP32, FP32))
        model.load_adapter(first)
        assert_equal(model, with_adapter(folder, first))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_weights_that_an_adapter_brings_along_have_to_be_the_checkpoints(
    folder: Path, adapter: Write, tmp_path: Path, target: str
) -> None:
    lora = adapter("llama", FP32, target_modules=["q_proj", target])
    (key,) = [
        key for key in load_file(lora / "adapter_model.safetensors") if key.endswith(f"{target}.base_layer.weight")
    ]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key][100, 3] += 1

    other = spoilt(lora, tmp_path / "other", change)
    with stream(folder, max_memory="64MiB") as model:
        with pytest.raises(UnsupportedError, match=f"its own '.*{target}.weight', which is not the checkpoint's"):
            model.load_adapter(other)
        with pytest.raises(RuntimeError, match="has been replaced or changed"):
            peft.PeftModel.from_pretrained(model, other)
    for is_loaded in (True, False):
        with stream(folder, max_memory="64MiB") as model:
            if is_loaded:
                model(**IDS)
            with pytest.raises(UnsupportedError, match=f"{target}.weight' has been replaced"):
                peft.PeftModel.from_pretrained(model, other, low_cpu_mem_usage=True)


def test_single_tokens_are_refused(folder: Path, resident: Resident, adapter: Write) -> None:
    lora = adapter("llama", FP32, target_modules=["q_proj"], trainable_token_indices=[3, 4])
    with stream(folder, max_memory="64MiB") as model:
        with pytest.raises(UnsupportedError, match=r"trained single tokens.*merge it into the checkpoint"):
            model.load_adapter(lora)
        assert_equal(model, resident("llama", FP32, FP32))


def test_arguments(folder: Path, first: Path, tmp_path: Path) -> None:
    with stream(folder, max_memory="64MiB") as model:
        with pytest.raises(CheckpointNotFoundError, match="no PEFT adapter"):
            model.load_adapter(tmp_path)
        with pytest.raises(ArgumentError, match="folder or hub id"):
            model.load_adapter()
        for call in (model.enable_adapters, model.disable_adapters, model.active_adapters):
            with pytest.raises(ArgumentError, match="there is no adapter"):
                call()
        model.load_adapter(first, "a")
        with pytest.raises(ArgumentError, match="an adapter 'a' already"):
            model.load_adapter(first, "a")
        for call in (model.set_adapter, model.delete_adapter):
            with pytest.raises(ArgumentError, match="no adapter 'b': those loaded are a"):
                call("b")


def test_an_adapter_is_not_a_model(first: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"is an adapter, not a model: .* model\.load_adapter\("):
        AutoModel.from_pretrained(first)


def test_without_files(folder: Path, first: Path) -> None:
    config = peft.PeftConfig.from_pretrained(first)
    with stream(folder, max_memory="64MiB") as model:
        state = load_file(first / "adapter_model.safetensors")
        model.load_adapter(peft_config=config, adapter_state_dict=state)
        assert_equal(model, with_adapter(folder, first))


def test_without_peft(folder: Path, first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with stream(folder) as model, pytest.raises(UnsupportedError, match=r"pip install peft"):
        model.load_adapter(first)


# -------------------------------------------------------------------------------------- what stands for absent weights


def test_absent_weights_say_what_they_will_be(folder: Path, sim: SimDevice) -> None:
    with stream(folder, "sim:0", dtype=BF16) as model:
        weight = model.model.layers[2].mlp.up_proj.weight
        assert isinstance(weight, nn.Parameter)
        assert (weight.shape, weight.dtype, weight.device) == ((128, 64), BF16, torch.device("sim:0"))
        assert {parameter.device for parameter in model.parameters()} == {torch.device("sim:0")}


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight + 1,
        lambda weight: weight.data.mul_(2),
        lambda weight: weight.sum(),
        lambda weight: weight.copy_(torch.zeros(weight.shape)),
        lambda weight: nn.functional.linear(torch.zeros(1, 64), weight),
        lambda weight: torch.cat([torch.zeros(1, 64), weight]),
        lambda weight: torch.stack([weight, weight]),
    ],
)
def test_absent_weights_cannot_be_used(folder: Path, use: Callable[[torch.Tensor], Any]) -> None:
    with (
        stream(folder) as model,
        pytest.raises(UnsupportedError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight'.* in memory"),
    ):
        use(model.model.layers[1].mlp.up_proj.weight)
