"""The only package that touches semi-private functions of transformers, so that a new release is one folder's work.

What it wraps: building a model without weights, the renames and conversions that transformers 5 applies to checkpoint
keys, the dtype each parameter must have, and what `from_pretrained` does after the last weight has been loaded. The
same calls work from 5.17 on; the test matrix runs the oldest and the newest supported release.
"""

from airstream.compat.activations import measure_passes
from airstream.compat.assembled import Assembled, is_packed_alone
from airstream.compat.blame import Consequences, blamed_on, no_advice
from airstream.compat.building import build_on_meta, finish_loading, load_generation_config
from airstream.compat.classes import choose_class
from airstream.compat.gguf import conversion_for, gguf_config, gguf_dtype, gguf_tokenizer
from airstream.compat.kept_state import kept_state
from airstream.compat.quantizers import Quantizer, find_quantizer
from airstream.compat.remote import check_trust
from airstream.compat.small_files import small_file_at_fault
from airstream.compat.suspects import advice, names_a_field
from airstream.compat.traits import (
    CACHE_KEYWORDS,
    CacheSize,
    cache_capacity,
    cache_keyword,
    cached_tokens,
    config_value,
    cut_back,
    measure_cache,
    position_limit,
    rotary_limit,
    uses_eager_attention,
    vocabulary_of,
)
from airstream.compat.weights import (
    DtypePlan,
    KeyConversion,
    may_be_missing,
    natural_order,
    stored_tensors,
    tied_names,
)

__all__ = [
    "CACHE_KEYWORDS",
    "Assembled",
    "CacheSize",
    "Consequences",
    "DtypePlan",
    "KeyConversion",
    "Quantizer",
    "advice",
    "blamed_on",
    "build_on_meta",
    "cache_capacity",
    "cache_keyword",
    "cached_tokens",
    "check_trust",
    "choose_class",
    "config_value",
    "conversion_for",
    "cut_back",
    "find_quantizer",
    "finish_loading",
    "gguf_config",
    "gguf_dtype",
    "gguf_tokenizer",
    "is_packed_alone",
    "kept_state",
    "load_generation_config",
    "may_be_missing",
    "measure_cache",
    "measure_passes",
    "names_a_field",
    "natural_order",
    "no_advice",
    "position_limit",
    "rotary_limit",
    "small_file_at_fault",
    "stored_tensors",
    "tied_names",
    "uses_eager_attention",
    "vocabulary_of",
]
