"""Another number of ranks goes on: nothing that was not sent yet is lost, or counted twice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import horovod.torch as hvd
import pytest
import torch
from models import Vectors, through_a_file
from torch import Tensor
from world import World

from hvd_compress import AsyncQsparseLocalSGD, Checkpoints, Compression, Ledger, QsparseLocalSGD, random_state, resize
from hvd_compress.membership import Change

SHAPES = {"wide": (6, 10), "long": (200,)}
UNIT = 72  # divides by all numbers of ranks here as often as they change, so that nothing is rounded


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return {name: UNIT * torch.randint(-8, 9, shape, generator=generator).float() for name, shape in SHAPES.items()}


def mean_gradient(name: str, ranks: int, step: int) -> Tensor:
    return torch.stack([gradients(rank, step)[name] for rank in range(ranks)]).sum(0) / ranks


# The rule


@pytest.mark.parametrize("before", range(1, 8))
@pytest.mark.parametrize("size", range(1, 8))
def test_each_new_rank_takes_a_mean_and_each_old_one_is_taken_whole(before: int, size: int) -> None:
    taken: dict[int, Fraction] = dict.fromkeys(range(before), Fraction(0))
    for rank in range(size):
        change = Change.of(rank, size, before)
        assert sum(change.weights) == before
        assert all(weight > 0 for weight in change.weights)
        for old, weight in zip(change.predecessors, change.weights, strict=True):
            taken[old] += Fraction(weight, before) / size
        if before == size:
            assert change.predecessors == (rank,)
    assert set(taken.values()) == {Fraction(1, before)}


def state(rank: int, size: int, rows: list[str], memory: Mapping[str, Tensor], op: str = "Average") -> dict[str, Any]:
    traffic = {"mpi": 10**rank, "horovod": 2 * 10**rank, "dense": 3 * 10**rank}
    ledger = {"tensors": {"w": traffic}, "shared": traffic, "exchanges": 5}
    own = {"format": 2, "round": 5, "seed": 0, "rank": rank, "size": size, "schedule": {}, "ledger": ledger}
    return {**own, "memory": memory, "rows": rows, "op": op}


def resized(states: list[Any], size: int) -> list[Any]:
    changes = [Change.of(rank, size, len(states)) for rank in range(size)]
    return [resize(change, [states[old] for old in change.predecessors]) for change in changes]


@pytest.mark.parametrize(("before", "size"), [(4, 2), (2, 4), (1, 3), (3, 1), (2, 3), (3, 2), (6, 4)])
class TestMemories:
    def test_mean_is_kept(self, before: int, size: int) -> None:
        memories = [UNIT * torch.randint(-9, 10, (50,)).float() for _ in range(before)]
        states = [state(rank, before, ["mass"], {"w": m}) for rank, m in enumerate(memories)]
        after = resized(states, size)
        total = torch.stack([a["memory"]["w"] for a in after]).sum(0)
        assert torch.equal(total / size, torch.stack(memories).sum(0) / before)
        assert [(a["rank"], a["size"], a["round"]) for a in after] == [(rank, size, 5) for rank in range(size)]
        largest = torch.stack(memories).abs().max(0).values
        assert all(bool((a["memory"]["w"].abs() <= largest).all()) for a in after)

    def test_under_sum_the_sum_is_kept(self, before: int, size: int) -> None:
        memories = [UNIT * torch.randint(-9, 10, (2, 50)).float() for _ in range(before)]
        states = [state(rank, before, ["mass", "mass"], {"w": m}, "Sum") for rank, m in enumerate(memories)]
        total = torch.stack([a["memory"]["w"] for a in resized(states, size)]).sum(0)
        assert torch.equal(total, torch.stack(memories).sum(0))

    @pytest.mark.parametrize("op", ["Average", "Sum"])
    def test_estimates(self, before: int, size: int, op: str) -> None:
        """The shared estimate is still the sum of the ranks' own, and its mean what the optimizer has been given."""
        own = [UNIT * torch.randint(-9, 10, (50,)).float() for _ in range(before)]
        total, common = torch.stack(own).sum(0), torch.randn(50)
        rows = ["estimate", "total", "estimate", "common"]
        states = [
            state(rank, before, rows, {"w": torch.stack([g, total, g, common])}, op) for rank, g in enumerate(own)
        ]
        after = [a["memory"]["w"] for a in resized(states, size)]
        for memory in after:
            assert torch.equal(memory[1], torch.stack([a[0] for a in after]).sum(0))
            assert torch.equal(memory[1] / size, total / before)
            assert torch.equal(memory[0], memory[2])
            assert torch.equal(memory[3], common)

    def test_a_rank_without_a_memory_has_zeros(self, before: int, size: int) -> None:
        states = [state(rank, before, ["mass"], {"w": torch.ones(3)} if rank == 0 else {}) for rank in range(before)]
        total = torch.stack([a["memory"].get("w", torch.zeros(3)) for a in resized(states, size)]).double().mean(0)
        torch.testing.assert_close(total, torch.full((3,), 1 / before, dtype=torch.float64))

    def test_bytes_are_counted_once(self, before: int, size: int) -> None:
        after = resized([state(rank, before, ["mass"], {}) for rank in range(before)], size)
        counted = [a["ledger"]["tensors"].get("w", {}).get("mpi", 0) for a in after]
        assert sum(counted) == int("1" * before)
        assert {a["ledger"]["exchanges"] for a in after} == {5}


