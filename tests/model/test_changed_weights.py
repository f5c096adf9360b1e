"""Whoever changes a weight of a streamed model is told by name, whatever the budget: the change would not last."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from airstream import UnsupportedError
from airstream.compat.building import build_on_meta
from airstream.model.absent import Absent
from airstream.model.weight import Weight
from tests.conftest import STREAMING, Resident, WriteTiny, least_memory, stream
from tests.stand_ins.tiny_models import VOCAB_SIZE

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))
LONG = torch.randint(3, VOCAB_SIZE, (1, 200), generator=torch.Generator().manual_seed(2))
PATH = "model.layers.1.mlp.up_proj"
NAME = f"{PATH}.weight"


@pytest.fixture
def folder(tiny: WriteTiny) -> Path:
    return tiny("llama", FP32)


class Half(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


def assign(module: nn.Module, values: torch.Tensor) -> None:
    module.weight = nn.Parameter(values)


def assign_data(module: nn.Module, values: torch.Tensor) -> None:
    module.weight.data = values


def add_to_data(module: nn.Module, values: torch.Tensor) -> None:
    """As PEFT merges an adapter: written first, then assigned what is there already."""
    module.weight.data += 1


def index(module: nn.Module, values: torch.Tensor) -> None:
    module.weight[0] = values[0]


def delete(module: nn.Module, values: torch.Tensor) -> None:
    del module.weight
    module.register_buffer("weight", values)


def swap(module: nn.Module, values: torch.Tensor) -> None:
    torch.utils.swap_tensors(module.weight, nn.Parameter(values, requires_grad=False))


def through_a_slice(module: nn.Module, values: torch.Tensor) -> None:
    module.weight[:2].copy_(values[:2])


def through_state_dict(module: nn.Module, values: torch.Tensor) -> None:
    module.state_dict()["weight"].copy_(values)


ROADS: Mapping[str, Callable[[Any, torch.Tensor], Any]] = {
    "assignment": assign,
    "deletion": delete,
    "swap_tensors": swap,
    "swap_tensors with a tensor": lambda module, values: torch.utils.swap_tensors(module.weight, values),
    ".data =": assign_data,
    ".data +=": add_to_data,
    ".data.mul_": lambda module, values: module.weight.data.mul_(0.5),
    ".data[0] =": lambda module, values: module.weight.data.__setitem__(0, values[0]),
    ".data.data.zero_": lambda module, values: module.weight.data.data.zero_(),
    "detach().add_": lambda module, values: module.weight.detach().add_(1),
    "mul_": lambda module, values: module.weight.mul_(0.5),
    "copy_": lambda module, values: module.weight.copy_(values),
    "set_": lambda module, values: module.weight.set_(values),
    "fill_ of rows": lambda module, values: module.weight[3:5].fill_(0),
    "copy_ to rows": through_a_slice,
    "rows =": index,
    "init.zeros_": lambda module, values: nn.init.zeros_(module.weight),
    "a view's": lambda module, values: module.weight.view(-1)[:3].zero_(),
    "out=": lambda module, values: torch.add(values, 1, out=module.weight),
    "state_dict()": through_state_dict,
    "apply": lambda module, values: module.apply(lambda each: nn.init.ones_(each.weight)),
    "prune": lambda module, values: prune.l1_unstructured(module, "weight", 0.5),
    "spectral_norm": lambda module, values: nn.utils.spectral_norm(module),
    "weight_norm": lambda module, values: parametrizations.weight_norm(module),
    "orthogonal": lambda module, values: parametrizations.orthogonal(module),
    "parametrization": lambda module, values: parametrize.register_parametrization(module, "weight", Half()),
    "a fused optimizer": lambda module, values: step_fused(module.weight),
    "module.load_state_dict": lambda module, values: module.load_state_dict({"weight": values}),
    "module.load_state_dict(assign=True)": lambda module, values: module.load_state_dict(
        {"weight": values}, assign=True
    ),
}


def step_fused(weight: torch.Tensor) -> None:
    """Fused optimizers write without a count of it."""
    weight.grad = torch.ones(weight.shape)
    torch.optim.SGD([weight], lr=0.1, fused=True).step()


@pytest.fixture(params=["streamed", "not loaded yet", "resident"])
def model(request: pytest.FixtureRequest, folder: Path) -> Any:
    """The three states that a weight can be in between two calls."""
    options = {} if request.param == "streamed" else {"max_memory": "1GiB"}
    with stream(folder, **options) as model:
        if request.param != "not loaded yet":
            model(IDS)
        assert isinstance(model.get_submodule(PATH).weight, Weight if request.param == "resident" else Absent)
        yield model


def assert_refused(model: Any, name: str, change: Callable[[], Any]) -> None:
    """Changing is refused by name, or whatever is computed after it."""
    refusal: RuntimeError | None = None
    try:
        change()
    except RuntimeError as error:
        refusal = error
    if refusal is not None:
        assert isinstance(refusal, UnsupportedError)
        assert f"'{name}'" in str(refusal)
        return
    for compute in (lambda: model(IDS), lambda: model(IDS), lambda: model.generate(IDS, max_new_tokens=2)):
        with pytest.raises(UnsupportedError, match=f"'{name}' has been replaced or changed"):
            compute()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of the older utilities
@pytest.mark.parametrize("road", ROADS)
def test_a_changed_weight_is_refused_by_name(model: Any, road: str) -> None:
    module = model.get_submodule(PATH)
    with torch.no_grad():
        assert_refused(model, NAME, lambda: ROADS[road](module, torch.zeros(module.weight.shape)))


@pytest.mark.parametrize("road", ["assignment", "swap_tensors", ".data =", ".data +=", ".data.mul_", "mul_", "copy_"])
@pytest.mark.parametrize("path", ["lm_head", "model.norm", "model.embed_tokens"])
def test_so_is_one_outside_the_layers(model: Any, path: str, road: str) -> None:
    module = model.get_submodule(path)
    with torch.no_grad():
        assert_refused(model, f"{path}.weight", lambda: ROADS[road](module, torch.zeros(module.weight.shape)))


@pytest.mark.parametrize("budget", [None, "1GiB"])
@pytest.mark.parametrize("road", ["assignment", "swap_tensors", ".data +=", ".data.mul_", "mul_"])
def test_so_is_one_that_a_hook_changes_while_its_layer_computes(folder: Path, road: str, budget: str | None) -> None:
    with stream(folder, **({} if budget is None else {"max_memory": budget})) as model:
        module = model.get_submodule(PATH)
        zeros = torch.zeros(module.weight.shape)

        def change(*_: Any) -> None:
            ROADS[road](module, zeros)

        module.register_forward_pre_hook(change)
        for _ in range(3):
            with pytest.raises(UnsupportedError, match=f"'{NAME}' has been replaced or changed"):
                model(IDS)


def test_so_are_two_of_a_models_weights_that_change_places(model: Any) -> None:
    """Each is a weight as ever, and nothing was written to it."""
    mlp = model.get_submodule(PATH.rpartition(".")[0])
    torch.utils.swap_tensors(mlp.up_proj.weight, mlp.gate_proj.weight)
    for _ in range(2):
        with pytest.raises(
            UnsupportedError, match=r"'model\.layers\.1\.mlp\.(up|gate)_proj\.weight' has been replaced"
        ):
            model(IDS)


def test_the_change_is_noticed_before_its_memory_is_given_up(folder: Path) -> None:
    """A longer prompt takes memory of weights, which would come back from disk as they were."""
    options: dict[str, Any] = {**STREAMING, "max_context": None, "max_batch_size": 1}
    with stream(folder, **options, max_memory={"cpu": least_memory(folder, **options)["cpu"] + 460_000}) as model:
        model(IDS)
        usual = model.plan
        model(LONG)
        assert model.plan.resident_bytes < usual.resident_bytes
        model(IDS)
        assert model.plan == usual
        kept = [name for name, weight in model.model.layers.named_parameters() if isinstance(weight, Weight)]
        model.model.layers.get_parameter(kept[-1]).mul_(0.5)
        acquired = model.stats.acquired
        with pytest.raises(UnsupportedError, match=f"layers.{kept[-1]}' has been replaced"):
            model(LONG)
        assert model.stats.acquired == acquired


def test_putting_the_weight_back_helps(model: Any, resident: Resident) -> None:
    module = model.get_submodule(PATH)
    ours = module.weight
    module.weight = nn.Parameter(torch.zeros(ours.shape), requires_grad=False)
    with pytest.raises(UnsupportedError, match=NAME):
        model(IDS)
    module.weight = ours
    assert torch.equal(model(IDS).logits, resident("llama", FP32, FP32)(IDS).logits)


@pytest.mark.parametrize("name", [NAME, "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_the_checkpoints_own_values_are_accepted(model: Any, resident: Resident, name: str) -> None:
    """Adapters bring along what they were trained with."""
    reference = resident("llama", FP32, FP32)
    values, module = reference.get_parameter(name), model.get_submodule(name.rpartition(".")[0])
    with torch.no_grad():
        module.weight.copy_(values)
        assert torch.equal(model(IDS).logits, reference(IDS).logits)
        module.weight = nn.Parameter(values.clone(), requires_grad=False)
        model.load_state_dict({name: values}, strict=False)
        assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_load_state_dict(model: Any, resident: Resident) -> None:
    reference = resident("llama", FP32, FP32)
    model.load_state_dict(reference.state_dict())
    state = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    state[NAME][7, 3] += 1
    with pytest.raises(UnsupportedError, match=f"'{NAME}' has been replaced"):
        model.load_state_dict(state)
    with pytest.raises(UnsupportedError, match=r"1 that it has no place for, such as 'other'.*strict=False"):
        model.load_state_dict(reference.state_dict() | {"other": torch.zeros(1)})
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


PARTS: dict[str, tuple[str, Callable[[Any], nn.Module]]] = {
    "the module": (f"{PATH}.", lambda model: model.get_submodule(PATH)),
    "a part of a layer": ("model.layers.1.mlp.", lambda model: model.model.layers[1].mlp),
    "a layer": ("model.layers.1.", lambda model: model.model.layers[1]),
    "all layers": ("model.layers.", lambda model: model.model.layers),
    "the base model": ("model.", lambda model: model.model),
    "the model": ("", lambda model: model),
    "in a module of the user's": ("", lambda model: nn.Sequential(model)),
}
"""By what a state dict is loaded into: what its names lack of the model's, and how to find it."""


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("part", PARTS)
def test_a_state_dict_is_refused_by_our_name_wherever_it_is_loaded(
    model: Any, resident: Resident, part: str, assign: bool
) -> None:
    prefix, find = PARTS[part]
    module, reference = find(model), resident("llama", FP32, FP32)
    before = "0." if part.startswith("in a module") else ""
    same = {
        before + name.removeprefix(prefix): values.clone()
        for name, values in reference.state_dict().items()
        if name.startswith(prefix)
    }
    module.load_state_dict(same, assign=assign)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
    name = before + NAME.removeprefix(prefix)
    for values in (same[name] + 1, same[name][:1], same[name].to("meta")):
        with pytest.raises(UnsupportedError, match=f"^'{NAME}' has been replaced or changed"):
            module.load_state_dict(same | {name: values}, assign=assign)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_a_copy_of_a_layer_takes_any_state_dict(model: Any) -> None:
    layer = copy.deepcopy(model.model.layers[1])
    layer.load_state_dict({name: values * 2 for name, values in layer.state_dict().items()})


