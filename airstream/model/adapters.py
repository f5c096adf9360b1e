"""This puts adapters (LoRA and its relatives, by PEFT) beside a model whose own weights are streamed.

PEFT owns what an adapter computes: it wraps modules, and the wrapper calls the module it wraps, whose weights come and
go as ever. What belongs to an adapter stays in memory. This knows how adapters get in without touching weights that are
not there; the engine makes room for them. It refuses to know the arithmetic of any kind of adapter.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from airstream.compat.blame import blamed_on
from airstream.errors import ArgumentError, CheckpointError, UnsupportedError
from airstream.model.adapter_source import Source
from airstream.model.stored import Stored
from airstream.model.wrappers import cast_copies, costs, freeze, refuse_looking, refuse_merging, strangers
from airstream.plan.facts import AdapterFacts
from airstream.reporting.extras import install
from airstream.reporting.units import counted
from airstream.system.importing import quiet_imports


class Host(Protocol):
    """What runs the model, as far as adapters have to do with it."""

    @property
    def modules(self) -> Iterable[nn.Module]:
        """The modules of the model alone, without adapters."""

    @property
    def head(self) -> nn.Module | None:
        """The lm_head."""

    @property
    def stored(self) -> Mapping[str, Stored]:
        """The checkpoint's weights, by name."""

    def between_generations(self) -> AbstractContextManager[None]:
        """Around what changes the results of the model: no other thread generates meanwhile."""

    def make_room(self, adapters: AdapterFacts) -> None:
        """Adapters that cost this much are beside the model from now on, in place of those that were.

        Raises:
            BudgetError: they do not fit, even if no weight stays in memory.
        """


