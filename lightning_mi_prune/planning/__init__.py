"""What a cut would do and cost, before anything changes."""

__all__: list[str] = []
