"""`AutoModel.from_pretrained` goes from what the user asks for to a running model, by composing the floors below."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import PreTrainedModel

from airstream.checkpoint.beside import check_small_files, without_tokenizer
from airstream.checkpoint.gguf import GgufIndex
from airstream.checkpoint.hub import check_name
from airstream.checkpoint.locate import locate
from airstream.codecs.names import LOSSLESS_CODEC
from airstream.compat.asked_formats import AskedFormat
from airstream.compat.blame import Consequences, blamed_on, no_advice
from airstream.compat.building import finish_loading, load_generation_config
from airstream.compat.gguf import gguf_tokenizer
from airstream.compat.small_files import small_file_at_fault
from airstream.errors import CheckpointNotFoundError, UnsupportedError
from airstream.loading.arguments import adopt, refuse_unnamed
from airstream.loading.asked import settled
from airstream.loading.fitting import fitting_plan
from airstream.loading.machine import THIS_MACHINE, Machine
from airstream.loading.options import LoadOptions, MaxMemory, resolve_device
from airstream.loading.prepare import DEFAULTS, STEPS, prepare, prepare_for_planning
from airstream.loading.prepared import Prepared
from airstream.loading.smaller import packed_alternatives
from airstream.model.engine import Engine
from airstream.model.forked import compute_on_one_thread
from airstream.model.shortage import explained
from airstream.model.streamed import StreamedModel, make_streamed
from airstream.plan.plan import Plan
from airstream.plan.request import Workload
from airstream.plan.whatif import with_advice
from airstream.profiling.live import progress
from airstream.repacking.cached import packed_copy
from airstream.reporting.status import Activity, showing
from airstream.system.forks import is_forked
from airstream.system.in_use import using
from airstream.system.memory import process_bytes
from airstream.transfer.machinery import Machinery
from airstream.transfer.opening import open_machinery

Beside = Literal["tokenizer", "processor"]
"""What lies beside a model's weights and makes its inputs."""

LAST_STEP = "reading the small parts"

NOTHING: Mapping[str, Any] = {}