def test_ranks_draw_numbers_of_their_own() -> None:
    before = {"random": random_state(), "progress": {"epoch": 3}}
    after = resized([before, before], 4)
    assert {a["progress"]["epoch"] for a in after} == {3}
    draws = [through_a_file(a)["random"]["torch"].numpy().tobytes() for a in after]
    assert len({*draws}) == 4


class Models(NamedTuple):
    generator: Any
    critic: Any


def memory_of(rank: int, value: float) -> dict[str, Any]:
    return state(rank, 2, ["mass"], {"w": torch.full((3,), value)})


@pytest.mark.parametrize("kind", [list, tuple, lambda models: Models(*models), lambda models: [[*models]]])
def test_states_in_lists(kind: Callable[[Any], Any]) -> None:
    """Two models, each with a compressor: those of a GAN."""
    before = [kind([memory_of(rank, 1.0 * rank), memory_of(rank, 10.0 * rank)]) for rank in range(2)]
    (after,) = resized(before, 1)
    assert type(after) is type(before[0])
    generator, critic = after[0] if len(after) == 1 else after
    assert generator["memory"]["w"].tolist() == [0.5] * 3
    assert critic["memory"]["w"].tolist() == [5.0] * 3
    assert (critic["rank"], critic["size"]) == (0, 1)


def test_ranks_draw_numbers_of_their_own_from_a_state_in_a_list() -> None:
    before = [random_state()]
    draws = [a[0]["torch"].numpy().tobytes() for a in resized([before, before], 4)]
    assert len({*draws, before[0]["torch"].numpy().tobytes()}) == 5


def test_lists_that_cannot_be_put_together() -> None:
    one, two = [memory_of(0, 1.0)], [memory_of(1, 1.0), memory_of(1, 2.0)]
    for other, lengths in ((two, r"\[1, 2\]"), (None, r"\[1, 'NoneType'\]")):
        with pytest.raises(ValueError, match=f"lists of states are not of one length: {lengths}"):
            resized([{"compressors": one}, {"compressors": other}], 1)


