"""The class of a checkpoint: what its config names, what is most likely meant, what the user wants, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoModelForSequenceClassification,
    CLIPImageProcessor,
    LlamaConfig,
    LlamaModel,
    LlavaProcessor,
    PreTrainedConfig,
    T5Config,
    pipeline,
)

from airstream import ArgumentError, AutoModel, CheckpointError, UnsupportedError
from airstream.compat.classes import choose_class
from airstream.model.row_table import RowTable
from tests.conftest import WriteTiny, stream
from tests.matrix.cases import IMAGE_TEXT_TO_TEXT, SEQ2SEQ_LM
from tests.matrix.configs import tiny_config
from tests.matrix.examine import tensors_of, write
from tests.matrix.inputs import Inputs, picture, seen, text
from tests.stand_ins.tiny_models import tiny_tokenizer

FP32 = torch.float32
Write = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """`written(auto_class, model_type)`: the folder of a tiny checkpoint."""
    folders: dict[tuple[str, str], Path] = {}

    def folder_of(auto_class: str, model_type: str) -> Path:
        if (auto_class, model_type) not in folders:
            folders[auto_class, model_type] = tmp_path_factory.mktemp(model_type)
            write(auto_class, model_type, folders[auto_class, model_type])
            tiny_tokenizer().save_pretrained(folders[auto_class, model_type])
        return folders[auto_class, model_type]

    return folder_of


def name_of(config: PreTrainedConfig, wanted: Any = None) -> str:
    return choose_class(config, Path(), trust_remote_code=False, wanted=wanted)[0].__name__


# -------------------------------------------------------------------------------------------------------- which class


@pytest.mark.parametrize(
    "named",
    ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification", "LlamaForTokenClassification"],
)
def test_the_class_that_the_config_names(named: str) -> None:
    assert name_of(LlamaConfig(architectures=[named])) == named


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), "LlamaForCausalLM"),
        (T5Config(), "T5ForConditionalGeneration"),
        (tiny_config("whisper"), "WhisperForConditionalGeneration"),
        (tiny_config("llava"), "LlavaForConditionalGeneration"),
        (tiny_config("gemma3"), "Gemma3ForConditionalGeneration"),  # which has a text model of its own, too
        (tiny_config("llama4"), "Llama4ForConditionalGeneration"),
        (tiny_config("clip"), "CLIPModel"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_what_is_most_likely_meant_where_none_is_named(config: PreTrainedConfig, expected: str) -> None:
    config.architectures = None
    assert name_of(config) == expected


def test_the_text_part_of_a_multimodal_model_that_was_saved_by_itself() -> None:
    config = tiny_config("mllama").text_config
    config.architectures = ["MllamaForCausalLM"]
    assert name_of(config) == "MllamaForCausalLM"


@pytest.mark.parametrize("named", ["AutoModel", "Trainer", "BertModel", "os", "PreTrainedModel", "__doc__", "a b", ""])
def test_a_config_cannot_name_what_is_not_a_class_of_its_type(named: str) -> None:
    assert name_of(LlamaConfig(architectures=[named])) == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (AutoModelForSequenceClassification, "LlamaForSequenceClassification"),
        ("AutoModelForSequenceClassification", "LlamaForSequenceClassification"),
        ("AutoModel", "LlamaModel"),
        (transformers.AutoModel, "LlamaModel"),
        (LlamaModel, "LlamaModel"),
        ("LlamaForTokenClassification", "LlamaForTokenClassification"),
    ],
    ids=str,
)
def test_the_class_that_the_user_wants(wanted: Any, expected: str) -> None:
    assert name_of(LlamaConfig(architectures=["LlamaForCausalLM"]), wanted) == expected


def test_a_text_model_of_a_multimodal_config_gets_the_config_of_the_text() -> None:
    cls, config = choose_class(tiny_config("llama4"), Path(), trust_remote_code=False, wanted="AutoModelForCausalLM")
    assert cls.__name__ == "Llama4ForCausalLM"
    assert config.model_type == "llama4_text"


@pytest.mark.parametrize("wanted", ["AutoModelForSeq2SeqLM", "BertModel", "nonsense", 5, dict, AutoModel])
def test_a_class_that_does_not_go_with_the_checkpoint_is_refused(wanted: Any) -> None:
    with pytest.raises(ArgumentError, match="model_class="):
        name_of(LlamaConfig(), wanted)


# ---------------------------------------------------------------------------------------- code of the checkpoint's own

OWN_CODE = """
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

class OwnForCausalLM(LlamaForCausalLM):
    pass

class OwnClassifier(LlamaForSequenceClassification):
    pass
