"""Pruning inside Trainer.fit; the only files that hold a Trainer."""

__all__: list[str] = []
