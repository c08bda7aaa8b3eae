"""``python -m hvd_compress``."""

from .cli import main

main()
