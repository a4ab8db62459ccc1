"""What can be pruned, as plain data: layouts, groups, stacks and the graph of both."""

__all__: list[str] = []
