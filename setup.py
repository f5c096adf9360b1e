"""Packaging of airstream; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent

EXTRAS = {
    "demo": ["gguf>=0.17"],
    "gguf": ["gguf>=0.17"],
    "peft": ["peft>=0.22"],
    "plot": ["matplotlib>=3.8"],
    "quant": ["accelerate>=1.1", "bitsandbytes>=0.46; platform_system != 'Darwin'", "optimum>=2.0"],
    "test": [
        "accelerate>=1.1",
        "bitsandbytes>=0.46; platform_system != 'Darwin'",
        "gguf>=0.17",
        "hypothesis>=6.100",
        "matplotlib>=3.8",
        "mypy>=1.15",
        "ipykernel>=6.29",
        "nbclient>=0.10",
        "peft>=0.22",
        "pytest>=8.3",
        "pytest-timeout>=2.3",
        "ruff>=0.12",
        "types-psutil",
    ],
}

BLOCKS = Extension(
    "airstream.codecs._blocks",
    ["airstream/codecs/blocks.c"],
    extra_compile_args=["-O3", "-ffp-contract=off"],  # a fused multiply-add rounds once where the format rounds twice
    optional=True,  # without a C compiler torch does the same, more slowly
)

setup(
    name="airstream",
    version="0.1.0",
    description="Run language models bigger than your GPU or RAM by streaming their layers from disk, exactly.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["airstream", "airstream.*"]),
    package_data={"airstream": ["py.typed"], "airstream.rates": ["cards.json"]},
    ext_modules=[BLOCKS],
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
    entry_points={"console_scripts": ["airstream = airstream.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