"""


@pytest.mark.parametrize(
    ("named", "auto_class"),
    [("OwnForCausalLM", "AutoModelForCausalLM"), ("OwnClassifier", "AutoModelForSequenceClassification")],
)
def test_own_code_runs_when_asked_for(written: Write, tmp_path: Path, named: str, auto_class: str) -> None:
    original = written("AutoModelForSequenceClassification" if "lassif" in named else "AutoModelForCausalLM", "llama")
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"architectures": [named], "auto_map": {auto_class: f"modeling_own.{named}"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "modeling_own.py").write_text(OWN_CODE)
    with stream(tmp_path, trust_remote_code=True) as own, stream(original) as plain:
        assert type(own).__name__ == named
        assert torch.equal(own(**text(own)).logits, plain(**text(plain)).logits)
    if auto_class == "AutoModelForCausalLM":  # what llama most likely is
        with stream(tmp_path) as untrusted:
            assert type(untrusted).__module__.startswith("transformers.")


def test_own_code_that_is_not_trusted_is_named_in_the_error() -> None:
    class UnknownConfig(PreTrainedConfig):
        model_type = "unknown"

    config = UnknownConfig()
    with pytest.raises(UnsupportedError, match="Upgrade transformers"):
        name_of(config)
    config.auto_map = {"AutoModelForCausalLM": "modeling_unknown.UnknownForCausalLM"}
    with pytest.raises(UnsupportedError, match="trust_remote_code=True"):
        name_of(config)


# ------------------------------------------------------------------------------------------------ models of other kinds


def equal(streamed: Any, reference: Any) -> bool:
    one, other = dict(tensors_of(streamed)), dict(tensors_of(reference))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_classifier_classifies_and_does_not_generate(written: Write) -> None:
    folder = written("AutoModelForSequenceClassification", "bert")
    reference = AutoModelForSequenceClassification.from_pretrained(folder)
    with stream(folder) as model:
        answers = [pipeline("text-classification", m, tokenizer=model.tokenizer)("w5 w77") for m in (model, reference)]
        assert answers[0] == answers[1]
        with pytest.raises(UnsupportedError, match="BertForSequenceClassification does not generate"):
            model.generate(torch.tensor([[5, 77]]))
        assert model.plan.tiers["cpu"].items["KV cache"] == 0


def test_embeddings_of_a_language_model(written: Write) -> None:
    """The checkpoint of a causal language model, without its head."""
    folder = written("AutoModelForCausalLM", "qwen3")
    reference = transformers.AutoModel.from_pretrained(folder).eval()
    with stream(folder, model_class="AutoModel") as model, torch.no_grad():
        assert type(model).__name__ == "Qwen3Model"
        assert equal(model(**text(model)), reference(**text(model)))


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_an_encoder_decoder(written: Write, model_type: str) -> None:
    folder = written(SEQ2SEQ_LM, model_type)
    reference = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    with stream(folder) as model:
        tables = [
            name for name, weight in model.named_parameters(remove_duplicate=False) if isinstance(weight, RowTable)
        ]
        assert len(tables) == 3, "the table that encoder and decoder share is in memory under none of its names"
        inputs = model.tokenizer(["w5 w77 w20 w30", "w9"], padding=True, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        for options in ({}, {"num_beams": 3}):
            options |= {"max_new_tokens": 6, "do_sample": False}
            assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))
        with torch.no_grad():
            assert equal(model.get_encoder()(inputs.input_ids), reference.get_encoder()(inputs.input_ids))


def test_layers_that_share_their_weights(written: Write) -> None:
    """ALBERT has one layer that runs four times."""
    folder = written("AutoModelForMaskedLM", "albert")
    reference = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with stream(folder) as model, torch.no_grad():
        assert equal(model(**text(model)), reference(**text(model)))


# ------------------------------------------------------------------------------------------------------ images and text


def bytes_of(model: Any, tower: bool) -> int:
    """Of all batches of the vision tower, or of all others."""
    return sum(batch.read_bytes for batch in model.plan.batches if ("vision" in batch.units[0]) == tower)


@pytest.mark.parametrize("max_memory", [None, "8GiB"], ids=["all streamed", "all resident"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_tower_that_is_not_called_is_not_read(written: Write, max_memory: str | None, prefetch: int) -> None:
    """Not even in the first pass, before it is known what will be called. An image brings it in."""
    folder = written(IMAGE_TEXT_TO_TEXT, "llava")
    options = {} if max_memory is None else {"max_memory": max_memory}
    read: list[tuple[str, str]] = []
    with stream(folder, prefetch_batches=prefetch, **options) as model:
        streamer = model._engine._executor.streamer
        begin = streamer._begin

        def watch(batch: int, *args: Any, **kwargs: Any) -> bool:
            units = model.plan.batches[batch].units if batch < len(model.plan.batches) else ("a table",)
            read.append(units[0])
            return begin(batch, *args, **kwargs)

        streamer._begin = watch
        assert model.stats.streamed_bytes == 0, "nothing is read before it is known what for"
        for _ in range(2):
            model(**text(model))
        model.generate(**text(model), max_new_tokens=3)
        assert read
        assert not [unit for unit in read if "vision" in unit]
        model(**text(model) | image_inputs(folder))
        assert len({unit for unit in read if "vision" in unit}) == 4


def image_inputs(folder: Path) -> Inputs:
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    return seen(reference, picture(reference))


def test_text_with_an_image_by_the_processor(written: Write) -> None:
    """From a picture to words: the processor of the checkpoint, and a pipeline."""
    folder = written(IMAGE_TEXT_TO_TEXT, "llava")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w5"]})
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="w5",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    with stream(folder) as model:
        assert model.processor is model.processor
        image = Image.linear_gradient("L").convert("RGB")
        inputs = model.processor(text="w5 w77 w20", images=image, return_tensors="pt")
        assert (inputs.input_ids == 5).sum() == 16
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert torch.equal(tokens, reference.generate(**inputs, max_new_tokens=5, do_sample=False))


def test_another_class_than_the_saved_one_is_named(tiny: WriteTiny) -> None:
    """Nothing is wrong with the download then."""
    with pytest.raises(CheckpointError, match=r"saved from LlamaForCausalLM: leave model_class= out, or name that"):
        AutoModel.from_pretrained(tiny("llama", FP32), model_class="AutoModelForSequenceClassification", device="cpu")
