"""This imagines what `compression=` makes of a checkpoint, so that a plan needs none of the weights, packed or plain.

It builds the plain model, as whoever packs does, and asks `layout` what becomes of it. It refuses to know plans.
"""

from __future__ import annotations

from pathlib import Path

import torch

from airstream.checkpoint.stored import CheckpointIndex
from airstream.codecs.names import LOSSLESS_CODEC, codec_named
from airstream.layout.imagined import imagine
from airstream.layout.imagined_checkpoint import Imagined
from airstream.layout.imagined_packing import imagine_packed, imagine_quantised
from airstream.layout.quantised import QuantisedTensors
from airstream.loading.asked import reworded
from airstream.loading.build import build_model
from airstream.loading.options import LoadOptions


def imagine_compressed(folder: Path, options: LoadOptions, index: CheckpointIndex | None) -> Imagined | None:
    """The checkpoint in `folder`, of which only the config need be there, packed; None if it stays as it is.

    Args:
        index: the headers of its weights, if they are there.

    Raises:
        UnsupportedError: it cannot be packed so; the message says why.
    """
    asked = options.compression
    assert asked is not None
    codec = codec_named(asked) if isinstance(asked, str) else asked
    dtype = "auto" if isinstance(codec, str) else codec.dtype or "auto"
    plain_options = LoadOptions(variant=options.variant, trust_remote_code=options.trust_remote_code, dtype=dtype)
    plain = build_model(folder, plain_options, torch.device("cpu"), index, is_measured=False)
    index = index or imagine(plain.model)
    if codec == LOSSLESS_CODEC:
        return imagine_packed(plain.model, index)
    with reworded(asked):
        made = QuantisedTensors(plain.model, index, plain.dtype, codec, folder, plain.quantizer)
    return imagine_quantised(plain.model, index, made)
