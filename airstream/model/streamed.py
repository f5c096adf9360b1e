"""This makes the class of a streamed model: a subclass with the few methods that cannot mean what they used to.

`streamed_class(LlamaForCausalLM)` is a subclass of it under the same name, so that whatever looks at the class, by
`isinstance` or by name, sees what it expects.

It knows which methods transformers and its users call. It refuses to know plans and weights: the engine has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from airstream.compat.steps import SaysSteps
from airstream.compat.traits import attention_of
from airstream.errors import UnsupportedError
from airstream.model import calls
from airstream.model.adapters import WithAdapters
from airstream.model.binding import holds
from airstream.model.engine import Engine  # not for type checking alone: transformers evaluates the annotations
from airstream.model.gradients import refuse_gradients
from airstream.model.inputs import check_ids, check_inputs
from airstream.model.moving import changes_nothing, refuse_moving
from airstream.model.packed import CountsPacked
from airstream.model.refusals import LOAD, TRAIN, Refusing, refuse, refuse_tracing
from airstream.model.weight_refusals import refuse_change
from airstream.plan.request import Workload  # likewise
from airstream.reporting.units import counted

if TYPE_CHECKING:
    from airstream.plan.plan import Plan
    from airstream.profiling.profile import Profile
    from airstream.reporting.stats import MeasuredLink, StreamStats


class GuardedModule(Refusing):  # type: ignore[misc]  # made of a table
    """A model whose calls are serialised, run without autograd, and leave nothing bound when they fail.

    What would change or keep weights is refused: they are not there between calls.
    """

    _engine: Engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_tracing()
        refuse_gradients(self, args, kwargs)
        config = getattr(self, "config", None)
        gate = self._engine.gate
        with self._engine.part_pass(lambda: calls.of_pass(args, kwargs, config), calls.has_cache(kwargs)):
            was_computing = gate.is_computing
            try:
                gate.is_computing = True
                return super().__call__(*args, **kwargs)
            finally:
                gate.is_computing = was_computing

    def to(self, *args: Any, **kwargs: Any) -> GuardedModule:
        """Only what changes nothing is possible: a streamed model cannot be moved or cast."""
        try:
            device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        except (RuntimeError, TypeError):  # a device that this torch has not, or nobody
            refuse_moving()
        own = self._engine.device
        moves = device is not None and (device.type, device.index or 0) != (own.type, own.index or 0)
        kind = next((weight.dtype for weight in self.parameters() if weight.is_floating_point()), None)
        if moves or dtype not in (None, kind):
            refuse_moving()
        return self

    def cuda(self, device: int | str | torch.device | None = None) -> GuardedModule:
        """As `to(device)`: refused if it would move or cast a weight."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> GuardedModule:
        """As `to("cpu")`: refused if it would move or cast a weight."""
        return self.to("cpu")

    def half(self) -> GuardedModule:
        """As `to(torch.float16)`: refused if it would move or cast a weight."""
        return self.to(torch.float16)

    def float(self) -> GuardedModule:
        """As `to(torch.float32)`: refused if it would move or cast a weight."""
        return self.to(torch.float32)

    def bfloat16(self) -> GuardedModule:
        """As `to(torch.bfloat16)`: refused if it would move or cast a weight."""
        return self.to(torch.bfloat16)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GuardedModule:  # noqa: ARG002
        """What moving and casting come down to, under whichever name, of a module that this one is in as well."""
        if not changes_nothing(fn, self.parameters()):
            refuse_moving()
        return self

    def train(self, mode: bool = True) -> GuardedModule:
        """Only `train(False)` is possible: a streamed model is not trained."""
        if mode:
            refuse("train()", TRAIN)
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> GuardedModule:
        """Only `requires_grad_(False)` is possible: streamed weights get no gradients."""
        if requires_grad:
            refuse("requires_grad_()", TRAIN)
        return super().requires_grad_(False)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Without a size this returns the embeddings, as in transformers; a streamed table cannot change its size."""
        if new_num_tokens is not None:
            refuse("resize_token_embeddings()", "resize and save the checkpoint with transformers, then stream that")
        return self.get_input_embeddings()

    def set_attn_implementation(self, attn_implementation: Any, *_: Any, **__: Any) -> None:
        """Allowed if it changes nothing: another one takes other memory, and rounds otherwise."""
        if attn_implementation != attention_of(self.config):
            refuse("set_attn_implementation()", LOAD.format("attn_implementation"))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """As in transformers, tied weights once: here what stands for them is another object under each name."""
        seen = set()
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            stored = getattr(parameter, "stored", None)
            if stored is None or not remove_duplicate or stored not in seen:
                seen.add(stored)
                yield name, parameter

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what stands beside the weights, of adapters; the checkpoint's own weights are accepted as they are.

        Raises:
            UnsupportedError: a value is not the checkpoint's.
        """
        tensors = self.state_dict(keep_vars=True)
        stored = {name: tensor.stored for name, tensor in tensors.items() if hasattr(tensor, "stored")}
        known = stored.keys() & state_dict.keys()
        for name in known:
            if not holds(state_dict[name], stored[name]):
                refuse_change(stored[name].name)
        rest = {name: value for name, value in state_dict.items() if name not in known}
        result = super().load_state_dict(rest, strict=False, assign=assign)
        result = type(result)([name for name in result.missing_keys if name not in known], result.unexpected_keys)
        if strict and (result.missing_keys or result.unexpected_keys):
            raise UnsupportedError(
                f"the state dict lacks {counted(len(result.missing_keys), 'tensor')} of the model, and has "
                f"{len(result.unexpected_keys)} that it has no place for, such as "
                f"{[*result.missing_keys, *result.unexpected_keys][0]!r}: strict=False allows that"
            )
        return result


