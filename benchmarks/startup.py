"""How long it takes before a model begins to work: planning from a config, loading headers, reading a vocabulary.

    python -m benchmarks.startup [--shapes llama-3-70b,deepseek-v3] [--formats config,safetensors,gguf] [--turns 3]

Shapes are published configs. A checkpoint of a shape is a file of the real size that consists of a header and a hole:
loading reads the header and the small weights, which are zeros. It is made in `--work` and deleted; its file system has
to know holes. Where a layer is larger than the memory of most machines, the checkpoint has as many tensors, layers and
experts, by the same names, but narrower matrices; its line says how many times narrower. The GGUF file is a small model
with a vocabulary of 262,144 words, as Gemma 3 has.

Every figure is of a process of its own, without its imports: seconds of CPU, and of wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.conditions import describe_machine

SHAPES: Mapping[str, dict[str, Any]] = {
    "llama-3-70b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000,
    },
    "qwen3-235b-a22b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 4096,
        "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64,
        "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "vocab_size": 151936,
    },
    "deepseek-v3": {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
        "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
        "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "n_group": 8, "topk_group": 4, "vocab_size": 129280,
    },
}  # fmt: skip
COMMON = {"dtype": "bfloat16", "max_position_embeddings": 8192, "tie_word_embeddings": False}
WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size")
NARROWER: Mapping[str, int] = {"deepseek-v3": 16}
"""How many times, for checkpoints that are loaded. DeepSeek-V3's ring alone would be 43 GiB."""

FORMATS = ("config", "safetensors", "gguf")
VOCABULARY = 262_144


def write_config(shape: str, folder: Path, narrower: int = 1) -> None:
    config = SHAPES[shape] | COMMON
    config |= {name: config[name] // narrower for name in WIDTHS if name in config}
    (folder / "config.json").write_text(json.dumps(config))


def write_hole(shape: str, folder: Path) -> None:
    """A checkpoint of `shape` whose weights are a hole in the file. Takes as much disk as its header."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from airstream.layout.imagined import imagine

    write_config(shape, folder, NARROWER.get(shape, 1))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    tensors = imagine(model).values()
    start = min(tensor.offset for tensor in tensors)
    header = {
        tensor.name: {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": [tensor.offset - start, tensor.end - start],
        }
        for tensor in tensors
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + sum(tensor.nbytes for tensor in tensors))


def write_vocabulary(folder: Path) -> None:
    """A GGUF file of a small llama with a large vocabulary."""
    import numpy as np
    from gguf import GGUFWriter

    hidden, layers = 64, 2
    writer = GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(256)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    words = [chr(33 + number) if number < 90 else f"w{number}" for number in range(VOCABULARY - 1)] + ["ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")
    shapes = {"token_embd": (VOCABULARY, hidden), "output_norm": (hidden,)}
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": (hidden,) for name in ("attn_norm", "ffn_norm")}
        names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes |= {f"blk.{layer}.{name}": (hidden, hidden) for name in names}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float16 if len(shape) > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(what: str, source: str) -> dict[str, float]:
    """Plan or load `source` in this process, once. The figures are without what is imported by everybody."""
    import transformers

    from airstream import AutoModel
    from airstream.loading.machine import Machine

    transformers.AutoConfig.for_model("llama")
    began, cpu = time.perf_counter(), time.process_time()
    if what == "config":
        AutoModel.plan(source, machine=Machine(gpu="RTX 3090", ram="64GiB"), max_memory={0: "60GiB", "cpu": "64GiB"})
    else:
        with AutoModel.from_pretrained(source, device="cpu", max_memory="64GiB") as model:
            if what == "gguf":
                assert model.tokenizer is not None
    return {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - began}


def _runs(what: str, source: Path, turns: int) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "benchmarks.startup", "--measure", what, str(source)]
    done = [subprocess.run(command, check=False, capture_output=True, text=True) for _ in range(turns)]
    if failed := next((run for run in done if run.returncode), None):
        raise RuntimeError(failed.stderr.strip().splitlines()[-1])
    return [json.loads(run.stdout.splitlines()[-1]) for run in done]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where files are made; a temporary folder if not given")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    print(f"{'shape':28} {'format':12} {'CPU s':>7} {'wall s':>7}   medians of {arguments.turns}")
    results = []
    for name in arguments.formats.split(","):
        for shape in ["262,144 words"] if name == "gguf" else arguments.shapes.split(","):
            narrower = NARROWER.get(shape, 1) if name == "safetensors" else 1
            label = shape if narrower == 1 else f"{shape}, {narrower}x narrower"
            with tempfile.TemporaryDirectory(dir=arguments.work) as folder:
                source = Path(folder)
                if name == "gguf":
                    write_vocabulary(source)
                    source /= "model.gguf"
                else:
                    (write_config if name == "config" else write_hole)(shape, source)
                try:
                    runs = _runs(name, source, arguments.turns)
                except RuntimeError as error:
                    print(f"{label:28} {name:12} failed: {error}", flush=True)
                    continue
            medians = [statistics.median(run[key] for run in runs) for key in ("cpu_seconds", "wall_seconds")]
            results.append({"shape": shape, "narrower": narrower, "format": name, "runs": runs})
            print(f"{label:28} {name:12} {medians[0]:7.2f} {medians[1]:7.2f}", flush=True)
    print(json.dumps({"machine": describe_machine(), "results": results}))


if __name__ == "__main__":
    main()
