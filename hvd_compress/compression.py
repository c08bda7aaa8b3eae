"""The ``Compression`` namespace: every compressor by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor

from .gradient import GradientCompressor
from .memory import Memory, NoMemory, Residual
from .operators import Operator, TopK
from .settings import Settings

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI

MEMORIES: dict[str, Callable[[], Memory]] = {"none": NoMemory, "residual": Residual}
"""What ``memory=`` may be called."""


class Compression(hvd.Compression):
    """Compressors for ``hvd.DistributedOptimizer(compression=…)`` and ``QsparseLocalSGD(compression=…)``.

    ``Compression.none`` and ``Compression.fp16`` are Horovod's own.
    """

    @staticmethod
    def topk(*, ratio: float | None = None, k: int | None = None, **options: Any) -> GradientCompressor:
        """Exact top-k of each tensor with error feedback.

        Args:
            ratio: part of each tensor that is sent, 0 < ratio ≤ 1. A common start is 0.01; with momentum in the
                optimizer on the gradient path, smaller ratios cost accuracy before they save much more.
            k: elements of each tensor that are sent, instead of ``ratio``; the Qsparse-local-SGD paper uses 1000.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: see :class:`hvd_compress.operators.TopK` and :meth:`of`.
        """
        return Compression.of(TopK(k=k, ratio=ratio), **options)

    @staticmethod
    def of(
        operator: Operator,
        *,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        memory: str | Callable[[], Memory] = "residual",
        dense_below: int = 1000,
        process_set: hvd.ProcessSet | None = None,
        seed: int = 0,
        timeout: float = 600.0,
        communicator: MPI.Intracomm | None = None,
    ) -> GradientCompressor:
        """A compressor of any operator, your own included.

        Args:
            operator: compresses each tensor.
            named_parameters: ``model.named_parameters()``. Needed for ``hvd.DistributedOptimizer``, which does not
                tell a compressor whose gradient it hands over; not needed for ``QsparseLocalSGD``.
            memory: what happens to that which was not sent: ``"residual"`` adds it to the next tensor (error
                feedback), ``"none"`` forgets it; or a function that makes a :class:`hvd_compress.memory.Memory`.
            dense_below: tensors with fewer elements are not compressed. Biases and normalisation layers are a
                thousandth of a model's bytes and sensitive; 0 compresses everything.
            process_set: the one that the optimizer was given, if it was given one.
            seed: of random operators.
            timeout: seconds to wait for all ranks to begin their first exchange.
            communicator: an mpi4py communicator of Horovod's ranks, after ``hvd.init(comm=…)`` with other ranks
                than MPI's world.

        Raises:
            TypeError: ``operator`` is not an operator, or ``named_parameters`` not pairs of name and parameter.
            ValueError: a setting out of its range, an unknown memory, or parameter names that are not unique.
        """
        if isinstance(memory, str):
            if memory not in MEMORIES:
                raise ValueError(_unknown("memory", memory, MEMORIES))
            memory = MEMORIES[memory]
        settings = Settings(operator, memory, dense_below, seed, timeout, process_set, communicator)
        return GradientCompressor(settings, named_parameters)

    @staticmethod
    def by_name(name: str, **settings: Any) -> type[Compressor] | GradientCompressor:
        """``Compression.<name>``, for configuration files and command lines.

        Args:
            name: ``"none"``, ``"fp16"``, ``"topk"``, ….
            settings: the compressor's.

        Raises:
            ValueError: there is no such compressor, or it takes no settings and was given some.
        """
        if name in _PLAIN:
            if settings:
                raise ValueError(f"compressor {name!r} takes no settings, got {', '.join(settings)}")
            return _PLAIN[name]
        if name not in _COMPRESSORS:
            raise ValueError(_unknown("compressor", name, [*_PLAIN, *_COMPRESSORS]))
        return _COMPRESSORS[name](**settings)


_PLAIN: dict[str, type[Compressor]] = {"none": Compression.none, "fp16": Compression.fp16}
_COMPRESSORS: dict[str, Callable[..., GradientCompressor]] = {"topk": Compression.topk}


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}{hint} Known are: {', '.join(sorted(known))}"
