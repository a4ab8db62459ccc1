"""What of a model can be pruned: groups of units and stacks of layers."""

__all__: list[str] = []
