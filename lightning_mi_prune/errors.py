"""REFUSE   the one error of the library: it names the value, the expectation and the remedy."""

from __future__ import annotations

__all__ = ["PruningError", "PruningWarning"]


class PruningError(RuntimeError):
    """A request that cannot be carried out; raised before a model, an optimizer or a file changes.

    Example:
        >>> from lightning_mi_prune import Plan, PruningError
        >>> try:
        ...     Plan(sizes={"ffn": 4}, kept={"ffn": (7,)})
        ... except PruningError as error:
        ...     print(error)
        Axis 'ffn' keeps position 7; expected 0 to 3.
    """


class PruningWarning(UserWarning):
    """Something that works but is worth a look: few samples, copies kept, no ranking."""
