"""Configs and folders made to do harm: refused with the name of what is wrong, at once, and in little memory."""

from __future__ import annotations

import json
import re
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from airstream import AirstreamError, AutoModel, CheckpointError
from airstream.auto import load_beside
from airstream.checkpoint.config_file import check_numbers, read_config_file
from airstream.checkpoint.formats import open_checkpoint
from airstream.checkpoint.generation_file import read_generation_file
from airstream.checkpoint.names import PICKLE_INDEX
from airstream.compat import suspects
from airstream.compat.suspects import advice
from airstream.system.foreign_json import CONFIG
from tests.conftest import WriteTiny
from tests.stand_ins.limits import GENEROUS, MAX_BYTES, MAX_SECONDS

HUGE = 10**12


def with_config(source: Path, folder: Path, text: str | None, with_weights: bool = True) -> Path:
    """A copy of `source`, with `text` as its config if there is one."""
    folder.mkdir()
    for file in source.iterdir():
        if with_weights or "safetensors" not in file.name:
            shutil.copy(file, folder)
    if text is not None:
        (folder / "config.json").write_text(text)
    return folder


FIELDS: list[tuple[str, str, Any]] = [
    ("llama", "hidden_size", -1),
    ("llama", "hidden_size", 0),
    ("llama", "hidden_size", HUGE),
    ("llama", "hidden_size", "64"),
    ("llama", "hidden_size", 64.5),
    ("llama", "num_hidden_layers", -3),
    ("llama", "num_hidden_layers", 10**8),
    ("llama", "vocab_size", -5),
    ("llama", "vocab_size", HUGE),
    ("llama", "num_attention_heads", 0),
    ("llama", "num_attention_heads", -4),
    ("llama", "num_attention_heads", HUGE),
    ("llama", "num_key_value_heads", 0),
    ("llama", "intermediate_size", HUGE),
    ("llama", "head_dim", -1),
    ("llama", "rms_norm_eps", "x"),
    ("llama", "hidden_act", "os.system"),
    ("llama", "model_type", "../llama"),
    ("llama", "model_type", ["llama"]),
    ("llama", "dtype", "os"),
    ("llama", "rope_parameters", 7),
    ("mixtral", "num_local_experts", HUGE),
    ("mixtral", "num_local_experts", -1),
    ("llama", "architectures", [1]),
    ("llama", "architectures", [["LlamaForCausalLM"]]),
    ("llama", "architectures", 7),
    ("llama", "pad_token_id", 10**9),
    ("llama", "pad_token_id", 5000),
    ("llama", "pad_token_id", "x"),
    ("llama", "num_labels", 10**9),
    ("llama", "sliding_window", "x"),
    ("llama", "output_hidden_states", "x"),
    ("llama", "id2label", 7),
    ("llama", "sub_configs", 7),
    ("llama", "auto_map", 7),
    ("llama", "attn_implementation", "evil/kernel"),
    ("llama", "_attn_implementation", "evil/kernel"),
    ("llama", "attn_implementation", {"": "evil/kernel"}),
    ("llama", "attn_implementation", "nothing that is"),
    ("llama", "experts_implementation", "evil/kernel"),
    ("llama", "quantization_config", 7),
    ("llama", "quantization_config", []),
    ("llama", "quantization_config", {"quant_method": 7}),
    ("llama", "quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": "x"}),
    ("llama", "quantization_config", {"quant_method": "fp8", "weight_block_size": "x"}),
    ("llama", "rope_parameters", {"rope_type": "yarn", "factor": "x"}),
    ("llama", "rope_parameters", {"rope_type": [], "rope_theta": {}}),
    ("llama", "rope_parameters", {"rope_theta": "x"}),
    ("llama", "initializer_range", "x"),
    ("llama", "max_position_embeddings", "x"),
    ("llama", "tie_word_embeddings", {"a": 1}),
    ("llama", "dtype", [1]),
    ("llama", "dtype", "float31"),
    ("llama", "model_type", 7),
    ("llama", "model_type", None),
    ("llama", "model_type", {"a": 1}),
    ("llama", "layer_types", ["x"]),
    ("mixtral", "num_experts_per_tok", HUGE),
    ("mixtral", "num_experts_per_tok", "x"),
    ("gpt2", "activation_function", 7),
    ("gpt2", "n_inner", "x"),
    ("gpt2", "n_layer", 10**8),
    ("gpt2", "n_head", 0),
    ("gpt2", "n_embd", -64),
    ("gpt2", "n_positions", HUGE),
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS, ids=lambda value: str(value))
def test_absurd_configs(tiny: WriteTiny, tmp_path: Path, name: str, field: str, value: Any) -> None:
    source = tiny(name, torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    assert field in config or field not in ("n_positions", "n_embd", "num_local_experts"), "nothing would be changed"
    folder = with_config(source, tmp_path / "m", json.dumps(config | {field: value}))
    refused(lambda: AutoModel.from_pretrained(folder, device="cpu", max_memory="8GiB"), folder)


def refused(load: Callable[[], Any], source: Path) -> None:
    """It raises an error of ours that says which file or tensor is wrong, at next to no cost."""
    before, started = peak_bytes(), time.thread_time()
    with pytest.raises(AirstreamError) as caught:
        load()
    said = str(caught.value)
    assert str(source) in said or "tensor" in said or "config.json" in said
    assert 20 < len(said) < 3000
    assert time.thread_time() - started < MAX_SECONDS * GENEROUS
    assert peak_bytes() - before < MAX_BYTES


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", {"a": {}}),
        ("sliding_window", 4),
        ("label2id", [1]),
        ("quantization_config", {"quant_method": "gptq"}),
        ("quantization_config", {"quant_method": "gptq", "bits": "x", "group_size": []}),
        ("torch_dtype", {"a": 1}),
        ("is_encoder_decoder", "x"),
        ("eos_token_id", ["x"]),
        ("eos_token_id", {"a": 1}),
        ("bos_token_id", []),
        ("max_length", "x"),
        ("temperature", []),
        ("return_dict", 7),
        ("output_attentions", True),
        ("tokenizer_class", 7),
        ("head_dim", 10**7),
        ("max_position_embeddings", 10**60),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e308}),
        ("rms_norm_eps", float("nan")),
        ("attention_dropout", -1),
    ],
    ids=str,
)
def test_odd_values_are_refused_by_name_or_do_no_harm(tiny: WriteTiny, tmp_path: Path, field: str, value: Any) -> None:
    source = tiny("llama", torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    folder = with_config(source, tmp_path / "m", json.dumps(config | {field: value}))
    (folder / "generation_config.json").unlink(missing_ok=True)
    try:
        model = AutoModel.from_pretrained(folder, device="cpu", max_memory="1GiB", max_context=32)
    except AirstreamError as error:
        assert str(folder) in str(error) or "tensor" in str(error)  # noqa: PT017 - transformers may mind, or not
    else:
        with model:
            model(torch.tensor([[3, 4]]))


NAMED: list[tuple[str, str, Any]] = [
    *(("llama", "dtype", value) for value in ("x", 7, [1], {}, True)),
    *(("llama", "architectures", value) for value in (7, [1], True)),
    *(("llama", "id2label", value) for value in (7, [1], "x", {"a": 1})),
    *(("llama", "model_type", value) for value in (7, [1], {"a": 1})),
    *(("llama", "is_encoder_decoder", value) for value in ("x", 7)),
    ("llama", "num_attention_heads", 0),
    ("llama", "num_attention_heads", 3),
    ("llama", "hidden_size", 3),
    ("llama", "hidden_act", "x"),
    ("llama", "rms_norm_eps", float("nan")),
    ("llama", "rope_parameters.rope_type", "x"),
    ("llama", "rope_parameters.rope_theta", None),
    ("gpt2", "n_head", 0),
    ("gpt2", "n_head", 3),
    ("gpt2", "n_embd", 3),
    ("gpt2", "n_positions", -1),
    ("gpt2", "n_inner", -1),
    ("gpt2", "activation_function", "x"),
    ("gpt2", "attn_pdrop", 1.5),
    ("gpt2", "embd_pdrop", float("nan")),
    ("qwen3_moe", "moe_intermediate_size", -1),
    ("qwen3_moe", "decoder_sparse_step", 0),
    ("qwen3_moe", "num_key_value_heads", 0),
    ("qwen3_moe", "num_experts_per_tok", -1),
    ("llama", "vocab_size", 3),
    ("llama", "intermediate_size", 10**9),
    ("gpt2", "n_positions", 3),
    ("gpt2", "n_inner", 3),
]
"""What transformers says of each names none of them, or nothing is said until the model computes."""


@pytest.mark.parametrize(("name", "path", "value"), NAMED, ids=str)
def test_the_field_is_named(
    tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, path: str, value: Any
) -> None:
    monkeypatch.setattr(suspects, "MAX_SECONDS", MAX_SECONDS * GENEROUS)
    source = tiny(name, torch.bfloat16)
    config = json.loads((source / "config.json").read_text())
    *outer, field = path.split(".")
    (config[outer[0]] if outer else config)[field] = value
    folder = with_config(source, tmp_path / "m", json.dumps(config))
    with pytest.raises(AirstreamError, match=rf"config\.json.*{field}\W"):
        AutoModel.from_pretrained(folder, device="cpu", max_memory="1GiB", max_context=32)


@pytest.mark.parametrize(("seconds", "fields"), [(0.0, []), (GENEROUS * MAX_SECONDS, ["b", "d", "e"])])
def test_a_search_for_the_field_is_bounded(monkeypatch: pytest.MonkeyPatch, seconds: float, fields: list[str]) -> None:
    """However many there are, and however long it takes to try one."""
    monkeypatch.setattr(suspects, "MAX_SECONDS", seconds)
    values = dict.fromkeys("ab", 1) | dict.fromkeys("cdefg", "x") | {"n": {"inner": 2}}
    tried: list[dict[str, Any]] = []

    def attempt(others: dict[str, Any]) -> None:
        tried.append(others)
        if not values.keys() - others.keys() & set("bdefg"):
            raise ValueError("no")

    said = advice(values, {}, attempt)
    assert re.findall(r"(\w+) \(", said) == fields
    assert len(tried) <= (1 if not fields else 12)


def test_what_fails_for_another_reason_is_no_field_s_fault() -> None:
    """What is tried again as it was, and works, has not failed because of a field."""
    assert advice({"a": 1}, {}, lambda _: None) == ""


GENERATION: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("max_length", "max_new_tokens", "num_beams", "top_k")
        for value in ("x", [1], {}, 1.5)
    ),
    *((name, value) for name in ("temperature", "top_p", "repetition_penalty") for value in ("x", [1], {}, True)),
    *((name, value) for name in ("eos_token_id", "pad_token_id", "bos_token_id") for value in ("x", {}, ["x"], 1.5)),
    *((name, "x") for name in ("do_sample", "use_cache", "output_scores", "suppress_tokens", "bad_words_ids")),
    ("early_stopping", []),
    ("cache_implementation", 7),
    ("cache_implementation", "nothing that is"),
    ("stop_strings", 7),
    ("eos_token_id", 10**9),
    ("watermarking_config", {"a": 1}),
    ("watermarking_config", 7),
    ("max_new_tokens", -1),
    ("compile_config", 7),
    ("num_return_sequences", 5),
    *(("num_beams", value) for value in (0, -1)),
    *(("prefill_chunk_size", value) for value in (0, -1, 10**30)),
    *(("prompt_lookup_num_tokens", value) for value in (0, -1, 10**30)),
    *((f"{name}repetition_penalty", value) for name in ("", "encoder_") for value in (0, -1.0, 3, float("nan"))),
    *(("bad_words_ids", value) for value in ([], [1], ["x"], [[[]]], [[-1]], {"a": 1})),
    *(("sequence_bias", value) for value in ([], [1], [[[1]]], [[[1], "x"]], [[[1], 1]], {"a": 1})),
    *((f"{begin}suppress_tokens", value) for begin in ("", "begin_") for value in (["x"], [None], {"a": 1})),
    *(("exponential_decay_length_penalty", value) for value in (7, [], [1], ["x", "y"], {"a": 1})),
    *((name, 1) for name in ("constraints", "force_words_ids", "dola_layers", "is_assistant")),
    ("encoder_no_repeat_ngram_size", 10**9),
    *(("assistant_early_exit", value) for value in (-1, 10**9)),
    *(("forced_eos_token_id", value) for value in (-1, [])),
    ("eos_token_id", []),
    ("guidance_scale", 10**30),
    ("stop_strings", [1]),
    ("use_mtp", "x"),
]


