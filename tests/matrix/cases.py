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
        return zlib.crc32(self.model_type.encode()) % NUM_PARTS


LISTED: Mapping[str, Mapping[str, str]] = {
    CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    SEQ2SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}
"""Auto classes of which every type that the installed transformers has is tried, or named with a reason."""

CHOSEN: Mapping[str, tuple[str, ...]] = {
    IMAGE_TEXT_TO_TEXT: (
        "aria", "aya_vision", "blip", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni",
        "deepseek_vl", "deepseek_vl_hybrid", "diffusion_gemma", "exaone4_5", "fuyu", "gemma3", "gemma4",
        "gemma4_unified", "git", "glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "got_ocr2",
        "hyperclovax_vision_v2", "idefics2", "idefics3", "internvl", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava",
        "llava_next", "llava_next_video", "llava_onevision", "minimax_m3_vl", "mistral3", "mistral4", "mllama",
        "ovis2", "paligemma", "pp_chart2table", "qianfan_ocr", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
        "qwen3_vl", "qwen3_vl_moe", "qwen4_exp", "smolvlm", "step3p7", "video_llava", "vipllava",
        "vision-encoder-decoder",
    ),
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
}
"""What is not tried, and why."""


def matrix() -> list[Case]:
    """Every case that the installed transformers has."""
    every = [Case(auto_class, model_type) for auto_class, types in LISTED.items() for model_type in types]
    chosen = [Case(auto_class, model_type) for auto_class, types in CHOSEN.items() for model_type in types]
    return [case for case in (*every, *chosen) if case.model_type in CONFIG_MAPPING]
