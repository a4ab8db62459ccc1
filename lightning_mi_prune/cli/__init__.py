"""The command line."""

from lightning_mi_prune.cli.program import main

__all__ = ["main"]