@pytest.mark.parametrize(("field", "value"), GENERATION, ids=str)
def test_absurd_generation_configs(tiny: WriteTiny, tmp_path: Path, field: str, value: Any) -> None:
    folder = with_config(tiny("llama", torch.bfloat16), tmp_path / "m", None)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({field: value}))
    refused(lambda: AutoModel.from_pretrained(folder, device="cpu", max_memory="1GiB", max_context=32), file)


@pytest.mark.parametrize("value", ["x", {}, ["x"], []], ids=str)
def test_ids_that_are_none_in_a_config_that_speaks_of_generation(tiny: WriteTiny, tmp_path: Path, value: Any) -> None:
    source = tiny("llama", torch.bfloat16)
    config = json.loads((source / "config.json").read_text()) | {"decoder_start_token_id": value}
    folder = with_config(source, tmp_path / "m", json.dumps(config))
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=r"config\.json: decoder_start_token_id is "):
        AutoModel.from_pretrained(folder, device="cpu", max_memory="1GiB", max_context=32)


@pytest.mark.parametrize(("field", "value"), GENERATION, ids=str)
def test_absurd_generation_configs_name_the_field(tmp_path: Path, field: str, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}))
    try:
        read_generation_file(tmp_path / "generation_config.json")
    except CheckpointError as error:
        assert f" {field} is " in str(error)  # noqa: PT017 - the rest is for transformers to refuse
    else:
        assert field in LEFT_TO_TRANSFORMERS


