"""What training runs have reached, and what they have sent for it. Reads files only."""

from .draw import draw
from .page import write_page
from .runs import Run, RunError, Summary, label, read, summarise

__all__ = ["Run", "RunError", "Summary", "draw", "label", "read", "summarise", "write_page"]
