"""How much is sent, exchange by exchange: plans that run along with training, and the optimum in hindsight."""

from .accordion import Accordion, AccordionSchedule
from .adaptive import AdaptiveTopK, AdaptiveTopKSchedule, next_k
from .base import Constant, Plan, Schedule
from .budget import divide
from .hard_threshold import HardThreshold, HardThresholdSchedule
from .offline import Bell, ErrorModel, Linear, Power, best_allocation, global_threshold
from .warm_up import WarmUp, WarmUpSchedule

__all__ = [
    "Accordion",
    "AccordionSchedule",
    "AdaptiveTopK",
    "AdaptiveTopKSchedule",
    "Bell",
    "Constant",
    "ErrorModel",
    "HardThreshold",
    "HardThresholdSchedule",
    "Linear",
    "Plan",
    "Power",
    "Schedule",
    "WarmUp",
    "WarmUpSchedule",
    "best_allocation",
    "divide",
    "global_threshold",
    "next_k",
]
