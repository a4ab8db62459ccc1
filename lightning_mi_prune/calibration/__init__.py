"""Collect activations, gradients and calls from data."""

__all__: list[str] = []
