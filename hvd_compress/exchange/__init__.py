"""Ranks and buffers. Knows mpi4py, and nothing of tensors or optimizers."""

from .communicator import abort_on_uncaught_exception, check_world, warn_of_few_cores
from .gather import Exchange
from .probe import probe, union
from .rendezvous import rendezvous
from .scatter import Scatter
from .service import Service
from .topology import Topology, labels_of, topology
from .watch import Watch

__all__ = [
    "Exchange",
    "Scatter",
    "Service",
    "Topology",
    "Watch",
    "abort_on_uncaught_exception",
    "check_world",
    "labels_of",
    "probe",
    "rendezvous",
    "topology",
    "union",
    "warn_of_few_cores",
]
