"""Find what can be pruned in a model: dependency groups of units, and stacks of layers."""

__all__: list[str] = []
