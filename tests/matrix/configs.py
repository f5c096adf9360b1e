"""Tiny configs of every architecture: what names mean everywhere, and what single types want besides.

A config is made of `COMMON`, as far as its class has such fields, and of what `SPECIAL` says of its type. Configs
inside configs (the text and vision parts of a multimodal model) are made in the same way.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

VOCAB_SIZE = 128

COMMON: Mapping[str, Any] = {
    # tokens
    "vocab_size": VOCAB_SIZE, "vocab_size_per_layer_input": VOCAB_SIZE,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    # width
    "hidden_size": 64, "d_model": 64, "n_embd": 64, "dim": 64, "embed_dim": 64, "embedding_size": 64,
    "word_embed_proj_dim": 64, "hidden_size_per_layer_input": 8, "text_hidden_size": 64,
    "intermediate_size": 128, "ffn_dim": 128, "n_inner": 128, "ffn_hidden_size": 128, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "d_inner": 128, "d_ff": 128, "dff": 128, "ffn_hidden": 128, "mlp_hidden_size": 128,
    "initializer_range": 0.02,
    # depth
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "encoder_layers": 2, "decoder_layers": 4,
    "num_encoder_layers": 2, "num_decoder_layers": 4, "layers": 4,
    # attention
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2, "num_kv_heads": 2, "head_dim": 16, "attention_head_dim": 16, "d_kv": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "qk_head_dim": 16, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 8,
    "sliding_window": 16, "attention_window_size": 16,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256,
    # experts
    "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_top_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32, "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32, "first_k_dense_replace": 1,
    # images
    "image_size": 16, "patch_size": 4, "spatial_patch_size": 4, "out_hidden_size": 64, "vision_dim": 64,
    "projection_dim": 64, "vision_output_dim": 64, "mm_tokens_per_image": 4, "image_seq_length": 16,
    "image_token_id": 5, "image_token_index": 5, "video_token_id": 6, "video_token_index": 6, "audio_token_id": 7,
    "audio_token_index": 7, "vision_start_token_id": 8, "vision_end_token_id": 9, "boi_token_id": 10,
    "boi_token_index": 10, "eoi_token_id": 11, "eoi_token_index": 11, "image_start_token_id": 8,
    "image_end_token_id": 9, "video_start_token_id": 10, "video_end_token_id": 11, "num_query_tokens": 4,
    "latent_query_num": 4, "patch_embed_hidden_size": 48, "insert_layer_id": 1, "projector_hidden_size": 64,
    # state spaces
    "lru_width": 64, "state_size": 16, "mamba_d_state": 16, "mamba_expand": 2,
}  # fmt: skip
"""What configs call things. Everything is four layers deep, 64 wide, and well below a megabyte."""

SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * 2
LINEAR_AND_FULL = ["linear_attention", "full_attention"] * 2
DEEP_ENCODER = {"encoder_layers": 4}
INKLING = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "sliding_window_size": 16,
    "d_rel": 4, "rel_extent": 16, "unpadded_vocab_size": VOCAB_SIZE,
}  # fmt: skip
QWEN_LINEAR = {
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "layer_types": LINEAR_AND_FULL,
}  # fmt: skip
MUSICGEN = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
CLIP_TOWER = {"vision_config": {"model_type": "clip_vision_model"}}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
EQUAL_HEADS = {"num_key_value_heads": 4}
SAM = {"image_size": 64, "patch_size": 4, "window_size": 4, "mlp_dim": 128, "global_attn_indexes": (1, 3)}
SPARSE = {"mlp_layer_types": ["dense", "sparse"] * 2}
MUSE = {"out_hidden_size": 256}
MUSE_VISION = {"pos_emb_height": 4, "pos_emb_width": 4, "max_position_embeddings": 16}
CODES = {"base_channels": 32, "channel_multiplier": [1, 1, 2], "num_embeddings": 8}
THINKER = {"vision_start_token_id": 8, "vision_end_token_id": 9, "audio_start_token_id": 10, "audio_end_token_id": 11}
SLIDING_TOO = {
    f"swa_{name}": COMMON[name]
    for name in ("num_attention_heads", "q_lora_rank", "kv_lora_rank", "head_dim", "qk_nope_head_dim", "v_head_dim")
}

SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "axk2": EQUAL_HEADS,
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4],
            "vocab_size": VOCAB_SIZE},
    "blt_local_encoder": {"hidden_size_global": 128},
    "blt_local_decoder": {"hidden_size_global": 128},
    "blt_global_transformer": {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4},
    "cpmant": {"dim_head": 16, "dim_ff": 128, "prompt_length": 4},
    "deepseek_v4": {"o_lora_rank": 16},
    "dots3_note_vision_encoder": {
        "adapter_in_dim": 64, "adapter_out_dim": 64, "mlp_layer_types": ["dense", "sparse"] * 2, "patch_size": 4,
        "per_layer_config": {1: {"num_local_experts": 4}, 3: {"num_local_experts": 4}},
    },
    "dots3_note_audio_encoder": {
        "adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 16, "feature_size": 16,
    },
    "bailing_hybrid": EQUAL_HEADS | {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "bart": DEEP_ENCODER,
    "bigbird_pegasus": DEEP_ENCODER,
    "blenderbot": DEEP_ENCODER,
    "blenderbot-small": DEEP_ENCODER,
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {
        "layer_types": SLIDING_AND_FULL,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in set(SLIDING_AND_FULL)},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "deepseek_v32": EQUAL_HEADS,
    "dory": {"n_input_layers": 1, "n_output_layers": 1},
    "dots3_note_text": EQUAL_HEADS | SLIDING_TOO | {"shared_experts_intermediate_size": 32,
                                                    "swa_num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": SLIDING_AND_FULL},
    "glm_moe_dsa": EQUAL_HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": EQUAL_HEADS | {"layer_types": LINEAR_AND_FULL, "linear_num_heads": 4, "linear_head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": EQUAL_HEADS | {"head_dim": 8, "zero_expert_num": 2},
    "inkling_text": INKLING,
    "inkling2_text": INKLING,
    "inkling2_loop_text": INKLING | {"loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 3,
                                     "n_layers_per_attn_res_block": 1},
    "roc_bert": {"pronunciation_embed_dim": 16, "pronunciation_vocab_size": 50, "shape_embed_dim": 16,
                 "shape_vocab_size": 50},
    "gemma4_vision": {"position_embedding_size": 64, "patch_size": 4, "pooling_kernel_size": 2},
    "gemma4_unified_vision": {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 64, "mm_posemb_size": 16,
                              "output_proj_dims": 64},
    "gemma4_unified_audio": {"audio_embed_dim": 16},
    "gemma4_audio": {"subsampling_conv_channels": (8, 4), "output_proj_dims": 64},
    "phi4_multimodal_vision": {"image_size": 16, "crop_size": 16, "patch_size": 4,},
    "phi4_multimodal_audio": {"num_blocks": 2, "ext_pw_out_channel": 64, "depthwise_separable_out_channel": 64,
                              "nemo_conv_channels": 64, "input_size": 16, "bias_max_distance": 16},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_chunk_size": 16},
    "got_ocr2_vision": SAM,
    "gemma4_assistant": {"backbone_hidden_size": 64, "text_config": {
        "model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 4}},
    "gemma4_unified_assistant": {"backbone_hidden_size": 64, "text_config": {
        "model_type": "gemma4_unified_text", "num_kv_shared_layers": 4}},
    "qwen3_5_text": QWEN_LINEAR,
    "qwen3_5_moe_text": QWEN_LINEAR,
    "qwen3_next": QWEN_LINEAR,
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "marian": DEEP_ENCODER,
    "mbart": DEEP_ENCODER,
    "mvp": DEEP_ENCODER,
    "pegasus": DEEP_ENCODER,
    "prophetnet": {"num_encoder_layers": 4},
    "whisper": DEEP_ENCODER | {"max_source_positions": 30, "num_mel_bins": 16},
    "plbart": DEEP_ENCODER,
    "qwen4_exp_text": {
        "ple_embed_dim": 16, "ple_layer_ids": [1], "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
        "indexer_budget": 8, "indexer_compress_ratio": 2, "ngram_vocab_size_base": 1000, "split_ngram_parts": 2,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        "hc_lowrank": 16, "layer_types": LINEAR_AND_FULL,
    },
    "reformer": {
        "is_decoder": True, "use_cache": False, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [4, 8],
        "attn_layers": ["local", "lsh", "local", "lsh"], "num_buckets": 4, "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4, "feed_forward_size": 128, "attention_head_size": 16,
    },
    "zamba": EQUAL_HEADS | {
        "layers_block_type": ["mamba", "mamba", "hybrid", "hybrid"], "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba"]},
    "zaya": {"num_experts_per_tok": 1},
    "xlm": {"emb_dim": 64, "n_words": VOCAB_SIZE},
    "xmod": {"default_language": "en_XX"},
    "xlstm": {"qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "musicgen": MUSICGEN,
    "musicgen_melody": MUSICGEN,
    "musicgen_decoder": {"num_codebooks": 2},
    "musicgen_melody_decoder": {"num_codebooks": 2},
    "llava": CLIP_TOWER, "vipllava": CLIP_TOWER | {"vision_feature_layers": [-2, -3]},
    "video_llava": CLIP_TOWER,
    "llava_next": CLIP_TOWER | {"image_grid_pinpoints": [[16, 16]]},
    "llava_next_video": CLIP_TOWER | {"image_grid_pinpoints": [[16, 16]]},
    "llava_onevision": {"image_grid_pinpoints": [[16, 16]]},
    "qwen2_vl_text": MROPE, "qwen2_5_vl_text": MROPE, "qwen3_vl_text": MROPE, "qwen3_vl_moe_text": MROPE,
    "paddleocr_vl_text": MROPE, "qwen2_5_omni_text": MROPE, "cosmos3_edge_text": MROPE,
    "qwen2_vl_vision": {"depth": 4}, "qwen2_5_vl_vision": {"depth": 4, "fullatt_block_indexes": [1, 3]},
    "qwen3_vl_vision": {"depth": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    "qwen3_vl_moe_vision": {"depth": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    "mllama_vision_model": {
        "num_global_layers": 2, "intermediate_layers_indices": [1, 3], "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "vision_output_dim": 192,
    },
    "mllama_text_model": {"cross_attention_layers": [1, 3]},
    "llama4_vision_model": {"intermediate_size": 256, "vision_output_dim": 64, "projector_input_dim": 64,
                            "projector_output_dim": 64},
    "chameleon": {"vocabulary_map": {"<image>": 5} | {f"IMGIMG{c}Z": 32 + n for n, c in enumerate("ABCDEFGH")}},
    "chameleon_vqgan": CODES | {"latent_channels": 32},
    "janus_vqgan": CODES | {"latent_channels": 32, "image_token_embed_dim": 64},
    "janus_vision_model": {"num_image_tokens": 16},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 12}
             | {f"<|visual token {n:06}|>": 32 + n for n in range(8)}},
    "emu3_vqgan": CODES | {"codebook_size": 8, "attn_resolutions": [2]},
    "florence_vision": {"depths": [1, 1, 1, 1], "patch_size": [7, 3, 3, 3], "embed_dim": [32, 32, 64, 64],
                        "num_heads": [4, 4, 4, 4], "num_groups": [4, 4, 4, 4], "window_size": 2},
    "molmo2": {"image_patch_id": 5, "low_res_image_start_token_id": 10},
    "molmo2_text": {"additional_vocab_size": 16},
    "molmo2_vision": EQUAL_HEADS | {"image_size": [16, 16], "num_position_embeddings": 16},
    "molmo2_adapter": EQUAL_HEADS | {"vision_feature_layer": [-1, -3]},
    "qwen2_5_omni_thinker": THINKER, "qwen3_omni_moe_thinker": THINKER,
    "qwen2_5_omni_vision_encoder": {"depth": 4, "fullatt_block_indexes": [1, 3]},
    "qwen3_omni_moe_vision_encoder": {"depth": 4, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
    "qwen3_omni_moe_audio_encoder": {"downsample_hidden_size": 16, "output_dim": 64},
    "qwen3_omni_moe_text": MROPE, "hunyuan_vl_text": MROPE,
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    "hunyuan_vl_vision": {"max_image_size": 32}, "hy_v4_vl_vision": {"max_image_size": 32},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 16], "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "ernie4_5_vl_moe_vision": {"depth": 4},
    "glm5_next_vision": {"depth": 4, "projection_intermediate_size": 64},
    "granite4_vision": {"deepstack_layer_map": [[-2, 0], [-3, 1]], "spatial_target_layers": [0, 1, 2, 3],
                        "downsample_rate": "1/2", "image_grid_pinpoints": [[16, 16]]},
    "inkling2_vision": {"projection_hidden_dim": 64, "posemb_grid_size": 4},
    "kimi_k25": {"projection_hidden_size": 64},
    "muse_glimmer": MUSE, "muse_spark": MUSE, "muse_glimmer_vision": MUSE_VISION, "muse_spark_vision": MUSE_VISION,
    "muse_spark_text": {"moe_hidden_size": 64},
    "muse_spark_audio": {"patch_sizes": [16, 6], "hidden_sizes": [32, 64], "depths": [1, 1], "num_hidden_layers": 2},
    "nemotron_h_omni": {"vision_hidden_size": 64},
    "radio": {"video_temporal_patch_size": 2, "max_img_size": 32},
    "wavtokenizer_encoder": {"codebook_dim": 64, "codebook_size": 8, "num_filters": 4},
    "apertus1p5": {"image_token_offset": 32, "audio_token_offset": 40},
    "apertus1p5_vision_tokenizer": CODES | {"codebook_size": 8, "latent_channels": 32, "attn_resolutions": [4],
                                            "resolution": 16, "num_res_blocks": 1},
    "deepseek_ocr2_text": SPARSE, "unlimited_ocr_text": SPARSE,
    "deepseek_ocr2_sam_vision_model": SAM | {"downsample_channels": [32, 64]},
    "unlimited_ocr_sam_vision_model": SAM | {"downsample_channels": [32, 64]},
    "pp_formulanet_vision": SAM | {"output_channels": 32, "post_conv_in_channels": 32, "post_conv_mid_channels": 32,
                                   "post_conv_out_channels": 64, "decoder_hidden_size": 64},
    "udop": {"decoder_start_token_id": 0, "max_2d_position_embeddings": 32},
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "vision-encoder-decoder": {"encoder": {"model_type": "vit"}, "decoder": {
        "model_type": "gpt2", "is_decoder": True, "add_cross_attention": True}, "decoder_start_token_id": 1,
        "pad_token_id": 0},
    "pixtral": {"image_size": 16, "patch_size": 4},
    "exaone4_5_vision": {"depth": 4}, "glm4v_vision": {"depth": 4}, "glm_ocr_vision": {"depth": 4},
    "glm4v_text": MROPE, "glm_ocr_text": MROPE, "exaone4_5_text": MROPE,
    "glm4v_moe_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "mistral4": EQUAL_HEADS, "mistral_large4_text": EQUAL_HEADS, "axk1": EQUAL_HEADS, "deepseek_v2": EQUAL_HEADS,
    "glm4_moe_lite": EQUAL_HEADS, "minicpm3": EQUAL_HEADS, "sarvam_mla": EQUAL_HEADS, "youtu": EQUAL_HEADS,
    "deepseek_v3": EQUAL_HEADS,
    "glm5_next_text": EQUAL_HEADS | {"qk_rope_head_dim": 0, "index_kpool": 2, "linear_head_dim": 16,
                                     "linear_num_heads": 4},
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "internvl_vision": {"image_size": [16, 16], "patch_size": [4, 4]},
    "moshi": {"audio_vocab_size": VOCAB_SIZE},
    "encoder-decoder": {"encoder": {"model_type": "bert"}, "decoder": {
        "model_type": "bert", "is_decoder": True, "add_cross_attention": True}, "decoder_start_token_id": 1,
        "pad_token_id": 0},
    "fsmt": {"src_vocab_size": VOCAB_SIZE, "tgt_vocab_size": VOCAB_SIZE, "langs": ["en", "de"]},
    "t5": {"decoder_start_token_id": 0},
    "nemo_speechlm": {"blank_token_id": 3},
}  # fmt: skip
"""What a type needs besides, or instead: sizes that have to agree, kinds of layers, parts whose type is left open."""


PART_OF: Mapping[str, str] = {"musicgen": "decoder", "musicgen_melody": "decoder"}
"""Types whose causal language model is that of a part, and has only that part's config."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of a tiny model of this type."""
    return CONFIG_MAPPING[model_type](**_arguments(CONFIG_MAPPING[model_type], model_type))


