"""Metadata of hvd-compress. Horovod itself is built by scripts/build_horovod.py; see docs/install.md."""

from pathlib import Path

from setuptools import Extension, find_packages, setup

CPP = Path("hvd_compress/kernels/cpp")


def extensions() -> list[Extension]:
    """The kernels in C++, without which everything works too, though slower: a failure to build them is a warning."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        print("warning: pybind11 is not here (pip install pybind11), so the kernels in C++ are not built")
        return []
    return [
        Pybind11Extension(
            "hvd_compress.kernels._native",
            sorted(map(str, CPP.glob("*.cpp"))),
            depends=sorted(map(str, CPP.glob("*.h"))),
            cxx_std=17,
            # Without contraction, so that a result does not depend on whether the machine has fused multiply-add; for
            # any machine of the architecture, so that a cluster's nodes may differ. Floats are also seen as integers.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fno-strict-aliasing", "-pthread"],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


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
    package_data={"hvd_compress": ["py.typed", "kernels/_native.pyi"]},
    ext_modules=extensions(),
    entry_points={"console_scripts": ["hvd-compress = hvd_compress.cli:main"]},
    install_requires=["horovod==0.28.1", "mpi4py>=4", "numpy", "rich", "torch>=2.1"],
    extras_require={
        "train": [
            "matplotlib",
            "pillow",
            "pyyaml",
            "scikit-learn",
            "tensorboard",
            "torchvision",
            "tqdm",
            "webdataset",
        ],
        "slurm": ["cloudpickle", "matplotlib", "pyyaml", "submitit>=1.5"],
        "test": ["hypothesis", "markdown-it-py", "mypy", "pytest", "ruff", "types-pyyaml", "types-tqdm"],
        "docs": ["furo", "myst-parser", "sphinx", "sphinx-copybutton"],
    },
)
