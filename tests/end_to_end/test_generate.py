"""Everything that `generate()` and its kin can do, a streamed model does with the resident model's results."""

from __future__ import annotations

import gc
import importlib
import re
import types
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BatchEncoding,
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

from airstream import ArgumentError, UnsupportedError
from airstream.model import calls as workload
from tests.conftest import Resident, WriteTiny, cache_in, cache_of, stream
from tests.stand_ins.comparing import Use, compare
from tests.stand_ins.tiny_models import VOCAB_SIZE

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))
BATCH = torch.randint(3, VOCAB_SIZE, (2, 12), generator=torch.Generator().manual_seed(2))
LEFT_PADDED = (torch.arange(12)[None] >= torch.tensor([[0], [5]])).long()
TURN = torch.randint(3, VOCAB_SIZE, (1, 5), generator=torch.Generator().manual_seed(3))
GREEDY: dict[str, Any] = {"do_sample": False, "min_new_tokens": 12, "max_new_tokens": 12}
SAMPLING: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "top_p": 0.95, "temperature": 1.3}


@pytest.fixture(scope="module")
def llama(tiny: WriteTiny) -> Iterator[Any]:
    with stream(tiny("llama-sharded", FP32), layers_per_batch=1, prefetch_batches=1) as model:
        yield model


@pytest.fixture(scope="module")
def sliding(tiny: WriteTiny) -> Iterator[Any]:
    """Two kinds of attention in turn, windows of 8."""
    with stream(tiny("gemma3", FP32), layers_per_batch=1, prefetch_batches=0) as model:
        yield model


@pytest.fixture(scope="module")
def assistant(tiny: WriteTiny) -> Any:
    """A small resident model that drafts: the first layers of another checkpoint."""
    return AutoModelForCausalLM.from_pretrained(tiny("llama-tied", FP32), num_hidden_layers=2).eval()


# ------------------------------------------------------------------------------------------------------- strategies


class StopAt(StoppingCriteria):
    """Stops at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Collector(BaseStreamer):
    """Keeps the tokens it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.has_ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.has_ended = True


def streamed_tokens(model: Any) -> Any:
    collector = Collector()
    sequences = model.generate(IDS, streamer=collector, **GREEDY)
    assert collector.has_ended
    assert collector.tokens == sequences.flatten().tolist()
    return collector.tokens


def two_turns(model: Any) -> Any:
    """A chat: the second turn goes on with the cache of the first."""
    cache = DynamicCache(config=model.config)
    first = model.generate(IDS, **cache_in(model, cache), **GREEDY)
    second = model.generate(torch.cat([first, TURN], dim=1), **cache_in(model, cache), **GREEDY)
    return first, second, cache.get_seq_length()


def by_hand(model: Any) -> Any:
    """A loop of forward passes, one token each, as people write it."""
    ids, cache, steps = IDS, None, []
    for _ in range(6):
        output = model(ids, use_cache=True, **cache_in(model, cache))
        cache, ids = cache_of(output), output.logits[:, -1:].argmax(-1)
        steps.append(output.logits)
    return steps


def transition_scores(model: Any) -> Any:
    output = model.generate(IDS, return_dict_in_generate=True, output_scores=True, **GREEDY)
    return model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)


