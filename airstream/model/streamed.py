"""The class of a streamed model: the checkpoint's own class, with the few methods that cannot mean what they used to.

`streamed_class(LlamaForCausalLM)` is a subclass of it under the same name, so that whatever looks at the class, by
`isinstance` or by name, sees what it expects.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import PreTrainedModel

from airstream.errors import UnsupportedError
from airstream.model import workload
from airstream.model.adapters import WithAdapters
from airstream.model.engine import Engine  # not for type checking alone: transformers evaluates the annotations
from airstream.model.inputs import check_inputs
from airstream.plan import Workload  # likewise

if TYPE_CHECKING:
    from airstream.plan import Plan
    from airstream.profiling import Profile
    from airstream.stats import MeasuredLink, StreamStats


class GuardedModule:
    """A model whose calls are serialised, run without autograd, and leave nothing bound when they fail.

    What would change or keep weights is refused: they are not there between calls.
    """

    _engine: Engine

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._engine.part_pass(lambda: workload.of_pass(args, kwargs)):
            return super().__call__(*args, **kwargs)  # type: ignore[misc]  # the module class comes after this one

    def _apply(self, *_: Any, **__: Any) -> NoReturn:
        """What moving and casting come down to, under whichever name."""
        _refuse("moving or casting", "load it with from_pretrained(..., device=..., dtype=...) instead")

    def train(self, mode: bool = True) -> GuardedModule:
        if mode:
            _refuse("train()", "its weights are not kept; fine-tune the checkpoint with transformers or PEFT")
        return super().train(False)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> GuardedModule:
        if requires_grad:
            _refuse("requires_grad_()", "its weights are not kept; fine-tune the checkpoint with transformers or PEFT")
        return self

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("save_pretrained()", f"the checkpoint lies unchanged in {self._engine.folder}: copy that folder")

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("push_to_hub()", f"the checkpoint lies unchanged in {self._engine.folder}: upload that folder")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> Any:
        """Without a size this returns the embeddings, as in transformers; a streamed table cannot change its size."""
        if new_num_tokens is not None:
            _refuse("resize_token_embeddings()", "resize and save the checkpoint with transformers, then stream that")
        return self.get_input_embeddings()  # type: ignore[attr-defined]

    def set_input_embeddings(self, value: Any) -> NoReturn:  # noqa: ARG002 - transformers' signature
        _refuse("set_input_embeddings()", "change and save the checkpoint with transformers, then stream that")


class StreamedModel(WithAdapters, GuardedModule):
    """What a streamed model has beyond its transformers class."""

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
        """End the reader threads, close the files, give the memory back. Idempotent; later calls raise ClosedError."""
        self._engine.close()

    def __enter__(self) -> StreamedModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        check_inputs("model", args, kwargs)
        work = workload.of_pass(args, kwargs)
        with self._engine.one_pass(work, workload.has_cache(kwargs), self._heed_adapters):
            return super().__call__(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if not self.can_generate():  # type: ignore[attr-defined]
            raise UnsupportedError(
                f"{type(self).__name__} does not generate: call it, model(**inputs), for what it computes, or load the "
                "checkpoint with model_class= a class that does"
            )
        check_inputs("model.generate", args, kwargs)
        engine = self._engine
        with engine.guard():
            self._heed_adapters()
        config: Any = self.config  # type: ignore[attr-defined]
        defaults: Any = self.generation_config  # type: ignore[attr-defined]
        work = workload.of_generation(defaults, config.is_encoder_decoder, args, kwargs)
        prompt_tokens = work.tokens if work is not None else 0
        with (
            engine.generation(work),
            engine.observer.one_call(prompt_tokens, engine.gate.turns.hold),
            self._show_progress(work, kwargs.get("streamer") is not None),
        ):
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    def to(self, *args: Any, **kwargs: Any) -> StreamedModel:
        """Only what changes nothing is possible: a streamed model cannot be moved or cast."""
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        moves = device is not None and (device.type, device.index or 0) != (self.device.type, self.device.index or 0)
        if moves or dtype not in (None, self.dtype):  # type: ignore[attr-defined]
            self._apply()
        return self

    def cuda(self, device: int | None = None) -> StreamedModel:
        return self.to(torch.device("cuda", device or 0))

    def cpu(self) -> StreamedModel:
        return self.to("cpu")

    def half(self) -> StreamedModel:
        return self.to(torch.float16)

    def float(self) -> StreamedModel:
        return self.to(torch.float32)

    def bfloat16(self) -> StreamedModel:
        return self.to(torch.bfloat16)


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


def _refuse(call: str, remedy: str) -> NoReturn:
    raise UnsupportedError(f"a streamed model does not support {call}: {remedy}")
