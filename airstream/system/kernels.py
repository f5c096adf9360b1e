"""This limits how many compiled kernels oneDNN keeps: few, so that the plan has room for them in the runtime.

Where a processor computes in half precision with AVX-512, a linear layer has a kernel for every number of rows,
and two caches keep 1,024 of them: one of the process (oneDNN's), and one of each thread (of the layer above it).
Either reads its limit from the environment when it is first used, and torch has no function for it. So both are used
once here, while the environment names the limit. What the user has set stays; so does a cache that was in use before.
It changes no bit: a kernel that was forgotten is compiled again. It knows nothing of models.
"""

from __future__ import annotations

import os
import threading

import torch

CACHE_LIMITS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")

KEPT_KERNELS = 12
"""Either cache keeps so many: more than a layer has shapes of weights. One takes 0.95 MiB in both of them together."""


class KernelLimit:
    """Sets the limit, once in each thread that computes in `dtype`; it holds if the thread made no product before."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._applies = _compiles_kernels(dtype)
        self._threads = threading.local()

    def set(self) -> None:
        """Set the limit for the calling thread, if that has not been done. Makes one small product."""
        if not self._applies or hasattr(self._threads, "is_set"):
            return
        self._threads.is_set = True
        missing = [name for name in CACHE_LIMITS if name not in os.environ]
        os.environ.update(dict.fromkeys(missing, str(KEPT_KERNELS)))
        try:
            some = torch.ones((32, 32), dtype=self._dtype, device="cpu")
            torch.nn.functional.linear(some, some)
        finally:
            for name in missing:
                os.environ.pop(name, None)


def _compiles_kernels(dtype: torch.dtype | None) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
