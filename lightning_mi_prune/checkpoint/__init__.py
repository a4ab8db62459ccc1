"""Store and open pruned models."""

__all__: list[str] = []
