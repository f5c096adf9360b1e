"""This handles checkpoints that were quantised before they were saved, as transformers' quantizers describe them.

A quantizer replaces modules of a model that has no weights yet, and says how the tensors of the checkpoint become what
those modules hold: as they are, put together to one object, or dequantised. It knows what each format needs of the
machine and refuses, with the remedy, what cannot be streamed. It refuses to know where bytes lie and when they are
read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoQuantizationConfig, get_hf_quantizer
from transformers.quantizers.base import HfQuantizer

from airstream.checkpoint.stored import StoredTensor
from airstream.compat.four_bit import settle_four_bits
from airstream.compat.integers import AWQ, GPTQ, GPTQ_V2, Layout, UnpackIntegers, with_unpacking
from airstream.compat.packed_sets import check_said_sets, check_sets
from airstream.compat.plain_formats import groups_of, kernel_for
from airstream.compat.quantizer import DEQUANTIZED, DEQUANTIZED_ON_CPU, Headers, Quantizer
from airstream.compat.quiet import quiet_transformers
from airstream.compat.schemes import choose_schemes, name_formats
from airstream.compat.stated import check_stated_numbers
from airstream.errors import UnsupportedError
from airstream.reporting.first_line import first_line

COMPRESSED = "compressed-tensors"

PACKAGES: Mapping[str, str] = {
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "torchao": "torchao",
    "hqq": "hqq",
    "quanto": "optimum-quanto",
    "fp8": "accelerate",
    "mxfp4": "accelerate",
    "bitnet": "accelerate",
}
"""What pip has to install for a format; accelerate besides, for all of them."""

REFUSED: Mapping[str, str] = {
    "hqq": "transformers cannot load it from a checkpoint itself",
    "quanto": "transformers cannot save it as a checkpoint itself",
    "gguf": "a .gguf file is loaded by naming the file",
}
"""Formats that cannot be streamed, and why not."""

KEPT_AS_LOADED = ("bitsandbytes", "fp8", "mxfp8", "mxfp4", "bitnet", "torchao", "compressed-tensors")
"""Formats known to leave weights alone after loading, but for flags."""

INTEGER_FORMATS: Mapping[str, Mapping[str, Layout]] = {
    "gptq": {"gptq": GPTQ, "gptq_v2": GPTQ_V2},
    "awq": {"gemm": AWQ},
    "auto-round": {
        "auto_round:auto_gptq": GPTQ,
        "auto_round:gptq": GPTQ,
        "auto_round": GPTQ_V2,
        "auto_round:gptqmodel": GPTQ_V2,
        "auto_round:auto_awq": AWQ,
        "auto_round:awq": AWQ,
    },
}
"""By format and what it calls its packing: formats that are dequantised here, without the package that wrote them."""

SCALED_ACTIVATIONS = ("bloom", "falcon", "gpt_bigcode", "gpt_neox", "gptj", "mpt", "starcoder2")
"""Model types whose activations AWQ scales by numbers that the model's class has no place for."""

INSTEAD = "Stream a checkpoint of the model in another format (bf16, bitsandbytes, FP8, GGUF) instead"


class _OfTransformers(Quantizer):
    """Of a checkpoint whose format transformers knows how to read."""

    def __init__(self, inner: HfQuantizer, method: str, settings: Mapping[str, Any], device: torch.device) -> None:
        super().__init__(method, settings)
        self._inner = inner
        self.is_on_cpu = device.type == "cpu"
        self.kernel = kernel_for(method, settings) if self.is_on_cpu else None

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._inner.update_dtype(dtype)

    def preprocess(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, headers: Headers) -> None:
        files = None if isinstance(headers, Mapping) else [str(file) for file in headers]
        if isinstance(headers, Mapping):
            self._inner.metadata = dict(headers)  # what torchao's would keep of the files
        with quiet_transformers(), torch.device("meta"):
            self._inner.preprocess_model(
                model=model,
                dtype=dtype,
                device_map={"": str(device)},
                checkpoint_files=files,
                use_kernels=False,
            )
        model.eval()

    def settle(self, model: PreTrainedModel, index: Mapping[str, StoredTensor]) -> None:
        if self.is_on_cpu and self.method == "bitsandbytes":
            check_sets(self.method, index)  # scales that are too few look like those of larger blocks
            settle_four_bits(model, index)
        check_said_sets(getattr(self._inner, "metadata", None) or {}, index)

    def finish(self, model: PreTrainedModel) -> None:
        model.hf_quantizer = self._inner
        with quiet_transformers():
            self._inner.postprocess_model(model)

    def mapping(self, model: PreTrainedModel) -> list[Any]:
        found: list[Any] = get_model_conversion_mapping(model, None, self._inner)
        if self.method == COMPRESSED:
            choose_schemes(found, self._inner)
        return found

    def scratch_bytes(self, elements: int) -> int:
        return 0 if self.kernel else super().scratch_bytes(elements)

    def is_load_operation(self, converter: Any) -> bool:
        return any(getattr(operation, "hf_quantizer", None) is not None for operation in converter.operations)


class IntegerQuantizer(Quantizer):
    """Of a checkpoint whose packed integers are made dense here, for the modules of a model that is not quantised."""

    def __init__(self, method: str, layout: Layout, settings: Mapping[str, Any]) -> None:
        super().__init__(method, settings)
        self._layout = layout

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def preprocess(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, headers: Headers) -> None:
        pass

    def settle(self, model: PreTrainedModel, index: Mapping[str, StoredTensor]) -> None:
        pass

    def finish(self, model: PreTrainedModel) -> None:
        pass

    def mapping(self, model: PreTrainedModel) -> list[Any]:
        return with_unpacking(get_model_conversion_mapping(model), self._layout)

    def is_load_operation(self, converter: Any) -> bool:
        return isinstance(converter.operations[0], UnpackIntegers)


