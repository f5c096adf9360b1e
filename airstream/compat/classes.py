"""This says which class of transformers, or of the checkpoint's own code, a checkpoint is a model of.

It knows the auto classes and what a config says of itself. It refuses to take a config's word for more than a choice
among the classes that transformers lists for its type, or those of its own code if that is trusted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import modeling_auto

from airstream.errors import ArgumentError, UnsupportedError

ENCODER_DECODERS = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")

PREFERENCE = (
    "AutoModelForImageTextToText",  # before the text model alone, which some multimodal types have too
    "AutoModelForMultimodalLM",
    "AutoModelForCausalLM",
    *ENCODER_DECODERS,
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModel",
)
"""Auto classes by what a checkpoint most likely is if its config does not say: the first that knows its type."""


def choose_class(
    config: PreTrainedConfig, folder: Path, trust_remote_code: bool, wanted: Any = None
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class to build for the checkpoint in `folder`, and the config to build it with: a text model of a multimodal
    checkpoint has that of its text part.

    Args:
        trust_remote_code: a class that comes with the checkpoint may be run.
        wanted: a class, an auto class, or the name of either, that the user wants instead of what the config names.

    Raises:
        ArgumentError: `wanted` is no such thing, or not one of this type of model.
        UnsupportedError: transformers has no class for this type of model.
    """
    if _is_model_class(wanted):
        return _with_its_config(wanted, config)
    auto_class = _name_of(wanted)
    own = _own_class(config, auto_class) if trust_remote_code else None
    if own is not None:
        return get_class_from_dynamic_module(own, str(folder)), config
    chosen = _listed_class(config, auto_class)
    if chosen is None:
        raise _refusal(config, auto_class)
    return _with_its_config(chosen, config)


def _listed_class(config: PreTrainedConfig, wanted: str | None) -> type[PreTrainedModel] | None:
    """Of the classes that transformers lists for this type, the one that is wanted, named, or most likely meant."""
    if wanted is not None:
        listed = dict(_listed(config))
        by_name = {cls.__name__: cls for classes in listed.values() for cls in classes}
        return next(iter(listed.get(wanted, ())), None) or by_name.get(wanted)
    named = set(config.architectures or ())
    for _, classes in _listed(config):
        for cls in classes:
            if cls.__name__ in named:
                return cls
    for name in named:  # the text part of a multimodal model, saved by itself, is in no list
        found: Any = getattr(transformers, name, None) if name.isidentifier() else None
        if _is_model_class(found) and found.config_class is type(config):
            return found
    listed = dict(_listed(config))
    return next((listed[auto_class][0] for auto_class in _preference(config) if auto_class in listed), None)


def _is_model_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, PreTrainedModel)


def _listed(config: PreTrainedConfig) -> Iterator[tuple[str, tuple[type[PreTrainedModel], ...]]]:
    """Every auto class that knows this type of model, with the classes it lists."""
    for name, auto_class in _auto_classes().items():
        classes = auto_class._model_mapping.get(type(config), None)
        if classes is not None:
            yield name, tuple(classes) if isinstance(classes, (list, tuple)) else (classes,)


def _auto_classes() -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(value, "_model_mapping", None) is not None
    }


def _preference(config: PreTrainedConfig) -> tuple[str, ...]:
    return (*ENCODER_DECODERS, *PREFERENCE) if config.is_encoder_decoder else PREFERENCE


def _own_class(config: PreTrainedConfig, wanted: str | None) -> str | None:
    """Where the checkpoint's own code has its class: that which the config names, else the most likely one."""
    own = {name: ref for name, ref in _auto_map(config).items() if name.startswith("AutoModel") and ref}
    if wanted is not None:
        return own.get(wanted)
    named = set(config.architectures or ())
    return next(
        (ref for ref in own.values() if ref.rpartition(".")[2] in named),
        next((own[name] for name in _preference(config) if name in own), None),
    )


def _auto_map(config: PreTrainedConfig) -> Mapping[str, Any]:
    found = getattr(config, "auto_map", None)
    return found if isinstance(found, Mapping) else {}


def _with_its_config(
    cls: type[PreTrainedModel], config: PreTrainedConfig
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    text = config.sub_configs.get("text_config")
    is_text_part = text is not None and cls.config_class is text and not isinstance(config, text)
    return cls, config.get_text_config() if is_text_part else config


def _name_of(wanted: Any) -> str | None:
    if wanted is None or isinstance(wanted, str):
        return wanted
    for name, auto_class in _auto_classes().items():
        if wanted is auto_class:
            return name
    raise ArgumentError(
        f"model_class={wanted!r}: use a model class of transformers or an auto class, such as "
        "transformers.AutoModelForTokenClassification, or the name of one"
    )


def _refusal(config: PreTrainedConfig, wanted: str | None) -> Exception:
    listed = dict(_listed(config))
    if wanted is not None and listed:
        return ArgumentError(
            f"model_class={wanted!r} does not go with a checkpoint of type {config.model_type!r}: "
            f"its auto classes are {', '.join(listed)}"
        )
    if any(name.startswith("AutoModel") for name in _auto_map(config)):
        return UnsupportedError(
            f"{config.model_type!r} is not a model of this transformers version, it brings its own code: "
            "pass trust_remote_code=True if you trust that code"
        )
    return UnsupportedError(
        f"{config.model_type!r} has no model class in this transformers version that can be streamed. Upgrade "
        "transformers if the model is new"
    )