LEFT_TO_TRANSFORMERS = (
    "cache_implementation", "eos_token_id", "watermarking_config", "max_new_tokens", "compile_config",
    "num_return_sequences",
)  # fmt: skip
"""Which says in its own words what goes with what."""


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token_id": [1, 2], "pad_token_id": 0, "temperature": 1, "do_sample": True, "top_k": 0, "top_p": 0.9},
        {"max_length": 4096, "early_stopping": "never", "num_beams": 2, "forced_eos_token_id": [1], "min_p": None},
        {
            "suppress_tokens": [1],
            "begin_suppress_tokens": [2],
            "use_cache": True,
            "guidance_scale": 3,
            "lang_to_id": {},
        },
        {
            "bad_words_ids": [[1, 2], [3]],
            "sequence_bias": [[[1], -2.5]],
            "repetition_penalty": 1,
            "is_assistant": False,
        },
        {"begin_suppress_tokens": [220, -1], "suppress_tokens": [], "exponential_decay_length_penalty": [5, 1.1]},
        {"transformers_version": "4.40.0", "_from_model_config": True, "bos_token_id": 1, "stop_strings": ["a"]},
    ],
)
def test_generation_configs_that_models_have(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert read_generation_file(tmp_path / "generation_config.json") == config


NESTED = '{"a":' * 600 + "1" + "}" * 600
LISTS = "[" + "[]," * (21 << 20) + "[]]"
BROKEN: dict[str, str] = {
    "nothing": "",
    "half": "{",
    "a list": "[]",
    "a list of lists": "[[[]]]",
    "a number": "7",
    "null": "null",
    "deep": NESTED,
    "deep lists": "[" * 99_999,
    "lists": LISTS,
    "half a letter": r'{"model_type": "\ud800"}',
    "a pointer": "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n",
    "a page": "<!doctype html><html>",
}
BESIDE = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("case", BROKEN)
def test_configs_that_are_broken(tiny: WriteTiny, tmp_path: Path, name: str, case: str) -> None:
    folder = with_config(tiny("llama", torch.bfloat16), tmp_path / "m", None)
    (folder / name).write_text(BROKEN[case])
    refused(lambda: AutoModel.from_pretrained(folder, device="cpu", max_memory="1GiB"), folder / name)


TOKENIZERS: list[tuple[str, Any]] = [
    ("tokenizer_config.json", {"tokenizer_class": 7}),
    ("tokenizer_config.json", {"tokenizer_class": ["x"]}),
    ("tokenizer_config.json", {"tokenizer_class": "os.system"}),
    ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": 7}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": 7}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": 7}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {str(10**30): {"content": "a"}}}),
    ("tokenizer_config.json", {"eos_token": {"content": 7}}),
    ("tokenizer_config.json", {"eos_token": 7}),
    ("tokenizer_config.json", {"pad_token": [[]]}),
    ("tokenizer_config.json", {"model_max_length": "x"}),
    ("tokenizer_config.json", {"model_max_length": []}),
    ("tokenizer_config.json", {"additional_special_tokens": 7}),
    ("tokenizer_config.json", {"extra_special_tokens": 7}),
    ("tokenizer_config.json", {"extra_special_tokens": {"a": []}}),
    ("tokenizer_config.json", {"chat_template": 7}),
    ("tokenizer_config.json", {"chat_template": [{"a": 1}]}),
    ("tokenizer_config.json", {"padding_side": "x"}),
    ("tokenizer_config.json", {"backend": 7}),
    ("tokenizer_config.json", {"auto_map": 7}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": 7}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["x.Y", None]}}),
    ("tokenizer_config.json", {"model_input_names": 7}),
    ("tokenizer_config.json", {"self": 7, "cls": 8, "tokenizer_object": 9}),
    ("tokenizer_config.json", {"tokenizer_file": 7, "vocab_file": []}),
    ("special_tokens_map.json", {"eos_token": 7}),
    ("special_tokens_map.json", {"eos_token": {"a": 1}}),
    ("special_tokens_map.json", {"additional_special_tokens": {"a": 1}}),
    ("added_tokens.json", {"a": "x"}),
    ("added_tokens.json", {"a": 10**30}),
    ("added_tokens.json", {"": -1}),
    ("tokenizer.json", {}),
    ("tokenizer.json", {"model": {}}),
    ("tokenizer.json", {"model": {"type": "BPE", "vocab": {}, "merges": ["a"]}}),
    ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 10**30}, "unk_token": "a"}}),
    ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": {"a": 2**32 - 1}, "unk_token": "a"}}),
    ("tokenizer.json", {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}}),
    (
        "tokenizer.json",
        {"added_tokens": [{"id": -1, "content": "a"}], "model": {"type": "BPE", "vocab": {}, "merges": []}},
    ),
    ("tokenizer.json", {"added_tokens": 7}),
]

