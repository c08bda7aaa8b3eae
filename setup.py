"""Metadata of hvd-compress. Horovod itself is built by scripts/build_horovod.py; see docs/install.md."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="hvd-compress",
    version="0.1.0",
    description="Compressed communication for Horovod: sparse messages that travel sparse, and local SGD",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["hvd_compress", "hvd_compress.*"]),
    package_data={"hvd_compress": ["py.typed"]},
    install_requires=["horovod==0.28.1", "mpi4py>=4", "numpy", "torch>=2.1"],
    extras_require={
        "train": ["matplotlib", "pillow", "rich", "scikit-learn", "torchvision", "tqdm"],
        "slurm": ["cloudpickle", "matplotlib", "pyyaml", "rich", "submitit>=1.5"],
        "test": ["hypothesis", "mypy", "pytest", "ruff", "types-pyyaml", "types-tqdm"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
    },
)