class WithAdapters:
    """What a streamed model does with adapters: `load_adapter` and its neighbours, as transformers has them.

    Adapters that PEFT puts in by itself (`PeftModel.from_pretrained(model, ...)`) are noticed by the next call.
    """

    _engine: Host
    modules: Callable[[], Iterator[nn.Module]]
    named_parameters: Callable[..., Iterator[tuple[str, nn.Parameter]]]
    _configs: Mapping[str, Any] | None = None
    _counted: tuple[str, ...] | None = ()

    def load_adapter(
        self,
        peft_model_id: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
        peft_config: Any = None,
        adapter_state_dict: Mapping[str, torch.Tensor] | None = None,
        *,
        low_cpu_mem_usage: bool = True,  # noqa: ARG002 - always: nothing is made in memory before there is room for it
        is_trainable: bool = False,
        hotswap: bool | str = "auto",
        adapter_kwargs: Mapping[str, Any] | None = None,
        **download: Any,
    ) -> None:
        """Load an adapter and use it from now on. It stays in memory, which is taken from weights that stayed.

        Args:
            peft_model_id: a folder with adapter_config.json, or a hub id.
            adapter_name: to tell several apart; "default" if not given.
            peft_config, adapter_state_dict: in place of `peft_model_id`, what would be in that folder.
            adapter_kwargs, download: `revision`, `subfolder`, `token`, `cache_dir`, as in transformers.

        Raises:
            UnsupportedError: PEFT is not installed, or the adapter would have to be trained or merged.
            CheckpointNotFoundError, CheckpointError: there is no such adapter, or it belongs to another model.
            BudgetError: it does not fit into `max_memory`, even if no weight stays.
        """
        _check_peft()
        if is_trainable or hotswap is True:
            what = "is_trainable=True" if is_trainable else "hotswap=True"
            raise UnsupportedError(
                f"load_adapter({what}) is not possible on a streamed model: its weights are not kept. Fine-tune the "
                "checkpoint with transformers and PEFT, and load what comes of it, after delete_adapter() if need be"
            )
        name = adapter_name or "default"
        if name in self._names:
            raise ArgumentError(f"there is an adapter {name!r} already: delete_adapter({name!r}), or give another name")
        with self._engine.between_generations():
            source = Source(peft_model_id, {**download, **(adapter_kwargs or {})})
            config = source.config() if peft_config is None else peft_config
            stored = source.weights() if adapter_state_dict is None else adapter_state_dict
            state = {key.removeprefix("base_model.model."): tensor for key, tensor in stored.items()}
            self._drop_base_weights(state)
            if getattr(config, "trainable_token_indices", None):
                raise UnsupportedError(
                    "the adapter has trained single tokens (trainable_token_indices), for which it needs the whole "
                    "embedding table in memory: merge it into the checkpoint with PEFT, save that, and stream it"
                )
            self._put_in(name, config, state, source.blame())

    def set_adapter(self, adapter_name: str | list[str]) -> None:
        """Use this adapter, or all of these at once, instead of those that were used.

        Waits until no other thread generates, as all do that change what a model computes.
        """
        self._check_known([adapter_name] if isinstance(adapter_name, str) else adapter_name)
        from peft.functional import set_adapter

        with self._engine.between_generations():
            set_adapter(self, adapter_name, inference_mode=True)

    def enable_adapters(self) -> None:
        """Use adapters again after `disable_adapters`."""
        self._switch(on=True)

    def disable_adapters(self) -> None:
        """Compute without adapters, which stay in memory."""
        self._switch(on=False)

    def active_adapters(self) -> list[str]:
        """The names of the adapters in use."""
        self._check_known([])
        from peft.tuners.tuners_utils import BaseTunerLayer

        layer = next(module for module in self.modules() if isinstance(module, BaseTunerLayer))
        return list(layer.active_adapters)

    def delete_adapter(self, adapter_names: str | list[str]) -> None:
        """Forget adapters. Their memory holds weights again from the next call on."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        with self._engine.between_generations():
            for name in names:
                self._remove(name)

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """The configs of all adapters, by name. PEFT sets it when it has put one in."""
        if self._configs is None:
            raise AttributeError("peft_config")  # as if it were not there: PEFT and transformers ask by hasattr()
        return self._configs

    @peft_config.setter
    def peft_config(self, configs: Mapping[str, Any]) -> None:
        self._configs, self._counted = configs, None
        refuse_merging(strangers(self, self._engine.modules))

    @peft_config.deleter
    def peft_config(self) -> None:
        self._configs, self._counted = None, None

    def _heed_adapters(self) -> None:
        """Plan for the adapters that are there now, if they have changed. Costs a microsecond otherwise."""
        names = self._names
        if names != self._counted:
            found = list(strangers(self, self._engine.modules))
            refuse_merging(found)
            refuse_looking(found)
            self._engine.make_room(costs(found, self._engine.head))
            self._counted = names

    @property
    def _names(self) -> tuple[str, ...]:
        return tuple(self._configs or ())

    def _check_known(self, names: Collection[str]) -> None:
        _check_peft()
        if not self._names:
            raise ArgumentError("there is no adapter: load one with load_adapter()")
        unknown = [name for name in names if name not in self._names]
        if unknown:
            raise ArgumentError(f"there is no adapter {unknown[0]!r}: those loaded are {', '.join(self._names)}")

    def _switch(self, on: bool) -> None:
        self._check_known([])
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        with self._engine.between_generations():
            for module in self.modules():
                if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                    module.enable_adapters(on)
            freeze(strangers(self, self._engine.modules))

    def _drop_base_weights(self, state: dict[str, torch.Tensor]) -> None:
        """Take those that PEFT has saved along with the adapter out of `state`, if they are the checkpoint's own."""
        for key in [key for key in state if key.endswith((".base_layer.weight", ".base_layer.bias"))]:
            name = key.replace(".base_layer.", ".")
            brought = state.pop(key)
            if name not in self._engine.stored or not self._engine.stored[name].has(brought):
                raise UnsupportedError(
                    f"the adapter brings its own {name!r}, which is not the checkpoint's: trained along, or of another "
                    "vocabulary. A streamed model cannot replace a weight: save the checkpoint with it, and stream that"
                )

    def _put_in(self, name: str, config: Any, state: Mapping[str, torch.Tensor], blame: str) -> None:
        """Wrap the modules, without memory; make room; load. If anything fails, the model is as it was."""
        from peft import inject_adapter_in_model, set_peft_model_state_dict

        config.inference_mode = True
        with self._or_as_it_was(name, blame), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant to be
            inject_adapter_in_model(config, self, name, low_cpu_mem_usage=True)
            self._heed_adapters()
            result = set_peft_model_state_dict(self, dict(state), name, low_cpu_mem_usage=True)
            lacking = [key for key, tensor in self.named_parameters() if tensor.device.type == "meta"]
            if lacking or result.unexpected_keys:
                more, less = len(result.unexpected_keys), len(lacking)
                raise CheckpointError(
                    f"the adapter has {counted(more, 'tensor')} that the model has no place for, and lacks {less} that "
                    f"its own config asks for, such as {(result.unexpected_keys or lacking)[0]!r}: it belongs to "
                    "another model"
                )
            cast_copies(strangers(self, self._engine.modules))
            freeze(strangers(self, self._engine.modules))
            self._hf_peft_config_loaded = True  # what transformers asks
            self.set_adapter(name)

    @contextmanager
    def _or_as_it_was(self, name: str, blame: str) -> Iterator[None]:
        """Takes adapter `name` out again, wrappers and all, if it cannot be put in: then `blame` is said of it."""
        before = [(module, dict(module.named_children())) for module in self.modules()]
        try:
            yield
        except BaseException:
            if name in self._names:
                self._remove(name)
            for module, children in before:
                for key, child in dict(module.named_children()).items():
                    if key not in children:
                        delattr(module, key)
                    elif child is not children[key]:
                        setattr(module, key, children[key])
            self._counted = None
            with blamed_on(f"the adapter {name!r} does not fit this model ({blame})"):
                raise

    def _remove(self, name: str) -> None:
        from peft.functional import delete_adapter

        configs = dict(self._configs or {})
        delete_adapter(self, name, f"{configs.pop(name).peft_type.value.lower()}_")
        if configs:
            self.peft_config = configs
        else:
            del self.peft_config
            self._hf_peft_config_loaded = False


def _check_peft() -> None:
    try:
        with quiet_imports():
            import peft  # noqa: F401 - is it there?
    except ImportError as error:
        raise UnsupportedError(f"adapters need PEFT: {install('peft', 'peft')}") from error
