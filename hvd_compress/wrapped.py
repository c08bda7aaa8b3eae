"""What optimizers have in common that take local steps with another optimizer."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor

from .membership import check_named_parameters
from .operators import working_dtype
from .settings import Settings


class Wrapped(torch.optim.Optimizer):
    """An optimizer whose ``param_groups``, ``state`` and hooks are another one's, which takes the local steps.

    Args:
        optimizer: the other one; it is :attr:`optimizer`.
        named_parameters: names of all its parameters; of more, if you like.

    Raises:
        TypeError, ValueError: no optimizer, or one that exchanges by itself, or one of its parameters has no name.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if _is_horovods(cls):
            raise TypeError(f"{cls.__name__} exchanges by itself: use it without hvd.DistributedOptimizer around it")

    def __init__(
        self, optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
    ) -> None:
        # The base class's own __init__ would build param_groups anew: they are the wrapped optimizer's.
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {optimizer!r}")
        if isinstance(optimizer, Wrapped):
            raise TypeError(f"{type(optimizer).__name__} already takes local steps: give its optimizer")
        self.optimizer = optimizer
        vars(self).update({name: of for name, of in vars(optimizer).items() if name.endswith("_hooks")})
        self._parameters = _parameters_of(optimizer, check_named_parameters(named_parameters))
        self._known = _ids_of(optimizer)
        # State
        self._starts: Mapping[str, Tensor] = {}  # where the local steps begin
        self._is_stale = False  # whether the parameters are still to be set to that

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's."""
        return self.optimizer.defaults

    def __getstate__(self) -> dict[str, Any]:
        """Not possible.

        Raises:
            TypeError: always; torch's own would leave out the wrapped optimizer.
        """
        raise TypeError(f"{type(self).__name__} cannot be copied or pickled, save its state_dict() instead")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible: the other ranks would not know.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(f"make a new {type(self).__name__} after changing the model, on all ranks")

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The wrapped optimizer's."""
        if set_to_none:
            self.optimizer.zero_grad()  # the default, and Horovod's optimizer takes no argument
        else:
            self.optimizer.zero_grad(set_to_none=False)

    # torch.amp.GradScaler would not call step() after an overflow on this rank; the ranks would then lose count of
    # their steps and wait for each other. With this mark it always calls, and leaves its two findings on the object.
    _step_supports_amp_scaling = True

    @contextmanager
    def _one_step(self) -> Iterator[None]:
        """A context in which ``step()`` does all it does: the scaler's findings do not outlive it.

        After an error torch leaves them here, and would multiply the next step's scale by this one's.
        """
        try:
            yield
        except BaseException:
            for finding in ("grad_scale", "found_inf"):
                self.__dict__.pop(finding, None)
            raise

    def _refuse_averaged(self, settings: Settings | None, process_set: hvd.ProcessSet | None) -> None:
        """Raise ValueError if all ranks that would exchange parameters have averaged their gradients already.

        With nodes for workers, the ranks of a node may do so; on a cluster of one node these are all.
        """
        if not _is_horovods(type(self.optimizer)) or (settings is not None and settings.has_one_worker):
            return
        averaged = getattr(self.optimizer, "process_set", hvd.global_process_set)  # Adasum's has none
        together = process_set or (settings and settings.process_set) or hvd.global_process_set
        if together.ranks and {*together.ranks} <= {*averaged.ranks}:
            raise ValueError(
                "hvd.DistributedOptimizer averages gradients over all ranks in every step, uncompressed, which local "
                f"steps are to avoid: give {type(self).__name__} the plain optimizer, or let it average inside each "
                "node only, process_set=hvd_compress.node_process_set()"
            )

    def _settle(self) -> None:
        """Let the local steps begin where they are to begin, also if something came between the last time."""
        if self._is_stale:
            self._set_parameters(self._starts)
            self._is_stale = False

    @torch.no_grad()
    def _set_parameters(self, values: Mapping[str, Tensor]) -> None:
        for name, p in self._parameters.items():
            p.copy_(values[name])

    def _local_step(self, closure: Callable[[], float] | None) -> float | None:
        strange = _ids_of(self.optimizer) - self._known
        if strange:
            raise RuntimeError(
                f"the wrapped optimizer was given {len(strange)} parameter(s) that would not be exchanged: make a "
                f"new {type(self).__name__} after changing the model, on all ranks"
            )
        scale = getattr(self, "grad_scale", None)
        if scale is not None and getattr(self.optimizer, "_should_synchronize", False):
            raise RuntimeError(
                "Horovod is still averaging the gradients that a GradScaler is to unscale: call synchronize() of the "
                f"hvd.DistributedOptimizer within {type(self).__name__} first, then scaler.step(…) within its "
                "skip_synchronize()"
            )
        if bool(getattr(self, "found_inf", False)):
            return None
        if scale is not None:
            for p in self._parameters.values():
                if p.grad is not None:
                    p.grad.div_(scale.to(p.grad.device))
        return self.optimizer.step(closure)


def load_together(states: Sequence[tuple[torch.optim.Optimizer, dict[str, Any]]], others: Callable[[], None]) -> None:
    """Load each optimizer's state, and ``others``; on an error the optimizers are as they were."""
    before = [(optimizer, optimizer.state_dict()) for optimizer, _ in states]
    try:
        for optimizer, state in states:
            optimizer.load_state_dict(state)
        others()
    except Exception:
        for optimizer, state in before:
            optimizer.load_state_dict(state)
        raise


def _is_horovods(kind: type) -> bool:
    """Whether it is hvd.DistributedOptimizer's, which makes a subclass of the optimizer's own class."""
    return hasattr(kind, "skip_synchronize")


def _ids_of(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def _parameters_of(
    optimizer: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.nn.Parameter]:
    """The optimizer's parameters by name, in the order of the names; of several names the first."""
    left = _ids_of(optimizer)
    chosen = {}
    for name, p in named.items():
        if id(p) in left:
            left.remove(id(p))
            chosen[name] = p
    if left:
        raise ValueError(f"{len(left)} of the optimizer's parameters are not in named_parameters")
    return chosen


def checksum(tensors: Mapping[str, Tensor]) -> str:
    """Tells the ranks' starting points apart."""
    crc = 0
    for tensor in tensors.values():
        crc = zlib.crc32(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data, crc)
    return f"{crc:08x}"


def model_of(parameters: Mapping[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    """Contiguous copies, in the working dtype: what is less than a step of a 16-bit parameter adds up there."""
    return {
        name: p.detach().to(working_dtype(p.dtype), memory_format=torch.contiguous_format, copy=True)
        for name, p in parameters.items()
    }


def moved(start: Tensor, p: torch.nn.Parameter) -> Tensor:
    """By how much ``p`` has moved downwards since it was set to ``start``, and rounded by that; like ``start``."""
    return start.to(p.dtype).to(start.dtype) - p.detach()
