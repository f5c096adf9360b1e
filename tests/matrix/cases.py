"""The matrix: which types are tried as what, and which are not, for which reason."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

CAUSAL_LM = "AutoModelForCausalLM"
SEQ2SEQ_LM = "AutoModelForSeq2SeqLM"
IMAGE_TEXT_TO_TEXT = "AutoModelForImageTextToText"

NUM_PARTS = 5
"""One of so many parts of the matrix runs with the other tests."""


@dataclass(frozen=True, order=True)
class Case:
    """A type of model, loaded as `auto_class` loads it."""

    auto_class: str
    model_type: str

    def __str__(self) -> str:
        return f"{self.model_type}-{self.auto_class.removeprefix('AutoModelFor').removeprefix('Auto')}"

    @property
    def part(self) -> int:
        """The part of the matrix it is in: always the same, whatever else there is."""
        return zlib.crc32(str(self).encode()) % NUM_PARTS


LISTED: Mapping[str, Mapping[str, str]] = {
    CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    SEQ2SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    IMAGE_TEXT_TO_TEXT: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
"""Auto classes of which every type that the installed transformers has is tried, or named with a reason."""

CHOSEN: Mapping[str, tuple[str, ...]] = {
    "AutoModel": ("bert", "roberta", "xlm-roberta", "mpnet", "modernbert", "deberta-v2", "llama", "mistral", "qwen3",
                  "gemma3_text", "t5", "clip", "siglip"),
    "AutoModelForMaskedLM": ("bert", "roberta", "albert", "distilbert", "modernbert", "electra", "deberta-v2"),
    "AutoModelForSequenceClassification": ("bert", "roberta", "distilbert", "modernbert", "deberta-v2", "gpt2", "llama",
                                           "qwen2", "qwen3"),
    "AutoModelForTokenClassification": ("bert", "roberta", "modernbert", "electra", "llama"),
    "AutoModelForQuestionAnswering": ("bert", "roberta", "distilbert", "modernbert"),
    "AutoModelForSpeechSeq2Seq": ("whisper", "speech_to_text"),
}  # fmt: skip
"""A few types of other auto classes."""

REASONS: Mapping[Case, str] = {
    Case(CAUSAL_LM, "gemma3n"): "its vision tower needs the package timm (gemma3n_text is equal)",
    Case(SEQ2SEQ_LM, "granite_speech"): "no tiny config yet: its encoder has fixed widths",
    Case(SEQ2SEQ_LM, "granite_speech_plus"): "no tiny config yet: its encoder has fixed widths",
    Case(SEQ2SEQ_LM, "nemo_speechlm"): "no tiny config yet: its parts have to agree in size",
    Case(SEQ2SEQ_LM, "vibevoice_asr"): "no tiny config yet: 2.6 GB of convolutions",
    Case(SEQ2SEQ_LM, "voxtral_realtime"): "takes no input but sound",
    Case(IMAGE_TEXT_TO_TEXT, "evolla"): "takes proteins, no images; transformers' own auto class does not find it",
    Case(IMAGE_TEXT_TO_TEXT, "fast_vlm"): "its vision tower needs the package timm",
    Case(IMAGE_TEXT_TO_TEXT, "gemma3n"): "its vision tower needs the package timm (gemma3n_text is equal)",
    Case(
        IMAGE_TEXT_TO_TEXT, "llama4"
    ): "its forward fails in transformers 5.24, which asks its text model's output for "
    "`image_outputs` (llama4_text is equal)",
    Case(IMAGE_TEXT_TO_TEXT, "perception_lm"): "its vision tower needs the package timm",
    Case(IMAGE_TEXT_TO_TEXT, "shieldgemma2"): "transformers 5.24 does not read back the names that it writes "
    "(gemma3 is equal)",
}
"""What is not tried, and why."""


def matrix() -> list[Case]:
    """Every case that the installed transformers has."""
    every = [Case(auto_class, model_type) for auto_class, types in LISTED.items() for model_type in types]
    chosen = [Case(auto_class, model_type) for auto_class, types in CHOSEN.items() for model_type in types]
    return [case for case in (*every, *chosen) if case.model_type in CONFIG_MAPPING]
