"""Published methods to compare with, all with one signature.

A baseline takes a dense model (which it may change: pass a copy), batches with labels for its
scores, the share of the prunable parameters to remove, and a seed. It returns the model, smaller or
with masks. One prunes during the training steps; one is a smaller model, fine-tuned by itself.
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from benchmarks.methods import Name, Widths
from benchmarks.subjects import entries_of, graph_of, size_of, weight_names, width_of
from benchmarks.tasks import Batch
from lightning_mi_prune import PruningPlan, apply_plan
from lightning_mi_prune.calibration.layers import StackRecorder
from lightning_mi_prune.core.empty_linear import KEPT_UNITS
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import DependencyGroup, count_parameters, full_depth
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.importance.layer_criteria import LayerCriterion, LayerSelector
from lightning_mi_prune.surgery.empty_modules import unit_argument_forward
from lightning_mi_prune.surgery.layers import remove_layers

__all__ = [
    "BASELINES",
    "SCORES_RATE",
    "Baseline",
    "layers_left",
    "pruned_by_library",
    "torch_pruning",
]

Prune = Callable[[nn.Module, Sequence[Batch], float, int], nn.Module]

# ------------------------------------------------------------------------------------------- masks


@torch.no_grad()  # the masked weights are then plain tensors, which can be copied
def magnitude_masks(
    model: nn.Module, batches: Sequence[Batch], sparsity: float, seed: int
) -> nn.Module:
    """Mask the smallest weights of neurons and heads, all matrices ranked together.

    It is what Lightning's ModelPruning does with `l1_unstructured` and global pruning. Masks save
    neither memory nor time in dense products. Biases count as prunable, but stay.
    """
    groups = choose_groups(graph_of(model).groups)
    paths = [name.removesuffix(".weight") for name in weight_names(groups)]
    prune.global_unstructured(
        [(model.get_submodule(path), "weight") for path in paths],
        pruning_method=prune.L1Unstructured,
        amount=round(sparsity * count_parameters(groups)),
    )
    return model


# ------------------------------------------------------------------------------------------ layers


def layers_left(layers: int, sparsity: float) -> int:
    """Layers that stay, rounded in favour of the baseline: at most this share is removed.

    Example:
        >>> [layers_left(6, sparsity) for sparsity in (0.25, 0.5, 0.75, 0.9)]
        [5, 3, 2, 1]
    """
    return max(1, math.ceil(layers * (1 - sparsity) - 1e-9))


def without_layers(criterion: LayerCriterion) -> Prune:
    """Remove the top layers ("last"), or those that are most like others ("cka", MPruner)."""

    @torch.no_grad()
    def cut(model: nn.Module, batches: Sequence[Batch], sparsity: float, seed: int) -> nn.Module:
        stacks = graph_of(model).stacks
        with StackRecorder(model, stacks) as recorder:
            for batch in batches:
                recorder.start_batch()
                model(**batch)
        compared, kept = recorder.compared(full_depth(stacks)), {}
        for stack in stacks:
            left = layers_left(stack.size, sparsity)
            selector = LayerSelector(None, target=left, criterion=criterion)
            kept[stack.name] = selector.choose(stack.name, compared[stack.name]).after
        remove_layers(model, stacks, PruningPlan({s.name: s.size for s in stacks}, kept))
        return model

    return cut


# ---------------------------------------------------------------------------------------- movement

DENSE, FINAL = 0.1, 0.2  # shares of the steps before pruning and after its end
SCORES_RATE = 0.01


def share_pruned(progress: float, sparsity: float) -> float:
    """Share that is masked at some point of the training, a cubic curve between two flat ends."""
    there = min(1.0, max(0.0, (progress - DENSE) / (1 - DENSE - FINAL)))
    return sparsity * (1 - (1 - there) ** 3)


def top(scores: Tensor, count: int) -> Tensor:
    """A mask of exactly this many of the largest scores, ties or not."""
    mask = torch.zeros_like(scores)
    mask.flatten()[scores.flatten().topk(count, sorted=False).indices] = 1
    return mask


class Scored(nn.Module):
    """A weight matrix times a mask of its units, through which gradients reach their scores."""

    mask: Tensor

    def __init__(self, units: int, entries: int = 1) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(1, units))
        self.register_buffer("mask", torch.ones(1, units), persistent=False)
        self.entries = entries

    def forward(self, weight: Tensor) -> Tensor:
        # The value is the mask, to the bit; the gradient is that of the scores.
        mask = self.mask + (self.scores - self.scores.detach())
        return weight * (mask.repeat_interleave(self.entries, 1) if self.entries > 1 else mask)


class Movement:
    """Movement pruning (Sanh et al. 2020) of heads and neurons (after Lagunas et al. 2021).

    A unit's score collects minus its gradient times its weights while the model trains; the best
    scores stay, the same share in every layer. Schedule and learning rate are those of the
    authors' commands. Published recipes prune for some ten epochs from the pretrained weights; here
    the steps and the start are those of all other methods.

    Args:
        model: The dense model, which is changed.
        sparsity: Share of the parameters of neurons and heads to remove.
    """

    def __init__(self, model: nn.Module, sparsity: float) -> None:
        self.model, self.sparsity = model, sparsity
        self.groups = choose_groups(graph_of(model).groups)
        self.scored = {
            group.consumers[0]: Scored(group.size, entries_of(group)) for group in self.groups
        }
        for path, scored in self.scored.items():
            parametrize.register_parametrization(model.get_submodule(path), "weight", scored)

    def parameters(self) -> list[nn.Parameter]:
        """The scores."""
        return [scored.scores for scored in self.scored.values()]

    @torch.no_grad()
    def before_step(self, progress: float) -> None:
        """Set all masks for a share of the steps that is done."""
        for group, width in widths_at(self.groups, share_pruned(progress, self.sparsity)).items():
            scored = self.scored[group.consumers[0]]
            scored.mask.copy_(top(scored.scores, width))

    @torch.no_grad()
    def finish(self) -> nn.Module:
        """The smaller model, without scores."""
        kept = {path: scored.mask.flatten().nonzero() for path, scored in self.scored.items()}
        for path in self.scored:
            parametrize.remove_parametrizations(self.model.get_submodule(path), "weight")
        places = {g.name: tuple(kept[g.consumers[0]].flatten().tolist()) for g in self.groups}
        sizes = {group.name: group.size for group in self.groups}
        apply_plan(self.model, self.groups, PruningPlan(sizes, places))
        return self.model


def widths_at(groups: Sequence[DependencyGroup], share: float) -> dict[DependencyGroup, int]:
    """Units that stay when a share of the parameters is removed.

    Every layer loses this share of its heads, and as many neurons as are then left to remove.
    """
    cost = {group: count_parameters([group]) // group.size for group in groups}
    room = (1 - share) * sum(cost[group] * group.size for group in groups)
    widths = {g: max(1, round((1 - share) * g.size)) for g in groups if g.kind != "ffn"}
    room -= sum(cost[group] * width for group, width in widths.items())
    neurons = [group for group in groups if group.kind == "ffn"]
    left = room / sum(cost[group] * group.size for group in neurons)
    return widths | {g: min(g.size, max(1, int(left * g.size + 1e-6))) for g in neurons}


# ----------------------------------------------------------------------------------- torch-pruning

GRID = 1000  # ratios are tried in thousandths
MARGIN = 0.05  # from this much below the asked share of parameters


def torch_pruning() -> Any:
    """The package, which only two baselines need.

    Raises:
        ModuleNotFoundError: If it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module("torch_pruning")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "torch-pruning is not installed, and two baselines of the benchmark come from it; run "
            "`pip install 'lightning-mi-prune[benchmark]'`, or leave them out with --methods"
        ) from error


