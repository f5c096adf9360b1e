"""In the manner of transformers' own tests: every mode of `generate`, on types that differ in what they keep.

A decoder, one with experts, one with two kinds of attention, an encoder-decoder: each streamed, against the same model
resident, on two prompts, one of them padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from tests.conftest import cache_in, cache_of, stream
from tests.stand_ins.comparing import compare
from tests.stand_ins.tiny_models import TOKENS, VOCAB_SIZE, tell_weights_apart, tiny_tokenizer, write_tiny

FP32 = torch.float32
BATCH = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(2))
PADDED = (torch.arange(12)[None] >= torch.tensor([[0], [5]])).long()
T5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
SAMPLED = {"do_sample": True, "temperature": 1.3}
EVERYTHING = dict.fromkeys(("return_dict_in_generate", "output_scores", "output_logits", "output_hidden_states"), True)
MODES: Mapping[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, everything returned": EVERYTHING,
    "greedy, without a cache": {"use_cache": False},
    "sampled": {**SAMPLED, "top_k": 40, "top_p": 0.95},
    "sampled, several": {**SAMPLED, "num_return_sequences": 3, "min_p": 0.01},
    "sampled, everything returned": {**SAMPLED, **EVERYTHING},
    "typical": {**SAMPLED, "typical_p": 0.9, "epsilon_cutoff": 0.001, "eta_cutoff": 0.001},
    "beams": {"num_beams": 3, "length_penalty": 0.7, "early_stopping": True},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2, **EVERYTHING},
    "sampled beams": {"num_beams": 2, **SAMPLED},
    "static cache": {"cache_implementation": "static"},
    "penalties": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    "words": {"bad_words_ids": [[5], [7, 9]], "suppress_tokens": [11], "begin_suppress_tokens": [4]},
    "bias": {"sequence_bias": [[[6], 2.0], [[8, 9], -3.0]], "renormalize_logits": True},
    "forced": {"forced_eos_token_id": 2, "exponential_decay_length_penalty": (4, 1.5)},
}
ONE_PROMPT: Mapping[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prefill in chunks": {"prefill_chunk_size": 5},
    "guided": {"guidance_scale": 1.5},
}
"""What transformers itself does with one sequence, or with a decoder alone."""

Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=["llama", "qwen3_moe", "gemma3", "t5"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """The streamed model, and the resident one."""
    folder = tmp_path_factory.mktemp(request.param)
    auto_class = write(request.param, folder)
    with stream(folder) as model:
        yield model, auto_class.from_pretrained(folder).eval()


def write(name: str, folder: Path) -> Any:
    """Write the checkpoint; gives the class of transformers that loads it."""
    if name != "t5":
        write_tiny(name, folder, FP32)
        return AutoModelForCausalLM
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**TOKENS, **T5))
    tell_weights_apart(model)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return AutoModelForSeq2SeqLM


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor, **mode: Any) -> Any:
    return model.generate(ids, **{"attention_mask": mask, "do_sample": False, "max_new_tokens": 8, **mode})


@pytest.mark.parametrize("mode", MODES)
def test_generate(pair: Pair, mode: str) -> None:
    model, reference = pair
    compare(lambda each: generate(each, BATCH, PADDED, **MODES[mode]), model, reference)


@pytest.mark.parametrize("mode", ONE_PROMPT)
def test_generate_for_one_prompt(pair: Pair, mode: str) -> None:
    model, reference = pair
    if model.config.is_encoder_decoder and mode != "prompt lookup":
        pytest.skip("of decoders alone")
    compare(lambda each: generate(each, BATCH[:1], PADDED[:1], **ONE_PROMPT[mode]), model, reference)


def test_padding_changes_little(pair: Pair) -> None:
    """As little as in the resident model, to the bit."""
    model, reference = pair
    if model.config.is_encoder_decoder:
        pytest.skip("encoders are padded on the right")
    compare(lambda each: each(BATCH[1:], attention_mask=PADDED[1:]).logits[:, 5:], model, reference)
    compare(lambda each: each(BATCH[1:, 5:]).logits, model, reference)


def test_going_on_with_a_cache(pair: Pair) -> None:
    model, reference = pair

    def twice(each: Any) -> Any:
        first = generate(each, BATCH[:1], PADDED[:1], return_dict_in_generate=True)
        ids = BATCH[:1] if each.config.is_encoder_decoder else first.sequences
        kept = {} if each.config.is_encoder_decoder else cache_in(each, cache_of(first))
        return generate(each, ids, torch.ones_like(ids), **kept)

    compare(twice, model, reference)


def test_from_embeddings(pair: Pair) -> None:
    model, reference = pair

    def from_embeddings(each: Any) -> Any:
        with torch.no_grad():
            embeddings = each.get_input_embeddings()(BATCH)
        return each.generate(inputs_embeds=embeddings, attention_mask=PADDED, do_sample=False, max_new_tokens=6)

    compare(from_embeddings, model, reference)
