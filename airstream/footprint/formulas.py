"""These formulas say what a forward pass needs besides weights: KV cache, activations, logits.

They need sizes, and refuse to know what configs call them: `of_config.py` does.

Formulas, with B sequences of T new tokens each, C tokens of context, s bytes per element:

    KV cache        B * C * s * sum over layers of (kv heads) * (key width + value width)
                    (for one layer of LLaMA-7B in fp16: 2 * 4096 * 2 = 16 KiB a token, 512 KiB for its 32 layers)
    states          B * (whatever state-space and linear attention layers keep of a sequence, however long it is)
    activations     B * (the most that is alive at once in a pass on the meta device: a polynomial in T and C for each
                    moment that may be the largest); where a model's code cannot be run there, the next two lines:
                    B * T * (a few hidden states + the widest MLP + queries, keys and values), freed layer by layer
    attention       B * T * C for the mask if there is one: of padding, or because tokens came before; times the heads,
                    in float32 too, where attention is computed eagerly
    adapters        B * T * (the input and three times the output of the widest module that has one)
    logits          B * V * (s + 4): the model's and generate()'s float32 copy, for as many positions as are asked for;
                    with labels one more in float32, of their logarithms
    lm_head copy    the lm_head, where torch copies it on the CPU to multiply the strided slice that holds the last
                    positions of a prompt; for each sequence, or once if they can be taken apart (`lm_head.py`)
    images          per value: (a few hidden states + the MLP) of a vision token / the values of its patch
    tokenizer       1,000 bytes per entry of the vocabulary (0.96 to 1.05 kB measured with 49k to 200k entries)
"""

from __future__ import annotations

from dataclasses import dataclass

from airstream.footprint.growth import PassGrowth

HIDDEN_COPIES = 8
"""Hidden states alive at once in the widest part of a layer: input, residual, norm (in float32: two), q, k, v, out."""

TOKENIZER_BYTES_PER_ENTRY = 1000


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
    state_elements: int
    """Elements that the cache keeps of a sequence, whatever its length."""
    vocab_size: int
    has_head: bool
    """Logits over the vocabulary are computed."""
    max_position: int
    eager_attention: bool
    pixel_bytes: float
    """Activations of a vision tower for every value of the images it sees; 0 if there is none."""
    image_values: int
    """Numbers that an image consists of, as far as the config says: a square, or a thousand patches."""
    head_copy_bytes: int
    """Bytes of the lm_head where it is copied once at the end of a prefill, else 0."""
    head_copy_bytes_each: int = 0
    """Bytes of the lm_head where it is copied for every sequence at the end of a prefill, else 0."""
    num_layers: int = 0
    passes: tuple[PassGrowth, ...] = ()
    """How passes grow, for the longest contexts first; none if that could not be found out."""
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
        keys_and_values = context * (self.kv_elements + self.kv_elements_per_layer)
        return batch_size * self.item_bytes * (keys_and_values + self.state_elements)

    def activation_bytes(
        self,
        batch_size: int,
        tokens: int,
        context: int,
        logits: int = 1,
        pixel_values: int = 0,
        is_padded: bool = False,
        has_labels: bool = False,
    ) -> int:
        """Peak bytes of one pass over `tokens` new tokens per sequence that keeps `logits` positions of each.

        Args:
            pixel_values: numbers that all images together consist of; they are seen before the tokens are.
            is_padded: some of the tokens are hidden.
            has_labels: a loss is computed.
        """
        layers = self._layer_bytes(tokens, context, is_padded or tokens < context) + tokens * self.adapter_token_bytes
        copies = 4 + (4 if has_labels and self.item_bytes < 4 else 0)
        per_logit = self.vocab_size * (self.item_bytes + copies) if self.has_head else 0
        head = logits * (per_logit + self.adapter_logit_bytes) + tokens * self.hidden_size * self.item_bytes
        head_copy = self.head_copy_bytes + batch_size * self.head_copy_bytes_each if 0 < logits < tokens else 0
        return max(batch_size * layers, batch_size * head + head_copy, int(pixel_values * self.pixel_bytes))

    def kept_bytes(self, tokens: int, context: int, states: bool, attentions: bool, scores: int) -> int:
        """What one sequence keeps because it was asked for: states and attention of all layers, scores of tokens."""
        of_states = (self.num_layers + 1) * tokens * self.hidden_size * self.item_bytes if states else 0
        of_attentions = self.num_layers * self.num_heads * tokens * context * self.item_bytes if attentions else 0
        return of_states + of_attentions + 4 * scores * self.vocab_size

    def _layer_bytes(self, tokens: int, context: int, is_masked: bool) -> int:
        """Of one sequence, at most; without what adapters and the lm_head compute."""
        for growth in self.passes:
            if context >= growth.window:
                return (growth.continued if is_masked else growth.fresh)(tokens, context)
        per_token = self.item_bytes * (HIDDEN_COPIES * self.hidden_size + 3 * self.intermediate_size)
        mask = 1 + self.item_bytes if is_masked or self.eager_attention else 0
        scores = 2 * 4 * self.num_heads if self.eager_attention else 0
        heads = 2 * context * self.item_bytes * self.num_heads * (self.hidden_size // self.num_heads)
        return tokens * per_token + tokens * context * (mask + scores) + heads
