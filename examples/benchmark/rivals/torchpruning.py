"""torch-pruning (DepGraph) from its package: group magnitude and group Taylor, its own pruner.

The same structures go as everywhere here, heads and neurons; the width of the stream stays. As its
example for BERT does, one ratio holds for neurons and heads; the ratio that reaches the asked
share of parameters is searched for.

MPNet makes one table of position biases, a column a head, for all layers. The package would rather
keep every head than cut it; here it does not see the table, and layers that lost heads take the
columns of the others.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from examples.benchmark.rivals.size import size_of, width_of
from lightning_mi_prune import WidthAxis, find_axes
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.standins import KEPT_UNITS, selecting

Batch = dict[str, Tensor]
GRID = 1000  # ratios are tried in thousandths
MARGIN = 0.05  # from this much below the asked share of parameters


def group_magnitude(
    *, everywhere: bool
) -> Callable[[nn.Module, Sequence[Batch], float, int], nn.Module]:
    """Its L2 norm of all tensors of a unit, with the package's defaults.

    Args:
        everywhere: Whether all layers compete, or each keeps the same share.
    """

    def prune(model: nn.Module, batches: Sequence[Batch], sparsity: float, seed: int) -> nn.Module:
        importance = library().importance.GroupMagnitudeImportance(p=2)
        return search(model, batches[0], sparsity, importance, everywhere=everywhere)

    return prune


def group_taylor(
    *, everywhere: bool
) -> Callable[[nn.Module, Sequence[Batch], float, int], nn.Module]:
    """Its first-order Taylor expansion, from the gradients of all batches together.

    Args:
        everywhere: Whether all layers compete, or each keeps the same share.
    """

    def prune(model: nn.Module, batches: Sequence[Batch], sparsity: float, seed: int) -> nn.Module:
        for batch in batches:
            (model(**batch).loss / len(batches)).backward()
        importance = library().importance.GroupTaylorImportance()
        cut = search(model, batches[0], sparsity, importance, everywhere=everywhere)
        cut.zero_grad(set_to_none=True)
        return cut

    return prune


def library() -> Any:
    """The package, which only these rivals need."""
    try:
        import torch_pruning
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "torch-pruning is not installed, and two rivals of the benchmark come from it; run "
            "`pip install 'lightning-mi-prune[benchmark]'`, or leave them out with --methods",
            name="torch_pruning",
        ) from error
    package: ModuleType = torch_pruning
    return package


def search(
    model: nn.Module, batch: Batch, sparsity: float, importance: Any, *, everywhere: bool
) -> nn.Module:
    """Prune with the smallest ratio that reaches a sparsity, or comes closest to it.

    Where all layers compete, a layer may lose every head; the package then leaves it whole, so a
    larger ratio can remove less. The search is by halves all the same, and the best of all that
    was tried is taken.

    Args:
        model: The dense model, with gradients where the importance needs them; left as it is.
        batch: Inputs to trace the model with.
        sparsity: Share of the parameters of neurons and heads.
        importance: The package's importance.
        everywhere: Whether all layers compete.
    """
    axes = choose_axes(find_axes(model))

    def at(step: int) -> nn.Module:
        return pruned(model, axes, batch, step / GRID, importance, everywhere=everywhere)

    low, high = max(1, round((sparsity - MARGIN) * GRID)), GRID - 1
    step, reached = min(high, max(low, round(sparsity * GRID))), dict[int, float]()
    while low <= high:
        reached[step] = size_of(at(step), axes).sparsity
        low, high = (step + 1, high) if reached[step] < sparsity else (low, step - 1)
        step = (low + high) // 2
    return at(min(reached, key=lambda at: (reached[at] < sparsity, abs(reached[at] - sparsity))))


def pruned(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    batch: Batch,
    ratio: float,
    importance: Any,
    *,
    everywhere: bool,
) -> nn.Module:
    """A copy with this share of neurons and heads removed by the package's pruner."""
    cut = copy.deepcopy(model)
    for new, old in zip(cut.parameters(), model.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    heads: dict[nn.Module, int] = {}
    producers: set[nn.Module] = set()
    most = ratio
    for axis in axes:
        makers = {cut.get_submodule(s.tensor.rpartition(".")[0]) for s in axis.slices if s.dim == 0}
        producers |= makers
        if axis.kind == "heads":
            heads |= dict.fromkeys(makers, axis.size)
            # The last head of a layer cannot go: the package would leave all of them.
            most = min(most, 1 - 1 / axis.size - 1e-6)
    # The width of the stream stays: neither embeddings nor what writes into the stream is pruned.
    fixed = [
        module
        for module in cut.modules()
        if isinstance(module, nn.Linear | nn.Embedding) and module not in producers
    ]
    # The package follows gradients, so tables without them are none of its business.
    sharing = [axis for axis in axes if axis.selects]
    tables = [m.weight for m in fixed if isinstance(m, nn.Embedding)] if sharing else []
    for table in tables:
        table.requires_grad_(False)
    gone: dict[nn.Module, Sequence[int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tensors that no layer of the package's holds
        pruner = library().pruner.BasePruner(
            cut,
            {name: tensor for name, tensor in batch.items() if name != "labels"},
            importance=importance,
            global_pruning=everywhere,
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
        for group in pruner.step(interactive=True):
            cuts = ((step.target.module, rows) for step, rows in group)
            gone |= {module: rows for module, rows in cuts if module in heads}
            group.prune()
    for table in tables:
        table.requires_grad_(True)
    for axis in axes:
        units = width_of(cut, axis, axis.entries)
        for count in axis.counts:
            each = count.per_unit * (axis.entries if count.entries else 1)
            setattr(cut.get_submodule(count.module), count.attribute, units * each)
    for axis in sharing:
        share(cut, axis, gone)
    return cut


def share(model: nn.Module, axis: WidthAxis, gone: Mapping[nn.Module, Sequence[int]]) -> None:
    """Let a layer that lost heads take what belongs to the others out of what all layers share.

    Args:
        model: The pruned model.
        axis: Heads of the layer.
        gone: Rows that left a projection.
    """
    maker = model.get_submodule(axis.slices[0].tensor.rpartition(".")[0])
    lost = {row // axis.entries for row in gone.get(maker, ())}
    kept = [unit for unit in range(axis.size) if unit not in lost]
    for selects in axis.selects if lost else ():
        module = model.get_submodule(selects.module)
        module.register_buffer(KEPT_UNITS, torch.tensor(kept), persistent=False)
        module.__dict__["forward"] = partial(selecting, module, selects)
