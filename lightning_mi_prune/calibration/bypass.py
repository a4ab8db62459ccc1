"""The loss of a model some of whose layers return their input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.progress import progress_step
from lightning_mi_prune.discovery.verification import returns_input

__all__ = [
    "bypassed",
    "loss_in",
    "losses_without",
]


@contextmanager
def bypassed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """A block in which some layers return their first input as their first output.

    They run nevertheless, so that all else that they return has its ordinary form.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> x = torch.randn(3, 2)
        >>> with bypassed([net[1]]):
        ...     torch.equal(net(x), net[0](x))
        True
        >>> torch.equal(net(x), net[0](x))
        False
    """
    with ExitStack() as hooks:
        for layer in layers:
            handle = layer.register_forward_hook(returns_input, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def losses_without(
    removals: Sequence[Iterable[nn.Module]], steps: Iterable[Callable[[], float]]
) -> Tensor:
    """Sums of the loss over some steps, without each of some sets of layers.

    Args:
        removals: The sets of layers.
        steps: Each returns the loss of the model on one batch.

    Returns:
        A sum for each of the sets ``(R,)``, on the CPU in double precision.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> losses_without([[], [net[0]], net], [lambda: net(torch.ones(1, 2)).sum().item()] * 3)[2]
        tensor(6., dtype=torch.float64)
    """
    sums = torch.zeros(len(removals), dtype=torch.float64)
    layers = [list(removal) for removal in removals]
    with progress_step("losses without layers", "loss") as progress:
        for step in steps:
            for place, removed in enumerate(layers):
                with bypassed(removed):
                    sums[place] += step()
                progress.advance()
    return sums


def loss_in(result: Any) -> float:
    """The loss in what a training step returns: a tensor, or the entry ``"loss"`` of a mapping.

    Raises:
        PruningError: If there is no single number.

    Example:
        >>> loss_in(torch.tensor(0.5)), loss_in({"loss": torch.tensor([2.0]), "logits": None})
        (0.5, 2.0)
    """
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shown = f"a tensor of {loss.numel()} numbers" if isinstance(loss, Tensor) else repr(loss)
        raise PruningError(
            f"The training step returned {shown:.60} for a loss; expected a tensor of one number, "
            "or a dict with it as 'loss'. Return the loss, or choose another criterion."
        )
    return float(loss.detach())
