"""Score units and layers, and put them in the order in which they go."""

__all__: list[str] = []
