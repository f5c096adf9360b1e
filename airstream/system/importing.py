"""This imports what is below us without a word that is neither ours nor the user's fault.

Optional packages that transformers and PEFT import on their own, torchao above all, log which of their kernels they
could not load and which deprecated calls they make: true, and nothing that who runs a model by us asked for.
Errors are heard, and so is everything where the user has chosen a level; nothing is left changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

TALKATIVE = ("torchao", "torch.utils._pytree", "bitsandbytes")
"""Loggers, with those below them, that speak while transformers and PEFT are imported."""


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Without warnings of `TALKATIVE` loggers whose level nobody has set."""
    loggers = [logger for name in TALKATIVE if not (logger := logging.getLogger(name)).level]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