def _arguments(cls: type[PreTrainedConfig], model_type: str | None, given: Mapping[str, Any] | None = None) -> dict:
    names = field_names(cls)
    wanted = {name: value for name, value in COMMON.items() if name in names}
    special = SPECIAL.get(model_type or "", {})
    for name, part in (getattr(cls, "sub_configs", None) or {}).items():
        if name in names and name not in special:
            wanted[name] = _part(cls, name, part)
    wanted |= special
    wanted |= given or {}
    for name, value in wanted.items():
        if isinstance(value, Mapping) and "model_type" in value:
            kind = value["model_type"]
            wanted[name] = {"model_type": kind, **_arguments(CONFIG_MAPPING[kind], kind, value)}
    return wanted


def _part(cls: type[PreTrainedConfig], name: str, part: type) -> dict | None:
    """What the part `name` of a config is made of; where its type is open, the one that `cls` gives it."""
    if part is not AutoConfig:
        return _arguments(part, getattr(part, "model_type", None))
    default = getattr(cls(), name, None)
    return None if default is None else {"model_type": default.model_type}


def field_names(cls: type) -> set[str]:
    """What the config class `cls` calls its fields."""
    if dataclasses.is_dataclass(cls):
        return {field.name for field in dataclasses.fields(cls)}
    return set(inspect.signature(cls).parameters)