def test_tying_again_changes_nothing(tiny: WriteTiny, resident: Resident) -> None:
    for options in ({}, {"max_memory": "1GiB"}):
        with stream(tiny("llama-tied", FP32), **options) as model:
            for _ in range(2):
                model.tie_weights()
                assert torch.equal(model(IDS).logits, resident("llama-tied", FP32, FP32)(IDS).logits)


@torch.inference_mode()
def test_in_inference_mode(folder: Path) -> None:
    """torch counts no changes of what is allocated in it."""
    with stream(folder, max_memory="1GiB") as model:
        model(IDS)
        model.get_submodule(PATH).weight.mul_(0.5)
        with pytest.raises(UnsupportedError, match=NAME):
            model(IDS)


LOOK_UPS: Mapping[str, Callable[[Any], Any]] = {
    "a pass": lambda model: model(IDS),
    "generate": lambda model: model.generate(IDS, max_new_tokens=2),
    "the table itself": lambda model: model.model.embed_tokens(IDS),
}


@pytest.mark.parametrize("look_up", LOOK_UPS.values(), ids=LOOK_UPS)
def test_a_table_that_would_change_itself_is_refused(
    model: Any, resident: Resident, look_up: Callable[[Any], Any]
) -> None:
    """What torch's embeddings have to train with is let be, but for a largest norm."""
    reference = resident("llama", FP32, FP32)
    table = model.model.embed_tokens
    table.scale_grad_by_freq, table.norm_type = True, 1.0
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
    table.max_norm = 0.1
    for _ in range(2):
        with pytest.raises(UnsupportedError, match=r"max_norm=0\.1 .*'model\.embed_tokens\.weight'"):
            look_up(model)
    table.max_norm = None
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_so_is_a_largest_norm_in_the_call_itself(folder: Path) -> None:
    with stream(folder) as model, pytest.raises(UnsupportedError, match=r"max_norm=1\.0 .*embed_tokens"):
        nn.functional.embedding(IDS, model.model.embed_tokens.weight, max_norm=1.0)


