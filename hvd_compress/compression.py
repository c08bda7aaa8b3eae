"""The ``Compression`` namespace: every compressor by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Literal

import horovod.torch as hvd
import torch
from horovod.torch.compression import Compressor

from .gradient import GradientCompressor
from .memory import DGC, EF21, Memory, TwoSided
from .operators import (
    CAT,
    QSGD,
    TBQSGD,
    TNQSGD,
    TQSGD,
    MinMax,
    OneBit,
    Operator,
    RandK,
    RandomBlock,
    Rotated,
    Sign,
    TernGrad,
    Threshold,
    TopK,
    compose,
)
from .schedules import Accordion, AdaptiveTopK, HardThreshold, Plan, WarmUp
from .settings import MEMORIES, Settings

if TYPE_CHECKING:  # importing mpi4py starts MPI
    from mpi4py import MPI


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
    def adaptive_topk(
        *, ratio: float, exchanges: int, smallest: float = 0.1, exponent: float = 1 / 3, **options: Any
    ) -> GradientCompressor:
        """Top-k whose k follows the gradients' norm within a total budget, with error feedback.

        Args:
            ratio: average part of the compressed elements that an exchange sends.
            exchanges: over which the budget holds, the steps of an epoch say; then a new budget begins.
            smallest: part of the average that each exchange gets at least.
            exponent: see :class:`hvd_compress.schedules.AdaptiveTopK`.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        plan = AdaptiveTopK(ratio, exchanges, smallest=smallest, exponent=exponent)
        return Compression.of(plan, **options)

    @staticmethod
    def accordion(*, high: float, low: float, interval: int = 10, **options: Any) -> GradientCompressor:
        """Top-k with a high ratio while the gradients' norm changes much and a low one else, with error feedback.

        Args:
            high: ratio in critical times.
            low: ratio otherwise.
            interval: exchanges between decisions.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(Accordion(high, low, interval=interval), **options)

    @staticmethod
    def hard_threshold(
        *,
        ratio: float,
        exchanges: int,
        smallest: float = 0.1,
        largest: float = 4.0,
        rate: float = 0.2,
        **options: Any,
    ) -> GradientCompressor:
        """Whatever exceeds one threshold for all tensors, moved so that a total budget lasts, with error feedback.

        Args:
            ratio: average part of the compressed elements that an exchange sends.
            exchanges: over which the budget holds, the steps of an epoch say; then a new budget begins.
            smallest: part of the average that each exchange gets at least.
            largest: multiple of the average that each exchange gets at most.
            rate: how fast the threshold follows; see :class:`hvd_compress.schedules.HardThreshold`.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        plan = HardThreshold(ratio, exchanges, smallest=smallest, largest=largest, rate=rate)
        return Compression.of(plan, **options)

    @staticmethod
    def cat(*, overhead: float = 20_000, packet: int = 12_000, **options: Any) -> GradientCompressor:
        """Top-k with the k that sends most energy per bit, chosen anew for each tensor, with error feedback.

        Args:
            overhead: bits that a message costs however short it is: latency times bandwidth.
            packet: bits that travel together.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: see :class:`hvd_compress.operators.CAT` and :meth:`of`.
        """
        return Compression.of(CAT(overhead=overhead, packet=packet), **options)

    @staticmethod
    def qtopk(
        *,
        ratio: float | None = None,
        k: int | None = None,
        bits: int = 4,
        norm: Literal["max", "l2"] = "max",
        scaled: bool = False,
        **options: Any,
    ) -> GradientCompressor:
        """Top-k with the kept values quantized: QTop_k of the Qsparse-local-SGD paper, with error feedback.

        Args:
            ratio: part of each tensor that is sent; or
            k: elements of each tensor that are sent.
            bits: of each value; 4 keeps nearly all of what top-k keeps.
            norm: the paper's ``"l2"`` needs ``scaled=True`` at few bits; see :class:`hvd_compress.operators.QSGD`.
            scaled: see :func:`hvd_compress.operators.compose`.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range, or an l2-norm composition that is no contraction.
        """
        operator = compose(TopK(k=k, ratio=ratio), QSGD(bits=bits, norm=norm), scaled=scaled)
        return Compression.of(operator, **options)

    @staticmethod
    def signtopk(
        *, ratio: float | None = None, k: int | None = None, m: float = 1, **options: Any
    ) -> GradientCompressor:
        """Top-k with one bit for each kept value and one scale: SignTop_k of the paper, with error feedback.

        Args:
            ratio: part of each tensor that is sent; or
            k: elements of each tensor that are sent.
            m: norm of the scale; see :class:`hvd_compress.operators.Sign`.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(compose(TopK(k=k, ratio=ratio), Sign(m=m)), **options)

    @staticmethod
    def randk(
        *, ratio: float | None = None, k: int | None = None, shared: bool = False, **options: Any
    ) -> GradientCompressor:
        """A random subset of each tensor, whose indices cost nothing, with error feedback.

        Args:
            ratio: part of each tensor that is sent; or
            k: elements of each tensor that are sent.
            shared: whether all ranks draw the same subset.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(RandK(k=k, ratio=ratio, shared=shared), **options)

    @staticmethod
    def qsgd(
        *, bits: int = 4, norm: Literal["max", "l2"] = "max", bucket: int = 512, **options: Any
    ) -> GradientCompressor:
        """All elements in few bits each, without bias and so without memory (``memory="residual"`` for EF-QSGD).

        Args:
            bits: of each element.
            norm: see :class:`hvd_compress.operators.QSGD`.
            bucket: consecutive elements that share a norm.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(QSGD(bits=bits, norm=norm, bucket=bucket), **{"memory": "none", **options})

    @staticmethod
    def sign(**options: Any) -> GradientCompressor:
        """One bit for each element and their mean magnitude, with error feedback: EF-SignSGD.

        Args:
            options: see :meth:`of`.
        """
        return Compression.of(Sign(), **options)

    @staticmethod
    def terngrad(*, clip: float | None = 2.5, **options: Any) -> GradientCompressor:
        """All elements as −1, 0 or 1 times the largest, without memory.

        Args:
            clip: see :class:`hvd_compress.operators.TernGrad`.
            options: see :meth:`of`.

        Raises:
            ValueError: ``clip`` is out of its range.
        """
        return Compression.of(TernGrad(clip=clip), **{"memory": "none", **options})

    @staticmethod
    def tnqsgd(
        *, bits: int = 4, model: Literal["laplace", "power"] = "laplace", **options: Any
    ) -> GradientCompressor:
        """All elements in few bits, cut and with levels placed where gradients are, without memory.

        Args:
            bits: of each element.
            model: of the gradients; see :class:`hvd_compress.operators.TNQSGD`.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(TNQSGD(bits=bits, model=model), **{"memory": "none", **options})

    @staticmethod
    def tqsgd(*, bits: int = 4, model: Literal["laplace", "power"] = "laplace", **options: Any) -> GradientCompressor:
        """As :meth:`tnqsgd`, with evenly spaced levels; see :class:`hvd_compress.operators.TQSGD`."""
        return Compression.of(TQSGD(bits=bits, model=model), **{"memory": "none", **options})

    @staticmethod
    def tbqsgd(
        *, bits: int = 4, model: Literal["laplace", "power"] = "laplace", **options: Any
    ) -> GradientCompressor:
        """As :meth:`tnqsgd`, with two step widths; see :class:`hvd_compress.operators.TBQSGD`."""
        return Compression.of(TBQSGD(bits=bits, model=model), **{"memory": "none", **options})

    @staticmethod
    def minmax(*, bits: int = 4, **options: Any) -> GradientCompressor:
        """All elements on an even grid from the smallest to the largest, without memory.

        Args:
            bits: of each element.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(MinMax(bits=bits), **{"memory": "none", **options})

    @staticmethod
    def rotated(*, bits: int = 4, **options: Any) -> GradientCompressor:
        """As :meth:`minmax` after a random rotation, which evens out the elements' sizes."""
        return Compression.of(Rotated(bits=bits), **{"memory": "none", **options})

    @staticmethod
    def onebit(**options: Any) -> GradientCompressor:
        """One bit for each element of the rotated tensor, with noise that makes it unbiased: FO-SGD's way there.

        Its variance is tens of times the signal: it needs many ranks, or a small learning rate.

        Args:
            options: see :meth:`of`.
        """
        return Compression.of(OneBit(), **{"memory": "none", **options})

    @staticmethod
    def random_block(*, ratio: float | None = None, k: int | None = None, **options: Any) -> GradientCompressor:
        """Consecutive elements from a random one on, the same on all ranks, with error feedback.

        Args:
            ratio: part of each tensor that is sent; or
            k: elements of each tensor that are sent.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(RandomBlock(k=k, ratio=ratio), **options)

    @staticmethod
    def threshold(threshold: float, **options: Any) -> GradientCompressor:
        """All elements of at least this magnitude, with error feedback.

        Args:
            threshold: in the units of the gradients; of the parameters under local SGD.
            options: see :meth:`of`.

        Raises:
            ValueError: it is not positive.
        """
        return Compression.of(Threshold(threshold), **options)

    @staticmethod
    def dgc(
        *,
        ratio: float = 0.001,
        warmup: int = 0,
        momentum: float = 0.9,
        nesterov: bool = False,
        masking: bool = True,
        clip: float | None = None,
        **options: Any,
    ) -> GradientCompressor:
        """Deep Gradient Compression: top-k of what each rank's own momentum has accumulated.

        Give the optimizer no momentum. Small tensors get theirs here too.

        Args:
            ratio: part of each tensor that is sent; the paper's is 0.001.
            warmup: exchanges over which the ratio falls from 25 % to that in stages, a quarter of each other; four
                epochs in the paper.
            momentum: see :class:`hvd_compress.memory.DGC`, as for the next three.
            nesterov: look ahead by one gradient.
            masking: momentum factor masking.
            clip: largest l2 norm of one tensor's gradient on one rank.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        memory = partial(DGC, momentum, nesterov=nesterov, masking=masking, clip=clip)
        return Compression.of(WarmUp(ratio, warmup), **{"memory": memory, **options})

    @staticmethod
    def ef21(
        *, ratio: float | None = None, k: int | None = None, momentum: float = 0.0, **options: Any
    ) -> GradientCompressor:
        """Top-k of by how much each rank's estimate of its gradient is wrong: EF21, or EF21-SGDM.

        Args:
            ratio: part of each tensor that is sent; or
            k: elements of each tensor that are sent.
            momentum: see :class:`hvd_compress.memory.EF21`; with minibatches, 0.9 or so.
            options: see :meth:`of`.

        Raises:
            ValueError, TypeError: a setting out of its range.
        """
        return Compression.of(TopK(k=k, ratio=ratio), **{"memory": partial(EF21, momentum), **options})

    @staticmethod
    def cd_adam(*, operator: Operator | None = None, **options: Any) -> GradientCompressor:
        """CD-Adam's compression on the way there and back, for :class:`hvd_compress.CDAdam`.

        Args:
            operator: a contraction; one bit for each element, as in the paper, if None.
            options: see :meth:`of`.
        """
        operator = Sign() if operator is None else operator
        return Compression.of(operator, **{"memory": partial(TwoSided, operator), **options})

    @staticmethod
    def of(
        operator: Operator | Plan,
        *,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None,
        memory: str | Callable[[], Memory] = "residual",
        dense_below: int = 1000,
        bucket_cap_mb: float = 25.0,
        process_set: hvd.ProcessSet | None = None,
        seed: int = 0,
        timeout: float = 600.0,
        communicator: MPI.Intracomm | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        exchange: str = "allgather",
        nodes: Sequence[int] | None = None,
        node_process_set: hvd.ProcessSet | None = None,
        reselect: float | None = None,
    ) -> GradientCompressor:
        """A compressor of any operator, your own included.

        Args:
            operator: compresses each tensor; or a plan of :mod:`hvd_compress.schedules`.
            named_parameters: ``model.named_parameters()``. Needed for ``hvd.DistributedOptimizer``, which does not
                tell a compressor whose gradient it hands over; not needed for ``QsparseLocalSGD``.
            memory: what happens to that which was not sent: ``"residual"`` adds it to the next tensor (error
                feedback), ``"none"`` forgets it, ``"dgc"`` and ``"ef21"`` are those of :mod:`hvd_compress.memory`
                with their usual settings; or a function that makes a memory.
            dense_below: tensors with fewer elements are not compressed. Biases and normalisation layers are a
                thousandth of a model's bytes and sensitive; 0 compresses everything.
            bucket_cap_mb: megabytes of uncompressed float32 that make a bucket, whose message travels while the
                backward pass goes on. Smaller ones begin earlier; each costs a collective's latency.
            process_set: the one that the optimizer was given, if it was given one.
            seed: of random operators.
            timeout: seconds that a rank waits for the others to come to an exchange, before it ends the job with the
                names of those who are missing: more than the longest time that some ranks alone evaluate or save.
            communicator: an mpi4py communicator of Horovod's ranks, after ``hvd.init(comm=…)`` with other ranks
                than MPI's world.
            grad_scaler: the ``torch.amp.GradScaler`` in use with ``hvd.DistributedOptimizer``. The memory is then in
                the units of unscaled gradients and stays right when the scale changes. ``QsparseLocalSGD``, whose
                memory is in the units of the parameters, needs none.
            exchange: how messages travel. ``"allgather"``: every rank receives every other rank's.
                ``"hierarchical"``: gradients are summed densely inside each node and compressed between nodes.
                ``"reduce_scatter"``: each rank sums a part of all elements, and what a rank receives does not grow
                with the number of ranks. ``"auto"``: measures once, and chooses among these. See docs/scale.md for
                which one suits which cluster.
            nodes: on which node each of Horovod's ranks is: a number for each rank, equal for those that share a
                node. MPI knows, so this is for tests, or to divide large nodes.
            node_process_set: of the ranks on this rank's node, :func:`hvd_compress.node_process_set`. Within nodes
                Horovod then sums, on GPUs by NCCL if it has that; else MPI does, through host memory.
            reselect: with ``"reduce_scatter"``, how many elements the sum may have, as a multiple of what one rank
                sends on average; what is left out is remembered by the rank that summed it. None: one such message,
                or more as long as a rank sends no more than 1.25 messages to other nodes in all (docs/scale.md).
                ``math.inf`` leaves nothing out; without ``memory="residual"`` nothing ever is.

        Raises:
            TypeError: a setting that there is not, or of the wrong kind: an ``operator`` that is none, a
                ``named_parameters`` that is not pairs of name and parameter.
            ValueError: a setting out of its range, an unknown memory, parameter names that are not unique, or an
                operator so coarse that a memory would feed its errors back until they explode.
        """
        if isinstance(memory, str):
            if memory not in MEMORIES:
                raise ValueError(_unknown("memory", memory, MEMORIES))
            memory = MEMORIES[memory]
        settings = Settings(
            operator,
            memory,
            dense_below=dense_below,
            bucket_cap_mb=bucket_cap_mb,
            seed=seed,
            timeout=timeout,
            process_set=process_set,
            communicator=communicator,
            grad_scaler=grad_scaler,
            exchange=exchange,
            nodes=nodes,
            node_process_set=node_process_set,
            reselect=reselect,
        )
        return GradientCompressor(settings, named_parameters)

    @staticmethod
    def by_name(name: str, **settings: Any) -> type[Compressor] | GradientCompressor:
        """``Compression.<name>``, for configuration files and command lines.

        Args:
            name: ``"none"``, ``"fp16"``, ``"topk"``, ``"qtopk"``, ….
            settings: the compressor's.

        Raises:
            ValueError: there is no such compressor, or it takes no settings and was given some.
        """
        if name in _PLAIN:
            if settings:
                raise ValueError(f"compressor {name!r} takes no settings, got {', '.join(settings)}")
            return _PLAIN[name]
        if name not in COMPRESSORS:
            raise ValueError(_unknown("compressor", name, [*_PLAIN, *COMPRESSORS]))
        return COMPRESSORS[name](**settings)


