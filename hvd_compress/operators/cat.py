"""CAT: top-k with as many elements as give the most for their bits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_numbers
from ..kernels import as_divisor
from ..wire import Floats, Message
from .base import Operator, flatten


@dataclass(frozen=True)
class CAT(Operator):
    """Top-k with the k, chosen for each tensor, that sends the largest part of its energy per bit.

    ``k = argmax (‖Top_k(x)‖² / ‖x‖²) / C(k)``, the smallest k among equals, with the cost of packets,
    ``C(k) = c₀ + P ⌈k (32 + log₂ d) / P⌉`` bits. Communication-aware adaptive tuning, Khirirat et al.
    (arXiv 2003.06377). The search is exact: squares are sorted and added up in float64. Elements that are not finite
    count as one unit of energy each, and all others as none. A tensor of zeros has k = 1.

    The larger c₀, the more is sent at once; with c₀ = 0 hardly ever more than one packet. Both defaults are choices
    of this library, not the paper's.

    Args:
        overhead: c₀, bits that a message costs however short it is: latency times bandwidth. 20 µs at 1 Gbit/s is
            20,000.
        packet: P, bits that travel together; 12,000 is an Ethernet frame. 1 for no packets: C is then c₀ and k
            elements' bits, rounded up.

    Raises:
        ValueError: ``overhead`` is negative or not finite, or ``packet`` not a positive number of bits.
        TypeError: ``overhead`` is no number.
    """

    draws = False

    overhead: float = 20_000
    packet: int = 12_000

    def __post_init__(self) -> None:
        check_numbers(overhead=self.overhead)
        if not 0 <= self.overhead < math.inf:
            raise ValueError(f"overhead must be a number of bits ≥ 0, got {self.overhead!r}")
        if isinstance(self.packet, bool) or not isinstance(self.packet, int) or self.packet < 1:
            raise ValueError(f"packet must be a number of bits ≥ 1, got {self.packet!r}")

    def cost(self, k: Tensor, numel: int) -> Tensor:
        """C(k) in bits, float64, for k of ``numel`` elements."""
        bits = k.double() * (32 + math.log2(numel))
        return self.overhead + self.packet * torch.ceil(bits / as_divisor(self.packet, bits))

    def gamma(self, numel: int) -> float:
        """``max(m/d, C(1)/C(d))``, m the elements that fit into the first packet (derived here).

        The share e(k) of the energy that k elements hold is concave, so ``e(k) ≥ k/d``. For the chosen k and any j,
        ``e(k) ≥ C(k) e(j)/C(j) ≥ C(1) j / (d C(j))``; j = m, which costs C(1), and j = d are the two parts. Not
        attained in general.
        """
        if numel == 0:
            return 1.0
        first = max(1, min(numel, math.floor(self.packet / (32 + math.log2(numel)))))
        one, all_ = self.cost(torch.tensor([1, numel], device="cpu"), numel).tolist()
        return max(first / numel, one / all_)

    def encode(self, x: Tensor, *, generator: torch.Generator | None = None) -> Message:
        """See :meth:`Operator.encode`. Nothing is drawn from ``generator``."""
        flat = flatten(x)
        if len(flat) == 0:
            return Message.dense(flat.clone().reshape(x.shape))
        magnitude = flat.abs().nan_to_num_(nan=torch.inf, posinf=torch.inf)
        order = torch.sort(magnitude, descending=True, stable=True)  # as TopK: the lowest index among equals
        k = self._count(order.values.double())
        if k == len(flat):
            return Message.dense(flat.clone().reshape(x.shape))
        indices = order.indices[:k].sort().values
        return Message(tuple(x.shape), indices, Floats(flat[indices]))

    def _count(self, descending: Tensor) -> int:
        largest = descending[0]
        # Relative to the largest, no square overflows. Where that is 0/0 or ∞/∞, see the class.
        relative = torch.where(torch.isinf(largest), torch.isinf(descending).double(), descending / largest)
        kept = torch.cumsum(relative.nan_to_num_(0.0).square(), 0)
        k = torch.arange(1, len(descending) + 1, device=descending.device)
        return int((kept / self.cost(k, len(descending))).argmax()) + 1  # argmax: the first of equals