@pytest.mark.parametrize("budget", [{}, {"max_memory": "1GiB"}], ids=["streamed", "resident"])
def test_a_model_with_such_a_table_is_not_loaded(
    folder: Path, budget: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = budget or {"max_memory": least_memory(folder, **STREAMING)}

    def build(*args: Any) -> Any:
        model = build_on_meta(*args)
        model.model.embed_tokens.max_norm = 1.0
        return model

    monkeypatch.setattr("airstream.loading.build.build_on_meta", build)
    with pytest.raises(UnsupportedError, match=r"max_norm=1\.0 .*'model\.embed_tokens\.weight'"):
        stream(folder, **options)


def test_a_copy_of_a_table_may_have_one(model: Any) -> None:
    copied = copy.deepcopy(model.model.embed_tokens)
    copied.max_norm = 0.1
    assert float(copied(IDS).detach().norm(dim=-1).max()) < 0.1001


# ------------------------------------------------------------------------------------------------------------- copies

COPIES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "clone": lambda weight: weight.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda weight: pickle.loads(pickle.dumps(weight)),
    "detach().clone()": lambda weight: weight.detach().clone(),
    "numpy": lambda weight: torch.from_numpy(weight.numpy().copy()),
    "to another dtype and back": lambda weight: weight.double().float(),
    "all its rows": lambda weight: weight[:],
    "all its rows, one by one": lambda weight: torch.stack([weight[row] for row in range(len(weight))]),
    "its rows by numbers": lambda weight: weight[torch.arange(len(weight)) - len(weight)],
    "half of its rows": lambda weight: torch.cat([weight[: len(weight) // 2], weight[len(weight) // 2 :]]),
}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe", "gpt2", "phi3"])
def test_copies_have_the_values(tiny: WriteTiny, resident: Resident, name: str) -> None:
    """Of streamed layers, of tables that are left on disk, of experts that are put together."""
    expected = resident(name, FP32, FP32).state_dict()
    with stream(tiny(name, FP32)) as model:
        for key, weight in model.state_dict().items():
            for how, copied in COPIES.items():
                if how.startswith("all its rows") and type(weight) is Weight:
                    continue
                assert torch.equal(copied(weight).detach(), expected[key]), (key, how)
        copied = copy.deepcopy(model.state_dict())
        assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in copied.values())
        assert all(torch.equal(copied[key], expected[key]) for key in expected)


@pytest.mark.parametrize("budget", [None, "1GiB"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer.mlp.gate))])
def test_a_copied_buffer_is_a_buffer(
    tiny: WriteTiny, resident: Resident, budget: str | None, copied: Callable[[nn.Module], nn.Module]
) -> None:
    """Whoever assigns it, registers it, and what counts parameters does not count it."""
    expected = copied(resident("deepseek_v3", FP32, FP32).model.layers[1])
    assert any(isinstance(each, torch.Tensor) for each in expected.buffers())
    with stream(tiny("deepseek_v3", FP32), **({"max_memory": budget} if budget else {})) as model:
        for _ in range(2):
            for _, buffer in model.named_buffers():
                assert not isinstance(buffer, nn.Parameter)
            ours = copied(model.model.layers[1])
            for kind in ("named_parameters", "named_buffers"):
                theirs = dict(getattr(expected, kind)())
                assert {name: type(each) for name, each in getattr(ours, kind)()} == {
                    name: type(each) for name, each in theirs.items()
                }
                assert all(torch.equal(each, theirs[name]) for name, each in getattr(ours, kind)())
            model(IDS)


