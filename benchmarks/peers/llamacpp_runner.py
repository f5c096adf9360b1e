"""llama.cpp through its Python bindings: a GGUF mapped into memory, in bf16 or as its own quantisation leaves it."""

from __future__ import annotations

import os
from itertools import islice
from typing import Any

import llama_cpp
from llama_cpp import Llama

from benchmarks.peers.gguf_export import write_gguf
from benchmarks.peers.measure import Request, Runner, TokenClock, main

GGUF_NAME = "model.gguf"


def prepare(request: Request) -> None:
    """Convert the checkpoint to GGUF, and that to the form that is asked for.

    Raises:
        RuntimeError: llama.cpp cannot quantise it.
    """
    out = request.work / GGUF_NAME
    if not request.form:
        write_gguf(request.checkpoint, out)
        return
    plain = out.with_suffix(".bf16")
    write_gguf(request.checkpoint, plain)
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request.form}")
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(out).encode(), how):
        raise RuntimeError(f"llama.cpp has not made a {request.form} of {plain}")
    plain.unlink()


def load(request: Request) -> Any:
    """The mapped model, with its own defaults: all cores for the prompt, half of them for decoding.

    More of those are slower when weights come from the disk: llama.cpp's threads spin while one of them waits for a
    page, and take the time of the kernel that reads it (6 GB in 3 GB on two shared cores, in alternation: one thread
    4.0-4.7 seconds a decoded token, two threads 4.3-9.2). When all weights fit they are faster: the environment
    variable LLAMACPP_THREADS sets how many decode.
    """
    if request.batch_size > 1:
        raise SystemExit("llama-cpp-python's generate() takes one sequence at a time")
    context = len(request.prompt) + request.num_tokens
    threads = int(os.environ.get("LLAMACPP_THREADS", "0")) or None
    file = str(request.work / GGUF_NAME)
    return Llama(file, n_ctx=context, n_batch=context, n_threads=threads, use_mmap=True, verbose=False)


def details(model: Any) -> dict[str, Any]:
    """How many threads decoded."""
    return {"decode_threads": model.n_threads}


def generate(model: Any, request: Request, clock: TokenClock) -> list[int]:
    """Greedy decoding. `Llama.generate` goes on past end-of-sequence by itself."""
    tokens = []
    for token in islice(model.generate(request.prompt, temp=0.0), request.num_tokens):
        clock.tick()
        tokens.append(int(token))
    return tokens


if __name__ == "__main__":
    main(Runner("llamacpp", ("llama_cpp_python", "gguf"), load, generate, prepare, details))
