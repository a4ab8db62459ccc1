"""sensitivity: what every group would cost at every width, expected and measured on copies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.constraints import may_be_empty, step_of, widths_between
from lightning_mi_prune.calibration.collect import Loss, first_batches, training_loss
from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError, number, require
from lightning_mi_prune.core.options import Reconstruction, check_count
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.core.running import copy_networks, move_tensors, undisturbed
from lightning_mi_prune.core.spilling import spilling
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.pipeline import allocated, selected
from lightning_mi_prune.planning.plan import LOSS_UNITS, without_solving
from lightning_mi_prune.pruner import Calibrated, PruneOptions, calibrated
from lightning_mi_prune.surgery.units import apply_plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "GroupSensitivity",
    "Sensitivity",
    "sensitivity",
]

_ANY = Budget(target_parameters=2**62)  # asks for no cut
_MOST_NAMED = 8  # groups in a legend


@dataclass(frozen=True)
class GroupSensitivity:
    """What one group costs, the others as they are.

    Args:
        name: Path of the group.
        kind: Kind of unit.
        expected: Expected rise of the loss with 0, 1, 2, ... units, up to all that it has now.
        measured: Loss that was measured at some widths: pairs of both, the widest first.
    """

    name: str
    kind: str
    expected: tuple[float, ...]
    measured: tuple[tuple[int, float], ...] = ()

    @property
    def units(self) -> int:
        """Units that it has now."""
        return len(self.expected) - 1


@dataclass(frozen=True)
class Sensitivity:
    """What every group would cost at every width, by itself.

    Args:
        groups: The groups.
        loss_unit: Unit of expected losses.
        loss: Loss of the model as it is, on the batches that were measured with; None where
            nothing was measured.
        evaluations: How many losses were measured.
    """

    groups: tuple[GroupSensitivity, ...]
    loss_unit: str
    loss: float | None = None
    evaluations: int = 0

    def __str__(self) -> str:
        lines = [f"expected rise of the loss ({self.loss_unit}) with this share of the units left"]
        widest = max(len(group.name) for group in self.groups)
        shares = (0.75, 0.5, 0.25, 0.1)
        lines.append(f"{'group':<{widest}}  {'units':>6}" + "".join(f"{s:>10.0%}" for s in shares))
        for group in self.groups:
            at = (number(group.expected[round(share * group.units)]) for share in shares)
            cells = "".join(f"{text:>10}" for text in at)
            lines.append(f"{group.name:<{widest}}  {group.units:>6}{cells}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return asdict(self)

    def plot(self, path: str | Path | None = None) -> Figure:
        """The rise of the loss over the share of units that stay: a curve for every group.

        Expected rises are lines, measured ones are points.

        Args:
            path: Where to write the picture (``.png``, ``.svg`` or ``.pdf``); None writes none.

        Returns:
            A matplotlib figure that belongs to no window.

        Raises:
            PruningError: If matplotlib is not installed.
        """
        kinds = list(dict.fromkeys(group.kind for group in self.groups))
        figure: Figure = require("matplotlib.figure", "plots").Figure(
            figsize=(1 + 4.2 * len(kinds), 4), layout="constrained"
        )
        colors = require("matplotlib", "plots").colormaps["viridis"]
        every = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        rises = [x - (self.loss or 0) for group in self.groups for _, x in group.measured]
        top = max(map(abs, (*rises, *(group.expected[0] for group in self.groups))))
        for kind, axes in zip(kinds, every, strict=True):
            mine = [group for group in self.groups if group.kind == kind]
            for place, group in enumerate(mine):
                color = colors(0.9 * place / max(1, len(mine) - 1))
                shares = [100 * width / group.units for width in range(group.units + 1)]
                axes.plot(shares, group.expected, color=color, label=group.name)
                if self.loss is not None:
                    points = [(100 * w / group.units, x - self.loss) for w, x in group.measured]
                    axes.scatter(*zip(*points, strict=True), color=color, s=16)
            axes.set_title(f"{kind}: {len(mine)} groups" if len(mine) > 1 else kind)
            axes.set_xlabel("units that stay, %")
            axes.set_yscale("symlog", linthresh=max(top / 100, 1e-12))
            axes.invert_xaxis()
            axes.grid(alpha=0.3)
            if len(mine) <= _MOST_NAMED:
                axes.legend(fontsize=7)
        points_too = "" if self.loss is None else " (line: expected, point: measured)"
        every[0].set_ylabel("rise of the loss")
        figure.suptitle(f"One group narrower, the others whole{points_too}", fontsize=10)
        if path is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=120)
        return figure


def sensitivity(
    model: nn.Module,
    data: Any,
    *,
    measured: bool = False,
    points: int = 4,
    batches: int = 8,
    **options: Unpack[PruneOptions],
) -> Sensitivity:
    """What every group of a module would cost at every width, by itself; nothing is changed.

    Args:
        model: The module, trained.
        data: Calibration data, as for :func:`prune`.
        measured: Whether losses are measured too, on copies that share the weights: ``points`` of
            every group, and the model as it is. Weights that stay make up for the rest
            (compensation); layers are not solved again, which would lower the loss further.
        points: Widths of a group that are measured, evenly from the narrowest one up.
        batches: Batches that a loss is the mean of, the first of ``training`` or ``data``.
        options: Those of :func:`prune`, but for its budgets and optimizers; ``widths`` does not
            matter.

    Raises:
        PruningError: As :func:`prune`; also if there is no loss to measure.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> given = [torch.randn(500, 8) for _ in range(4)]
        >>> found = sensitivity(net, given, loss=lambda m, x: m(x).square().mean(), measured=True)
        >>> [width for width, _ in found.groups[0].measured], found.evaluations
        ([64, 48, 32, 16, 8], 5)
    """
    check_count("points", points, least=1)
    check_count("batches", batches, least=1)
    options["widths"] = "global"
    options["reconstruction"] = without_solving(options.get("reconstruction") or Reconstruction())
    loss = options.get("loss")
    if measured and loss is None:
        if not hasattr(model, "training_step"):
            raise PruningError(
                "measured=True needs a loss, but there is none; expected loss(model, batch) or a "
                "LightningModule."
            )
        loss = training_loss
    known = PlanTracker.held_by(model)
    with calibrated(model, data, [_ANY], **options) as found, spilling(found.memory == "low"):
        groups, current = found.tracker.groups, found.plan
        given = (model, groups, found.chosen, current, found.collected)
        rankings = allocated(found.options[0], *given).first
        assert rankings is not None  # noqa: S101  # widths="global" ranks all
        expected = {group.name: _curve(rankings[group.name]) for group in found.chosen}
        base, losses = None, dict[str, tuple[tuple[int, float], ...]]()
        if measured and loss is not None:
            size, seed = options.get("batch_size", 32), options.get("seed", 0)
            source = options.get("training")
            rows = batches_of(data if source is None else source, batch_size=size, seed=seed)
            few = list(first_batches(rows, batches))
            base = _mean_loss(model, loss, few)
            for group in found.chosen:
                narrower = _measured(found, group, rankings, loss, few, points)
                losses[group.name] = ((current.width(group.name), base), *narrower)
        if known is None:
            found.tracker.close()
        importance = found.options[0].importance
    return Sensitivity(
        groups=tuple(
            GroupSensitivity(g.name, g.kind, expected[g.name], losses.get(g.name, ()))
            for g in found.chosen
        ),
        loss_unit=LOSS_UNITS[importance.relevance],
        loss=base,
        evaluations=sum(len(each) - 1 for each in losses.values()) + (base is not None),
    )


def _curve(ranking: Ranking) -> tuple[float, ...]:
    """Expected losses with 0, 1, ... units; sums never fall as units go, but for rounding."""
    lost = accumulate((0.0, *ranking.loss), max)
    return tuple(lost)[::-1]


def _measured(
    found: Calibrated,
    group: DependencyGroup,
    rankings: Mapping[str, Ranking],
    loss: Loss,
    batches: Sequence[Any],
    points: int,
) -> Iterator[tuple[int, float]]:
    """Losses at some widths of a group, on copies that share all that is not cut."""
    model, options, current = found.model, found.options[0], found.plan
    step, now = step_of(group, options.constraints.multiple), current.width(group.name)
    least = 0 if may_be_empty(group) else min(step, now)
    narrower = widths_between(least, now, step)[1:]
    count = min(points, len(narrower))
    places = {len(narrower) - 1 - (i * len(narrower)) // count for i in range(count)}
    for place in sorted(places):
        widths = {group.name: narrower[place]}
        decision = selected(options, model, [group], current, found.collected, widths, rankings)
        shared = {id(parameter): parameter for parameter in model.parameters()}
        cut = copy_networks(model, {""}, shared)
        apply_plan(
            cut,
            found.tracker.groups,
            decision.plan,
            current=current,
            compensated=decision.compensated,
            rotated=decision.rotated,
        )
        yield narrower[place], _mean_loss(cut, loss, batches)


def _mean_loss(model: nn.Module, loss: Loss, batches: Iterable[Any]) -> float:
    """The mean of a loss over batches, without gradients and without a trace."""
    device, values = next(model.parameters()).device, []
    with undisturbed(model), torch.no_grad():
        for batch in batches:
            value = loss(model, move_tensors(batch, device))
            if isinstance(value, Tensor) and value.numel() == 1:
                values.append(float(value))
            elif value is not None:
                raise PruningError(
                    f"The loss is a {type(value).__name__}; expected one number for each batch."
                )
    if not values:
        raise PruningError("No batch gave a loss; expected one number for each batch.")
    return sum(values) / len(values)
