"""Every public method of a transformers model is equal on a streamed one, refused, or has nothing to do with it.

A method that transformers adds is in no table, and fails the test: somebody has to decide.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from airstream import UnsupportedError
from airstream.model.refusals import REFUSED
from tests.conftest import Resident, WriteTiny, stream
from tests.stand_ins.comparing import assert_same
from tests.stand_ins.tiny_models import VOCAB_SIZE

FP32 = torch.float32
IDS = torch.randint(3, VOCAB_SIZE, (1, 12), generator=torch.Generator().manual_seed(1))


def kinds(named: Any) -> Any:
    """Names, shapes and types of tensors."""
    items = dict(named).items()
    return [(name, tuple(each.shape), each.dtype, each.requires_grad, each.device.type) for name, each in items]


def names(named: Any) -> Any:
    return [name for name, _ in named]


def classes(modules: Any) -> Any:
    return [type(module).__name__.lstrip("_") for module in modules]


def seen(register: Callable[[Any, Callable[..., None]], Any]) -> Callable[[Any], Any]:
    """How often a hook that `register` registers is called."""

    def use(model: Any) -> Any:
        calls: list[int] = []
        handle = register(model, lambda *_: calls.append(1))
        with torch.no_grad():
            model(IDS)
        handle.remove()
        return len(calls)

    return use


def trained(tensors: Any) -> Any:
    return [tensor.requires_grad for tensor in tensors]


EQUAL: Mapping[str, Callable[[Any], Any]] = {
    "base_model": lambda model: type(model.base_model).__name__,
    "base_model_prefix": lambda model: model.base_model_prefix,
    "buffers": lambda model: [tuple(each.shape) for each in model.buffers()],
    "can_generate": lambda model: model.can_generate(),
    "can_record_outputs": lambda model: sorted(model.can_record_outputs),
    "children": lambda model: classes(model.children()),
    "compute_transition_scores": lambda model: model.compute_transition_scores(IDS, (torch.ones(1, VOCAB_SIZE),)),
    "config_class": lambda model: model.config_class,
    "cpu": lambda model: model.cpu() is model,
    "device": lambda model: model.device,
    "dtype": lambda model: model.dtype,
    "dummy_inputs": lambda model: dict(model.dummy_inputs),
    "eval": lambda model: model.eval() is model and not model.training,
    "extra_repr": lambda model: model.extra_repr(),
    "float": lambda model: model.float() is model,
    "forward": lambda model: torch.no_grad()(model.forward)(IDS).logits,
    "generate": lambda model: model.generate(IDS, do_sample=False, max_new_tokens=4),
    "generation_config_class": lambda model: model.generation_config_class,
    "get_buffer": lambda model: model.get_buffer("model.rotary_emb.inv_freq"),
    "get_correct_attn_implementation": lambda model: model.get_correct_attn_implementation("sdpa"),
    "get_correct_experts_implementation": lambda model: model.get_correct_experts_implementation(None),
    "get_decoder": lambda model: type(model.get_decoder()).__name__,
    "get_encoder": lambda model: type(model.get_encoder()).__name__,
    "get_expanded_tied_weights_keys": lambda model: model.get_expanded_tied_weights_keys(),
    "get_experts_implementation": lambda model: model.get_experts_implementation(),
    "get_input_embeddings": lambda model: model.get_input_embeddings()(IDS).detach(),
    "get_memory_footprint": lambda model: (model.get_memory_footprint(), model.get_memory_footprint(False)),
    "get_output_embeddings": lambda model: kinds(model.get_output_embeddings().named_parameters()),
    "get_parameter": lambda model: model.get_parameter("model.layers.1.mlp.up_proj.weight").clone(),
    "get_parameter_or_buffer": lambda model: model.get_parameter_or_buffer("lm_head.weight").shape,
    "get_submodule": lambda model: type(model.get_submodule("model.layers.1")).__name__,
    "input_modalities": lambda model: model.input_modalities,
    "is_remote_code": lambda model: model.is_remote_code(),
    "load_state_dict": lambda model: str(model.load_state_dict(model.state_dict())),
    "loss_function": lambda model: model.loss_function(
        torch.ones(1, 12, VOCAB_SIZE), labels=IDS, vocab_size=VOCAB_SIZE
    ),
    "main_input_name": lambda model: model.main_input_name,
    "modules": lambda model: classes(model.modules()),
    "named_buffers": lambda model: names(model.named_buffers()),
    "named_children": lambda model: names(model.named_children()),
    "named_modules": lambda model: names(model.named_modules()),
    "named_non_persistent_buffers": lambda model: names(model.named_non_persistent_buffers()),
    "named_parameters": lambda model: (
        kinds(model.named_parameters()),
        kinds(model.named_parameters(prefix="a", recurse=True)),
        kinds(model.named_parameters(remove_duplicate=False)),
        kinds(model.base_model.named_parameters()),
    ),
    "num_parameters": lambda model: (
        model.num_parameters(),
        model.num_parameters(only_trainable=True),
        model.num_parameters(exclude_embeddings=True),
        model.base_model.num_parameters(),
    ),
    "output_modalities": lambda model: model.output_modalities,
    "parameters": lambda model: [tuple(each.shape) for each in model.parameters()],
    "register_forward_hook": seen(lambda model, hook: model.register_forward_hook(hook)),
    "register_forward_pre_hook": seen(lambda model, hook: model.register_forward_pre_hook(hook)),
    "requires_grad_": lambda model: trained(model.requires_grad_(False).parameters()),
    "resize_token_embeddings": lambda model: type(model.resize_token_embeddings()).__name__,
    "set_attn_implementation": lambda model: model.set_attn_implementation("sdpa"),
    "state_dict": lambda model: {name: tensor.clone() for name, tensor in model.state_dict().items()},
    "tie_weights": lambda model: (model.tie_weights(), torch.no_grad()(model)(IDS).logits),
    "to": lambda model: model.to("cpu", FP32) is model,
    "train": lambda model: model.train(False).training,
    "zero_grad": lambda model: model.zero_grad(),
}
"""What is the same on a streamed model: what to do with one, and what to compare."""

WITH_ARGUMENTS: Mapping[str, Callable[[Any], Any]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "cuda": lambda model: model.cuda(),
    "double": lambda model: model.double(),
    "from_pretrained": lambda model: type(model).from_pretrained(model._engine.folder),
    "half": lambda model: model.half(),
    "ipu": lambda model: model.ipu(),
    "mtia": lambda model: model.mtia(),
    "type": lambda model: model.type(torch.float64),
    "xpu": lambda model: model.xpu(),
}
"""What is refused beside the table of refusals."""

REASONS: Mapping[str, str] = {
    "adapters have tests of their own": "active_adapters delete_adapter disable_adapters enable_adapters "
    "get_adapter_state_dict load_adapter set_adapter",
    "of several processes, of which a streamed model has one": "ep_plan fsdp_plan fsdp_size pp_plan supports_pp_plan "
    "supports_tp_plan tp_plan tp_size init_parallel_plans prepare_distribute_model supports_context_parallel "
    "is_distributed_loading_by_transformers barrier_after_gathered_checkpoint_save gather_sharded_state_dict_for_save "
    "should_save_on_this_rank",
    "looks at no weight": "add_model_tags model_tags register_for_auto_class is_custom_code is_backend_compatible "
    "warn_if_padding_and_no_attention_mask adjust_generation_fn heal_tokens load_custom_generate get_init_context "
    "prepare_inputs_for_generation destroy_cached_continuous_batching_manager retrieve_modules_from_names",
    "puts in modules or changes weights, which the next call notices": "add_module apply register_buffer "
    "register_module register_parameter set_submodule",
    "of training, or of loading for it": "activation_checkpointing_disable disable_input_require_grads "
    "gradient_checkpointing_disable is_activation_checkpointing is_gradient_checkpointing register_backward_hook "
    "supports_gradient_checkpointing register_full_backward_hook register_full_backward_pre_hook "
    "mark_tied_weights_as_initialized",
    "machinery of nn.Module, untouched": "T_destination call_super_init dump_patches get_extra_state set_extra_state "
    "register_load_state_dict_post_hook register_load_state_dict_pre_hook register_state_dict_post_hook "
    "register_state_dict_pre_hook",
    "transformers itself does not implement it for this type": "get_position_embeddings",
    "generate() changes it itself, and has the same results": "set_experts_implementation",
    "set_use_kernels() is refused": "use_kernels",
}
IRRELEVANT = {name: reason for reason, names in REASONS.items() for name in names.split()}


@pytest.fixture(scope="module", params=["streamed", "resident"])
def model(request: pytest.FixtureRequest, tiny: WriteTiny) -> Iterator[Any]:
    """With tied weights, streamed, or in memory."""
    with stream(tiny("llama-tied", FP32), **({} if request.param == "streamed" else {"max_memory": "1GiB"})) as model:
        model(IDS)
        yield model


def test_every_public_method_is_in_one_table() -> None:
    tables = [EQUAL, {name: remedy for name, remedy in REFUSED.items() if name[0] != "_"}, WITH_ARGUMENTS, IRRELEVANT]
    added = {"smart_apply", torch._C._get_privateuse1_backend_name()}  # by loading a model, and by a backend of tests
    public = {name for name in dir(LlamaForCausalLM) if not name.startswith("_")} - added
    assert public - set().union(*tables) == set()
    for number, table in enumerate(tables):
        assert not set(table) & set().union(*tables[:number])


@pytest.mark.parametrize("name", EQUAL)
def test_equal(model: Any, resident: Resident, name: str) -> None:
    reference = copy.deepcopy(resident("llama-tied", FP32, FP32))  # some of it changes the model
    assert_same(EQUAL[name](model), EQUAL[name](reference))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(model: Any, name: str) -> None:
    remedy = re.escape(REFUSED[name].partition("{")[0])
    with pytest.raises(UnsupportedError, match=f"a streamed model does not support .*: {remedy}"):
        getattr(model, name)()
    if hasattr(nn.Module, name) and name != "compile":
        with pytest.raises(UnsupportedError, match="does not support"):
            getattr(model.base_model, name)()
    assert model(IDS).logits.shape == (1, 12, VOCAB_SIZE)


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_refused_with_arguments(model: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match=r"from_pretrained\("):
        WITH_ARGUMENTS[name](model)
