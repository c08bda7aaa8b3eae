"""Which reducer: the one place that knows all exchanges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from .auto import AutoReducer
from .hierarchical import HierarchicalReducer
from .ledger import Ledger
from .pieces import in_buckets
from .reducer import Reducer
from .scattered import ScatteredReducer
from .settings import Settings

AnyReducer: TypeAlias = Reducer | HierarchicalReducer | ScatteredReducer | AutoReducer


def reducer(settings: Settings, parameters: Mapping[str, torch.nn.Parameter], ledger: Ledger) -> AnyReducer:
    """What sums the parameters' gradients, or changes, in the way that ``settings.exchange`` says.

    Raises:
        ValueError: see :meth:`Settings.check_sizes`.
    """
    shapes = {name: p.shape for name, p in parameters.items()}
    settings.check_sizes(shape.numel() for shape in shapes.values())
    options: dict[str, Any] = {
        "operator": settings.operator,
        "memory": settings.memory(),
        "dense_below": settings.dense_below,
        "seed": settings.seed,
        "ledger": ledger,
    }

    buckets = list(in_buckets(shapes, settings.bucket_cap_mb))
    nodes, within = settings.nodes, settings.node_process_set

    def make(exchange: str) -> Reducer | HierarchicalReducer | ScatteredReducer:
        if exchange == "hierarchical":
            return HierarchicalReducer(shapes, **options, nodes=nodes, node_process_set=within, buckets=buckets)
        if exchange == "reduce_scatter":
            return ScatteredReducer(shapes, **options, nodes=nodes, reselect=settings.reselect)
        return Reducer(shapes, **options, nodes=nodes, buckets=buckets)

    if settings.exchange == "auto":
        return AutoReducer(make, shapes, **options, nodes=nodes, node_process_set=within, reselect=settings.reselect)
    return make(settings.exchange)
