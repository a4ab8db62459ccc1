"""GATHER   what several stacks say of themselves in one validation run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.exact import ExactSums
from lightning_mi_prune.hooks import Ear
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.sample import Example
from lightning_mi_prune.sparing import Compared
from lightning_mi_prune.stack import StackListener, blocks_of

__all__ = ["StackListeners"]


class StackListeners(Ear):
    """Hears several stacks at once, each by itself.

    Args:
        model: Module from which everything is named.
        stacks: The stacks, as they stand.
        options: As for :class:`StackListener`.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[DepthAxis], **options: Any) -> None:
        super().__init__(model)
        self._ears = {
            stack.name: StackListener(
                model,
                blocks_of(model, stack.name),
                scope=stack.scope,
                network=stack.network,
                **options,
            )
            for stack in stacks
        }
        self._stacks = list(stacks)

    def start_batch(self, rows: int | None = None, padded: int = 0) -> None:
        """Say that a batch begins."""
        for ear in self._ears.values():
            ear.start_batch(rows, padded)

    @property
    def seconds(self) -> float:
        """Time spent on listening."""
        return sum(ear.seconds for ear in self._ears.values())

    @property
    def sums(self) -> dict[str, ExactSums]:
        """All sums by name, to be added up over ranks."""
        alike = {f"{name} alignment": ear.alignment for name, ear in self._ears.items()}
        return alike | {f"{name} angles": ear.angles for name, ear in self._ears.items()}

    @property
    def examples(self) -> dict[str, Example]:
        """One call of each network, or of its encoder where it is never called itself."""
        found: dict[str, Example] = {}
        for stack in self._stacks:
            heard = self._ears[stack.name].examples
            path = stack.network if stack.network in heard else stack.scope
            found |= {path: heard[path]} if path in heard else {}
        return found

    @property
    def stored(self) -> dict[str, list[Example]]:
        """Stored inputs, by path of the network; stacks of one network store the same ones once."""
        ears = reversed(self._ears.values())
        return {path: calls for ear in ears for path, calls in ear.stored.items()}

    def compared(self, plan: Plan) -> dict[str, Compared]:
        """How alike the layers of every stack are, numbered as built.

        Args:
            plan: Plan the model carries.

        Raises:
            PruningError: If a stack said nothing or too little, or values that are not finite.
        """
        silent = [name for name, ear in self._ears.items() if not ear.angles.count]
        if silent:
            ran = [name for name in self._ears if name not in silent]
            raise PruningError(
                f"The layers of {silent[0]!r} never ran in validation, so they cannot be compared; "
                f"{ran or 'no others'} did. Let validation_step run them, or leave them out with "
                "stacks= or module=."
            )
        return {
            stack.name: self._ears[stack.name].compared(plan.kept[stack.name], stack.fixed)
            for stack in self._stacks
        }

    def _attach(self) -> Iterator[RemovableHandle]:
        for ear in self._ears.values():
            yield from ear._attach()

    def _drop(self) -> None:
        for ear in self._ears.values():
            ear._drop()
