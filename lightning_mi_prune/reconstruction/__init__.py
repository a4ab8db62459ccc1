"""Weights that stay make up for what was removed, by least squares."""

__all__: list[str] = []
