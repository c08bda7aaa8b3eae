"""The ``world`` fixture: ``@pytest.mark.ranks(2, 3)`` runs a test once for each number of MPI ranks."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from lab import missing as missing_lab
from sandbox import missing
from world import World

# A busy machine is no failure.
hypothesis.settings.register_profile("no-deadline", parent=hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("no-deadline")
hypothesis.settings.register_profile("fuzz", parent=hypothesis.settings(), max_examples=200_000)


class _Worlds:
    """At most one world at a time: idle Horovod ranks still talk to each other and would slow the others."""

    def __init__(self) -> None:
        self._world: World | None = None

    def of(self, ranks: int) -> World:
        if self._world is None or not self._world.usable or self._world.ranks != ranks:
            self.close()
            self._world = World(ranks)
        return self._world

    def close(self) -> None:
        if self._world is not None and self._world.usable:
            self._world.close()
        self._world = None


@pytest.fixture(scope="session")
def worlds() -> Iterator[_Worlds]:
    worlds = _Worlds()
    yield worlds
    worlds.close()


@pytest.fixture
def world(worlds: _Worlds, ranks: int) -> World:
    return worlds.of(ranks)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "world" in metafunc.fixturenames:
        marker = metafunc.definition.get_closest_marker("ranks")
        metafunc.parametrize("ranks", marker.args if marker else (2,), ids=lambda n: f"{n} ranks")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-slurm", action="store_true", help="fail where the tests on Slurm would be skipped")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests without ranks first, then world by world, so that each is started once."""

    def ranks(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        return callspec.params.get("ranks", 0) if callspec else 0

    items.sort(key=ranks)
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)
    in_lab = [item for item in items if item.get_closest_marker("lab")]
    if in_lab and (reason := missing_lab()):
        for item in in_lab:
            item.add_marker(pytest.mark.skip(reason=reason))
    on_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if on_slurm and (reason := missing()):
        if config.getoption("--require-slurm"):
            raise pytest.UsageError(f"--require-slurm: {reason}")
        for item in on_slurm:
            item.add_marker(pytest.mark.skip(reason=reason))
