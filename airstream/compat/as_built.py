"""This is a model as it was built, whatever wraps its modules later: how transformers' converters are to see it.

They look at the module and at the placeholder whose weight they make, and find both by name. An adapter gives modules
other names. It knows names and modules. It refuses to know what is made.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn


class AsBuilt:
    """`model`, in which modules and parameters are found by the names they have now. Keeps none of them alive."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.proxy(model)
        self._modules_by_name = weakref.WeakValueDictionary(model.named_modules(remove_duplicate=False))

    def get_submodule(self, target: str) -> nn.Module:
        """The module that had this name."""
        module = self._modules_by_name.get(target)
        return module if module is not None else self._model.get_submodule(target)

    def get_parameter_or_buffer(self, target: str) -> torch.Tensor:
        """The parameter or buffer that had this name, as it is now."""
        path, _, leaf = target.rpartition(".")
        module = self.get_submodule(path)
        found: torch.Tensor | None = module._parameters.get(leaf)
        found = found if found is not None else module._buffers.get(leaf)
        if found is None:
            raise AttributeError(f"{target!r} is neither a parameter nor a buffer")
        return found

    get_parameter = get_buffer = get_parameter_or_buffer

    def __getattr__(self, name: str) -> Any:
        """Whatever else is asked of the model."""
        return getattr(self._model, name)