class StreamedModel(WithAdapters, SaysSteps, CountsPacked, GuardedModule):
    """What a streamed model has beyond its transformers class."""

    _engine: Engine
    _tokenizer: Any = None
    _processor: Any = None
    _load_beside: Callable[[str], Any]
    _show_progress: Callable[[Workload | None, bool], AbstractContextManager[Any]]

    @property
    def plan(self) -> Plan:
        """What is resident, what is streamed, and the predicted peak."""
        return self._engine.plan

    @property
    def stats(self) -> StreamStats:
        """What has been streamed so far, and how long computation waited for it."""
        return self._engine.stats

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = self._load_beside("tokenizer")
        return self._tokenizer

    @property
    def processor(self) -> Any:
        """What makes inputs of text, images and sound, loaded when first asked for; without such, the tokenizer."""
        if self._processor is None:
            self._processor = self._load_beside("processor")
        return self._processor

    @property
    def device(self) -> torch.device:
        """The device that computes: where inputs belong."""
        return self._engine.device

    def measure_link(self) -> MeasuredLink:
        """Stream all layers once without computing: how fast this machine's disk and bus are. Blocks for one pass.

        Returns:
            Bytes, wall seconds until the last of them had arrived, and where they came from; the rate is None if
            nothing is streamed.
        """
        return self._engine.measure_link()

    def profile(self) -> AbstractContextManager[Profile]:
        """Record where the time goes: `with model.profile() as profile: model.generate(...)`, then `print(profile)`.

        Waits for the device once a pass, and costs less than 2 % of the time.
        """
        return self._engine.observer.profile()

    @property
    def last_profile(self) -> Profile | None:
        """The profile that began last: of everything since loading with `profiling_mode=True`, or of `profile()`."""
        return self._engine.observer.last_profile

    def close(self) -> None:
        """End the reader threads, close the files, give the memory back. Idempotent; later calls raise ClosedError.

        In a hook it returns at once; the pass raises ClosedError at its next layer, and then memory is given back.
        """
        self._engine.close()

    def __enter__(self) -> StreamedModel:
        self._engine.gate.check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        refuse_tracing()
        self._check_inputs("model", args, kwargs)
        refuse_gradients(self, args, kwargs)
        work = calls.of_pass(args, kwargs, self.config)
        with self._engine.one_pass(work, calls.has_cache(kwargs), self._heed_adapters):
            return super().__call__(*args, **kwargs)

    def _check_inputs(self, call: str, args: Any, kwargs: Any) -> None:
        check_inputs(call, args, kwargs)
        if self.main_input_name == "input_ids":
            check_ids(call, args, kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. It waits until its KV cache fits beside those of other generations."""
        if not self.can_generate():
            raise UnsupportedError(
                f"{type(self).__name__} does not generate: call it, model(**inputs), for what it computes, or load the "
                "checkpoint with model_class= a class that does"
            )
        self._check_inputs("model.generate", args, kwargs)
        engine = self._engine
        with engine.guard():
            self._heed_adapters()
        config: Any = self.config
        defaults: Any = self.generation_config
        work = calls.of_generation(defaults, config.is_encoder_decoder, args, kwargs)
        prompt_tokens = work.prompt if work is not None else 0
        is_draft = calls.is_draft(args, kwargs)
        with (
            engine.generation(work, is_asked=calls.asks_for_length(args, kwargs)),
            engine.observer.one_call(prompt_tokens, is_draft, engine.gate.turns.hold),
            self._show_progress(work, kwargs.get("streamer") is not None),
        ):
            result = super().generate(*args, **kwargs)
            engine.observer.correct(calls.accepted_tokens(result, config.is_encoder_decoder, args, kwargs))
            return result

    def _accept(self, tokens: int) -> None:
        self._engine.observer.accept(tokens)


def make_streamed(
    model: PreTrainedModel,
    engine: Engine,
    load_beside: Callable[[str], Any],
    show_progress: Callable[[Workload | None, bool], AbstractContextManager[Any]],
) -> None:
    """Turn `model` into a streamed one: change its class, and guard the parts of it that can be called alone."""
    for part in _parts_called_alone(model):
        _change_class(part, GuardedModule, engine)
    _change_class(model, StreamedModel, engine)
    model._load_beside = load_beside
    model._show_progress = show_progress


def _parts_called_alone(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The base model, encoder and decoder: what users call by itself, besides the model."""
    parts = [model.base_model]
    if model.config.is_encoder_decoder:
        parts += [getattr(model, getter)() for getter in ("get_encoder", "get_decoder") if hasattr(model, getter)]
    different = {id(part): part for part in parts if isinstance(part, torch.nn.Module) and part is not model}
    return list(different.values())


def _change_class(module: torch.nn.Module, mixin: type, engine: Engine) -> None:
    cls = type(module)
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    module.__class__ = type(cls.__name__, (mixin, cls), names)
    object.__setattr__(module, "_engine", engine)
