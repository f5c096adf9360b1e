"""The systems compared: which runner, which environment, which pinned versions. Adding one is adding a row.

Knows how to make the environments; knows nothing of measuring.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# torch stays first: it is installed before the rest, so that nothing else decides which build of it comes.
_TRANSFORMERS = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0")
_LLAMACPP = ("llama-cpp-python==0.3.36", "gguf==0.19.0")
_BITSANDBYTES = "bitsandbytes==0.50.2"

_AIRSTREAM_RUNNER = "benchmarks.peers.airstream_runner"


@dataclass(frozen=True)
class System:
    """One row: a runner module and the environment it runs in."""

    name: str
    runner: str
    venv: str | None = None  # a folder name; None: the Python that runs the comparison
    requirements: tuple[str, ...] = ()
    needs_preparation: bool = False
    form: str = ""  # what its runner makes of the weights; as they are, by default

    def python(self, venvs: Path) -> Path:
        """The interpreter that runs this system."""
        return Path(sys.executable) if self.venv is None else venvs.absolute() / self.venv / "bin" / "python"

    def command(self, venvs: Path, action: str, arguments: list[str]) -> list[str]:
        """The command line of this system's runner."""
        return [str(self.python(venvs)), "-m", self.runner, action, *arguments]


SYSTEMS = {
    system.name: system
    for system in (
        System("airstream", _AIRSTREAM_RUNNER),
        *(
            System(f"airstream-{form}", _AIRSTREAM_RUNNER, needs_preparation=form != "fast", form=form)
            for form in ("fast", "lossless", "int8", "int4")
        ),
        System(
            "airllm",
            "benchmarks.peers.airllm_runner",
            "airllm",
            (*_TRANSFORMERS, "airllm==4.0.0"),
            needs_preparation=True,
        ),
        System(
            "airllm-4bit",
            "benchmarks.peers.airllm_runner",
            "airllm-4bit",
            (*_TRANSFORMERS, "airllm==4.0.0", _BITSANDBYTES),
            needs_preparation=True,
            form="4bit",
        ),
        System("accelerate", "benchmarks.peers.accelerate_runner", "accelerate", _TRANSFORMERS),
        System(
            "accelerate-4bit",
            "benchmarks.peers.accelerate_runner",
            "accelerate-4bit",
            (*_TRANSFORMERS, _BITSANDBYTES),
            form="4bit",
        ),
        System("accelerate-auto", "benchmarks.peers.accelerate_auto_runner", "accelerate", _TRANSFORMERS),
        *(
            System(
                f"llamacpp-{form.lower()}" if form else "llamacpp",
                "benchmarks.peers.llamacpp_runner",
                "llamacpp",
                _LLAMACPP,
                needs_preparation=True,
                form=form,
            )
            for form in ("", "Q8_0", "Q4_K_M")
        ),
        System("transformers", "benchmarks.peers.transformers_runner", "accelerate", _TRANSFORMERS),
    )
}


def ensure_environment(system: System, venvs: Path) -> None:
    """Create or complete the environment of `system`, unless the pinned versions are there. Blocks and downloads.

    Raises:
        subprocess.CalledProcessError: venv or pip failed; its own messages went to standard error.
    """
    if system.venv is None:
        return
    python = system.python(venvs)
    if not python.exists():
        _call([sys.executable, "-m", "venv", str(venvs / system.venv)])
    if not has_requirements(python, system.requirements):
        _call([str(python), "-m", "pip", "install", "--quiet", system.requirements[0]])
        _call([str(python), "-m", "pip", "install", "--quiet", *system.requirements])


def has_requirements(python: Path, requirements: tuple[str, ...]) -> bool:
    """Whether `python` has exactly these `name==version` (a build's local suffix such as `+cpu` is not looked at)."""
    program = (
        "import json, sys; from importlib.metadata import distributions; "
        "json.dump({d.metadata['Name'].lower().replace('_', '-'): d.version for d in distributions()}, sys.stdout)"
    )
    answer = subprocess.run([str(python), "-c", program], check=True, capture_output=True, text=True)
    installed: dict[str, str] = json.loads(answer.stdout)
    wanted = dict(requirement.split("==") for requirement in requirements)
    return all(installed.get(name, "").partition("+")[0] == version for name, version in wanted.items())


def _call(command: list[str]) -> None:
    # pip's output goes to standard error: standard output belongs to the result.
    subprocess.run(command, check=True, stdout=sys.stderr)
