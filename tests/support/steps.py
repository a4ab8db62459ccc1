"""A display that keeps what it is shown."""

from __future__ import annotations


class Events:
    """Keeps every event of every step, in order."""

    def __init__(self) -> None:
        self.all = []
        self.steps = []

    def begin(self, step) -> None:
        self.all.append(("begin", step))
        self.steps.append(step)

    def advance(self, step) -> None:
        self.all.append(("advance", step))

    def end(self, step) -> None:
        self.all.append(("end", step))

    def check(self) -> None:
        """Every step begins once, advances in between, ends once, and reaches its total."""
        assert self.steps
        for step in self.steps:
            kinds = [kind for kind, one in self.all if one is step]
            assert kinds == ["begin", *["advance"] * (len(kinds) - 2), "end"], step.name
            assert step.seconds >= 0
            assert not step.failed
            assert step.done > 0, step.name
            assert step.total is None or step.done == step.total, step.name