class AutoModel:
    """Streams models of any architecture that transformers knows. See `from_pretrained`."""

    def __init__(self, *_: Any, **__: Any) -> None:
        raise UnsupportedError("AutoModel is not made directly: use AutoModel.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *unnamed: Any,
        dtype: str | torch.dtype = "auto",
        device: str | int | torch.device | None = None,
        max_memory: MaxMemory = None,
        max_context: int | None = None,
        max_batch_size: int = 1,
        layers_per_batch: int | Literal["auto"] = "auto",
        prefetch_batches: int | Literal["auto"] = "auto",
        page_cache: bool | Literal["auto"] = "auto",
        model_class: Any = None,
        attn_implementation: str | None = None,
        compression: str | None = None,
        kernels: Literal["exact", "fast"] = "exact",
        gguf_file: str | None = None,
        subfolder: str = "",
        variant: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        trust_remote_code: bool = False,
        profiling_mode: bool = False,
        progress: bool | Literal["auto"] = "auto",
        **foreign: Any,
    ) -> Any:
        """A transformers model of the checkpoint's own class whose layers are streamed from disk as they are needed.

        It is a `PreTrainedModel`: `generate()`, `pipeline(...)` and the rest work as ever, with the same results to the
        bit where the arithmetic is the same. It has `tokenizer`, `processor`, `plan`, `stats`, `profile()`, `close()`;
        it is a context manager. The checkpoint is read as it lies: nothing is converted, or written beside it. Blocks
        until the first layers are being read; the download, if there is one, included.

        Args:
            pretrained_model_name_or_path: a folder with config.json and *.safetensors, a hub id, or a GGUF file.
            dtype: what weights are to be, "auto" for the checkpoint's own; packed GGUF is float32, as in transformers.
            device: the one that computes; the accelerator if there is one, else the CPU.
            max_memory: bytes that the model may cost above what the process used before: weights, ring, KV cache,
                activations. As in accelerate, `{0: "4GiB", "cpu": "8GiB"}`; one size is the budget of the device that
                computes. What is not given is 90 % of the free memory.
            max_context: tokens per sequence that the KV cache is planned for; as many as fit, up to 4096, if not given.
            max_batch_size: sequences that are generated at once.
            layers_per_batch, prefetch_batches: layers that move as one unit, and how many such units are read ahead.
            page_cache: read through the operating system's page cache; "auto" does if the checkpoint will stay there.
            model_class: instead of the one that the checkpoint names: a class or auto class of transformers, or a name.
            compression: pack the checkpoint once, into the cache folder, and stream that: "lossless" keeps every bit.
            kernels: "fast" multiplies with weights as they are stored, on the CPU: they stay packed in memory, too. It
                rounds otherwise than transformers.
            gguf_file: the GGUF file to use, of a folder or hub repository; of one that is split, any part.
            attn_implementation, ...: the others are as in transformers.
            profiling_mode: record where the time goes, in `last_profile`. Costs less than 2 % of it.
            progress: a live line about loading, prompt and tokens; "auto" shows it in notebooks and on terminals.
            unnamed: nothing: what stands without a name is refused, and told its name.
            foreign: other libraries' arguments, such as `quantization_config`: honoured, let pass if they change
                nothing, or refused with a remedy.

        Raises:
            ArgumentError: an argument is unknown, malformed, or contradicts another.
            CheckpointNotFoundError, CheckpointError: there is no such checkpoint, or it is incomplete or corrupt.
            BudgetError: the budgets cannot hold one layer and its work; the message has the smallest that would do.
        """
        given = locals()
        refuse_unnamed(unnamed)
        options = LoadOptions(**{name: given[name] for name in DEFAULTS})  # every option is an argument
        return load_model(pretrained_model_name_or_path, options, foreign)

    @classmethod
    def plan(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *unnamed: Any,
        machine: Machine = THIS_MACHINE,
        prompt_tokens: int | None = None,
        **options: Any,
    ) -> Plan:
        """The plan that `from_pretrained` would follow with the same arguments, and what would make it faster.

        Reads headers; where the weights are not there, the config alone, and plans for what transformers would write.

        Args:
            machine: the one to plan for, if not this one: `Machine(gpu="RTX 3090", ram="64GiB", disk_gbps=3.5)`.
            prompt_tokens: of the prompt whose first token is predicted; 512, or as many as the context holds, if not
                given.
            options: as `from_pretrained`.
        """
        refuse_unnamed(unnamed)
        prepared = prepare_for_planning(pretrained_model_name_or_path, options, machine, prompt_tokens)
        tokens = prepared.request.prompt_tokens
        again = partial(
            prepare, pretrained_model_name_or_path, with_weights=False, machine=machine, prompt_tokens=tokens
        )
        made = fitting_plan(prepared, again)
        packed = {}
        if made.streamed_bytes and made.prediction is not None:
            packed = packed_alternatives(pretrained_model_name_or_path, options, machine, prompt_tokens, prepared)
        return with_advice(made, prepared.facts, prepared.request, packed)


def load_model(
    name: str | os.PathLike[str],
    options: LoadOptions,
    foreign: Mapping[str, Any] = NOTHING,
    check: Callable[[PreTrainedModel], None] = lambda _: None,
) -> StreamedModel:
    """As `from_pretrained`, once `check` has let pass the model, which has no weights then."""
    host_bytes = process_bytes()
    options = LoadOptions(**adopt(foreign, vars(options), DEFAULTS))
    check_name(name)
    _check_default_device()
    if is_forked():
        compute_on_one_thread()
    # Without the time at first: where something is downloaded, the hub draws bars.
    if isinstance(options.compression, AskedFormat):
        folder, gguf = locate(name, options.hub, options.gguf_file, options.trust_remote_code, with_weights=False)
        options = settled(options, folder, gguf, resolve_device(options.device))
    if options.compression is not None:
        name = packed_copy(name, options, options.compression, partial(_check_fits, name, options))
        options = replace(options, compression=None, subfolder="", variant=None, revision=None)
    activity = Activity(f"loading {Path(name).absolute().name}", (*STEPS, LAST_STEP), is_timed=False)
    plan: Plan | None = None
    with using(Path(name)), showing(activity.text, bool(options.progress)), explained(lambda: plan):
        prepared = prepare(name, options, begin=activity.begin)
        check(prepared.model)
        plan = fitting_plan(prepared, partial(prepare, name))
        activity.begin(LAST_STEP)
        return _assemble(prepared, plan, host_bytes)


def _check_fits(name: str | os.PathLike[str], options: LoadOptions) -> None:
    """Refuse a budget in which the model could not run, before it is packed for hours.

    Of a lossless one it is not known before how small it gets.

    Raises:
        BudgetError: the message has the smallest one that would do.
    """
    if options.compression != LOSSLESS_CODEC:
        prepared = prepare(name, options, with_weights=False)
        fitting_plan(prepared, partial(prepare, name, with_weights=False))