def find_quantizer(config: PreTrainedConfig, device: torch.device, has_fp8: bool | None = None) -> Quantizer | None:
    """The quantizer of the checkpoint that `config` describes; None if it is not quantised. Changes `config`.

    Args:
        has_fp8: whether a device that is only described multiplies FP8; None if `device` is here to be asked.

    Raises:
        UnsupportedError: the format is unknown, cannot be streamed, or needs a package or a device that is not there.
    """
    owner, settings = _settings(config)
    if settings is None:
        return None
    method = str(settings.get("quant_method") or "bitsandbytes")
    if method in INTEGER_FORMATS:
        check_stated_numbers(settings)
        return IntegerQuantizer(method, _layout(settings, method, str(config.model_type)), settings)
    if method in REFUSED:
        raise UnsupportedError(f"a checkpoint quantised with {method} cannot be streamed: {REFUSED[method]}. {INSTEAD}")
    if not any(name.startswith(method) for name in AUTO_QUANTIZER_MAPPING):
        raise UnsupportedError(
            f"the checkpoint is quantised with {method[:100]!r} (quant_method in config.json), which this transformers "
            "does not know. Upgrade transformers"
        )
    _check_settings(settings)
    multiplies = has_fp8 is not False and device.type != "cpu"
    if method in DEQUANTIZED or (method in DEQUANTIZED_ON_CPU and not multiplies):
        owner.quantization_config = {**settings, "dequantize": True}
    if settings.get("llm_int8_enable_fp32_cpu_offload"):  # of the machine that saved it: nothing would be packed here
        owner.quantization_config = {**settings, "llm_int8_enable_fp32_cpu_offload": False}
    _refuse_quantised_activations(settings, method)
    try:
        with quiet_transformers():
            inner, _, _ = get_hf_quantizer(config, None, {"": str(device)}, True, {})
    except ImportError as error:
        packages = " ".join(dict.fromkeys((PACKAGES.get(method, method), "accelerate")))  # each is named once
        raise UnsupportedError(
            f"weights quantised with {method} need more packages: pip install {packages} ({first_line(error)}; "
            'airstream\'s extra "quant" has what most checkpoints need)'
        ) from error
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"a checkpoint quantised with {method} cannot run on {device}: {first_line(error)}. {_remedy(device)}"
        ) from error
    if method in DEQUANTIZED_ON_CPU and has_fp8:
        inner.quantization_config.dequantize = False  # whatever is here
    if method == COMPRESSED:
        name_formats(inner)
    _refuse_what_changes_weights(inner, method)
    return _OfTransformers(inner, method, settings, device)


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Fail in transformers' own words where `settings` make no sense: that is not for want of a package or a device."""
    with contextlib.suppress(ImportError), quiet_transformers():
        AutoQuantizationConfig.from_dict(dict(settings))


def _settings(config: PreTrainedConfig) -> tuple[Any, dict[str, Any] | None]:
    """Where the description of the quantisation is, and it: of the model, or of its language model."""
    for owner in (config, config.get_text_config(decoder=True)):
        found = getattr(owner, "quantization_config", None)
        if found:
            return owner, dict(found) if isinstance(found, Mapping) else found.to_dict()
    return config, None


def _layout(settings: Mapping[str, Any], method: str, model_type: str) -> Layout:
    """How integers are packed, as the checkpoint's `settings` name it: with the names of all writers, old and new."""
    layouts = INTEGER_FORMATS[method]
    names = ("packing_format", "checkpoint_format", "version", "format")
    packing = next((str(settings[name]).lower() for name in names if settings.get(name)), next(iter(layouts)))
    if packing not in layouts or str(settings.get("pack_dtype") or "int32") != "int32":
        raise UnsupportedError(
            f"a {method} checkpoint packed as {packing!r} cannot be streamed, only {' and '.join(map(repr, layouts))} "
            f"in 32-bit words. {INSTEAD}"
        )
    if layouts[packing] is AWQ and model_type in SCALED_ACTIVATIONS:
        raise UnsupportedError(f"an AWQ checkpoint of {model_type!r} scales activations, too: not supported. {INSTEAD}")
    return layouts[packing]


def _refuse_quantised_activations(settings: Mapping[str, Any], method: str) -> None:
    """Refuse what would be computed in another way if its weights were dequantised: activations are rounded, too."""
    if method == COMPRESSED and any(group.get("input_activations") for group in groups_of(settings)):
        raise UnsupportedError(
            "a compressed-tensors checkpoint with quantised activations (W8A8, FP8 dynamic) cannot be streamed: its "
            f"modules change their own weights on first use. Weight-only ones (W4A16, W8A16) can. {INSTEAD}"
        )


def _refuse_what_changes_weights(inner: HfQuantizer, method: str) -> None:
    """Refuse a format that may do to loaded weights what a layer that comes and goes would not have done to it."""
    changes = type(inner)._process_model_after_weight_loading is not HfQuantizer._process_model_after_weight_loading
    if changes and method not in KEPT_AS_LOADED:
        raise UnsupportedError(
            f"a checkpoint quantised with {method} cannot be streamed: transformers changes its weights once all "
            f"of them have been loaded. {INSTEAD}"
        )


def _remedy(device: torch.device) -> str:
    return f"Load it on a GPU. Else: {INSTEAD[0].lower()}{INSTEAD[1:]}" if device.type == "cpu" else INSTEAD
