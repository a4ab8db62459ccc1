"""Reports, tables and plots of cuts."""

__all__: list[str] = []
