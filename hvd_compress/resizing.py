"""Going on with another number of ranks: what each of them takes over from those that saved.

What the model has still to receive is spread over the ranks' memories, and Qsparse-local-SGD's identity (the model
less the mean memory is where uncompressed steps would have led) holds only as long as that mean stays. So R memories
are laid side by side on a line of length 1, and each of R' new ranks takes the mean of its part of that line, 1/R'::

    m'_q = Σ_r w_qr m_r,   w_qr = R' · |[q/R', (q+1)/R') ∩ [r/R, (r+1)/R')|,   so   (1/R') Σ m'_q = (1/R) Σ m_r

With half the ranks, each takes the mean of two memories; with twice as many, two ranks take the same one. No memory
grows: each is a mean of some that were there.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import auto, hierarchical
from .async_local_sgd import ASYNC_STATE_KEY
from .ledger import Ledger
from .local_sgd import STATE_KEY
from .membership import Change
from .memory import COMMON, MASS, TOTAL

_RANDOM_KEYS = {"torch", "cuda", "numpy", "python"}


def resize(change: Change, states: Sequence[Any]) -> Any:
    """This rank's state, made from those of its predecessors: for :meth:`Checkpoints.load`.

    States of compressors and of :class:`QsparseLocalSGD` are found wherever they are in dictionaries, lists and
    tuples, and go by these rules; all else is taken from the nearest predecessor as it is, as what is the same on all
    ranks should be.

    - Memories: see above; under ``op=hvd.Sum`` their sum is kept instead of their mean. DGC's velocities go as its
      accumulated gradients. EF21 and CD-Adam keep the mean of the ranks' estimates and, of the estimate that all
      ranks share, the mean that the optimizer is given.
    - The state of an optimizer under local SGD (momentum, moments): the mean, where the ranks' differ.
    - ``exchange="auto"`` keeps its choice.
    - The ledger of each old rank goes to one new rank as a whole: the total over all ranks stays.
    - Counters, schedules and seed are the same on all ranks. A compressor's draws are functions of these and of the
      rank, so new ranks draw numbers of their own.
    - What :func:`random_state` returned: derived anew from the predecessor's and the new rank, since two ranks must
      not draw the same. The GPU's generator is left as the program has seeded it.

    Args:
        change: this rank's part.
        states: of ``change.predecessors``.

    Raises:
        ValueError: a state cannot be divided: it was saved between two exchanges of local SGD, or in the middle of an
            asynchronous run, or predecessors were at different exchanges; or a list has more states on one rank than
            on another; or memories are kept by node, with ``exchange="hierarchical"``.
    """
    first = states[change.nearest]
    rule = _rule(first)
    if rule is not None:
        return rule(change, states)
    if not _has_states(first):  # of ranks' own shape, perhaps: what each one has logged
        return first
    if isinstance(first, Mapping):
        return {key: _of_all(change, states, key) if _has_states(value) else value for key, value in first.items()}
    if any(type(state) is not type(first) or len(state) != len(first) for state in states):
        lengths = [len(state) if isinstance(state, list | tuple) else type(state).__name__ for state in states]
        raise ValueError(f"the ranks' lists of states are not of one length: {lengths}")
    make = getattr(first, "_make", type(first))  # a named tuple's
    return make(resize(change, place) for place in zip(*states, strict=True))


def _of_all(change: Change, states: Sequence[Mapping[str, Any]], key: Any) -> Any:
    lacking = [rank for rank, state in zip(change.predecessors, states, strict=True) if key not in state]
    if lacking:
        raise ValueError(f"rank(s) {lacking} saved no {key!r}, which rank {change.predecessors[change.nearest]} did")
    return resize(change, [state[key] for state in states])


def _rule(state: Any) -> Callable[[Change, Sequence[Any]], Any] | None:
    """What makes one state of several such; None if there is no rule for it as a whole."""
    if not isinstance(state, Mapping):
        return None
    if "memory" in state and "rows" in state:
        return _compressor
    if state.get("format") == auto.STATE_FORMAT:
        return _auto
    if state.get("format") == hierarchical.STATE_FORMAT:
        return _hierarchical
    if STATE_KEY in state:
        return _local_sgd
    if ASYNC_STATE_KEY in state:
        return _async_local_sgd
    if state.keys() == _RANDOM_KEYS:
        return _random_numbers
    return None


def _has_states(tree: Any) -> bool:
    if isinstance(tree, Mapping):
        return _rule(tree) is not None or any(map(_has_states, tree.values()))
    return isinstance(tree, list | tuple) and any(map(_has_states, tree))


def _compressor(change: Change, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = states[change.nearest]
    for name in ("rows", "op"):
        if any(state[name] != first[name] for state in states):
            raise ValueError(f"the ranks' states differ in {name!r}: {[state[name] for state in states]}")
    names = dict.fromkeys(name for state in states for name in state["memory"])
    return {
        **first,
        "round": _same("exchanges", [state["round"] for state in states]),
        "rank": change.rank,
        "size": change.size,
        "memory": {name: _memory(change, [state["memory"].get(name) for state in states], first) for name in names},
        "ledger": _ledger(change, [state["ledger"] for state in states]),
    }


def _auto(change: Change, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    taken = {**states[change.nearest], "ledger": _ledger(change, [state["ledger"] for state in states])}
    if taken["chosen"] is not None:
        taken["chosen"] = resize(change, [{**state["chosen"], "op": state["op"]} for state in states])
    return taken


def _hierarchical(change: Change, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    raise ValueError(
        "it was saved with exchange='hierarchical', which keeps memories by node: as many ranks on each node go on "
        "as have saved, or none of them with its compressor's state"
    )


def _memory(change: Change, memories: Sequence[Tensor | None], state: Mapping[str, Any]) -> Tensor:
    """One parameter's. A rank that has none has never been given that parameter: its memory is zero."""
    some = next(memory for memory in memories if memory is not None)
    filled = [torch.zeros_like(some) if memory is None else memory for memory in memories]
    mean, nearest = _mean(change, filled), filled[change.nearest]
    rows = zip(state["rows"], mean.view(len(state["rows"]), -1), nearest.reshape(len(state["rows"]), -1), strict=True)
    for kind, row, whole in rows:
        if kind == MASS and state["op"] == "Sum":
            row.mul_(change.before).div_(change.size)
        elif kind == TOTAL:
            torch.mul(whole, change.size, out=row).div_(change.before)
        elif kind == COMMON:
            row.copy_(whole)
    return mean