def test_what_one_rank_alone_has_saved() -> None:
    """A log, of the first rank; a compressor's state must be everywhere."""
    before: list[dict[str, Any]] = [{"model": memory_of(0, 1.0), "log": [1.0, 2.0]}, {"model": memory_of(1, 3.0)}]
    (after,) = resized(before, 1)
    assert after["log"] == [1.0, 2.0]
    assert after["model"]["memory"]["w"].tolist() == [2.0] * 3
    with pytest.raises(ValueError, match=r"rank\(s\) \[1\] saved no 'critic', which rank 0 did"):
        resized([{**before[0], "critic": memory_of(0, 1.0)}, before[1]], 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mean_of_narrow_numbers_is_rounded_once(dtype: torch.dtype) -> None:
    """Their sum is beyond float16, and 64 roundings would make 1528 of 1507.6 in bfloat16."""
    moments = [torch.tensor([1500.0 + n % 16]).to(dtype) for n in range(64)]
    own = {"local_steps": 0, "steps": 8, "starts": {}, "average": {"ledger": Ledger().state_dict()}}
    (after,) = resized([{"state": {0: {"momentum_buffer": m}}, "qsparse_local_sgd": own} for m in moments], 1)
    expected = torch.stack(moments).double().mean(0).to(dtype)
    assert torch.equal(after["state"][0]["momentum_buffer"], expected)


def test_lists_without_states_are_the_nearest_ranks() -> None:
    plain = [[{"losses": [1.0, 2.0], "best": (1, torch.ones(2))}], [{"losses": [3.0]}, {"epoch": 2}]]
    for rank, after in enumerate(resized(plain, 2)):
        assert after is plain[rank]
    assert resized(plain, 1)[0] is plain[Change.of(0, 1, 2).nearest]


@pytest.mark.parametrize("has_none", [0, 1])
def test_momentum_that_a_rank_has_none_of_is_zero(has_none: int) -> None:
    """It has not met the parameter yet; the number of its steps is what the others say."""
    states: list[dict[str, Any]] = []
    for rank in range(2):
        state = {0: {"exp_avg": torch.full((3,), 4.0), "step": torch.tensor(6.0)}, 1: {"exp_avg": torch.ones(2)}}
        if rank == has_none:
            del state[0]
        average = {"ledger": Ledger().state_dict()}
        own = {"local_steps": 0, "steps": 8, "starts": {}, "average": average}
        states.append({"state": state, "param_groups": [{"params": [0, 1]}], "qsparse_local_sgd": own})
    (after,) = resized(states, 1)
    assert after["state"][0]["exp_avg"].tolist() == [2.0] * 3
    assert after["state"][0]["step"] == 6
    assert after["state"][1]["exp_avg"].tolist() == [1.0] * 2


# Whole optimizers


def memories(parts: Mapping[str, Any]) -> dict[str, Tensor]:
    found = parts["qsparse_local_sgd"]["average"] if "qsparse_local_sgd" in parts else parts
    return found["memory"]


def local_sgd(model: torch.nn.Module, group: Any, memory: str) -> tuple[Any, Any]:
    # The momentum is that of a rank, and makes the local steps differ from the gradients, so here there is none.
    optimizer = QsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=7, dense_below=0, memory=memory, process_set=group),
        sync_every=2,
    )
    return optimizer, optimizer


def gradient_path(model: torch.nn.Module, group: Any, memory: str) -> tuple[Any, Any]:
    compression = Compression.topk(
        k=7, dense_below=0, memory=memory, process_set=group, named_parameters=model.named_parameters()
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=compression,
        process_set=group or hvd.global_process_set,
    )
    return optimizer, compression


PATHS: dict[str, Callable[..., tuple[Any, Any]]] = {"local": local_sgd, "gradient": gradient_path}


def three_two_three(path: str) -> None:
    """x_T − (1/R) Σ m_T = x_0 − Σ_t (mean gradient of those who took part in step t), through two changes."""
    pair = hvd.add_process_set([0, 1])
    everyone = hvd.global_process_set
    expected = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    saved: list[Any] = []
    weights: dict[str, Any] = {}
    try:
        for first, group, ranks in ((0, everyone, 3), (4, pair, 2), (8, everyone, 3)):
            own = None
            if hvd.rank() < ranks:
                model = Vectors(SHAPES)
                optimizer, stateful = PATHS[path](model, group, "residual")
                if saved:
                    change = Change.of(hvd.rank(), ranks, len(saved))
                    model.load_state_dict(weights)
                    stateful.load_state_dict(resize(change, [saved[old] for old in change.predecessors]))
                for step in range(first, first + 4):
                    optimizer.zero_grad()
                    model(gradients(hvd.rank(), step)).backward()
                    optimizer.step()
                own = through_a_file((stateful.state_dict(), model.state_dict()))
            gathered = [each for each in hvd.allgather_object(own, name="states") if each is not None]
            saved, weights = [each[0] for each in gathered], gathered[0][1]
            for name in SHAPES:
                for step in range(first, first + 4):
                    expected[name] -= mean_gradient(name, ranks, step)
                mean_memory = torch.stack([memories(s)[name] for s in saved]).sum(0).view(SHAPES[name]) / ranks
                assert mean_memory.abs().sum() > 0
                assert all(torch.equal(each[1][name], weights[name]) for each in gathered)
                assert torch.equal(weights[name] - mean_memory, expected[name])
    finally:
        hvd.remove_process_set(pair)


