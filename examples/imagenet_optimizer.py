"""The optimizer of each method, its learning rate, and the bytes and seconds of its exchanges."""

from __future__ import annotations

import argparse
import inspect
import math
from typing import Any, Protocol

import horovod.torch as hvd
import torch
from imagenet_model import parameter_groups
from imagenet_options import Method
from ranks import on_all_ranks
from torch import nn

from hvd_compress import Compression, GradientCompressor, Ledger, QsparseLocalSGD
from hvd_compress.compression import COMPRESSORS


class Steps(Protocol):
    """Steps of an optimizer, by whatever method the ranks agree."""

    optimizer: Any
    ledger: Ledger
    books: Any  # to be saved beside model and optimizer

    def take(self) -> bool:
        """One step, with the gradients that are there; whether the ranks agree on the weights now."""

    def agree(self) -> bool:
        """Give all ranks one and the same model, before it is validated; whether that took an exchange."""


class LocalSteps:
    """Qsparse-local-SGD."""

    def __init__(
        self,
        sgd: torch.optim.Optimizer,
        method: Method,
        scaler: torch.amp.GradScaler,
        compression: Any,
        model: nn.Module,
    ) -> None:
        self.optimizer: Any = QsparseLocalSGD(
            sgd,
            named_parameters=model.named_parameters(),
            compression=compression,
            sync_every=method.sync_every,
        )
        self.ledger: Ledger = self.optimizer.ledger
        self.books: Any = self.ledger
        self._scaler = scaler

    def take(self) -> bool:
        """See :class:`Steps`."""
        before = self.ledger.exchanges
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return self.ledger.exchanges > before

    def agree(self) -> bool:
        """See :class:`Steps`: if there were steps since the last exchange. It is counted as all others are."""
        before = self.ledger.exchanges
        self.optimizer.synchronize()
        return self.ledger.exchanges > before


class GradientSteps:
    """An unmodified ``hvd.DistributedOptimizer``.

    Horovod's own compressors keep no ledger. What they hand over has the parameters' shapes in each step.
    """

    def __init__(
        self,
        sgd: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        compression: Any,
        model: nn.Module,
        backward_passes: int,
    ) -> None:
        self.optimizer: Any = hvd.DistributedOptimizer(
            sgd,
            named_parameters=model.named_parameters(),
            compression=compression,
            backward_passes_per_step=backward_passes,
        )
        self._scaler = scaler
        self._dense: dict[str, int] = {}
        self._handed: dict[str, int] = {}
        self.ledger = compression.ledger if isinstance(compression, GradientCompressor) else Ledger()
        self.books: Any = compression if isinstance(compression, GradientCompressor) else self.ledger
        if self.books is self.ledger:
            self._dense = {name: p.nbytes for name, p in model.named_parameters()}
            self._handed = {name: compression.compress(p.detach())[0].nbytes for name, p in model.named_parameters()}

    def take(self) -> bool:
        """See :class:`Steps`."""
        with self.ledger.timed("exchange"):  # what of it is not hidden behind the backward pass
            self.optimizer.synchronize()
        with self.optimizer.skip_synchronize():
            self._scaler.step(self.optimizer)
        self._scaler.update()
        if self._handed and hvd.size() > 1:  # a single rank's gradients never get to Horovod
            self.ledger.exchanges += 1
            for name, handed in self._handed.items():
                self.ledger.tensors[name].dense += self._dense[name]
                self.ledger.tensors[name].horovod += handed
        return True

    def agree(self) -> bool:
        """See :class:`Steps`: they do."""
        return False


def make_steps(
    method: Method, model: nn.Module, args: argparse.Namespace, scaler: torch.amp.GradScaler, steps_per_epoch: int
) -> Steps:
    """The chosen method's."""
    sgd = make_sgd(method, model, args)
    compression = on_all_ranks(lambda: make_compression(method, model, args, scaler, steps_per_epoch))
    if method.optimizer == "local-sgd":
        return LocalSteps(sgd, method, scaler, compression, model)
    return GradientSteps(sgd, scaler, compression, model, args.accumulate)


def make_sgd(method: Method, model: nn.Module, args: argparse.Namespace) -> torch.optim.SGD:
    """Without momentum, if the compressor has it."""
    has_momentum = not _takes_momentum(method.compression)
    return torch.optim.SGD(
        parameter_groups(model, args.weight_decay, args.decay_norm),
        # Linear scaling: the authors' 0.128 · (256 · ranks) / 1024 at a batch size of 256.
        args.lr * args.batch_size * hvd.size() / 256,
        momentum=args.momentum if has_momentum else 0.0,
        nesterov=args.nesterov and has_momentum,
        fused=True,
    )


def _takes_momentum(compression: str) -> bool:
    """Whether the optimizer's momentum is the compressor's affair, as it is DGC's. (EF21's is an average.)"""
    return compression in COMPRESSORS and "nesterov" in inspect.signature(COMPRESSORS[compression]).parameters


def make_compression(
    method: Method, model: nn.Module, args: argparse.Namespace, scaler: torch.amp.GradScaler, steps_per_epoch: int
) -> Any:
    """By its name, with those of the settings that it has.

    Raises:
        ValueError: there is no such compressor, or a setting is out of its range or not to be given here.
    """
    if method.compression not in COMPRESSORS:
        return Compression.by_name(method.compression)
    options = {
        "k": args.k,
        "ratio": args.ratio,
        "bits": args.bits,
        "exchanges": max(1, steps_per_epoch // method.sync_every),
    }
    if _takes_momentum(method.compression):
        options |= {"momentum": args.momentum, "nesterov": args.nesterov}
    parameters = inspect.signature(COMPRESSORS[method.compression]).parameters
    chosen = {name: value for name, value in options.items() if name in parameters and value is not None}
    missing = [n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if lacking := [name for name in missing if name not in chosen]:
        settable = [f"--{name}" for name in lacking if name in options]
        wanted = f"give {', '.join(settable)}" if settable else "it cannot be chosen by an option of this program"
        raise ValueError(f"--compression {method.compression} needs {', '.join(lacking)}: {wanted}")
    # Under local SGD the memory is in the units of the parameters, which no scale changes.
    scaled = scaler.is_enabled() and method.optimizer == "gradient"
    return Compression.by_name(
        method.compression,
        **chosen,
        dense_below=args.dense_below,
        exchange=args.exchange,
        named_parameters=model.named_parameters(),
        grad_scaler=scaler if scaled else None,
    )


def lr_factor(epoch: float, args: argparse.Namespace) -> float:
    """A linear warm-up, then what ``--schedule`` says: a tenth after each of ``--drop-at``, or down to zero.

    Args:
        epoch: with its fraction, at the end of the step that is to be taken.
        args: with ``warmup_epochs``, ``schedule``, ``drop_at`` and ``epochs``.
    """
    if epoch < args.warmup_epochs:
        return epoch / args.warmup_epochs
    if args.schedule == "step":
        return 0.1 ** sum(epoch > drop for drop in args.drop_at)
    passed = min(1.0, (epoch - args.warmup_epochs) / max(args.epochs - args.warmup_epochs, 1e-9))
    return 1 - passed if args.schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