def _local_sgd(change: Change, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [state[STATE_KEY] for state in states]
    if any(o["local_steps"] for o in own):
        raise ValueError(
            "it was saved between two exchanges, when each rank's parameters had moved on their own: another number "
            "of ranks can go on only from a state that was saved after synchronize()"
        )
    first = own[change.nearest]
    taken = {
        **first,
        "steps": _same("steps", [o["steps"] for o in own]),
        "starts": {name: _mean(change, [o["starts"][name] for o in own]) for name in first["starts"]},
    }
    averages = [o["average"] for o in own]
    if "format" not in first["average"]:  # Horovod's
        ledger = _ledger(change, [average["ledger"] for average in averages])
        taken["average"] = {**first["average"], "ledger": ledger}
    else:
        taken["average"] = resize(change, averages)
    return {**_optimizer(change, states, STATE_KEY), STATE_KEY: taken}


def _async_local_sgd(change: Change, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    own = [state[ASYNC_STATE_KEY] for state in states]
    if any(o["server"] is not None for o in own):
        raise ValueError(
            "it was saved in the middle of an asynchronous run, whose servers know their ranks: another number of "
            "ranks can go on only from a state that was saved after finish()"
        )
    senders = [o["sender"] for o in own]
    latest = max(sender["round"] for sender in senders)  # ranks exchange at different times
    sender = _compressor(change, [{**sender, "round": latest} for sender in senders])
    return {**_optimizer(change, states, ASYNC_STATE_KEY), ASYNC_STATE_KEY: {**own[change.nearest], "sender": sender}}


def _optimizer(change: Change, states: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    return {name: _averaged(change, [s[name] for s in states]) for name in states[change.nearest] if name != key}


def _averaged(change: Change, values: Sequence[Any]) -> Any:
    """A tree of values, where tensors of floating point that differ are averaged.

    Of a parameter that some rank has not met yet, there is no state there (None): momentum and moments are zero.
    """
    there = [value for value in values if value is not None]
    first = values[change.nearest] if values[change.nearest] is not None or not there else there[0]
    if isinstance(first, Mapping):
        keys = dict.fromkeys(key for value in there for key in value)
        return {key: _averaged(change, [None if v is None else v.get(key) for v in values]) for key in keys}
    if isinstance(first, Tensor) and first.is_floating_point():
        absent = torch.zeros_like(first) if first.dim() else first  # steps, which are a number
        tensors = [absent if value is None else value for value in values]
        differ = any(t.shape == first.shape and not torch.equal(t, first) for t in tensors)
        return _mean(change, tensors) if differ else first
    return first


def _mean(change: Change, tensors: Sequence[Tensor]) -> Tensor:
    """Weighted; a copy. Whole weights first, so that nothing is rounded where the result has no need to be."""
    if len(tensors) == 1:
        return tensors[0].clone()
    dtype = tensors[0].dtype
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(dtype, torch.float32))  # a sum may leave float16
    for weight, tensor in zip(change.weights, tensors, strict=True):
        total.add_(tensor, alpha=weight)
    return total.div_(change.before).to(dtype)


def _ledger(change: Change, states: Sequence[dict]) -> dict[str, object]:
    """The sum of those of the old ranks that begin within this rank's part of the line."""
    ledger, total = Ledger(), Ledger()
    for old, state in zip(change.predecessors, states, strict=True):
        ledger.load_state_dict(state)
        exchanges = ledger.exchanges
        if old * change.size // change.before == change.rank:
            total.take(ledger)
        total.exchanges = exchanges
    return total.state_dict()


def _random_numbers(change: Change, states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    key = states[change.nearest]["torch"].cpu().numpy().tobytes() + f"{change.rank} of {change.size}".encode()
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
    kind, keys, *rest = np.random.RandomState(seed % 2**32).get_state(legacy=True)
    return {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "cuda": None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "python": random.Random(seed).getstate(),
    }


def _same(what: str, numbers: Sequence[int]) -> int:
    if len({*numbers}) > 1:
        raise ValueError(f"the ranks' states were saved after different numbers of {what}: {sorted({*numbers})}")
    return numbers[0]