NO_TOKENIZER: list[tuple[str, str, Any]] = [
    ("tokenizer_config.json", "padding_side", "x"),
    ("tokenizer_config.json", "additional_special_tokens", 7),
    ("tokenizer_config.json", "added_tokens_decoder", 7),
    ("tokenizer_config.json", "eos_token", 7),
    ("tokenizer_config.json", "tokenizer_class", 7),
    ("tokenizer_config.json", "chat_template", [1]),
    ("tokenizer_config.json", "model_input_names", 7),
    ("tokenizer_config.json", "model_max_length", "x"),
    ("tokenizer_config.json", "split_special_tokens", 7),
    ("special_tokens_map.json", "eos_token", 7),
    ("special_tokens_map.json", "additional_special_tokens", {"a": 1}),
    ("added_tokens.json", "<s>", "x"),
    ("tokenizer.json", "added_tokens", 7),
    ("tokenizer.json", "version", 7),
]


@pytest.mark.parametrize(("name", "field", "value"), NO_TOKENIZER, ids=str)
def test_the_file_of_a_tokenizer_that_is_wrong_is_named(
    tiny: WriteTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, field: str, value: Any
) -> None:
    monkeypatch.setattr(suspects, "MAX_SECONDS", MAX_SECONDS * GENEROUS)
    folder = with_config(tiny("llama", torch.bfloat16), tmp_path / "m", None)
    old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(old | {field: value}))
    before = sorted(folder.iterdir())
    with pytest.raises(CheckpointError) as caught:
        load_beside(folder, False, "tokenizer")
    where = "line 1" if name == "tokenizer.json" else field  # which has an entry for every word
    assert name in str(caught.value)
    assert where in str(caught.value)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("case", BROKEN)
