"""This builds a model without weights, and does what `from_pretrained` does after the last weight has been loaded.

It knows the steps of `from_pretrained`, in their order. It refuses to know weights.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, LoadStateDictConfig
from transformers.utils.loading_report import LoadStateDictInfo

from airstream.checkpoint.generation_file import check_ids, read_generation_file
from airstream.compat.blame import blamed_on
from airstream.compat.quiet import quiet_transformers
from airstream.compat.remote import with_generation


def build_on_meta(
    cls: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    """A model of `cls` without weights: every parameter and buffer is on the meta device. Changes `config`'s dtype."""
    extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        model = with_generation(cls)._from_config(config, dtype=dtype, **extra)
    return model.eval()


def attention_names() -> list[str]:
    """What `attn_implementation` may be, but for kernels of the hub."""
    return ["eager", *sorted(name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "|" not in name)]


def load_generation_config(model: PreTrainedModel, folder: str) -> None:
    """Give `model` the checkpoint's generation config, or what its model config says of generation, as transformers."""
    if not model.can_generate():
        return
    own = Path(folder, "generation_config.json")
    if os.path.lexists(own):  # where it is a link to nothing, transformers would do without what it said
        read_generation_file(own)
        with blamed_on(f"transformers cannot read {own}"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return
    config = own.with_name("config.json")
    if config.is_file():
        check_ids(config)
    with blamed_on(f"{config} says something of generation that cannot be"):
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
    with quiet_transformers():
        type(model)._finalize_model_loading(model, config, info)