def _unknown(what: str, name: object, known: Iterable[str]) -> str:
    return f"unknown {what} {name!r}{_nearest(name, known) or '.'} Known are: {', '.join(sorted(known))}"


def _nearest(name: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _naming_the_unknown(make: Callable[..., GradientCompressor]) -> Callable[..., GradientCompressor]:
    """``make``, which says of a misspelt setting what it is, rather than which one is missing for that reason."""
    own, shared = (inspect.signature(of).parameters for of in (make, Compression.of))
    known = {name for name, p in own.items() if p.kind is not p.VAR_KEYWORD}
    known |= {name for name, p in shared.items() if p.kind is p.KEYWORD_ONLY}

    @wraps(make)
    def checked(*args: Any, **settings: Any) -> GradientCompressor:
        for name in settings.keys() - known:
            called = f"Compression.{make.__name__}()"
            raise TypeError(f"{called} got an unexpected keyword argument {name!r}{_nearest(name, known)}")
        return make(*args, **settings)

    def compress(*_: Any) -> None:
        called = f"Compression.{make.__name__}"
        raise TypeError(f"{called} makes compressors, unlike Compression.none and .fp16: give {called}(…)")

    checked.compress = compress  # type: ignore[attr-defined]  # which Horovod would call
    return checked


_PLAIN: dict[str, type[Compressor]] = {"none": Compression.none, "fp16": Compression.fp16}
COMPRESSORS: dict[str, Callable[..., GradientCompressor]] = {
    name: _naming_the_unknown(getattr(Compression, name))
    for name, made in vars(Compression).items()
    if isinstance(made, staticmethod) and name not in ("of", "by_name")
}
"""What takes settings, by name."""
for _name, _made in (*COMPRESSORS.items(), ("of", _naming_the_unknown(Compression.of))):
    setattr(Compression, _name, staticmethod(_made))
