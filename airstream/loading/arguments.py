"""This says what becomes of each argument that other libraries' `from_pretrained` take.

It knows the names of transformers, accelerate, AirLLM, FlexLLMGen, llama.cpp and vLLM, as tables: what means the same
is honoured, what changes nothing is let pass with a line in the log, and the rest is refused with a sentence that says
what takes its place. It refuses to know what an option does once it has a name of ours.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from airstream.compat.asked_formats import ARGUMENT, QUANTISE, AskedFormat, read_asked
from airstream.errors import ArgumentError

__all__ = ["HARMLESS", "HONOURED", "REFUSED", "adopt"]

logger = logging.getLogger(__name__)

DEFAULT = object()
"""What an argument comes to that asks for what happens anyway."""


SIZE = re.compile(r"\d[\d.]*(e\+?\d+)?\s*([kmgt]?i?b?)?", re.IGNORECASE)
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|gpu)(:\d+)?")
DTYPES = ("float16", "bfloat16", "float32", "float64", "fp16", "bf16", "fp32", "half")
"""What an argument without a name was meant for, by what it looks like."""


def _same(_: str, value: Any) -> Any:
    return DEFAULT if value is None else value


def _device_of(name: str, device_map: Any) -> Any:
    """The one device that computes, of an accelerate `device_map`."""
    if device_map is None or (isinstance(device_map, str) and device_map in SPREAD):
        return DEFAULT
    if isinstance(device_map, Mapping):
        if list(device_map) != [""]:
            raise _refused(name, 'modules are not placed one by one: name memory, max_memory={0: ..., "cpu": ...}')
        return device_map[""]
    return device_map


def _context_of(_: str, tokens: Any) -> Any:
    """llama.cpp writes 0 for as much as the model says."""
    return DEFAULT if tokens is None or (isinstance(tokens, int) and tokens == 0) else tokens


def _asks(name: str, wanted: Any) -> bool | None:
    """What a switch says, if it says anything: "no" is a text, which would be true."""
    from airstream.loading.options import (
        check_flag,
    )  # with torch, which mistakes on the command line need not wait for

    if wanted is None:
        return None
    check_flag(name, wanted)
    return bool(wanted)


def _batches_ahead(name: str, prefetching: Any) -> Any:
    return 0 if _asks(name, prefetching) is False else DEFAULT


SPREAD = frozenset({"auto", "balanced", "balanced_low_0", "sequential"})
"""How accelerate spreads a model over devices; here one computes, and layers come to it."""

HONOURED: Mapping[str, tuple[str, Callable[[str, Any], Any]]] = {
    "torch_dtype": ("dtype", _same),
    "hf_token": ("token", _same),
    "use_auth_token": ("token", _same),
    "device_map": ("device", _device_of),
    "prefetching": ("prefetch_batches", _batches_ahead),
    "max_seq_len": ("max_context", _same),
    "max_model_len": ("max_context", _same),
    "n_ctx": ("max_context", _context_of),
    "gpu_batch_size": ("max_batch_size", _same),
    "load_in_4bit": ("compression", lambda name, wanted: "4bit" if _asks(name, wanted) else DEFAULT),
    "load_in_8bit": ("compression", lambda name, wanted: "8bit" if _asks(name, wanted) else DEFAULT),
    ARGUMENT: ("compression", lambda _, wanted: read_asked(wanted) if wanted else DEFAULT),
}
"""Arguments that mean what one of ours means: its name, and what gives its value."""

NO_FILES = "the checkpoint is read as it lies, and nothing is written"
STREAMED = "weights are never in memory all at once"
WHOLE = "downloads resume and are verified by themselves"

HARMLESS: Mapping[str, str] = {
    "low_cpu_mem_usage": STREAMED,
    "_fast_init": STREAMED,
    "offload_folder": NO_FILES,
    "offload_dir": NO_FILES,
    "offload_state_dict": NO_FILES,
    "offload_buffers": "buffers are small, and stay",
    "layer_shards_saving_path": NO_FILES,
    "delete_original": "there is no second copy, and the checkpoint is kept",
    "use_safetensors": "safetensors go first, and pickles are read without running what is in them",
    "weights_only": "pickles are read without running what is in them",
    "resume_download": WHOLE,
    "use_mmap": "page_cache=True reads through the page cache",
    "pin_weight": "host memory is pinned where that helps",
}
"""Arguments that change no result, and why nothing is to be done."""

BUDGET = (
    'name the memory that may be used, max_memory="4GiB" or max_memory={0: "4GiB", "cpu": "8GiB"}, and the plan does '
    "the rest"
)
CONFIG = "a model is built as its config.json says: change that file, in a copy of the checkpoint"
KERNELS = "choose how attention is computed with attn_implementation="
THREADS = (
    "torch's threads compute, one for each core: set OMP_NUM_THREADS=... in the environment before the program starts, "
    "or call torch.set_num_threads(...) in it"
)
ONE_DEVICE = "one device computes, which device= names, and layers are streamed to it"

REFUSED: Mapping[str, str] = {
    "quantization": QUANTISE,
    "bnb_config": QUANTISE,
    "compress_weight": QUANTISE,
    "compress_cache": "the KV cache is kept as it is: max_batch_size and max_context say how much of it there is",
    "n_gpu_layers": BUDGET,
    "gpu_memory_utilization": BUDGET,
    "cpu_offload_gb": BUDGET,
    "percent": BUDGET,
    "tensor_parallel_size": ONE_DEVICE,
    "tp_plan": ONE_DEVICE,
    "no_split_module_classes": ONE_DEVICE,
    "tp_size": ONE_DEVICE,
    "device_mesh": ONE_DEVICE,
    **dict.fromkeys(("n_threads", "n_threads_batch", "num_threads", "threads", "threads_batch"), THREADS),
    "use_cache": "pass it to the call, model.generate(..., use_cache=False)",
    "use_flash_attention_2": KERNELS,
    "use_flash_attn": KERNELS,
    "config": CONFIG,
    "rope_scaling": CONFIG,
    "num_labels": CONFIG,
    "ignore_mismatched_sizes": "weights of another shape than the config's are an error",
    "state_dict": "weights are read from the checkpoint: save_pretrained(..., state_dict=...) writes one",
    "output_loading_info": "a checkpoint that lacks weights is an error: `airstream verify` names what is missing",
    "force_download": "remove the model from the hub's cache, and it is downloaded again",
    "proxies": "set the environment variable HTTPS_PROXY",
    "from_tf": "save the checkpoint as safetensors with transformers",
    "from_flax": "save the checkpoint as safetensors with transformers",
}
"""Arguments that would change what is computed, or promise what is not done, and what takes their place."""

UNASKED: Mapping[str, tuple[Any, ...]] = {"use_cache": (None, True), "config": (None,)}
"""Values that ask for nothing: for all other arguments that are refused, None and False."""


def adopt(foreign: Mapping[str, Any], given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options `given`, with what `foreign` ones, which are not ours, ask for in our terms.

    Args:
        defaults: the defaults of all options of ours, by name.

    Raises:
        ArgumentError: an argument is unknown, cannot be honoured, or contradicts one that is `given`.
    """
    options, idle, typed = dict(given), list[str](), dict[str, str]()
    for name, value in foreign.items():
        if name in HONOURED:
            ours, translate = HONOURED[name]
            meant = translate(name, value)
            said = str(meant) if name == ARGUMENT else f"{name}={value!r}"
            _set(options, ours, meant, defaults, said, typed.get(ours))
            if meant is not DEFAULT:
                typed.setdefault(ours, said)
        elif name in HARMLESS:
            idle.append(f"{name} ({HARMLESS[name]})")
        elif name not in REFUSED:
            raise _unknown(name, defaults)
        elif not any(value is unasked for unasked in UNASKED.get(name, (None, False))):
            raise _refused(name, REFUSED[name])
    if idle:
        logger.warning("these arguments change nothing in airstream: %s", ", ".join(idle))
    return options