USES: dict[str, Use] = {
    "greedy": lambda model: model.generate(IDS, **GREEDY),
    "batch, left-padded": lambda model: model.generate(BATCH, attention_mask=LEFT_PADDED, **GREEDY),
    "sampling": lambda model: model.generate(IDS, **SAMPLING),
    "sampling, several": lambda model: model.generate(IDS, num_return_sequences=3, **SAMPLING),
    "beams": lambda model: model.generate(BATCH, num_beams=3, num_return_sequences=2, **GREEDY),
    "sampled beams": lambda model: model.generate(IDS, num_beams=3, **SAMPLING),
    "prompt lookup": lambda model: model.generate(IDS, prompt_lookup_num_tokens=3, **GREEDY),
    "early exit": lambda model: model.generate(IDS, assistant_early_exit=2, **GREEDY),
    "penalties": lambda model: model.generate(IDS, repetition_penalty=1.3, no_repeat_ngram_size=2, **GREEDY),
    "dynamic cache": lambda model: model.generate(IDS, cache_implementation="dynamic", **GREEDY),
    "static cache": lambda model: model.generate(IDS, cache_implementation="static", **GREEDY),
    "static cache object": lambda model: model.generate(
        IDS, **cache_in(model, StaticCache(config=model.config, max_cache_len=64)), **GREEDY
    ),
    "no cache": lambda model: model.generate(IDS, use_cache=False, **GREEDY),
    "two turns": two_turns,
    "chunked prefill": lambda model: model.generate(IDS, prefill_chunk_size=5, **GREEDY),
    "embeddings": lambda model: model.generate(inputs_embeds=model.get_input_embeddings()(IDS), **GREEDY),
    "stopping criteria": lambda model: model.generate(
        IDS, stopping_criteria=StoppingCriteriaList([StopAt(16)]), do_sample=False, max_new_tokens=12
    ),
    "generation config": lambda model: model.generate(IDS, GenerationConfig(**GREEDY, eos_token_id=2)),
    "streamer": streamed_tokens,
    "everything returned": lambda model: model.generate(
        IDS,
        return_dict_in_generate=True,
        output_hidden_states=True,
        output_scores=True,
        output_logits=True,
        **GREEDY,
    ),
    "transition scores": transition_scores,
    "by hand": by_hand,
    "all layers' states": lambda model: model(IDS, output_hidden_states=True).hidden_states,
    "loss": torch.no_grad()(lambda model: model(BATCH, labels=BATCH).loss),
    "last logits only": lambda model: model(BATCH, logits_to_keep=2).logits,
    "all logits but the first": lambda model: model(BATCH, logits_to_keep=-1).logits,
    "logits of a slice": lambda model: model(BATCH, logits_to_keep=slice(1, 4)).logits,
    "logits of some positions": lambda model: model(BATCH, logits_to_keep=[0, 3]).logits,
    "tuple": lambda model: model(IDS, return_dict=False, use_cache=False),
    "base model": lambda model: model.base_model(IDS).last_hidden_state,
    "inference mode": torch.inference_mode()(lambda model: model.generate(IDS, **GREEDY)),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_use(llama: Any, resident: Resident, use: Use) -> None:
    compare(use, llama, resident("llama-sharded", FP32, FP32))


@pytest.mark.parametrize(
    "name", ["greedy", "batch, left-padded", "beams", "static cache", "two turns", "prompt lookup"]
)
def test_use_with_sliding_windows(sliding: Any, resident: Resident, name: str) -> None:
    compare(USES[name], sliding, resident("gemma3", FP32, FP32))


def test_assisted_decoding(llama: Any, resident: Resident, assistant: Any) -> None:
    compare(
        lambda model: model.generate(IDS, assistant_model=assistant, **GREEDY),
        llama,
        resident("llama-sharded", FP32, FP32),
    )


def test_as_the_assistant(llama: Any, resident: Resident, assistant: Any) -> None:
    """The other way round: a streamed model drafts for a resident one."""
    drafter = resident("llama-sharded", FP32, FP32)
    expected = assistant.generate(IDS, assistant_model=drafter, **GREEDY)
    assert torch.equal(assistant.generate(IDS, assistant_model=llama, **GREEDY), expected)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """What quanto's C++ does: several numbers of `bits` out of each byte."""
    return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_cache(llama: Any, resident: Resident, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"quanto": "optimum.quanto"}.get(backend, backend))
    if backend == "quanto":  # else it compiles C++ when it is first used: minutes, and gigabytes of memory
        library = importlib.import_module("optimum.quanto.library")
        extension = library.extensions.get_extension("quanto_cpp")
        monkeypatch.setattr(extension, "_lib", types.SimpleNamespace(unpack=unpack))
    cache = {"backend": backend, "nbits": 4, "residual_length": 4, "axis_key": 0, "axis_value": 0}
    compare(
        lambda model: model.generate(IDS, cache_implementation="quantized", cache_config=cache, **GREEDY),
        llama,
        resident("llama-sharded", FP32, FP32),
    )


