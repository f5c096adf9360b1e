"""What other tools do with a model: copy it, save it, move it, put it into modules and pipelines of theirs."""

from __future__ import annotations

import copy
import errno
import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from transformers import LogitsProcessorList, StoppingCriteriaList, pipeline

from airstream import UnsupportedError
from tests.conftest import Resident, WriteTiny, stream
from tests.stand_ins.tiny_models import VOCAB_SIZE

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["streamed", "not loaded yet", "resident"])
def model(request: pytest.FixtureRequest, tiny: WriteTiny) -> Iterator[Any]:
    options = {} if request.param == "streamed" else {"max_memory": "1GiB"}
    with stream(tiny("llama-tied", FP32), **options) as model:
        if request.param == "resident":
            model(IDS)
        yield model


@pytest.fixture
def reference(resident: Resident) -> Any:
    return resident("llama-tied", FP32, FP32)


def save_object(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WHOLE: Mapping[str, tuple[Callable[[Any, Path], Any], str]] = {
    "deepcopy": (lambda model, file: copy.deepcopy(model), r"load a second one with from_pretrained\(\)"),
    "deepcopy of the base model": (lambda model, file: copy.deepcopy(model.base_model), "load a second one"),
    "deepcopy of what it is in": (lambda model, file: copy.deepcopy(nn.Sequential(model)), "load a second one"),
    "copy": (lambda model, file: copy.copy(model), "load a second one"),
    "pickle": (lambda model, file: pickle.dumps(model), "load a second one"),
    "torch.save": (lambda model, file: torch.save(model, file), "load a second one"),
    "save_model": (lambda model, file: save_model(model, str(file)), r"weight\.clone\(\) for name"),
    "save_file": (lambda model, file: save_file(model.state_dict(), file), r"weight\.clone\(\) for name"),
    "another of its class": (lambda model, file: type(model)(model.config), r"AutoModel\.from_pretrained"),
    "share_memory of what it is in": (lambda model, file: nn.Sequential(model).share_memory(), "device="),
    "half of what it is in": (lambda model, file: nn.Sequential(model).half(), "dtype="),
    "to_empty of what it is in": (lambda model, file: nn.Sequential(model).to_empty(device="cpu"), "device="),
    "zeros by what it is in": (lambda model, file: nn.Sequential(model)._apply(lambda each: each.zero_()), "device="),
    "train of what it is in": (lambda model, file: nn.Sequential(model).train(), "fine-tune"),
}


@pytest.mark.parametrize("what", WHOLE)
def test_refused_with_the_remedy(model: Any, reference: Any, tmp_path: Path, what: str) -> None:
    use, remedy = WHOLE[what]
    with pytest.raises(UnsupportedError, match=remedy):
        use(model, tmp_path / "file")
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


MOVES: Mapping[str, Callable[[nn.Module], Any]] = {
    "to(0)": lambda module: module.to(0),
    'to("cuda")': lambda module: module.to("cuda"),
    'to("cuda:1")': lambda module: module.to("cuda:1"),
    'to("meta")': lambda module: module.to("meta"),
    "to(float64)": lambda module: module.to(torch.float64),
    "to(dtype=float16)": lambda module: module.to(dtype=torch.float16),
    "to(a tensor)": lambda module: module.to(torch.zeros(1, dtype=torch.float64)),
    "cuda()": lambda module: module.cuda(),
    "cuda(1)": lambda module: module.cuda(1),
    "double()": lambda module: module.double(),
    "half()": lambda module: module.half(),
    "bfloat16()": lambda module: module.bfloat16(),
    "type()": lambda module: module.type(torch.float16),
}
"""That another device, or another type, would come of."""

STAYS: Mapping[str, Callable[[nn.Module], Any]] = {
    'to("cpu")': lambda module: module.to("cpu"),
    "to(float32)": lambda module: module.to(torch.float32),
    "cpu()": lambda module: module.cpu(),
    "float()": lambda module: module.float(),
    "type()": lambda module: module.type(torch.float32),
}
"""That nothing would."""

MOVED = ["", "model", "model.layers", "model.layers.2", "model.layers.1.mlp.up_proj", "model.embed_tokens", "lm_head"]


@pytest.mark.parametrize("path", MOVED)
@pytest.mark.parametrize("how", MOVES)
def test_moving_and_casting_are_refused_at_once(model: Any, reference: Any, path: str, how: str) -> None:
    """Of the model and of all that is in it, whatever is in memory."""
    if how == "to(0)" and path.startswith(("model.", "lm_head")) and not torch.accelerator.is_available():
        pytest.skip("torch itself refuses that: there is no such device")
    module = model.get_submodule(path)
    with pytest.raises(UnsupportedError, match=r"moving or casting: load it with .*device=..., dtype=..."):
        MOVES[how](module)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


@pytest.mark.parametrize("path", MOVED)
def test_what_stays_where_it_is_may_be_moved_there(model: Any, reference: Any, path: str) -> None:
    module = model.get_submodule(path)
    for how in STAYS.values():
        assert how(module) is module
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_a_device_that_nobody_knows_is_refused_likewise(model: Any) -> None:
    with pytest.raises(UnsupportedError, match="moving or casting"):
        model.to("gpu")


def test_state_dicts_have_the_values(model: Any, reference: Any, tmp_path: Path) -> None:
    expected = reference.state_dict()
    copies = {name: weight.clone() for name, weight in model.state_dict().items()}
    save_file(copies, tmp_path / "file.safetensors")
    for got in (
        copies,
        copy.deepcopy(model.state_dict()),
        pickle.loads(pickle.dumps(model.state_dict())),
        save_object(model.state_dict()),
        load_file(tmp_path / "file.safetensors"),
    ):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_parts_can_be_copied(model: Any, reference: Any) -> None:
    """With weights of their own, and without hooks."""
    hidden = torch.randn(2, 3, 64)
    for copied in (copy.deepcopy(model.lm_head), pickle.loads(pickle.dumps(model.lm_head))):
        assert torch.equal(copied(hidden), reference.lm_head(hidden))
        nn.init.zeros_(copied.weight)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_rows_of_the_lm_head(model: Any, reference: Any) -> None:
    """Trainers look at a few of them."""
    for module, same in ((model.lm_head, reference.lm_head), (model.model.embed_tokens, reference.model.embed_tokens)):
        assert torch.equal(module.weight[:2], same.weight[:2])
        assert torch.equal(module.weight[-1], same.weight[-1])
        assert torch.equal(module.weight[5, :3], same.weight[5, :3])
        with pytest.raises(IndexError):
            module.weight[VOCAB_SIZE]


@pytest.mark.parametrize("device", ["cpu", -1, torch.device("cpu"), None], ids=str)
def test_pipeline(model: Any, reference: Any, device: Any) -> None:
    def write(model: Any, tokenizer: Any) -> Any:
        writer = pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
        return writer("w5 w77 w20", do_sample=False, max_new_tokens=4)

    assert write(model, model.tokenizer) == write(reference, model.tokenizer)


class Pooling(nn.Module):
    """As libraries of embeddings have it: one of several modules in a row."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids).last_hidden_state.mean(1)


def test_a_module_of_several(model: Any, reference: Any) -> None:
    own = nn.Linear(64, 8)
    ours = nn.Sequential(Pooling(model.base_model), own).to("cpu").to(torch.device("cpu"), FP32).float().cpu().eval()
    with torch.no_grad():
        assert torch.equal(ours(IDS), own(Pooling(reference.base_model)(IDS)))
    assert nn.Sequential(model).to("cpu").eval().requires_grad_(False)[0] is model


@pytest.mark.parametrize("tool", ["cpu_offload", "disk_offload"])
def test_tools_that_move_weights(model: Any, reference: Any, tmp_path: Path, tool: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    arguments = [tmp_path] if tool == "disk_offload" else []
    with pytest.raises(UnsupportedError, match=rf"such as accelerate's cpu_offload: .*{re.escape('max_memory=')}"):
        getattr(accelerate, tool)(model, *arguments)


def through_a_function(module: nn.Module) -> Callable[..., Any]:
    return torch.compile(lambda *args, **kwargs: module(*args, **kwargs))


def by_the_module(module: nn.Module) -> Callable[..., Any]:
    nn.Module.compile(module)
    return module


COMPILED: Mapping[str, Callable[[nn.Module], Callable[..., Any]]] = {
    "torch.compile": torch.compile,
    "of a function": through_a_function,
    "compile()": by_the_module,
}


@pytest.mark.filterwarnings("ignore")  # of torch's own, about what it compiles
@pytest.mark.parametrize("path", ["", "model", "model.layers.1", "model.layers.1.mlp.up_proj"])
@pytest.mark.parametrize("how", COMPILED)
def test_compiling_is_refused_before_it_begins(tiny: WriteTiny, reference: Any, how: str, path: str) -> None:
    """Not by torch's own error, after minutes."""
    with stream(tiny("llama-tied", FP32)) as model:
        given = torch.randn(1, 4, 64) if "layers" in path else IDS
        with pytest.raises(UnsupportedError, match=r"does not support (torch\.)?compile\(\): .*without compiling"):
            COMPILED[how](model.get_submodule(path))(given)
        model.get_submodule(path)._compiled_call_impl = None
        assert torch.equal(model(IDS).logits, reference(IDS).logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("", {"fullgraph": True}),
        ("model.layers.1.mlp", {"fullgraph": True}),
        ("model.layers.1.mlp", {}),
        ("model.norm", {}),
    ],
    ids=str,
)
def test_compiling_what_stays_or_the_whole_graph_says_what_to_do(
    tiny: WriteTiny, reference: Any, path: str, options: dict[str, Any]
) -> None:
    """torch passes no errors of others on then, but what they say."""
    with stream(tiny("llama-tied", FP32), max_memory="4GiB") as model:
        assert torch.equal(model(IDS).logits, reference(IDS).logits)  # from now on all of it stays
        compiled = torch.compile(model.get_submodule(path), backend="eager", **options)
        with pytest.raises(Exception, match=r"a streamed model does not support .*[wW]ithout compiling"):
            compiled(torch.randn(1, 4, 64) if path else IDS)
        assert torch.equal(model(IDS).logits, reference(IDS).logits)


