"""How many units every group keeps: budgets, constraints, costs."""

__all__: list[str] = []
