"""The gradient path: a compressor for an unmodified ``hvd.DistributedOptimizer``.

Horovod calls ``compress(p.grad)`` for one gradient after the other while the backward pass runs, sums what that
returns, and later calls ``decompress`` for each. Here ``compress`` keeps the gradient's message and gives Horovod
a *ticket* of two numbers to sum. Messages travel through MPI in buckets, in an order that all ranks share, while the
backward pass goes on; the first ``decompress`` of a step sends off what is left and waits for all of them, and each
hands back its tensor's average. Horovod negotiates tickets by name, so by the time that one is summed every rank has
compressed that gradient, whatever the order of its own.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import horovod.torch.optimizer as hvd_optimizer
import torch
from horovod.torch.compression import Compressor
from torch import Tensor

from .exchanges import AnyReducer, reducer
from .horovod_exchange import for_horovod
from .kernels import is_finite
from .ledger import Ledger
from .membership import check_horovod_takes, check_named_parameters, link
from .operators import working_dtype
from .settings import Settings

_is_about = partial(math.isclose, rel_tol=1e-5)
_use_count = getattr(torch._C, "_storage_Use_Count", None)  # before torch 2.9, only builds with CUDA have it
_current_node = getattr(torch._C, "_current_autograd_node", lambda: None)


class _Dense(NamedTuple):
    """Context of a gradient that went through Horovod itself."""

    name: str
    dtype: torch.dtype


class _Ticket(NamedTuple):
    """Context of a gradient whose message is on its way."""

    name: str
    dtype: torch.dtype
    scale: float  # that the GradScaler had given the gradient


class GradientCompressor(Compressor):
    """Compresses the gradients of one optimizer. Made by :class:`hvd_compress.Compression`.

    Small gradients (``dense_below``) are left to Horovod, sparse ones too; the others are exchanged as compressed
    messages. All ranks average the same messages in rank order, so their gradients are bit-identical.
    """

    def __init__(
        self, settings: Settings, named_parameters: Iterable[tuple[str, torch.nn.Parameter]] | None = None
    ) -> None:
        # Configuration
        self.settings = settings
        self.ledger = Ledger()
        self._parameters = None if named_parameters is None else check_named_parameters(named_parameters)
        # State
        self._lock = threading.Lock()  # a model on two devices has two threads in its backward pass
        self._reducer = None if self._parameters is None else reducer(settings, self._parameters, self.ledger)
        self._latest: str | None = None  # whose gradient came last in this step
        self._followers: dict[str | None, str] = {}  # whose came next, last time
        self._submitted: set[str] = set()  # since the last decompress
        self._taken: dict[str, tuple[Tensor, int]] = {}  # their gradients, and torch's count of changes to these
        self._op = "Average"  # Horovod's, as the last exchange has shown
        self._scale = 1.0  # the GradScaler's, in this step
        self._tickets: dict[torch.device, list[Tensor]] = {}  # that are still to be given to Horovod
        self._reduced: dict[str, Tensor] = {}  # waiting for their decompress
        self._dense_finite: list[Tensor] = []  # of gradients left to Horovod: bool of no dimensions each
        self._sparse: list[tuple[str, int]] = []  # bytes of sparse gradients that are still to be counted

    def __repr__(self) -> str:
        return f"GradientCompressor({self.settings.operator!r}, dense_below={self.settings.dense_below})"

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Take a gradient in; called by Horovod.

        Args:
            tensor: a bound parameter's ``.grad``.

        Returns:
            What Horovod is to sum, and the context for :meth:`decompress`.

        Raises:
            NotImplementedError: Horovod was asked for what cannot work with compression (``op=hvd.Adasum``, a
                sparse gradient in a group).
            RankMismatchError: at the first call, when ranks differ.
            RuntimeError: no parameters were bound, or this is not a gradient of one of them; or it is on a GPU, and
                Horovod was built without.
        """
        if tensor.requires_grad:
            raise NotImplementedError(
                "op=hvd.Adasum hands over parameters, not gradients, and cannot be compressed: use op=hvd.Average "
                "or hvd.Sum, or compression=hvd.Compression.none"
            )
        if tensor.is_sparse:
            raise NotImplementedError(
                "a sparse gradient in a group cannot be reduced: leave the embedding out of groups=…, or use "
                "sparse=False in it"
            )
        with self._lock:
            return self._take_in(tensor)

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
        """Hand out the reduced gradient; called by Horovod.

        Args:
            tensor: what Horovod made of the first value that :meth:`compress` returned.
            ctx: the second value; None for a sparse gradient, which Horovod does not show to :meth:`compress`.

        Raises:
            NotImplementedError: Horovod's ``op`` is neither Average nor Sum, or a rank has joined (``hvd.join``).
            RuntimeError: a gradient was changed since :meth:`compress`; no memory has changed.
            PeerError, RankMismatchError, WireError: the exchange failed; every rank raises, no memory has changed.
        """
        self._submitted.clear()
        if ctx is None:
            self._count_sparse()
            return tensor
        if isinstance(ctx, _Dense):
            return self._as_gradient(ctx.name, tensor, ctx.dtype)
        if ctx.name not in self._reduced:
            self._exchange(tensor)
        reduced = self._reduced.pop(ctx.name)
        return self._as_gradient(ctx.name, reduced if ctx.scale == 1 else reduced.mul_(ctx.scale), ctx.dtype)

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory, step, seed and ledger; call it between steps. Save one for each rank."""
        return {**self._bound().state_dict(), "op": self._op}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bit for bit, where :meth:`state_dict` was taken.

        Raises:
            ValueError: the state is of another model, rank or number of ranks; nothing has changed then.
        """
        self._bound().load_state_dict(state)
        self._op = state["op"]
        self._forget_step()

    def reset_memory(self) -> None:
        """Forget what was not sent so far. Do it on all ranks, between steps."""
        self._bound().reset_memory()

    def leave(self) -> None:
        """Forget the other ranks, and a step that was begun: the number of ranks is about to change."""
        self._forget_step()
        self._tickets.clear()  # this may become another rank
        self._bound().leave()

    def _take_in(self, tensor: Tensor) -> tuple[Tensor, Any]:
        reducer, name = self._owner(tensor)
        if not reducer.is_open:
            check_horovod_takes(tensor.device)
            by, ranks = link(self.settings.process_set, self.settings.communicator)
            reducer.open(by, ranks, self._expects(), self.settings.timeout)
        scaler = self.settings.grad_scaler
        if scaler is not None and not self._submitted:  # once a step, since it waits for the GPU
            self._scale = scaler.get_scale()
        if not self._submitted:
            self._dense_finite.clear()  # of a step without a compressed gradient, which asks nobody
        traffic = self.ledger.tensors[name]
        traffic.dense += tensor.nbytes
        self._submitted.add(name)
        if tensor.numel() < self.settings.dense_below and not reducer.covers_small:
            dense = for_horovod(tensor)
            traffic.horovod += dense.nbytes
            self._dense_finite.append(is_finite(dense))
            return dense, _Dense(name, tensor.dtype)
        if self._scale != 1:
            # In the working dtype, where the small ones of a 16-bit gradient do not vanish.
            reducer.add(name, tensor.to(working_dtype(tensor.dtype)) / self._scale)
        elif (
            tensor.dtype == working_dtype(tensor.dtype)
            and tensor.is_contiguous()
            and _may_have_readers(tensor, self._is_in_its_hook(name))
        ):
            instead = torch.empty_like(tensor)
            reducer.add(name, tensor, instead)
            tensor.data = instead  # frees the old one once it is read; by set_() it would count as a change of both
        else:
            reducer.add(name, tensor)
        if self._gradient(name) is tensor and not tensor._is_view():  # views count changes together
            self._taken[name] = tensor, tensor._version
        ticket = self._ticket(tensor.device)
        traffic.horovod += ticket.nbytes
        return ticket, _Ticket(name, tensor.dtype, self._scale)

    def _expects(self) -> str:
        """Of the other ranks. Sums in two dtypes would be two sums."""
        return f"gradient path in {', '.join(sorted({str(p.dtype) for p in (self._parameters or {}).values()}))}"

    def _ticket(self, device: torch.device) -> Tensor:
        """One on each rank, and one on the first rank only: what becomes of them tells Horovod's operation."""
        left = self._tickets.setdefault(device, [])
        if not left:  # made by the step, not one by one
            tickets = torch.ones(len(self._parameters or ()), 2, device=device)
            tickets[:, 1].fill_(float(self._bound().rank == 0))  # a copy from the host would wait for the GPU
            left.extend(tickets.unbind())
        return left.pop()

    def _as_gradient(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """With the parameter's shape and strides: torch's fused optimizers pair the two's elements by address."""
        assert self._parameters is not None
        p = self._parameters[name]
        if p.is_contiguous():
            values = values if values.shape == p.shape else values.view(p.shape)
            return values if values.dtype == dtype else values.to(dtype)
        return torch.empty_like(p, dtype=dtype).copy_(values.view(p.shape))

    def _bound(self) -> AnyReducer:
        if self._reducer is None:
            raise RuntimeError(
                "the compressor does not know the parameters, and Horovod does not tell it their names: give "
                "named_parameters=model.named_parameters() to Compression.… as well as to hvd.DistributedOptimizer. "
                "Tensors that are no gradients (hvd.allreduce) take Compression.none or .fp16"
            )
        return self._reducer

    def _owner(self, tensor: Tensor) -> tuple[AnyReducer, str]:
        """The name of the parameter whose gradient this is."""
        reducer = self._bound()
        assert self._parameters is not None
        # Gradients mostly come in one order, so the search is mostly over before it begins.
        before = self._latest if self._submitted else None
        follower = self._followers.get(before)
        if follower is None or self._parameters[follower].grad is not tensor:
            follower = next((name for name, p in self._parameters.items() if p.grad is tensor), None)
        if follower is not None:
            self._latest = self._followers[before] = follower
            return reducer, follower
        # With sparse_as_dense=True, Horovod makes a dense copy of a sparse gradient.
        alike = [
            name for name, p in self._parameters.items() if name not in self._submitted and _is_copy(tensor, p.grad)
        ]
        if len(alike) > 1:  # gradients of zeros, say
            alike = [name for name in alike if _is_in_horovods_hands(self._parameters[name])]
        if len(alike) == 1:
            return reducer, alike[0]
        raise RuntimeError(
            f"a gradient of shape {tuple(tensor.shape)} belongs to none of the {len(self._parameters)} parameters "
            "that this compressor knows: give the same named_parameters to Compression.… and to "
            "hvd.DistributedOptimizer, and make a new compressor and optimizer after changing the model. Tensors "
            "that are no gradients (hvd.allreduce) take Compression.none or .fp16"
        )

    def _exchange(self, ticket: Tensor) -> None:
        reducer = self._bound()
        size, seen = reducer.size, ticket.tolist()
        is_average, is_sum = (all(map(_is_about, seen, t)) for t in ([1, 1 / size], [size, 1]))
        if not is_average and not is_sum:
            raise NotImplementedError(
                "a compressor works with op=hvd.Average and op=hvd.Sum only, and as long as no rank has called "
                "hvd.join(): give all ranks as many batches"
            )
        changed = [
            name
            for name, (taken, version) in self._taken.items()
            if self._gradient(name) is not taken or taken._version != version
        ]
        self._taken.clear()
        if changed or _is_within_scaler():
            which = f"the gradients of {', '.join(changed)}" if changed else "gradients"
            reducer.let_fail(
                RuntimeError(
                    f"{which} were changed between backward() and optimizer.synchronize(), when they were on their "
                    "way: call optimizer.synchronize() first, then clip or unscale them, then optimizer.step(), or "
                    "scaler.step(optimizer), within optimizer.skip_synchronize()"
                )
            )
        self._op, divisor = ("Average", size) if is_average else ("Sum", 1)
        reduced = reducer.reduce(divisor=divisor, overflow_elsewhere=self._has_overflow())
        self._reduced = reduced.sums
        if not reduced.overflow:
            with reducer.alone():
                self._keep_in_range(divisor)

    def _keep_in_range(self, divisor: float) -> None:
        """What float16 cannot hold stays in the memory. As inf it would be lost, since ranks have sent it."""
        assert self._parameters is not None
        half = {n: v for n, v in self._reduced.items() if self._parameters[n].dtype == torch.float16 and len(v)}
        if not half:
            return
        limit = torch.finfo(torch.float16).max / self._scale
        largest = [torch.linalg.vector_norm(values, math.inf) for values in half.values()]
        are_far = torch.stack([norm.to(largest[0].device) for norm in largest]) > limit
        for (name, values), is_far in zip(half.items(), are_far.tolist(), strict=True):
            if is_far:
                kept = values.clamp(-limit, limit)
                self._bound().give_back(name, values.sub_(kept).mul_(divisor))
                values.copy_(kept)

    def _gradient(self, name: str) -> Tensor | None:
        assert self._parameters is not None
        return self._parameters[name].grad

    def _is_in_its_hook(self, name: str) -> bool:
        """Whether autograd is at the gradient of this parameter, not at another's of its group, nor at none."""
        assert self._parameters is not None
        return getattr(_current_node(), "variable", None) is self._parameters[name]

    def _forget_step(self) -> None:
        """Whatever a step that was never finished has left here."""
        self._submitted.clear()
        self._taken.clear()
        self._reduced.clear()
        self._dense_finite.clear()
        self._sparse.clear()

    def _has_overflow(self) -> bool:
        """Whether a gradient that Horovod reduces itself holds inf or NaN: then the whole step is likely skipped."""
        finite, self._dense_finite = self._dense_finite, []
        parameters = (self._parameters or {}).values()
        finite += [is_finite(p.grad._values()) for p in parameters if p.grad is not None and p.grad.is_sparse]
        return bool(finite) and not bool(torch.stack([f.to(finite[0].device) for f in finite]).all())

    def _count_sparse(self) -> None:
        """Write down one sparse gradient, which Horovod gathers by itself as int64 indices and values.

        Horovod does not say which one it asks about, but it asks about each once before it changes the first.
        """
        if not self._sparse:
            gradients = ((name, p.grad) for name, p in (self._parameters or {}).items())
            self._sparse = [
                (name, g._indices().nbytes + g._values().nbytes)
                for name, g in gradients
                if g is not None and g.is_sparse
            ]
        if self._sparse:
            name, sent = self._sparse.pop()
            self.ledger.tensors[name].horovod += sent
            self.ledger.tensors[name].dense += sent  # plain Horovod sends the same


def _is_copy(dense: Tensor, gradient: Tensor | None) -> bool:
    """Whether one could be made of the other, a sparse gradient."""
    if gradient is None or not gradient.is_sparse or gradient.shape != dense.shape:
        return False
    return torch.equal(gradient.to_dense().view(torch.uint8), dense.view(torch.uint8))  # as bytes, which NaN has too


def _is_in_horovods_hands(parameter: torch.nn.Parameter) -> bool:
    """Whether it is what Horovod's optimizer calls about: a local variable there, as it hands over only a copy."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals["__name__"] != hvd_optimizer.__name__:
        frame = frame.f_back
    return frame is not None and any(value is parameter for value in frame.f_locals.values())


def _is_within_scaler() -> bool:
    """Whether ``scaler.step(optimizer)`` has called, which unscales gradients first, and of which no count tells."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not torch.amp.GradScaler.step.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals["self"].is_enabled()


def _may_have_readers(tensor: Tensor, is_in_its_hook: bool) -> bool:
    """Whether somebody else may still read this gradient's storage.

    Autograd gives one storage to both tables of ``rows[None] + columns[None]``, and goes on with it in the layers
    below. Nothing public tells; where the storage's holders can be explained, nobody else reads it.
    """
    storage = tensor.untyped_storage()
    holders = 2 + is_in_its_hook  # the tensor, the line above, and autograd, which has just made it
    return _use_count is None or _use_count(storage._cdata) > holders
