"""This finds out whether a model keeps something of a call in its own modules.

Qwen2-VL keeps the offset of its positions from the prompt for the tokens that follow, RecurrentGemma the states of its
layers. Two generations of such a model cannot take turns between passes. transformers has no word for it, but it is
written in the models' code: a method other than those that build or change a model assigns to an attribute.

It knows source code. It refuses to know who generates, and what happens when two generations meet.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Collection, Iterable, Iterator

from torch import nn

BUILDING = ("__init__", "set_", "post_init", "_init", "resize", "_resize", "tie_", "_tie", "reset", "train", "enable")
CHANGING = ("disable", "gradient", "freeze", "_freeze", "load_", "save_", "prepare_for_onnx", "_preprocess_accelerate")
HARMLESS = ("self.config.problem_type",)
"""What is assigned while a loss is computed, and says nothing about the call."""

DYNAMIC = "dynamic"
"""The rotary embedding whose frequencies follow the longest sequence so far, by a decorator."""


def kept_state(modules: Iterable[nn.Module]) -> str | None:
    """The name of something that `modules` keep of a call, such as "self.rope_deltas", or None. Reads source code."""
    modules = list(modules)
    for module in modules:
        if getattr(module, "rope_type", None) == DYNAMIC:
            return "the frequencies of dynamic RoPE"
    classes = {cls for module in modules for cls in type(module).__mro__ if _is_of_a_model(cls)}
    names: dict[str, set[str]] = {}
    for cls in classes:
        names.setdefault(cls.__module__, set()).add(cls.__qualname__)
    found = (kept for module, in_it in sorted(names.items()) for kept in _assigned_in_module(module, in_it))
    return next(found, None)


def _is_of_a_model(cls: type) -> bool:
    """Whether it computes, and is neither torch's nor what all models of transformers share."""
    library, _, rest = cls.__module__.partition(".")
    shared = library == "transformers" and not rest.startswith("models.")
    return issubclass(cls, nn.Module) and library not in ("torch", "airstream", "peft") and not shared


def _assigned_in_module(module: str, classes: Collection[str]) -> Iterator[str]:
    """What methods of these classes assign to."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        yield f"whatever the classes of {module} do, whose source code is not there"
        return
    read = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for name in sorted(classes):
        if name not in read:
            yield f"whatever {name} does, whose source code is not there"
            return
        methods = (node for node in read[name].body if isinstance(node, ast.FunctionDef))
        for method in methods:
            if not method.name.startswith((*BUILDING, *CHANGING)):
                yield from (kept for kept in _assigned_in(method) if kept not in HARMLESS)


def _assigned_in(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _root(node) == "self":
            yield ast.unparse(node)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("self.register_buffer", "setattr"):
            yield f"what {method.name}() keeps"


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
