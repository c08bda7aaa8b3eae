"""Memories: nothing is lost, and nothing changes before an exchange has succeeded."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from hvd_compress.memory import NoMemory, Residual
from hvd_compress.operators import TopK


def test_what_was_put_in_is_what_was_sent_and_what_is_left() -> None:
    """With dyadic numbers of few bits every sum is exact, so the identity holds to the bit."""
    memory, operator = Residual(), TopK(k=3)
    generator = torch.Generator().manual_seed(0)
    put_in, sent = torch.zeros(50), torch.zeros(50)
    for _ in range(200):
        x = torch.randint(-64, 64, (50,), generator=generator) / 16
        compensated = memory.compensate("w", x)
        message = operator.encode(compensated)
        message.add_to(sent)
        memory.commit("w", message)
        put_in += x
        assert torch.equal(put_in, sent + memory.state_dict()["w"])


def test_error_feedback_by_hand() -> None:
    """Top-1 of (3, 2), then of (1, 1) with what was left."""
    memory, operator = Residual(), TopK(k=1)
    steps = [([3.0, 2.0], [3, 0], [0, 2]), ([1.0, 1.0], [0, 3], [1, 0]), ([0.5, -2.0], [0, -2], [Fraction(3, 2), 0])]
    for x, sent, left in steps:
        compensated = memory.compensate("w", torch.tensor(x))
        message = operator.encode(compensated)
        assert message.decode().tolist() == sent
        memory.commit("w", message)
        assert memory.state_dict()["w"].tolist() == left


def test_decay_by_hand() -> None:
    """Top-1 with decay 1/2: what waits is halved at each exchange."""
    memory, operator = Residual(decay=0.5), TopK(k=1)
    for x, sent, left in [([3.0, 2.0], [3, 0], [0, 2]), ([1.5, 0.0], [1.5, 0], [0, 1]), ([0, 0], [0, 0.5], [0, 0])]:
        compensated = memory.compensate("w", torch.tensor(x, dtype=torch.float32))
        message = operator.encode(compensated)
        assert message.decode().tolist() == sent
        memory.commit("w", message)
        assert memory.state_dict()["w"].tolist() == left
    for decay in (0.0, 1.5):
        with pytest.raises(ValueError, match="decay"):
            Residual(decay=decay)


def test_nothing_changes_without_update() -> None:
    memory, operator = Residual(), TopK(k=1)
    x = torch.tensor([3.0, 2.0])
    compensated = memory.compensate("w", x)
    memory.commit("w", operator.encode(compensated))
    before = memory.state_dict()["w"].clone()
    failed = memory.compensate("w", torch.tensor([torch.nan, 1.0]))
    operator.encode(failed)
    assert torch.equal(memory.state_dict()["w"], before)
    assert x.tolist() == [3.0, 2.0]


def test_parameters_do_not_mix() -> None:
    memory, operator = Residual(), TopK(k=1)
    for name, x in (("a", [1.0, 2.0]), ("b", [4.0, 3.0])):
        compensated = memory.compensate(name, torch.tensor(x))
        memory.commit(name, operator.encode(compensated))
    assert {n: m.tolist() for n, m in memory.state_dict().items()} == {"a": [1.0, 0.0], "b": [0.0, 3.0]}


def test_loading_copies() -> None:
    memory = Residual()
    state = {"w": torch.tensor([1.0, 2.0])}
    memory.load_state_dict(state)
    state["w"].zero_()
    assert memory.compensate("w", torch.zeros(2)).tolist() == [1.0, 2.0]


def test_no_memory_forgets_and_refuses_to_lose_one() -> None:
    memory, operator = NoMemory(), TopK(k=1)
    compensated = memory.compensate("w", torch.tensor([3.0, 2.0]))
    memory.commit("w", operator.encode(compensated))
    assert memory.compensate("w", torch.tensor([1.0, 1.0])).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="residual"):
        memory.load_state_dict({"w": torch.ones(2)})
