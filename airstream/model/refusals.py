"""This lists what a streamed model cannot do, by the name of the method, and what to do instead.

It refuses to know why a method would fail: whoever adds one here has found out that it would lose a change, take memory
that is in no plan, or end in an error that does not say what is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch

from airstream.errors import UnsupportedError

LOAD = "load it with from_pretrained(..., {}=...) instead"
TRAIN = "its weights are not kept; fine-tune the checkpoint with transformers or PEFT"
CHANGE = "change and save the checkpoint with transformers, then stream that"
SECOND = (
    "load a second one with from_pretrained(), in the other process if there is one. copy.deepcopy(model.state_dict()) "
    "copies the weights, if there is memory for them"
)
GENERATE = (
    "its paged KV cache takes what memory is free, whatever max_memory says. Give generate() a padded batch instead: "
    "from_pretrained(..., max_batch_size=...) plans for it"
)

REFUSED: Mapping[str, str] = {
    "__deepcopy__": SECOND,
    "__init__": "its class has no others. Use airstream.AutoModel.from_pretrained(), or the class of transformers",
    "__reduce_ex__": SECOND,
    "activation_checkpointing_enable": TRAIN,
    "add_adapter": "its weights are not kept; train the adapter with transformers and PEFT, and load_adapter() it",
    "compile": "compiled code keeps the weights that it was compiled with. Call and generate without compiling",
    "continuous_batching_context_manager": GENERATE,
    "dequantize": LOAD.format("dtype") + ", of a checkpoint that transformers has dequantized and saved",
    "enable_input_require_grads": TRAIN,
    "enable_peft_hotswap": "use delete_adapter() and load_adapter() instead",
    "generate_batch": GENERATE,
    "get_compiled_call": "compiled code keeps the weights that it was compiled with. Set "
    "generation_config.disable_compile = True, or do not give a compile_config",
    "gradient_checkpointing_enable": TRAIN,
    "init_continuous_batching": GENERATE,
    "init_weights": CHANGE,
    "initialize_weights": CHANGE,
    "maybe_distribute_model": "one device computes. " + LOAD.format("device"),
    "post_init": CHANGE,
    "push_to_hub": "the checkpoint lies unchanged in {folder}: upload that folder",
    "resize_position_embeddings": CHANGE,
    "save_distributed_checkpoint": "the checkpoint lies unchanged in {folder}: copy that folder",
    "save_pretrained": "the checkpoint lies unchanged in {folder}: copy that folder",
    "set_decoder": CHANGE,
    "set_encoder": CHANGE,
    "set_input_embeddings": CHANGE,
    "set_output_embeddings": CHANGE,
    "set_use_kernels": "kernels from the hub round otherwise. Load the checkpoint with transformers to use them",
    "share_memory": "other processes cannot see what it reads: " + SECOND,
    "to_empty": CHANGE,
}
"""`{folder}` is where the checkpoint lies."""


OPERATORS: Mapping[str, str] = {
    "__deepcopy__": "copying",
    "__init__": "making another one by its class",
    "__reduce_ex__": "copying, pickling or saving it as an object",
}


def refuse(call: str, remedy: str) -> NoReturn:
    """Raise because a streamed model does not support `call`; `remedy` is what to do instead."""
    raise UnsupportedError(f"a streamed model does not support {call}: {remedy}")


# Else the error would be traced, too, and reach the user inside of torch's own. With fullgraph=True the reason does.
@torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
    reason=f"a streamed model does not support it: {REFUSED['compile']}"
)
def _refuse_compiling() -> NoReturn:
    refuse("torch.compile()", REFUSED["compile"])


def refuse_tracing() -> None:
    """Raise if torch does not compute, but compiles, transforms or records a program of what is computed.

    It would have the weights of one pass in it, or look into weights that are not there.
    """
    if torch.compiler.is_compiling():
        _refuse_compiling()
    if torch._C._get_tracing_state() is not None:
        refuse("torch.jit.trace()", "trace the checkpoint loaded with transformers")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        refuse("torch.func.vmap(), jvp() and other transforms", "give it a batch; for derivatives, use transformers")


def _refusal(name: str, remedy: str) -> Callable[..., NoReturn]:
    call = OPERATORS.get(name, f"{name}()")

    def method(self: Any, *_: Any, **__: Any) -> NoReturn:
        refuse(call, remedy.format(folder=self._engine.folder) if "{folder}" in remedy else remedy)

    method.__name__, method.__doc__ = name, f"Refused: {remedy}"
    return method


Refusing: Any = type("Refusing", (), {name: _refusal(name, remedy) for name, remedy in REFUSED.items()})
"""The methods of the table, each of which raises UnsupportedError."""
