"""Movement pruning (Sanh et al. 2020): scores that learn, while the model trains, what may go.

A weight's score collects minus its gradient times itself: weights that move away from zero stay.
The forward pass sees the top v of the scores, gradients reach all of them (straight through); v
falls from 1 along a cubic curve. Schedule and learning rate are those of the authors' commands:
a tenth of the steps dense, the last fifth at the final v, scores with a learning rate of 0.01.

`of_weights` masks single weights, a share of each matrix, as the commands do; `of_all_weights`
ranks all matrices together. `of_units` has one score for each head and neuron, in the manner of
block movement pruning (Lagunas et al. 2021), and ends in a smaller dense model.

Published recipes prune for some ten epochs from the pretrained weights; here the steps and the
start are those of all other methods.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from examples.benchmark.rivals.size import weights_of
from lightning_mi_prune import Plan, WidthAxis, apply, find_axes
from lightning_mi_prune.axes import count_parameters
from lightning_mi_prune.choosing import choose_axes

DENSE, FINAL = 0.1, 0.2  # shares of the steps before pruning and after its end
LEARNING_RATE = 0.01


def share_gone(progress: float, sparsity: float) -> float:
    """Share that is masked at some point of the training, a cubic curve between two flat ends.

    Example:
        >>> [round(share_gone(progress / 10, 0.8), 2) for progress in (0, 1, 4, 8, 10)]
        [0.0, 0.0, 0.65, 0.8, 0.8]
    """
    there = min(1.0, max(0.0, (progress - DENSE) / (1 - DENSE - FINAL)))
    return sparsity * (1 - (1 - there) ** 3)


def top(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly this many of the largest scores, ties or not.

    Example:
        >>> top(torch.tensor([[0.5, 2.0], [1.0, 1.0]]), 2).sum()
        tensor(2.)
    """
    mask = torch.zeros_like(scores)
    mask.flatten()[scores.flatten().topk(count, sorted=False).indices] = 1
    return mask


class Scored(nn.Module):
    """A weight matrix times a mask, through which gradients reach the scores.

    Args:
        shape: Shape of the scores: of the weight, or ``(1, units)`` for its columns.
        entries: Columns of one unit.
    """

    mask: Tensor

    def __init__(self, shape: Sequence[int], entries: int = 1) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(shape))
        self.register_buffer("mask", torch.ones(shape), persistent=False)
        self.entries = entries

    def forward(self, weight: Tensor) -> Tensor:
        # The value is the mask, to the bit; the gradient is that of the scores.
        mask = self.mask + (self.scores - self.scores.detach())
        return weight * (mask.repeat_interleave(self.entries, 1) if self.entries > 1 else mask)


class Movement:
    """Prunes a model during its training steps.

    Args:
        model: The dense model, which is changed.
        sparsity: Share of the parameters of neurons and heads that must go.
        together: Whether the scores of all matrices compete, or each gives the same share.
        units: Whether whole neurons and heads are scored.
    """

    def __init__(
        self, model: nn.Module, sparsity: float, *, together: bool = False, units: bool = False
    ) -> None:
        self.model, self.sparsity, self.together = model, sparsity, together
        self.axes = choose_axes(find_axes(model))
        self.units = units
        names = weights_of(self.axes)
        if units:
            self.scored = {
                axis.readers[0]: Scored((1, axis.size), axis.entries) for axis in self.axes
            }
        else:
            shapes = {name: model.get_parameter(name).shape for name in names}
            self.scored = {n.removesuffix(".weight"): Scored(shapes[n]) for n in names}
        for path, scored in self.scored.items():
            module = model.get_submodule(path)
            parametrize.register_parametrization(module, "weight", scored)

    @classmethod
    def of_weights(cls, model: nn.Module, sparsity: float) -> "Movement":
        """Single weights, the same share of every matrix."""
        return cls(model, sparsity)

    @classmethod
    def of_all_weights(cls, model: nn.Module, sparsity: float) -> "Movement":
        """Single weights, all matrices together."""
        return cls(model, sparsity, together=True)

    @classmethod
    def of_units(cls, model: nn.Module, sparsity: float) -> "Movement":
        """Heads and neurons, the same share of every layer."""
        return cls(model, sparsity, units=True)

    def parameters(self) -> list[nn.Parameter]:
        """The scores."""
        return [scored.scores for scored in self.scored.values()]

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        """Set all masks.

        Args:
            progress: Share of the steps that are done.
        """
        gone = share_gone(progress, self.sparsity)
        if self.units:
            for axis, width in widths_at(self.axes, gone).items():
                scored = self.scored[axis.readers[0]]
                scored.mask.copy_(top(scored.scores, width))
            return
        scores = [scored.scores for scored in self.scored.values()]
        total = sum(map(torch.numel, scores))
        left = total - round(gone * count_parameters(self.axes))  # biases count, but stay
        if self.together:
            masks = top(torch.cat([score.flatten() for score in scores]), left)
            parts = torch.split(masks, [score.numel() for score in scores])
        else:
            parts = tuple(top(score, round(score.numel() * left / total)) for score in scores)
        for scored, mask in zip(self.scored.values(), parts, strict=True):
            scored.mask.copy_(mask.view_as(scored.mask))

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The pruned model: with zeros in its weights, or smaller; the scores are gone."""
        kept = {path: scored.mask.flatten().nonzero() for path, scored in self.scored.items()}
        for path in self.scored:
            parametrize.remove_parametrizations(self.model.get_submodule(path), "weight")
        if self.units:
            sizes = {axis.name: axis.size for axis in self.axes}
            places = {a.name: tuple(kept[a.readers[0]].flatten().tolist()) for a in self.axes}
            apply(self.model, self.axes, Plan(sizes, places))
        return self.model


def widths_at(axes: Sequence[WidthAxis], gone: float) -> dict[WidthAxis, int]:
    """Units that every axis keeps: the same share of heads, and as many neurons as the rest allows.

    Args:
        axes: Heads and neurons.
        gone: Share of their parameters that must go.
    """
    cost = {axis: count_parameters([axis]) // axis.size for axis in axes}
    room = (1 - gone) * sum(cost[axis] * axis.size for axis in axes)
    widths = {a: max(1, round((1 - gone) * a.size)) for a in axes if a.kind != "ffn"}
    room -= sum(cost[axis] * width for axis, width in widths.items())
    neurons = [axis for axis in axes if axis.kind == "ffn"]
    share = room / sum(cost[axis] * axis.size for axis in neurons)
    return widths | {a: min(a.size, max(1, int(share * a.size + 1e-6))) for a in neurons}