def test_tokenizers_that_are_broken(tiny: WriteTiny, tmp_path: Path, name: str, case: str) -> None:
    folder = with_config(tiny("llama", torch.bfloat16), tmp_path / "m", None)
    (folder / name).write_text(BROKEN[case])
    loaded_or_refused(folder, must_be_refused=case not in ("a list", "null", "nothing"))


@pytest.mark.parametrize("what", ["tokenizer", "processor"])
@pytest.mark.parametrize(("name", "contents"), TOKENIZERS, ids=str)
def test_absurd_tokenizers(tiny: WriteTiny, tmp_path: Path, name: str, contents: Any, what: Any) -> None:
    folder = with_config(tiny("llama", torch.bfloat16), tmp_path / "m", None)
    old = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(old | contents if contents else contents))
    loaded_or_refused(folder, what=what)


def loaded_or_refused(folder: Path, must_be_refused: bool = False, what: Any = "tokenizer") -> None:
    before, started = peak_bytes(), time.thread_time()
    try:
        tokenizer = load_beside(folder, False, what)
    except AirstreamError as error:
        assert str(folder) in str(error)  # noqa: PT017 - what transformers minds is its own affair
    else:
        assert not must_be_refused, tokenizer
    assert time.thread_time() - started < MAX_SECONDS * GENEROUS
    assert peak_bytes() - before < MAX_BYTES


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "intermediate_size", "max_position_embeddings"])
def test_absurd_sizes_without_weights_are_at_most_planned(tiny: WriteTiny, tmp_path: Path, field: str) -> None:
    source = tiny("llama", torch.bfloat16)
    config = json.loads((source / "config.json").read_text()) | {field: HUGE}
    folder = with_config(source, tmp_path / "m", json.dumps(config), with_weights=False)
    before = peak_bytes()
    try:
        AutoModel.plan(folder, device="cpu", max_memory="8GiB", max_context=64)
    except AirstreamError as error:
        assert "GiB" in str(error)  # noqa: PT017 - a model of that size may be planned, and does not fit
    assert peak_bytes() - before < 200 << 20


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"llama"', "[" * 99_999, '{"a":' * 99_999, "\xff"])
def test_configs_that_are_none(tiny: WriteTiny, tmp_path: Path, text: str) -> None:
    folder = with_config(tiny("llama", torch.bfloat16), tmp_path / "m", text)
    with pytest.raises(CheckpointError, match=r"config\.json is (not a JSON object|not a config|empty|text)"):
        AutoModel.plan(folder, device="cpu")


def test_a_config_of_a_terabyte(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as stream:
        stream.truncate(CONFIG.max_bytes + 1)  # sparse
    with pytest.raises(CheckpointError, match="it is not a config"):
        read_config_file(tmp_path / "config.json")


def test_absurd_numbers_deep_inside(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"text_config": [{"num_layers": HUGE}]}))
    with pytest.raises(CheckpointError, match="num_layers is 1,000,000,000,000"):
        read_config_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 126, "num_attention_heads": 128, "pad_token_id": -1, "vocab_size": 262_144},
        {"n_layer": 0, "num_hidden_layers": 0, "sliding_window": -1, "max_position_embeddings": 10_485_760},
        {"n_routed_experts": 384, "num_image_tokens": -1, "depth": 32, "depths": [2, 2, 18, 2]},
    ],
)
def test_numbers_that_models_have(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    read_config_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    "name", ["inner_group_num", "num_block_repeats", "num_quantizers", "num_hash_functions", "n_langs"]
)
def test_counts_of_other_names(tmp_path: Path, name: str) -> None:
    """Each of which something is built for in some type of model."""
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {name: 10**9}}))
    with pytest.raises(CheckpointError, match=f"{name} is 1,000,000,000"):
        read_config_file(tmp_path / "config.json")


def test_no_config_of_transformers_has_absurd_numbers(tmp_path: Path) -> None:
    checked, refused = 0, set[str]()
    for cls in set(CONFIG_MAPPING.values()):
        try:
            values = cls().to_dict()
        except (ValueError, TypeError, AttributeError, ImportError, StrictDataclassError):
            continue  # it cannot be made without arguments
        try:
            check_numbers(tmp_path, values)
        except CheckpointError as error:
            refused.add(f"{cls.__name__}: {error}")
        checked += 1
    assert not refused
    assert checked > 200


@pytest.mark.parametrize("shard", ["../x.bin", "/etc/passwd", "sub/x.bin", "..", "", "a\\x.bin", "x\0.bin", 5, None])
def test_an_index_of_pickles_that_leads_elsewhere(tmp_path: Path, shard: Any) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.bin")
    (folder / PICKLE_INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(folder)