READS: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda weight: weight.sum(),
    "T": lambda weight: weight.T,
    "equal": lambda weight: torch.equal(weight, torch.zeros(weight.shape)),
    "equal to it": lambda weight: torch.equal(torch.zeros(weight.shape), weight),
    "tolist": lambda weight: weight.tolist(),
    "iteration": list,
    "in": lambda weight: 0.5 in weight,
    "product": lambda weight: torch.ones(1, weight.shape[0]) @ weight,
    "a column": lambda weight: weight[:, 0],
    "norm": torch.linalg.norm,
    "dlpack": lambda weight: torch.from_dlpack(weight),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_who_only_reads_is_told_what_to_write(folder: Path, read: Callable[[torch.Tensor], Any]) -> None:
    with stream(folder) as model:
        weight = model.get_parameter(NAME)
        with pytest.raises(UnsupportedError) as caught:
            read(weight)
        assert str(caught.value).startswith(f"weight.clone() reads {NAME!r} from the checkpoint")
        assert "adapter" not in str(caught.value)
        assert "change" not in str(caught.value)


def test_a_copy_that_memory_cannot_hold_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airstream.model.stored_in_files.available_host_bytes", lambda: 1000)
    with stream(folder) as model, pytest.raises(MemoryError, match=rf"{NAME}.* takes .* copy fewer weights"):
        copy.deepcopy(model.get_parameter(NAME))
