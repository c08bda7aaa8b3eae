"""Truncated quantization: levels, cuts and errors against closed forms, and against numbers computed elsewhere."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from hvd_compress.operators import TBQSGD, TNQSGD, TQSGD
from hvd_compress.operators.gradient_models import Laplace, PowerLaw, fit_laplace, fit_power_law

ALL = [TQSGD, TNQSGD, TBQSGD]


def integral(f: Any, low: float, high: float, steps: int = 200_000) -> float:
    """Midpoint rule."""
    g = low + (torch.arange(steps, dtype=torch.float64) + 0.5) * ((high - low) / steps)
    return float(f(g).sum()) * (high - low) / steps


# Models


def density(model: Laplace | PowerLaw, g: torch.Tensor) -> torch.Tensor:
    if isinstance(model, Laplace):
        return torch.exp(-g.abs() / model.scale) / (2 * model.scale)
    body = torch.full_like(g, (1 - 2 * model.rho) / (2 * model.g_min))
    tail = model.rho * (model.tail - 1) * model.g_min ** (model.tail - 1) * g.abs() ** -model.tail
    return torch.where(g.abs() <= model.g_min, body, tail)


@pytest.mark.parametrize("model", [Laplace(0.3), PowerLaw(3.5, 0.1, 1.0), PowerLaw(5.0, 0.05, 0.02)])
def test_model_integrals(model: Any) -> None:
    unit = model.scale if isinstance(model, Laplace) else model.g_min
    for alpha in (0.5 * unit, unit, 4 * unit):
        assert model.mass(alpha) == pytest.approx(integral(lambda g: density(model, g), -alpha, alpha), rel=1e-4)
        root = integral(lambda g: density(model, g) ** (1 / 3), 0, alpha)
        assert model.cube_root_mass(alpha) == pytest.approx(root, rel=1e-4)
        assert model.cube_root_quantile(model.cube_root_mass(alpha)) == pytest.approx(alpha, rel=1e-9)
    cut = 4 * unit  # a heavy tail's integral needs logarithmic steps: g = cut · e^t

    def lost(t: torch.Tensor) -> torch.Tensor:
        g = cut * t.exp()
        return 2 * (g - cut) ** 2 * density(model, g) * g

    assert model.lost(cut) == pytest.approx(integral(lost, 0, 50), rel=1e-4)


def test_estimators() -> None:
    """Rule: within five standard errors: γ/√n for the Laplace scale, (γ − 1)/√m for the tail index of m samples."""
    n = 200_000
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    laplace = -0.7 * torch.log(1 - u) * sign
    assert float(fit_laplace(laplace)) == pytest.approx(0.7, abs=5 * 0.7 / math.sqrt(n))
    power = (1 - u) ** (-1 / 3) * sign  # a pure tail with index 4
    fitted = fit_power_law(power)
    assert fitted is not None
    assert fitted.tail == pytest.approx(4.0, abs=5 * 3 / math.sqrt(0.1 * n))
    assert fitted.rho == pytest.approx(0.05, rel=1e-3)
    assert fitted.g_min == pytest.approx(0.1 ** (-1 / 3), rel=0.02)


@pytest.mark.parametrize("x", [torch.zeros(100), torch.ones(100), torch.ones(5), torch.full((50,), math.nan)])
def test_no_tail_to_fit(x: torch.Tensor) -> None:
    assert fit_power_law(x) is None


# Laplace: closed forms of arXiv 2402.01160


@pytest.mark.parametrize(
    ("s", "alpha", "error"),
    [
        (1, 0.722162, 1.235785),
        (3, 1.790729, 0.606123),
        (7, 3.199464, 0.236968),
        (15, 4.877400, 0.077424),
        (31, 6.733956, 0.022457),
        (255, 12.762674, 0.000404),
    ],
)
def test_tnqsgd_cut_and_error(s: int, alpha: float, error: float) -> None:
    table = TNQSGD(levels=s).table(Laplace())
    assert table[-1] == pytest.approx(alpha, abs=1e-6)
    assert table[-1] == pytest.approx(3 * math.log(1 + math.sqrt(6) * s / 9), rel=1e-12)
    # The published error is that of a continuous density of levels; the s + 1 levels themselves come close to it.
    assert 27 / (s + 3 * math.sqrt(6) / 2) ** 2 == pytest.approx(error, abs=1e-6)
    assert TNQSGD(levels=s).error(Laplace()) == pytest.approx(error, rel=0.02)


def test_tnqsgd_is_a_little_above_the_error_of_a_density() -> None:
    for c, most in ((1 / 4, 1.02), (1 / 6, 1.03)):
        for s in range(1, 64):
            density = 108 * c / (s + math.sqrt(54 * c)) ** 2
            assert 1 < TNQSGD(levels=s, constant=c).error(Laplace()) / density < most


@pytest.mark.parametrize(
    ("s", "half"),
    [
        (3, [0.48695655, 1.79072907]),
        (7, [0.29510019, 0.98989288, 1.89569152, 3.19946404]),
        (15, [0.165111, 0.525379, 0.934894, 1.409282, 1.973036, 2.667829, 3.573627, 4.877400]),
    ],
)
def test_tnqsgd_levels(s: int, half: list[float]) -> None:
    table = TNQSGD(levels=s).table(Laplace())
    assert table == pytest.approx([-v for v in reversed(half)] + half, abs=1e-6)
    assert TNQSGD(levels=s).table(Laplace(0.01)) == pytest.approx([0.01 * v for v in table], rel=1e-12)


@pytest.mark.parametrize(
    ("s", "alpha"), [(1, 0.863046), (3, 2.079442), (7, 3.611918), (15, 5.375278), (255, 13.363042)]
)
def test_tnqsgd_with_the_average_instead_of_the_worst_case(s: int, alpha: float) -> None:
    assert TNQSGD(levels=s, constant=1 / 6).table(Laplace())[-1] == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize(
    ("operator", "error"),
    [
        (TNQSGD(levels=3), 0.521624),
        (TNQSGD(levels=7), 0.186731),
        (TNQSGD(levels=15), 0.056989),
        (TNQSGD(levels=3, constant=1 / 6), 0.510641),
        (TNQSGD(levels=7, constant=1 / 6), 0.182325),
    ],
)
def test_exact_error_of_the_levels(operator: Any, error: float) -> None:
    """``∫ (g − l_{k−1})(l_k − g) p`` over the steps, and what the cut loses."""
    table = operator.table(Laplace())
    exact = Laplace().lost(table[-1])
    for low, high in itertools.pairwise(table):
        exact += integral(lambda g, a=low, b=high: (g - a) * (b - g) * density(Laplace(), g), low, high, 20_000)
    assert exact == pytest.approx(error, abs=2e-6)


def test_measured_error_of_laplace_samples() -> None:
    """Rule: the mean squared error of 10^6 samples within five standard errors of the exact one, 0.056989 γ²."""
    generator = torch.Generator().manual_seed(0)
    n = 1_000_000
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    x = -torch.log(1 - u) * torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    squares = (TNQSGD(bits=4)(x, generator=generator) - x).square()
    assert float(squares.mean()) == pytest.approx(0.056989, abs=5 * float(squares.std()) / n**0.5)


# Power law: arXiv 2402.01798


@pytest.mark.parametrize(
    ("tail", "bits", "alpha", "error"),
    [
        (3.5, 2, 1.144066, 0.623280),
        (3.5, 3, 2.144332, 0.455263),
        (3.5, 4, 3.908434, 0.337215),
        (4.0, 2, 1.032280, 0.290619),
        (4.0, 3, 1.721301, 0.174287),
        (4.0, 4, 2.831448, 0.105953),
        (5.0, 3, 1.364514, 0.071611),
        (5.0, 4, 1.974517, 0.034199),
    ],
)
def test_uniform_levels_for_a_power_law(tail: float, bits: int, alpha: float, error: float) -> None:
    model = PowerLaw(tail, 0.1, 1.0)
    operator = TQSGD(bits=bits, model="power")
    assert operator.table(model)[-1] == pytest.approx(alpha, abs=1e-6)
    assert operator.error(model) == pytest.approx(error, abs=1e-6)
    q = model.mass(alpha)
    closed = (tail - 1) * q ** ((tail - 3) / (tail - 1)) * 0.2 ** (2 / (tail - 1)) / (tail - 3)
    closed /= (tail - 2) ** (2 / (tail - 1)) * (2**bits - 1) ** ((6 - 2 * tail) / (1 - tail))
    assert operator.error(model) == pytest.approx(closed, rel=1e-5)


def test_a_cut_is_never_inside_the_body_nor_beyond_the_largest_element() -> None:
    assert TQSGD(bits=2, model="power").table(PowerLaw(5.0, 0.1, 1.0))[-1] == 1.0
    kinds: list[Any] = ALL
    for kind in kinds:
        beyond = kind(bits=8, model="power").table(PowerLaw(3.5, 0.1, 1.0))[-1]
        assert kind(bits=8, model="power").table(PowerLaw(3.5, 0.1, 1.0, largest=beyond / 2))[-1] == pytest.approx(
            beyond / 2
        )
        assert kind(bits=8, model="power").table(PowerLaw(3.5, 0.1, 1.0, largest=beyond * 2))[-1] == pytest.approx(
            beyond
        )


@pytest.mark.parametrize(("s", "most"), [(1, 4.044), (2, 1.805), (3, 1.294), (6, 1.005), (7, 1.002), (15, 1.0001)])
def test_what_a_cut_outside_the_body_costs(s: int, most: float) -> None:
    """The error of even levels, relative to that with the best cut: the most for tails from 3.05 to 5."""

    def error(model: PowerLaw, alpha: float) -> float:
        step, inside, k = 2 * alpha / s, model.mass(alpha), model.tail - 1
        if alpha >= 1:
            return step**2 / 4 * inside + model.lost(alpha)
        body = (1 - 2 * model.rho) * (1 - alpha) ** 3 / 3
        return step**2 / 4 * inside + body + 2 * model.rho * (k / (k - 2) - 2 * alpha * k / (k - 1) + alpha**2)

    ratios = []
    for tail in (3.05, 3.5, 4.0, 4.5, 5.0):
        model = PowerLaw(tail, 0.05, 1.0)
        least = min(error(model, 0.3 * 1.003**i) for i in range(1500))
        operator = TQSGD(levels=s, model="power")
        assert error(model, operator.table(model)[-1]) == pytest.approx(operator.error(model))
        ratios.append(operator.error(model) / least)
    assert 1 + 0.7 * (most - 1) < max(ratios) <= most


def heavy_tailed(generator: torch.Generator, n: int = 50_000) -> dict[str, torch.Tensor]:
    u, body, part = (torch.rand(n, generator=generator, dtype=torch.float64) for _ in range(3))
    sign = torch.where(torch.rand(n, generator=generator) < 0.5, -1.0, 1.0)
    powers = {f"power law {t}": sign * torch.where(part < 0.1, u ** (1 / (1 - t)), body) for t in (3.25, 4.0, 5.0)}
    return {"normal": torch.randn(n, generator=generator), "Laplace": -u.log() * sign, **powers}


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("s", [1, 2])
def test_laplace_is_the_model_for_one_bit(kind: Any, s: int) -> None:
    """And for two with a level at zero. With a power law one bit is worse than nothing, even for a power law."""
    for name, x in heavy_tailed(torch.Generator().manual_seed(0)).items():
        laplace, power = (
            float((kind(levels=s, model=model)(x, generator=torch.Generator().manual_seed(1)) - x).square().sum())
            for model in ("laplace", "power")
        )
        assert laplace < power, name
        assert s > 1 or laplace < x.square().sum() < power, name


def test_either_model_serves_two_bits() -> None:
    kinds: list[Any] = ALL
    for x in heavy_tailed(torch.Generator().manual_seed(0)).values():
        for kind in kinds:
            laplace, power = (
                float((kind(bits=2, model=model)(x, generator=torch.Generator().manual_seed(1)) - x).square().sum())
                for model in ("laplace", "power")
            )
            assert 1 / 1.2 < laplace / power < 1.2


@pytest.mark.parametrize("s", [3, 7, 31, 255, 4095])
@pytest.mark.parametrize("tail", [3.05, 3.5, 5.0])
def test_cuts_fulfil_the_condition_for_a_power_law(tail: float, s: int) -> None:
    """The fixed point itself, which is far beyond what a few repetitions reach where tails are heavy."""
    model, c = PowerLaw(tail, 0.05, 0.3), 1 / 4
    kinds: list[Any] = [TQSGD, TNQSGD]
    for kind in kinds:
        alpha = kind(levels=s, model="power").table(model)[-1]
        q = model.mass(alpha) if kind is TQSGD else (2 * model.cube_root_mass(alpha)) ** 3 / (4 * alpha**2)
        right = model.g_min * (model.rho * s**2 / (2 * c * (tail - 2) * q)) ** (1 / (tail - 1))
        assert alpha == pytest.approx(max(right, model.g_min), rel=1e-9)


def test_more_bits_for_heavy_tails_leave_less_error() -> None:
    """All levels lie within the data, whose largest of 200,000 are a hundred times as large as their body."""
    generator = torch.Generator().manual_seed(0)
    x = (1 - torch.rand(200_000, generator=generator)) ** -0.5
    kinds: list[Any] = ALL
    for kind in kinds:
        errors = [
            float((kind(bits=bits, model="power")(x, generator=generator) - x).square().sum())
            for bits in range(3, 11)
        ]
        assert all(more < 0.9 * less for less, more in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("model", [Laplace(), PowerLaw(3.5, 0.1, 1.0), PowerLaw(4.5, 0.1, 1.0)])
def test_non_uniform_and_bi_scaled_are_not_worse_than_uniform(bits: int, model: Any) -> None:
    name: Any = "laplace" if isinstance(model, Laplace) else "power"
    kinds: list[Any] = ALL
    uniform, non_uniform, bi_scaled = (kind(bits=bits, model=name).error(model) for kind in kinds)
    assert non_uniform <= uniform * 1.001
    assert bi_scaled <= uniform * 1.001
    if bits >= 3:
        assert non_uniform < uniform
        assert bi_scaled < uniform


# All three


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("steps", [*range(1, 20), 254, 255])
@pytest.mark.parametrize("model", [Laplace(2.0), PowerLaw(4.0, 0.08, 0.5)])
def test_tables_are_ascending_symmetric_and_of_their_size(kind: Any, steps: int, model: Any) -> None:
    name = "laplace" if isinstance(model, Laplace) else "power"
    table = kind(levels=steps, model=name).table(model)
    assert len(table) == steps + 1
    assert all(a < b for a, b in itertools.pairwise(table))
    assert table == pytest.approx([-v for v in reversed(table)], abs=1e-12)
    assert (0.0 in [round(v, 12) for v in table]) == (steps % 2 == 0)


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("model", ["laplace", "power"])
def test_unbiased_inside_the_cut(kind: Any, model: Any) -> None:
    """Each element's mean over 4,000 draws is within five standard errors of the element, cut at ±α."""
    x = torch.randn(60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    operator = kind(bits=3, model=model)
    generator, draws = torch.Generator().manual_seed(1), 4000
    total, table = torch.zeros_like(x), operator.encode(x, generator=generator).values
    for _ in range(draws):
        total += operator(x, generator=generator)
    levels = operator._fitted(x)
    cut = x.clamp(levels[0], levels[-1])
    above = torch.searchsorted(levels, cut).clamp(1, len(levels) - 1)
    variance = (cut - levels[above - 1]) * (levels[above] - cut)
    assert table.bits == 3
    assert bool(((total / draws - cut).abs() <= 5 * (variance / draws).sqrt() + 1e-12).all())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("scale", [2.0**-900, 2.0**-260, 2.0**260, 2.0**900])
def test_a_power_law_in_any_unit(kind: Any, bits: int, scale: float) -> None:
    """Powers of the elements leave a float64's range. A power of two as unit changes no bit."""
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    received, scaled = (
        kind(bits=bits, model="power")(unit * x, generator=torch.Generator().manual_seed(1)) for unit in (1.0, scale)
    )
    assert torch.allclose(scaled / scale, received, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_zero_level_keeps_zeros(kind: Any) -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    x[::3] = 0
    operator = kind(bits=3, zero=True)
    assert operator.s == 6
    assert not operator(x, generator=torch.Generator().manual_seed(1))[::3].any()


@pytest.mark.parametrize("kind", ALL)
def test_bad_arguments(kind: Any) -> None:
    for arguments in (
        {},
        {"bits": 0},
        {"bits": 2, "model": "normal"},
        {"bits": 2, "constant": 0.3},
        {"levels": 5000},
    ):
        with pytest.raises(ValueError, match=r"must be|give|possible"):
            kind(**arguments)