def test_eager_attention_returns_its_weights(tiny: WriteTiny) -> None:
    folder = tiny("llama", FP32)
    reference = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with stream(folder, attn_implementation="eager") as model:
        compare(lambda model: model(IDS, output_attentions=True).attentions, model, reference)


# ------------------------------------------------------------------------------------------------ text in, text out


def test_pipeline(llama: Any, resident: Resident) -> None:
    def write(model: Any) -> Any:
        writer = pipeline("text-generation", model=model, tokenizer=llama.tokenizer)
        return writer("w5 w77 w20", **GREEDY)

    compare(write, llama, resident("llama-sharded", FP32, FP32))
    assert write(llama)[0]["generated_text"].startswith("w5 w77 w20")


def test_the_tokenizer_comes_with_the_model(llama: Any) -> None:
    assert llama.tokenizer("w5 w77", return_tensors="pt").input_ids.tolist() == [[5, 77]]
    assert llama.tokenizer is llama.tokenizer


@pytest.mark.parametrize("streamer", [TextStreamer, TextIteratorStreamer])
def test_text_streamers(llama: Any, capsys: pytest.CaptureFixture[str], streamer: type[TextStreamer]) -> None:
    expected = llama.tokenizer.decode(llama.generate(IDS, **GREEDY)[0, IDS.shape[1] :])
    sink = streamer(llama.tokenizer, skip_prompt=True)
    llama.generate(IDS, streamer=sink, **GREEDY)
    text = "".join(sink) if isinstance(sink, TextIteratorStreamer) else capsys.readouterr().out
    assert text.strip() == expected


def test_generation_config_of_the_checkpoint_counts(tiny: WriteTiny, llama: Any, resident: Resident) -> None:
    reference = resident("llama-sharded", FP32, FP32)
    never_compiled = {"disable_compile": True}
    assert llama.generation_config.to_dict() == reference.generation_config.to_dict() | never_compiled
    assert llama.config.to_dict() == reference.config.to_dict()


# --------------------------------------------------------------------------------------------------------- autograd


def test_nothing_is_recorded_for_a_backward_pass(tiny: WriteTiny) -> None:
    """A recorded graph would keep every layer that ever ran in memory."""
    weights: list[weakref.ref[torch.Tensor]] = []
    with stream(tiny("llama", FP32), layers_per_batch=1) as model, torch.enable_grad():
        model.model.layers[2].mlp.register_forward_pre_hook(
            lambda module, _: weights.append(weakref.ref(module.up_proj.weight))
        )
        output = model(IDS, output_hidden_states=True)
        assert torch.is_grad_enabled()
        assert weights[0]() is not None
    assert output.logits.grad_fn is None
    assert not output.logits.requires_grad
    gc.collect()
    assert weights[0]() is None


# --------------------------------------------------------------------------------------- what is no tensor: what to do

