"""Ranks and buffers. Knows mpi4py, and nothing of tensors or optimizers."""

from .communicator import abort_on_uncaught_exception, check_world
from .gather import Exchange
from .rendezvous import rendezvous
from .service import Service
from .watch import Watch

__all__ = ["Exchange", "Service", "Watch", "abort_on_uncaught_exception", "check_world", "rendezvous"]