def by_library(score: str, *, together: bool) -> Prune:
    """torch-pruning (DepGraph) with its group magnitude, or its Taylor score of all batches.

    It removes what all methods here remove, heads and neurons; the hidden size stays. As in its
    example for BERT, one ratio holds for neurons and heads; the ratio that reaches the asked
    share of parameters is searched for.
    """

    def cut(model: nn.Module, batches: Sequence[Batch], sparsity: float, seed: int) -> nn.Module:
        package = torch_pruning().importance
        if score == "magnitude":
            importance = package.GroupMagnitudeImportance(p=2)
        else:
            importance = package.GroupTaylorImportance()
            for batch in batches:
                (model(**batch).loss / len(batches)).backward()
        found = _search(model, batches[0], sparsity, importance, together=together)
        found.zero_grad(set_to_none=True)
        return found

    return cut


def _search(
    model: nn.Module, batch: Batch, sparsity: float, importance: Any, *, together: bool
) -> nn.Module:
    """Prune with the smallest ratio that reaches a sparsity, or comes closest to it.

    Where all layers compete, a layer may lose every head; the package then leaves it whole, so a
    larger ratio can remove less. The search is a bisection nevertheless, and the best ratio that
    was tried is taken.
    """
    groups = choose_groups(graph_of(model).groups)

    def at(step: int) -> nn.Module:
        return pruned_by_library(model, groups, batch, step / GRID, importance, together=together)

    low, high = max(1, round((sparsity - MARGIN) * GRID)), GRID - 1
    step, reached = min(high, max(low, round(sparsity * GRID))), dict[int, float]()
    while low <= high:
        reached[step] = size_of(at(step), groups)["reached"]
        low, high = (step + 1, high) if reached[step] < sparsity else (low, step - 1)
        step = (low + high) // 2
    return at(min(reached, key=lambda at: (reached[at] < sparsity, abs(reached[at] - sparsity))))