BATCH_OF_TEXT = BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
MESSAGES = [{"role": "user", "content": "What is it?"}]
NO_TENSORS: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "text": (("What is it?",), {}, r"not text: .*tokenizer\(text, padding=True, return_tensors=\"pt\"\)"),
    "texts": ((["One", "Two"],), {}, r"not text: .*tokenizer\(text, padding=True"),
    "text by name": ((), {"input_ids": "What?"}, r"not text: .*tokenizer\(text, padding=True"),
    "a batch": ((BATCH_OF_TEXT,), {}, r"batch\) takes .* write model.*\(\*\*batch\)"),
    "a dictionary": ((dict(BATCH_OF_TEXT),), {}, r"write model.*\(\*\*batch\)"),
    "a batch by name": ((), {"input_ids": BATCH_OF_TEXT}, r"write model.*\(\*\*batch\)"),
    "messages": ((MESSAGES,), {}, r"not messages: .*apply_chat_template\(messages, add_generation_prompt=True"),
    "lists": ((IDS.tolist(),), {}, r"not a list: let the tokenizer .*return_tensors=\"pt\""),
    "lists by name": ((), {"input_ids": IDS.tolist(), "attention_mask": IDS}, r"not a list: .*return_tensors=\"pt\""),
}


@pytest.mark.parametrize("call", ["model", "model.generate"])
@pytest.mark.parametrize(("args", "kwargs", "said"), NO_TENSORS.values(), ids=NO_TENSORS)
def test_what_is_no_tensor_is_told_what_to_do(
    call: str, args: tuple[Any, ...], kwargs: dict[str, Any], said: str, llama: Any
) -> None:
    called = llama.generate if call == "model.generate" else llama
    with pytest.raises(ArgumentError, match=rf"^{re.escape(call)}\(.*{said}"):
        called(*args, **kwargs)


def test_what_the_message_says_to_write_is_right(llama: Any) -> None:
    assert llama.generate(**BATCH_OF_TEXT, max_new_tokens=2).shape == (1, 14)


def test_inputs_may_be_left_out(llama: Any) -> None:
    assert llama.generate(max_new_tokens=2).shape[0] == 1


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "one dimension": ({"input_ids": IDS[0]}, r"shape \(12,\) is one sequence: .* input_ids\[None\]"),
    "no dimension": ({"input_ids": IDS[0, 0]}, r"is one sequence"),
    "no token": ({"input_ids": IDS[:, :0]}, r"shape \(1, 0\) is no token: .*bos_token_id"),
    "no sequence": ({"input_ids": IDS[:0]}, r"shape \(0, 12\) is no token"),
    "floats": ({"input_ids": IDS.float()}, r"torch\.float32: .*input_ids\.long\(\)"),
    "truth": ({"input_ids": IDS > 0}, r"torch\.bool: .*input_ids\.long\(\)"),
    "an array": ({"input_ids": IDS.numpy()}, r"input_ids is of type ndarray: torch\.from_numpy"),
    "a number": ({"input_ids": 5}, r"input_ids is of type int"),
    "too large": ({"input_ids": IDS + VOCAB_SIZE}, r"not all in the vocabulary of \d+ tokens .*model\.tokenizer"),
    "negative": ({"input_ids": -IDS}, r"ids of tokens from -\d+ to -\d+ are not all in the vocabulary"),
}
ODD_MASKS: dict[str, Any] = {
    "shorter": torch.ones(1, 11, dtype=torch.long),
    "of two sequences": torch.ones(2, 12, dtype=torch.long),
    "of one dimension": torch.ones(12, dtype=torch.long),
    "of four dimensions": torch.ones(1, 1, 12, 12, dtype=torch.long),
    "a list": [[1] * 12],
}


@pytest.mark.parametrize("call", ["model", "model.generate"])
@pytest.mark.parametrize(("kwargs", "said"), ODD.values(), ids=ODD)
def test_what_are_no_ids_is_told_what_to_pass(call: str, kwargs: dict[str, Any], said: str, llama: Any) -> None:
    called = partial(llama.generate, max_new_tokens=2) if call == "model.generate" else llama
    with pytest.raises(ArgumentError, match=said):
        called(**kwargs)
    with pytest.raises(ArgumentError, match=said):
        called(kwargs["input_ids"])


