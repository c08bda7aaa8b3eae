"""Which reducer: the one place that knows all exchanges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from .auto import AutoReducer
from .hierarchical import HierarchicalReducer
from .ledger import Ledger
from .reducer import Reducer
from .scattered import ScatteredReducer
from .settings import Settings

AnyReducer: TypeAlias = Reducer | HierarchicalReducer | ScatteredReducer | AutoReducer


def reducer(settings: Settings, parameters: Mapping[str, torch.nn.Parameter], ledger: Ledger) -> AnyReducer:
    """What sums the parameters' gradients, or changes, in the way that ``settings.exchange`` says."""
    shapes = {name: p.shape for name, p in parameters.items()}
    options: dict[str, Any] = {
        "operator": settings.operator,
        "memory": settings.memory(),
        "dense_below": settings.dense_below,
        "seed": settings.seed,
        "ledger": ledger,
    }

    def make(exchange: str) -> Reducer | HierarchicalReducer | ScatteredReducer:
        if exchange == "hierarchical":
            return HierarchicalReducer(shapes, **options, bucket_cap_mb=settings.bucket_cap_mb, nodes=settings.nodes)
        if exchange == "reduce_scatter":
            return ScatteredReducer(shapes, **options, reselect=settings.reselect)
        return Reducer(shapes, **options, bucket_cap_mb=settings.bucket_cap_mb)

    if settings.exchange == "auto":
        return AutoReducer(make, shapes, **options, nodes=settings.nodes, reselect=settings.reselect)
    return make(settings.exchange)
