"""Building a model without weights, and what `from_pretrained` does after the last weight has been loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from airstream.compat.remote import with_generation
from airstream.errors import UnsupportedError


def model_class(config: PreTrainedConfig, folder: Path, trust_remote_code: bool) -> type[PreTrainedModel]:
    """The causal language model class of `config`: the checkpoint's own code if it has some and it is trusted.

    Raises:
        UnsupportedError: transformers has no such class for this type of model.
    """
    own = getattr(config, "auto_map", {}).get("AutoModelForCausalLM")
    if own is not None and trust_remote_code:
        return get_class_from_dynamic_module(own, str(folder))
    try:
        return AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        raise UnsupportedError(
            f"{config.model_type!r} is not a causal language model of this transformers version. Upgrade transformers "
            "if the model is new; if it brings its own code, and you trust it, pass trust_remote_code=True"
        ) from None


def build_on_meta(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """A model of `cls` without weights: every parameter and buffer is on the meta device. Changes `config`'s dtype."""
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = with_generation(cls)._from_config(config, dtype=dtype, **extra)
    return model.eval().requires_grad_(False)


def load_generation_config(model: PreTrainedModel, folder: str) -> None:
    """Give `model` the checkpoint's generation config, or what its model config says of generation, as transformers."""
    if not model.can_generate():
        return
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder)
    except OSError:
        model.generation_config = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


def finish_loading(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, missing: set[str]) -> None:
    """Do what `from_pretrained` does last: fill the buffers that no checkpoint has, and parameters it may lack.

    Everything in the state dict but `missing` counts as loaded, though it still is on the meta device.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in missing:
            tensor._is_hf_initialized = True
    info = LoadStateDictInfo(
        missing_keys=set(missing),
        unexpected_keys=set(),
        mismatched_keys=set(),
        conversion_errors={},
        error_msgs=[],
        skipped_pp_keys=set(),
    )
    config = LoadStateDictConfig(device_map={"": device}, dtype=dtype)
    with _quiet_transformers():
        type(model)._finalize_model_loading(model, config, info)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without transformers' load report: what is missing has been judged already, more strictly."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
