"""Write a Llama-shaped checkpoint of random bf16 weights, sharded like a hub download.

    python -m benchmarks.checkpoints OUT 3072,8192,28,32000,24,8 [--seed N] [--shard-gb G]

The shape is hidden,intermediate,layers,vocab,heads,kv_heads: 3072,8192,28,32000,24,8 gives 6.03 GB (the comparison
workload), 4096,11008,32,32000,32,32 the 7B shape (13.5 GB). The same seed gives the same bytes. Values are small normal
numbers, so activations stay finite; the text such a model generates is noise. There is no tokenizer: every program here
speaks token ids.

Peak host memory: one shard.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

INDEX_NAME = "model.safetensors.index.json"
BYTES_PER_VALUE = 2  # bf16

Sizes = dict[str, torch.Size]


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama model."""

    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read `"hidden,intermediate,layers,vocab,heads,kv_heads"`.

        Raises:
            argparse.ArgumentTypeError: it is not six positive whole numbers, or the heads do not divide.
        """
        parts = text.split(",")
        if len(parts) != 6 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            wanted = "hidden,intermediate,layers,vocab,heads,kv_heads"
            raise argparse.ArgumentTypeError(f"shape {text!r} is not six positive whole numbers ({wanted})")
        shape = cls(*map(int, parts))
        if shape.hidden % shape.heads or shape.heads % shape.kv_heads:
            raise argparse.ArgumentTypeError(
                f"shape {text!r}: heads must divide hidden, and kv_heads must divide heads"
            )
        return shape

    def __str__(self) -> str:
        return ",".join(map(str, astuple(self)))

    def config(self) -> LlamaConfig:
        """The transformers configuration of this shape."""
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            vocab_size=self.vocab,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=False,
            dtype="bfloat16",
            architectures=["LlamaForCausalLM"],
            max_position_embeddings=8192,
            bos_token_id=1,
            eos_token_id=2,
        )


class RandomWeights:
    """A stream of random tensors. The same seed and the same order of calls give the same values."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        # One block of noise, shifted anew for every tensor, is much faster than fresh numbers and as good for timing.
        self._noise = (torch.randn(1 << 24, generator=self._generator) * 0.02).to(torch.bfloat16)

    def tensor(self, name: str, size: torch.Size) -> torch.Tensor:
        """The next tensor: ones for a norm, noise for anything else."""
        if "norm" in name:
            return torch.ones(size, dtype=torch.bfloat16)
        shift = int(torch.randint(0, 1 << 20, (1,), generator=self._generator))
        repeats = -(-size.numel() // self._noise.numel())
        return self._noise.roll(shift).repeat(repeats)[: size.numel()].reshape(size).contiguous()


def tensor_sizes(config: LlamaConfig) -> Sizes:
    """Name and size of every tensor, as transformers itself lays the model out (built without memory)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tensor.shape for name, tensor in sorted(model.state_dict().items())}


def shard_names(sizes: Sizes, max_shard_bytes: float) -> list[list[str]]:
    """Deal the tensors, in order, into shards of at most `max_shard_bytes` each (a larger tensor gets its own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        nbytes = BYTES_PER_VALUE * size.numel()
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    return shards


def write_checkpoint(out: Path, shape: Shape, seed: int = 0, max_shard_bytes: float = 2e9) -> int:
    """Write the checkpoint of `shape` to the new folder `out` and return the bytes of its weights. Blocks on the disk.

    The folder appears under its name only when it is complete; an interrupted call leaves `OUT.partial`, which the next
    call replaces.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it, or name another folder")
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    config = shape.config()
    config.save_pretrained(partial)
    total = _write_shards(partial, tensor_sizes(config), RandomWeights(seed), max_shard_bytes)
    partial.rename(out)
    return total


def _write_shards(folder: Path, sizes: Sizes, weights: RandomWeights, max_shard_bytes: float) -> int:
    shards = shard_names(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: weights.tensor(name, sizes[name]) for name in names}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = BYTES_PER_VALUE * sum(size.numel() for size in sizes.values())
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def main(argv: Sequence[str] | None = None) -> None:
    """Write one checkpoint and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to create")
    parser.add_argument("shape", type=Shape.parse, help="hidden,intermediate,layers,vocab,heads,kv_heads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    args = parser.parse_args(argv)
    total = write_checkpoint(args.out, args.shape, args.seed, args.shard_gb * 1e9)
    print(f"{total / 1e9:.2f} GB of weights in {args.out}")


if __name__ == "__main__":
    main()
