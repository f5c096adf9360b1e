"""Checkpoints with their own code: run only if that is asked for, and then streamed as any other."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from airstream import AutoModel, CheckpointNotFoundError, UnsupportedError
from airstream.cli import main
from tests.conftest import on_accelerator, stream
from tests.stand_ins.comparing import greedy, logits, prompts
from tests.stand_ins.sim import SimDevice
from tests.stand_ins.tiny_models import VOCAB_SIZE, tiny_tokenizer

CONFIGURATION = """
from transformers import PreTrainedConfig

open(MARKER, "a").close()


class AveragingConfig(PreTrainedConfig):
    model_type = "airstream-test-averaging"

    def __init__(self, vocab_size=128, hidden_size=32, num_hidden_layers=4, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)
"""

BLOCKS = """
import torch
from torch import nn

from .mixing_averaging import averages


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.register_buffer("decay", torch.zeros(width))

    def forward(self, hidden):
        mixed = averages(self.norm(hidden)) * self.decay.sigmoid()
        return hidden + self.down(torch.tanh(self.up(mixed)))
"""

MIXING = """
import torch


def averages(hidden):
    counts = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
    return hidden.cumsum(1) / counts[:, None]
"""

MODELING = """
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .blocks_averaging import Block
from .configuration_averaging import AveragingConfig

open(MARKER, "a").close()


class AveragingForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AveragingConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return CausalLMOutput(logits=self.lm_head(hidden))
"""

OLD_MODELING = MODELING.replace("(PreTrainedModel, GenerationMixin)", "(PreTrainedModel)").replace(
    "    def forward(",
    "    def prepare_inputs_for_generation(self, input_ids, **kwargs):\n"
    '        return {"input_ids": input_ids}\n\n    def forward(',
)
"""As code was written when every model could generate."""

TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

open(MARKER, "a").close()


class AveragingTokenizer(PreTrainedTokenizerFast):
    def shout(self):
        return "from its own code"
"""


@pytest.fixture(scope="module", autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """transformers copies code before it imports it; not into the user's cache."""
    folder = tmp_path_factory.mktemp("modules")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that exists once any of the checkpoint's code has run."""
    return tmp_path / "code-has-run"


@pytest.fixture
def folder(tmp_path: Path, marker: Path) -> Path:
    """A checkpoint of a type that only its own code knows."""
    return write(tmp_path / tmp_path.name, marker, MODELING)


def write(folder: Path, marker: Path, modeling: str) -> Path:
    folder.mkdir()
    files = {
        "configuration_averaging.py": CONFIGURATION,
        "modeling_averaging.py": modeling,
        "blocks_averaging.py": BLOCKS,
        "mixing_averaging.py": MIXING,
        "tokenization_averaging.py": TOKENIZATION,
    }
    for name, code in files.items():
        (folder / name).write_text(code.replace("MARKER", repr(str(marker))))
    config = {
        "model_type": "airstream-test-averaging",
        "architectures": ["AveragingForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_averaging.AveragingConfig",
            "AutoModelForCausalLM": "modeling_averaging.AveragingForCausalLM",
        },
        "vocab_size": VOCAB_SIZE,
        "dtype": "float32",
        "use_cache": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    torch.manual_seed(0)
    weights = {name: torch.randn(tensor.shape) for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tiny_tokenizer().save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_averaging.AveragingTokenizer"]}
    settings["tokenizer_class"] = "AveragingTokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in [name for name in sys.modules if name.startswith("transformers_modules.")]:
        del sys.modules[name]  # else the code would not run again
    marker.unlink()
    return folder


def resident(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


def assert_same(folder: Path, device: str = "cpu") -> None:
    reference = resident(folder)
    inputs = {"input_ids": prompts(1, 12)["input_ids"]}
    with stream(folder, device, trust_remote_code=True) as model:
        assert type(model).__name__ == "AveragingForCausalLM"
        assert model.plan.streamed_bytes > 4 * 32 * 128 * 2 * 4
        expected = reference if device == "cpu" else on_accelerator(reference)
        assert torch.equal(logits(model, inputs), logits(expected, inputs))
        assert torch.equal(greedy(model, inputs), greedy(expected, inputs))
        assert logits(model, inputs).std() > 0.3


def test_streamed_as_resident(folder: Path) -> None:
    assert_same(folder)


def test_on_an_accelerator(folder: Path, sim: SimDevice) -> None:
    assert_same(folder, "sim:0")


def test_code_from_before_generation_was_a_mixin(tmp_path: Path, marker: Path) -> None:
    inputs = {"input_ids": prompts(1, 12)["input_ids"]}
    expected = greedy(resident(write(tmp_path / "new_averaging", marker, MODELING)), inputs)
    with stream(write(tmp_path / "old_averaging", marker, OLD_MODELING), trust_remote_code=True) as model:
        assert torch.equal(greedy(model, inputs), expected)


def test_its_tokenizer(folder: Path) -> None:
    with stream(folder, trust_remote_code=True) as model:
        assert model.tokenizer.shout() == "from its own code"
        assert model.tokenizer("w5 w6")["input_ids"] == [5, 6]


LOADS: dict[str, Any] = {
    "from_pretrained": lambda folder: AutoModel.from_pretrained(folder, device="cpu"),
    "plan": lambda folder: AutoModel.plan(folder, device="cpu"),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS)
def test_nothing_runs_unless_asked_for(folder: Path, marker: Path, load: Any) -> None:
    message = r"configuration_averaging\.py, modeling_averaging\.py.*if you trust it, pass trust_remote_code=True"
    with pytest.raises(UnsupportedError, match=message):
        load(folder)
    assert not marker.exists()


def test_a_tokenizer_of_its_own_is_not_run_unless_asked_for(folder: Path, marker: Path) -> None:
    """Beside a model that transformers knows."""
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises((CheckpointNotFoundError, ValueError), match="trust_remote_code=True"):
        AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert not marker.exists()


def test_a_type_that_transformers_knows_needs_no_code(folder: Path, marker: Path) -> None:
    """That a checkpoint brings code for it as well is none of our business, unless asked for."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama", "architectures": None}))
    (folder / "model.safetensors").unlink()
    assert AutoModel.plan(folder, device="cpu").batches
    assert not marker.exists()


def test_plan_from_the_config_alone(folder: Path, marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.safetensors").unlink()
    command = ["plan", str(folder), "--device", "cpu"]
    assert main(command) != 0
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not marker.exists()
    main([*command, "--trust-remote-code"])
    assert "blocks.0" in AutoModel.plan(folder, device="cpu", trust_remote_code=True).batches[0].units
    assert "float32" in capsys.readouterr().out
    assert marker.exists()
