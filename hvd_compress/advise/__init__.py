"""Whether compression pays: measured between the ranks at hand, computed for more of them."""

from .predict import Advice, Candidate, Measurements, advise

__all__ = ["Advice", "Candidate", "Measurements", "advise"]