def _check_default_device() -> None:
    if torch.get_default_device().type == "meta":
        raise UnsupportedError(
            "torch's default device is meta, whose tensors have no values, so that no model can be loaded: call "
            'torch.set_default_device("cpu") before, or leave the `with torch.device("meta")` that you are in'
        )


@torch.inference_mode(False)  # torch counts no changes of what is made in it, and weights have to be watched
def _assemble(prepared: Prepared, plan: Plan, host_bytes: int) -> StreamedModel:
    model = prepared.model
    gguf = prepared.index if isinstance(prepared.index, GgufIndex) else None
    load: Callable[[Beside], Any]
    if gguf is not None:  # its reader needs much memory for a while: before the weights do
        load = partial(_load_from_gguf, gguf, _load_now(partial(gguf_tokenizer, gguf, model.config)))
    else:  # a GGUF file says of generation what its config says, and the model has that already
        load = partial(load_beside, prepared.folder, prepared.options.trust_remote_code)
        load_generation_config(model, os.fspath(prepared.folder))
    with blamed_on(f"no model can be made of the checkpoint in {prepared.folder}"):
        finish_loading(model, prepared.device, prepared.dtype, set(model.state_dict()) - prepared.parts.specs.keys())
        if prepared.quantizer is not None:
            prepared.quantizer.finish(model)
    _start(prepared, plan, host_bytes, load)
    return model


def _start(prepared: Prepared, plan: Plan, host_bytes: int, load: Callable[[Any], Any]) -> None:
    """Let the model be streamed. Until it is whole nobody has it to close it, and an interrupt may come at any step."""
    model, is_packed = prepared.model, prepared.request.decoding_bytes > 0
    machinery: Machinery | None = None
    engine: Engine | None = None
    try:
        machinery = open_machinery(prepared.index.files, prepared.device, plan.direct_io, is_packed)
        engine = Engine(prepared, plan, machinery, host_bytes)
        make_streamed(model, engine, load, partial(_progress, engine, prepared.options.progress))
        if model.can_generate():
            model.generation_config.disable_compile = True
        weakref.finalize(model, engine.abandon)
    except BaseException:
        if engine is not None:
            engine.close()
        elif machinery is not None:
            machinery.close()
        raise


def _progress(
    engine: Engine, wanted: bool | Literal["auto"], work: Workload | None, has_streamer: bool
) -> AbstractContextManager[Any]:
    """What shows how a generation of some workload goes."""
    max_tokens = work.context - work.prompt if work else None
    return progress(wanted, engine.observer, engine.stats, max_tokens, has_streamer)


def _load_now(load: Callable[[], Any]) -> Callable[[], Any]:
    """Gives what `load` gives now, or raises what it raises now: not everybody asks."""
    try:
        loaded = load()
    except CheckpointNotFoundError as error:
        failure = error  # the name `error` ends with this block

        def fail() -> Any:
            raise failure

        return fail
    return lambda: loaded


def load_beside(folder: Path, trust_remote_code: bool, what: Beside) -> Any:
    """What turns text, and for a processor whatever else the model takes, into its inputs."""
    # Looked up here: what loads processors of images takes memory that a text model has no use for.
    auto_class = transformers.AutoTokenizer if what == "tokenizer" else transformers.AutoProcessor
    check_small_files(folder)
    load = partial(auto_class.from_pretrained, trust_remote_code=trust_remote_code)
    find = no_advice if trust_remote_code else partial(small_file_at_fault, folder, load)  # lest code is run once more
    try:
        with blamed_on(f"{folder} has no {what} that transformers can load", _NOT_THERE, find):
            return load(folder)
    except CheckpointNotFoundError as error:  # asked only now: some tokenizers are made of no file at all
        raise (without_tokenizer(folder) if what == "tokenizer" else None) or error from error.__cause__


_NOT_THERE: Consequences = (((ImportError,), UnsupportedError), ((OSError, ValueError), CheckpointNotFoundError))


def _load_from_gguf(index: GgufIndex, load_tokenizer: Callable[[], Any], what: Beside) -> Any:
    if what == "processor":
        raise UnsupportedError(f"{index.first} holds a language model, which has a tokenizer and no processor")
    return load_tokenizer()
