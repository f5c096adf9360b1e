"""This reads what an object of transformers, or a dict in its place, asks a checkpoint to be quantised as.

It knows what such objects are. It refuses to know which of them can be packed (`asked_codecs`), and what a checkpoint
is already (`same_format`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airstream.errors import ArgumentError
from airstream.reporting.alike import nearest
from airstream.reporting.first_line import first_line

if TYPE_CHECKING:
    import torch  # the command line reads the names of this module before it has a model to load

__all__ = ["ARGUMENT", "OF_THE_MACHINE", "QUANTISE", "AskedFormat", "read_asked"]

ARGUMENT = "quantization_config"

QUANTISE = (
    'name how the weights are to be packed, compression="nf4", "int8", "int4", "fp8" or "lossless", or a checkpoint '
    "that is quantised already (bitsandbytes, GPTQ, AWQ, FP8, MXFP4), or a GGUF file"
)
"""What there is for whoever wants smaller weights."""

OF_THE_MACHINE = ("llm_int8_enable_fp32_cpu_offload",)
"""Fields that say where weights lie, which a plan does here."""


@dataclass(frozen=True)
class AskedFormat:
    """What is asked for.

    Attributes:
        kind: the name of the object's class.
        text: the object's fields, as JSON.
        dtype: what weights are cast to before; None for what the checkpoint says.
    """

    kind: str
    text: str
    dtype: torch.dtype | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The object's fields, as `config.json` of a quantised checkpoint has them."""
        return dict(json.loads(self.text))

    @property
    def method(self) -> str:
        """What writes and reads the format."""
        return str(self.settings.get("quant_method"))

    def config(self) -> Any:
        """The object."""
        from transformers.quantizers.auto import AutoQuantizationConfig

        return AutoQuantizationConfig.from_dict(self.settings)

    def __str__(self) -> str:
        return f"{ARGUMENT} ({self.kind})"


def read_asked(value: Any) -> AskedFormat:
    """What `value`, an object or a dict, asks for.

    Raises:
        ArgumentError: it is neither, or transformers makes nothing of it.
    """
    from transformers.quantizers.auto import AutoQuantizationConfig
    from transformers.utils.quantization_config import QuantizationConfigMixin

    made = value
    if isinstance(value, Mapping):
        try:
            made = AutoQuantizationConfig.from_dict(dict(value))
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError) as error:
            raise ArgumentError(f"{ARGUMENT}={value!r}: {first_line(error)}: {QUANTISE}") from error
    if not isinstance(made, QuantizationConfigMixin):
        raise ArgumentError(f"{ARGUMENT}={value!r} is no object of transformers that says how to quantise: {QUANTISE}")
    fields = json.loads(json.dumps(made.to_dict(), default=str))
    if isinstance(value, Mapping):
        _refuse_unknown(value, fields)
    for name in OF_THE_MACHINE:
        if name in fields:
            fields[name] = False
    return AskedFormat(type(made).__name__, json.dumps(fields, sort_keys=True))


def _refuse_unknown(given: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Refuse what transformers would pass over in silence."""
    for name in given:
        if name not in fields:
            public = [field for field in fields if not field.startswith("_")]
            meant = nearest(str(name), public)
            instead = f"did you mean {meant!r}?" if meant else f"the fields are {', '.join(public)}"
            raise ArgumentError(f"{ARGUMENT} has no field {name!r}: {instead}")
