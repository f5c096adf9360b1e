"""Packaging of airstream; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent

PROJECT_URL = "https://example.invalid/airstream"
"""Where the repository is: a placeholder until it has a public address. Notebooks name it too."""

# peft: `load_adapter` of some releases of transformers asks for 0.22, which nobody can install yet; that of a streamed
# model, and `PeftModel`, work with 0.21.
EXTRAS = {
    "demo": ["accelerate>=1.1", "gguf>=0.17"],  # transformers, with which the answer is compared, asks for both
    "gguf": ["gguf>=0.17"],
    "peft": ["peft>=0.21"],
    "plot": ["matplotlib>=3.8"],
    "quant": [
        "accelerate>=1.1",
        "bitsandbytes>=0.46; platform_system != 'Darwin'",
        "compressed-tensors>=0.20",
        "optimum>=2.0",
        "torchao>=0.18",
    ],
    "test": [
        "accelerate>=1.1",
        "bitsandbytes>=0.46; platform_system != 'Darwin'",
        "compressed-tensors>=0.20",
        "gguf>=0.17",
        "hqq>=0.2.8",
        "hypothesis>=6.100",
        "matplotlib>=3.8",
        "mypy>=1.15",
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "optimum-quanto>=0.2.7",
        "peft>=0.21",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "ruff>=0.12",
        "torchao>=0.18",
        "types-psutil",
    ],
}

EXTRAS["all"] = sorted({package for name in ("demo", "gguf", "peft", "plot", "quant") for package in EXTRAS[name]})

BLOCKS = Extension(
    "airstream.codecs._blocks",
    ["airstream/codecs/blocks.c", "airstream/codecs/lossless.c", "airstream/codecs/checksums.c"],
    depends=["airstream/codecs/widths.h"],
    extra_compile_args=["-O3", "-ffp-contract=off"],  # a fused multiply-add rounds once where the format rounds twice
    optional=True,  # without a C compiler torch does the same, more slowly
)

PRODUCTS = Extension(
    "airstream.codecs._products",
    ["airstream/codecs/products.c", "airstream/codecs/team.c"],
    depends=["airstream/codecs/decoders.h", "airstream/codecs/widths.h"],
    extra_compile_args=["-O3", "-ffp-contract=fast", "-Wno-psabi", "-pthread"],
    extra_link_args=["-pthread"],
    optional=True,  # without them kernels="fast" is refused
)


class BuildLibrary(build_ext):
    """Builds the kernels, which know nothing of Python, under a name without a version of it."""

    def get_ext_filename(self, fullname: str) -> str:
        return re.sub(r"\.[^./\\]+(\.(?:so|pyd))$", r"\1", super().get_ext_filename(fullname))


class Wheel(bdist_wheel):
    """A wheel for every Python on one platform: its library is loaded by ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def for_an_index(markdown: str) -> str:
    """`markdown` with links that lead somewhere from outside the repository, too."""
    return re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", rf"]({PROJECT_URL}/blob/main/\1)", markdown)


setup(
    name="airstream",
    version="0.1.0",
    description="Run language models bigger than your GPU or RAM by streaming their layers from disk, exactly.",
    long_description=for_an_index((HERE / "README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    url=PROJECT_URL,
    project_urls={
        "Source": PROJECT_URL,
        "Documentation": f"{PROJECT_URL}/blob/main/docs/guide.md",
        "Changelog": f"{PROJECT_URL}/blob/main/CHANGELOG.md",
    },
    keywords="llm transformers inference offloading streaming low-memory gguf",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["airstream", "airstream.*"]),
    package_data={"airstream": ["py.typed"], "airstream.rates": ["cards.json"]},
    ext_modules=[BLOCKS, PRODUCTS],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "filelock>=3.15",
        "psutil>=5.9",
        "tqdm>=4.66",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["airstream = airstream.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: Microsoft :: Windows",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
