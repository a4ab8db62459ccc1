"""Apply a plan to a model and its optimizers; the only place that changes a model."""

__all__: list[str] = []