def refuse_others(given: Iterable[str], known: Sequence[str]) -> None:
    """Raise for the first of the names `given` that is none of the `known` ones."""
    for name in given:
        if name not in known:
            raise _unknown(name, known)


def refuse_unnamed(values: Sequence[Any]) -> None:
    """Raise for what is given without a name behind the model's, with the name that it may have been meant for."""
    if not values:
        return
    value = values[0]
    text = str(value).strip()
    if isinstance(value, Mapping) or SIZE.fullmatch(text):
        meant = f"max_memory={value!r}"
    elif text.startswith("torch.") or text in DTYPES:
        meant = f"dtype={value!r}"
    elif DEVICE.fullmatch(text):
        meant = f"device={text!r}"
    else:
        meant = 'max_memory="4GiB"'
    raise ArgumentError(f"{value!r} has no name: behind the model's, every argument is named, as in {meant}")


def _set(
    options: dict[str, Any], ours: str, value: Any, defaults: Mapping[str, Any], typed: str, before: str | None
) -> None:
    """Set one of ours, which `typed` asks for; `before` is how another name of its has asked for it, if one has."""
    if value is DEFAULT:
        return
    other = options.get(ours, defaults[ours])
    if other not in (defaults[ours], value):
        theirs = before or (str(other) if isinstance(other, AskedFormat) else f"{ours}={other!r}")
        raise ArgumentError(f"{typed} and {theirs} contradict each other: leave the first one out")
    options[ours] = value


def _refused(name: str, instead: str) -> ArgumentError:
    return ArgumentError(f"there is no argument {name!r}: {instead}")


def _unknown(name: str, known: Iterable[str]) -> ArgumentError:
    close = difflib.get_close_matches(name, list(known), n=1)
    return _refused(name, f"did you mean {close[0]!r}?" if close else f"the arguments are {', '.join(known)}")