TRANSFORMED: Mapping[str, Callable[[Any], Any]] = {
    "vmap": lambda model: torch.func.vmap(lambda ids: model(ids[None]).logits)(IDS),
    "grad": lambda model: torch.func.grad(lambda each: model(inputs_embeds=each).logits.sum())(torch.ones(1, 2, 64)),
    "jvp": lambda model: torch.func.jvp(
        lambda each: model(inputs_embeds=each).logits, (torch.ones(1, 2, 64),), (torch.ones(1, 2, 64),)
    ),
}


@pytest.mark.parametrize("what", TRANSFORMED)
def test_transforms_are_refused(model: Any, reference: Any, what: str) -> None:
    with pytest.raises(UnsupportedError, match=r"torch\.func.*: give it a batch"):
        TRANSFORMED[what](model)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


class Failing:
    """A hook, a processor, a criterion and a streamer."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise self._error

    put = end = __call__


def call_hooked(model: Any, failing: Failing, path: str, is_before: bool) -> None:
    module = model.get_submodule(path)
    handle = (module.register_forward_pre_hook if is_before else module.register_forward_hook)(failing)
    try:
        model(IDS)
    finally:
        handle.remove()


RAISED_BY: Mapping[str, Callable[[Any, Failing], Any]] = {
    "processor": lambda model, f: model.generate(IDS, max_new_tokens=2, logits_processor=LogitsProcessorList([f])),
    "criterion": lambda model, f: model.generate(IDS, max_new_tokens=2, stopping_criteria=StoppingCriteriaList([f])),
    "streamer": lambda model, f: model.generate(IDS, max_new_tokens=2, streamer=f),
    "prefix": lambda model, f: model.generate(IDS, max_new_tokens=2, prefix_allowed_tokens_fn=f),
    **{
        f"hook {'before' if is_before else 'after'} {path or 'the model'}": partial(
            call_hooked, path=path, is_before=is_before
        )
        for path in ("", "model.embed_tokens", "model.layers.1", "model.layers.1.mlp", "model.norm", "lm_head")
        for is_before in (True, False)
    },
}


@pytest.mark.parametrize("where", RAISED_BY)
def test_what_the_users_code_raises_is_theirs(model: Any, reference: Any, where: str) -> None:
    """The same object, though its class may be one that tells of a shortage of memory."""
    for error in (
        MemoryError("theirs"),
        OSError(errno.ENOMEM, "theirs"),
        RuntimeError("out of memory: theirs"),
        torch.OutOfMemoryError("theirs"),
        KeyError("theirs"),
        StopIteration("theirs"),
        KeyboardInterrupt("theirs"),
    ):
        with pytest.raises(type(error)) as raised:
            RAISED_BY[where](model, Failing(error))
        assert raised.value is error
    assert torch.equal(model(IDS).logits, reference(IDS).logits)