@pytest.mark.ranks(3)
@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_lost_when_a_rank_goes_and_comes(world: World, path: str) -> None:
    world.run(three_two_three, path)


def through_checkpoints(directory: str, first: int) -> dict[str, Tensor]:
    """Four steps and a checkpoint, from another world's if there is one. Returns x less the mean memory."""
    model = Vectors(SHAPES)
    optimizer, _ = local_sgd(model, None, "residual")
    checkpoints = Checkpoints(directory)
    saved = checkpoints.load(resize=resize)
    assert (saved is None) == (first == 0)
    if saved is not None:
        assert saved.ranks != hvd.size()
        model.load_state_dict(saved.state["model"])
        optimizer.load_state_dict(saved.state["optimizer"])
    for step in range(first, first + 4):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.step()
    checkpoints.save(first + 4, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    own = memories(optimizer.state_dict())
    mean = {name: hvd.allreduce(own[name], name=f"memory.{name}", op=hvd.Sum) / hvd.size() for name in SHAPES}
    return {name: p.detach() - mean[name].view_as(p) for name, p in model.named_parameters()}


@pytest.mark.ranks(3)
def test_checkpoints_of_another_number_of_ranks(world: World, tmp_path: Path) -> None:
    """Three ranks save, one goes on, then three again; the one is this process."""
    hvd.init()
    moved = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for first, ranks in ((0, 3), (4, 1), (8, 3)):
        if ranks == 1:
            results = [through_checkpoints(str(tmp_path), first)]
        else:
            results = world.run(through_checkpoints, str(tmp_path), first)
        for name in SHAPES:
            for step in range(first, first + 4):
                moved[name] -= mean_gradient(name, ranks, step)
            assert all(torch.equal(result[name], moved[name]) for result in results)


def in_mid_round() -> dict[str, Any]:
    model = Vectors(SHAPES)
    optimizer, _ = local_sgd(model, None, "residual")
    for step in range(3):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.step()
    return optimizer.state_dict()


def asynchronous(finished: bool) -> dict[str, Any]:
    model = Vectors(SHAPES)
    optimizer = AsyncQsparseLocalSGD(
        torch.optim.SGD(model.parameters(), lr=1.0),
        named_parameters=model.named_parameters(),
        compression=Compression.topk(k=7, dense_below=0),
    )
    for step in range(3 + hvd.rank()):
        optimizer.zero_grad()
        model(gradients(hvd.rank(), step)).backward()
        optimizer.step()
    if finished:
        optimizer.finish()
        return optimizer.state_dict()
    state = optimizer.state_dict()
    optimizer.finish()
    return state


@pytest.mark.ranks(3)
class TestRefused:
    def test_in_mid_round(self, world: World) -> None:
        with pytest.raises(ValueError, match=r"after synchronize\(\)"):
            resized(world.run(in_mid_round), 2)

    def test_an_asynchronous_run_that_goes_on(self, world: World) -> None:
        with pytest.raises(ValueError, match=r"after finish\(\)"):
            resized(world.run(asynchronous, False), 2)
        states = world.run(asynchronous, True)
        before = [s["async_qsparse_local_sgd"]["sender"]["memory"]["long"] for s in states]
        after = [s["async_qsparse_local_sgd"]["sender"]["memory"]["long"] for s in resized(states, 2)]
        assert torch.equal(torch.stack(after).sum(0) / 2, torch.stack(before).sum(0) / 3)