@pytest.mark.parametrize("mask", ODD_MASKS.values(), ids=ODD_MASKS)
def test_so_is_a_mask_of_another_shape(mask: Any, llama: Any) -> None:
    with pytest.raises(ArgumentError, match=r"attention_mask is of .*input_ids of shape \(1, 12\) take a"):
        llama.generate(IDS, attention_mask=mask)


def test_what_transformers_takes_is_taken(llama: Any, resident: Resident) -> None:
    uses: list[Use] = [
        lambda model: model(IDS.int()).logits,
        lambda model: model(IDS, attention_mask=torch.ones(1, 12)).logits,
        lambda model: model(inputs_embeds=torch.ones(1, 3, 64)).logits,
        lambda model: model.generate(IDS, attention_mask=torch.ones(1, 13, dtype=torch.long), max_new_tokens=2),
        lambda model: model.generate(inputs_embeds=torch.ones(1, 3, 64), max_new_tokens=2),
        lambda model: model.generate(torch.cat([IDS, IDS]), attention_mask=torch.ones_like(IDS), max_new_tokens=2),
    ]
    for use in uses:
        compare(use, llama, resident("llama-sharded", FP32, FP32))


# ------------------------------------------------------------------------------------------------ prompts that are long


@pytest.mark.parametrize("rope", [None, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}])
@pytest.mark.parametrize("how", ["a pass", "generate"])
def test_a_prompt_longer_than_the_positions_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, how: str, rope: Any
) -> None:
    """But not where positions are scaled."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=8, rope_parameters=rope, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=FP32).save_pretrained(tmp_path)
    with stream(tmp_path) as model, caplog.at_level("WARNING", "airstream"):
        model(IDS[:, :8])
        assert not caplog.records
        for _ in range(2):
            model(IDS) if how == "a pass" else model.generate(IDS, max_new_tokens=2)
    said = [record.getMessage() for record in caplog.records if "was trained for" in record.getMessage()]
    assert len(said) == (rope is None)
    assert all("12 tokens" in line and "8 positions" in line for line in said)


EMBEDDED = torch.zeros(1, 3, 64, requires_grad=True)
GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "labels": lambda model: model(IDS, labels=IDS),
    "labels by position": lambda model: model(IDS, None, None, None, None, IDS),
    "embeddings": lambda model: model(inputs_embeds=EMBEDDED),
    "embeddings, base model": lambda model: model.base_model(inputs_embeds=EMBEDDED),
}


@pytest.mark.parametrize("use", GRADIENTS.values(), ids=GRADIENTS)
def test_where_a_gradient_is_asked_for_it_is_refused(llama: Any, resident: Resident, use: Use) -> None:
    """And the values alone are given."""
    acquired = llama.stats.acquired
    with torch.enable_grad(), pytest.raises(UnsupportedError, match=r"no_grad\(\).*train.*transformers and PEFT"):
        use(llama)
    assert llama.stats.acquired == acquired
    for mode in (torch.no_grad, torch.inference_mode):
        compare(mode()(lambda model: use(model)[0].detach()), llama, resident("llama-sharded", FP32, FP32))


KEPT: dict[str, Any] = {
    "all": 0,
    "the last": 1,
    "more than there are": 99,
    "all but the first two": -2,
    "a slice": slice(1, 9, 2),
    "a slice from the end": slice(-3, None),
    "nothing": slice(4, 2),
    "a list": [0, 5, 5],
    "a tensor": torch.tensor([1, 2]),
    "a tensor of one number": torch.tensor(3),
}
"""Ways to say which positions get logits: how many, or an index."""


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_as_many_logits_are_planned_as_are_computed(keep: Any) -> None:
    ids = torch.zeros(2, 12, dtype=torch.long)
    work = workload.of_pass((ids,), {"logits_to_keep": keep})
    assert work is not None
    # as models of transformers look for them
    positions = torch.arange(12)[slice(-keep, None) if isinstance(keep, int) else keep]
    assert work.logits == positions.numel()
