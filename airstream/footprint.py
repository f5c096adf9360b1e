"""What a forward pass needs besides weights: KV cache, activations, logits. Arithmetic on a model's config.

Formulas, with B sequences of T new tokens each, C tokens of context, s bytes per element:

    KV cache        B * C * s * sum over layers of (kv heads) * (key width + value width)
                    (for one layer of LLaMA-7B in fp16: 2 * 4096 * 2 = 16 KiB a token, 512 KiB for its 32 layers)
    activations     B * T * (a few hidden states + the widest MLP + queries, keys and values), freed layer by layer
    attention       B * T * C for the mask; times the heads, in float32 too, where attention is computed eagerly
    adapters        B * T * (the input and three times the output of the widest module that has one)
    logits          B * V * (s + 4): the model's and generate()'s float32 copy, for as many positions as are asked for
    lm_head copies  B * (the lm_head) for B > 1: on the CPU, torch multiplies the strided slice that holds the last
                    positions in bfloat16 through a batched product, for which it copies the weight for every sequence
    tokenizer       1,000 bytes per entry of the vocabulary (0.96 to 1.05 kB measured with 49k to 200k entries)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HIDDEN_COPIES = 8
"""Hidden states alive at once in the widest part of a layer: input, residual, norm (in float32: two), q, k, v, out."""


TOKENIZER_BYTES_PER_ENTRY = 1000

POSITION_COUNTS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")
"""What configs call the longest context."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """The sizes that the formulas need, read from a config. All counts are per token unless they say otherwise."""

    item_bytes: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    kv_elements: int
    """Elements of keys and values of one token, all layers together."""
    kv_elements_per_layer: int
    vocab_size: int
    max_position: int
    eager_attention: bool
    head_copy_bytes: int
    """Bytes of the lm_head where it is copied for every sequence of a prefill, else 0."""
    adapter_token_bytes: int = 0
    """What adapters compute beside the layers, of one token."""
    adapter_logit_bytes: int = 0
    """What adapters compute beside the lm_head, of one position."""

    @property
    def tokenizer_bytes(self) -> int:
        """Host memory of the tokenizer."""
        return TOKENIZER_BYTES_PER_ENTRY * self.vocab_size

    def kv_bytes(self, batch_size: int, context: int) -> int:
        """The KV cache at its largest, with the moment at which one layer's tensors are being extended."""
        return batch_size * context * self.item_bytes * (self.kv_elements + self.kv_elements_per_layer)

    def activation_bytes(self, batch_size: int, tokens: int, context: int, logits: int = 1) -> int:
        """Peak bytes of one pass over `tokens` new tokens per sequence that keeps `logits` positions of each."""
        per_token = self.item_bytes * (HIDDEN_COPIES * self.hidden_size + 3 * self.intermediate_size)
        per_token += self.adapter_token_bytes
        scores = self.num_heads * (self.item_bytes + 4) if self.eager_attention else self.item_bytes
        attention = tokens * context * scores
        heads = 2 * context * self.item_bytes * self.num_heads * (self.hidden_size // self.num_heads)
        layers = tokens * per_token + attention + heads
        head = logits * (self.vocab_size * (self.item_bytes + 4) + self.adapter_logit_bytes)
        if batch_size > 1 and 0 < logits < tokens:
            head += self.head_copy_bytes
        return batch_size * max(layers, head + tokens * self.hidden_size * self.item_bytes)


def footprint(
    config: Any, item_bytes: int, eager_attention: bool, head_copy_bytes: int = 0, kv_elements: int | None = None
) -> Footprint:
    """The footprint of a model with this transformers config, computing in elements of `item_bytes`.

    Args:
        kv_elements: per token, where that has been measured; else it is computed from the config.
    """
    text = config.get_text_config(decoder=True)
    hidden = first_count(text, "hidden_size", "d_model", "n_embd", "dim", default=1024)
    heads = first_count(text, "num_attention_heads", "n_head", "num_heads", "decoder_attention_heads", default=1)
    layers = first_count(text, "num_hidden_layers", "n_layer", "num_layers", "decoder_layers", default=1)
    intermediate = first_count(text, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", default=4 * hidden)
    routed = first_count(text, "num_experts_per_tok", default=0) * first_count(
        text, "moe_intermediate_size", default=intermediate
    )
    per_layer = _kv_elements_per_layer(text, hidden, heads)
    return Footprint(
        item_bytes=item_bytes,
        hidden_size=hidden,
        intermediate_size=max(intermediate, routed),
        num_heads=heads,
        kv_elements=layers * per_layer if kv_elements is None else kv_elements,
        kv_elements_per_layer=per_layer if kv_elements is None else -(-kv_elements // layers),
        vocab_size=first_count(text, "vocab_size", "n_words", default=1),
        max_position=first_count(text, *POSITION_COUNTS, default=1 << 20),
        eager_attention=eager_attention,
        head_copy_bytes=head_copy_bytes,
    )


def _kv_elements_per_layer(text: Any, hidden: int, heads: int) -> int:
    if first_count(text, "kv_lora_rank", default=0):  # multi-head latent attention: the latents are what is cached
        return first_count(text, "kv_lora_rank", default=0) + first_count(text, "qk_rope_head_dim", default=0)
    head_dim = first_count(text, "head_dim", "kv_channels", default=hidden // heads)
    kv_heads = first_count(text, "num_key_value_heads", "num_kv_heads", default=heads)
    if getattr(text, "new_decoder_architecture", False):  # Falcon 40B and 180B repeat keys and values before caching
        kv_heads = heads
    elif getattr(text, "multi_query", False):  # Falcon 7B, StarCoder
        kv_heads = 1
    return 2 * kv_heads * head_dim


def first_count(config: Any, *names: str, default: int) -> int:
    """The first of the attributes that is a positive number: configs name one thing differently, or leave it None."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return default
