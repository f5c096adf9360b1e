"""This refuses what cannot be done to a weight, which is the checkpoint's and in memory only while it computes.

It has the words. It refuses to know what a weight is: whoever stands for one has found out what is done to it.
"""

from __future__ import annotations

import sys
from typing import NoReturn

from airstream.errors import UnsupportedError
from airstream.model.refusals import REFUSED, refuse

OF_ADAPTERS = (
    "An adapter that looks at weights when it is loaded needs model.load_adapter(...) or PEFT's low_cpu_mem_usage=True"
)


def refuse_absent(name: str, operation: str, *, writes: bool) -> NoReturn:
    """Raise because `operation` needs values of weight `name`, which are not in memory, or `writes` some."""
    if writes:
        raise UnsupportedError(
            f"{name!r} is not in memory: a streamed model has its weights in place only while it computes, and cannot "
            f"change them ({operation}). weight.clone() reads it from the checkpoint. {OF_ADAPTERS}"
        )
    raise UnsupportedError(
        f"weight.clone() reads {name!r} from the checkpoint: do the operation ({operation}) on that. A streamed model "
        f"has its weights in memory only while it computes{f'. {OF_ADAPTERS}' if _is_in('peft.') else ''}"
    )


def refuse_copy_of_packed(name: str) -> NoReturn:
    """Raise because somebody copies weight `name`, whose module computes with packed tensors."""
    if _is_in("peft."):
        refuse_dora(name)
    raise UnsupportedError(
        f"{name!r} is packed, and has values only while its layer computes: a streamed model cannot read or copy it. "
        "Read the checkpoint's files with safetensors.safe_open instead"
    )


def refuse_dora(name: str) -> NoReturn:
    """Raise because an adapter looks at weight `name`, which bitsandbytes has packed."""
    raise UnsupportedError(
        f"an adapter that looks at weights, as DoRA does, cannot be beside a streamed model whose weights bitsandbytes "
        f"has packed, such as {name!r}: PEFT puts others in their place when it computes. delete_adapter() or PEFT's "
        "unload() takes it out. Load it beside the checkpoint in another format, such as airstream repack writes with "
        "--codec int8, int4 or fp8"
    )


def _is_in(package: str) -> bool:
    """Whether it is `package` that looks at a weight: PEFT, while it loads an adapter, or torch, while it compiles."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith(package):
            return True
    return False


def refuse_remaking() -> NoReturn:
    """Raise because somebody makes a weight of the class of another one: tools that move parameters do."""
    raise UnsupportedError(
        "a streamed model's weights cannot be moved, offloaded or exchanged by other tools, such as accelerate's "
        "cpu_offload: it streams them itself. Give from_pretrained() the device= and max_memory= that the model is to "
        "have, or load the checkpoint with transformers for such a tool"
    )


def refuse_storage(name: str) -> NoReturn:
    """Raise because somebody asks for the storage of weight `name`: what writes files, or looks for tied weights."""
    if _is_in("torch._dynamo.symbolic_convert"):  # of a module whose weights stay, which no hook is called before
        refuse("torch.compile()", REFUSED["compile"])
    raise UnsupportedError(
        f"{name!r} has no storage of its own: a streamed model has its weights in place only while it computes, side "
        "by side. Make copies, {name: weight.clone() for name, weight in model.state_dict().items()}, if there is "
        "memory for them: those have one, and can be saved"
    )


def refuse_gradient(name: str) -> NoReturn:
    """Raise because weight `name` is asked for a gradient: an optimizer would change it."""
    raise UnsupportedError(
        f"{name!r} has no gradient: a streamed model's weights are not kept. Fine-tune the checkpoint with "
        "transformers or PEFT"
    )


def refuse_late_change(unit: str) -> NoReturn:
    """Raise because somebody has kept a weight that was lent to `unit`, and changed it after the unit's call."""
    raise UnsupportedError(
        f"a weight of {unit!r} has been changed after its layer's call, by a hook or whoever kept it, when its memory "
        "held other weights. A streamed model takes its weights from the checkpoint alone: keep a copy of a weight, "
        "weight.clone(), and change that. What was changed has been forgotten, and the model can be used again"
    )


def refuse_change(name: str) -> NoReturn:
    """Raise because weight `name` has been changed, or is about to be."""
    raise UnsupportedError(
        f"{name!r} has been replaced or changed: a streamed model takes its weights from the checkpoint alone. Change "
        "and save the checkpoint with transformers, and stream that"
    )