def pruned_by_library(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    batch: Batch,
    ratio: float,
    importance: Any,
    *,
    together: bool,
    heads_ratio: float | None = None,
) -> nn.Module:
    """A copy with this share of neurons and heads removed by the pruner of torch-pruning.

    Another share of the heads can be given.
    """
    cut = copy.deepcopy(model)
    for new, old in zip(cut.parameters(), model.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    heads: dict[nn.Module, int] = {}
    producers: set[nn.Module] = set()
    most = ratio if heads_ratio is None else heads_ratio
    for group in groups:
        own = {cut.get_submodule(s.tensor.rpartition(".")[0]) for s in group.tensors if s.dim == 0}
        producers |= own
        if group.kind == "heads":
            heads |= dict.fromkeys(own, group.size)
            # One head must stay: a layer that would lose all of its heads is left whole.
            most = min(most, 1 - 1 / group.size - 1e-6)
    # The hidden size stays: neither embeddings nor what writes into the residual stream is pruned.
    kinds = nn.Linear | nn.Embedding | nn.Conv2d
    fixed = [m for m in cut.modules() if isinstance(m, kinds) and m not in producers]
    # MPNet has one table of position biases, a column a head, for all layers: the package would
    # keep every head for it. Without a gradient it is ignored, and is indexed below.
    sharing = [group for group in groups if group.unit_arguments]
    tables = [m.weight for m in fixed if isinstance(m, nn.Embedding)] if sharing else []
    for table in tables:
        table.requires_grad_(False)
    removed: dict[nn.Module, Sequence[int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that no layer of the package's holds
        pruner = torch_pruning().pruner.BasePruner(
            cut,
            {name: tensor for name, tensor in batch.items() if name != "labels"},
            importance=importance,
            global_pruning=together,
            pruning_ratio=ratio,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=most,
            # Its defaults are dictionaries that all pruners would share.
            in_channel_groups={},
            out_channel_groups={},
            ignored_layers=fixed,
            output_transform=lambda output: output.logits.sum(),
        )
        for subset in pruner.step(interactive=True):
            cuts = ((step.target.module, rows) for step, rows in subset)
            removed |= {module: rows for module, rows in cuts if module in heads}
            subset.prune()
    for table in tables:
        table.requires_grad_(True)
    for group in groups:
        at = group.all_widths({group.name: width_of(cut, group, entries_of(group))})
        for number in group.attributes:
            value = layout_size(number.layout, at)
            setattr(cut.get_submodule(number.module), number.attribute, value)
    for group in sharing:
        _select_biases(cut, group, removed)
    return cut


def _select_biases(
    model: nn.Module, group: DependencyGroup, removed: Mapping[nn.Module, Sequence[int]]
) -> None:
    """Make a layer that lost heads read the position biases of those that are left."""
    producer = model.get_submodule(group.tensors[0].tensor.rpartition(".")[0])
    lost = {row // entries_of(group) for row in removed.get(producer, ())}
    kept = [unit for unit in range(group.size) if unit not in lost]
    for selects in group.unit_arguments if lost else ():
        module = model.get_submodule(selects.module)
        module.register_buffer(KEPT_UNITS, torch.tensor(kept), persistent=False)
        module.__dict__["forward"] = partial(unit_argument_forward, module, selects)


# ---------------------------------------------------------------------------------------- registry


@dataclass(frozen=True)
class Baseline:
    """A method from elsewhere, named like the variants of our own.

    Args:
        method: Name of the method.
        widths: "global" where all layers compete, "uniform" where all keep the same share.
        prune: What prunes before any training step.
        gradual: What prunes during the steps instead.
        fine_tuned: Whether it is a smaller model with a fine-tuning of its own instead.
    """

    method: str
    widths: Widths
    prune: Prune | None = None
    gradual: Callable[[nn.Module, float], Movement] | None = None
    fine_tuned: bool = False

    @property
    def name(self) -> Name:
        """What distinguishes it from all others."""
        return self.method, self.widths, "none"


BASELINES = (
    Baseline("torch-pruning-magnitude", "uniform", by_library("magnitude", together=False)),
    Baseline("torch-pruning-magnitude", "global", by_library("magnitude", together=True)),
    Baseline("torch-pruning-taylor", "uniform", by_library("taylor", together=False)),
    Baseline("torch-pruning-taylor", "global", by_library("taylor", together=True)),
    Baseline("magnitude-masks", "global", magnitude_masks),
    Baseline("first-layers", "uniform", without_layers("last")),
    Baseline("cka-layers", "uniform", without_layers("cka")),
    Baseline("small-dense", "uniform", fine_tuned=True),
    Baseline("movement-units", "uniform", gradual=Movement),
)
