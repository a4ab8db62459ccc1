"""DECIDE   rank, allot, select, refit: one decision, for the callback and one shot alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lightning_mi_prune.axes import WidthAxis, count_parameters
from lightning_mi_prune.budget import Budget, check_reach
from lightning_mi_prune.clock import cached_table, device_of, measure_table
from lightning_mi_prune.competition import allot
from lightning_mi_prune.costs import Costs, ParameterCosts, measure_macs
from lightning_mi_prune.criteria import Criterion, MutualInformation
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.files import check_writable
from lightning_mi_prune.latency import Device, LatencyTable
from lightning_mi_prune.limits import Limits, check_left
from lightning_mi_prune.milliseconds import LatencyCosts
from lightning_mi_prune.plan import Plan, Ranking
from lightning_mi_prune.ranking import RelevanceSource, rank_axes
from lightning_mi_prune.readings import readings
from lightning_mi_prune.refit import Sum, refit_all
from lightning_mi_prune.relevance import relevance_of
from lightning_mi_prune.sample import Example, Heard, copied, placed
from lightning_mi_prune.selection import Selection, select
from lightning_mi_prune.standins import parameters_of
from lightning_mi_prune.surgery import apply
from lightning_mi_prune.turning import check_turns

__all__ = ["Method", "pull_back"]


_SWEEPS = 2  # rankings of axes that cross, each by what the other keeps


@dataclass(frozen=True)
class Method:
    """Which units stay, and with which weights.

    Args:
        budget: How small the model must get.
        criterion: Who puts the units in order.
        widths: ``"global"`` lets all axes compete by what they lose for their cost, ``"uniform"``
            keeps the same share everywhere.
        relevance: What tells which part of the layer above matters: ``"gradient"`` of training
            steps, ``"readers"`` (the weights kept above), or None.
        fold_in: Whether readers' weights absorb dropped units by least squares.
        refit: Whether output projections are solved again on what the cut model really hears.
        refit_positions: Positions of inputs that are stored for that.
        refit_ridge: Pull towards the weights that folding in left, as a share of the mean variance.
        limits: Floors, caps and pins.
        multiple: Neuron widths are multiples of this.
        latency_table: File of measured latencies (JSON), measured and written if it is not there;
            a path that cannot be written to is refused before anything is measured.
        latency_batch: Examples in the call that is timed.
    """

    budget: Budget
    criterion: Criterion = field(default_factory=MutualInformation)
    widths: Literal["global", "uniform"] = "global"
    relevance: Literal["gradient", "readers"] | None = "gradient"
    fold_in: bool = True
    refit: bool = True
    refit_positions: int = 16384
    refit_ridge: float = 1e-2
    limits: Limits = field(default_factory=Limits)
    multiple: int = 8
    latency_table: str | None = None
    latency_batch: int = 1

    def check(
        self,
        module: nn.Module,
        axes: Sequence[WidthAxis],
        chosen: Sequence[WidthAxis],
        current: Mapping[str, int],
        *,
        writes: bool = True,
    ) -> None:
        """Refuse what can be known to fail before anything is heard.

        Args:
            module: The model as it stands.
            axes: All its axes.
            chosen: Those that may shrink.
            current: Present widths of all axes.
            writes: Whether this process measures latencies and writes their file; others may not
                even see its disk.

        Raises:
            PruningError: If limits contradict each other, the budget is out of reach, dimensions of
                heads may go where nothing tells which, or the file of latencies is of another
                device or cannot be written.
        """
        check_turns(module, chosen, relevance=self.relevance, budget=self.budget)
        if self.budget.measure == "parameters":
            check_reach(
                chosen,
                self.budget,
                costs=self.costs(module, axes, chosen, current, {}),
                widths=self.widths,
                current={axis.name: current[axis.name] for axis in chosen},
                limits=self.limits,
                multiple=self.multiple,
            )
        else:
            now = {axis.name: current[axis.name] for axis in chosen}
            self.limits.resolve(chosen, now, multiple=self.multiple)
            if self.budget.measure == "ms" and self.latency_table is not None and writes:
                _check_table(self.latency_table, device_of(module))

    def costs(
        self,
        module: nn.Module,
        axes: Sequence[WidthAxis],
        chosen: Sequence[WidthAxis],
        current: Mapping[str, int],
        examples: Mapping[str, Example],
        tables: MutableMapping[Device, LatencyTable] | None = None,
    ) -> Costs:
        """What widths cost, in the measure of the budget.

        Args:
            module: The model as it stands.
            axes: All its axes.
            chosen: Those that may shrink.
            current: Present widths of all axes.
            examples: One call of each network; only MACs and latency need it.
            tables: Latencies that were measured before and are in no file; new ones are added.
        """
        if self.budget.kind == "target_parameters":  # of the whole module, whatever was cut of it
            fixed = sum(p.numel() for p in module.parameters()) - count_parameters(axes, current)
            return ParameterCosts(axes, fixed, held=current)
        if self.budget.measure == "parameters":
            return ParameterCosts(chosen)
        if not examples:
            raise PruningError(
                f"{self.budget} needs a call of the network to measure, but none was heard; run "
                "validation first."
            )
        device = next(module.parameters()).device  # those of a checkpoint are on the CPU
        examples = {path: replace(c, **placed(vars(c), device)) for path, c in examples.items()}
        if self.budget.measure == "MACs":
            return measure_macs(module, axes, examples, current)
        index = torch.zeros(self.latency_batch, dtype=torch.long)
        calls = {path: call.some(index) for path, call in examples.items()}

        # Dimensions of heads take time to time: only where they may go, or some have gone.
        may = {axis.name for axis in chosen}
        timed = [a for a in axes if a.turn is None or a.name in may or current[a.name] < a.size]

        def measure() -> LatencyTable:
            return measure_table(module, timed, calls, multiple=self.multiple)

        table = cached_table(self.latency_table, measure, device_of(module, calls), tables)
        return LatencyCosts(table, timed, held=current)

    def decide(
        self,
        module: nn.Module,
        axes: Sequence[WidthAxis],
        chosen: Sequence[WidthAxis],
        current: Plan,
        heard: Heard,
        *,
        progress: float = 1.0,
        kept: float = 1.0,
        tables: MutableMapping[Device, LatencyTable] | None = None,
    ) -> Selection | None:
        """Choose the survivors; the model is only read.

        Args:
            module: The model as it stands.
            axes: All its axes.
            chosen: Those that may shrink.
            current: The plan it carries.
            heard: What was heard of it.
            progress: How far to go from the model as built to the budget.
            kept: Share of the information that earlier cuts left.
            tables: As for :meth:`costs`.

        Returns:
            What to cut, or None where the model is that small already.

        Raises:
            PruningError: If the budget is out of reach, or too little was heard.
        """
        weights = parameters_of(module)
        now = {name: len(units) for name, units in current.kept.items()}
        costs = self.costs(module, axes, chosen, now, heard.examples, tables)
        mine = {axis.name: now[axis.name] for axis in chosen}
        relevance = self._relevance(heard)

        def rank(axes: Sequence[WidthAxis] = chosen, **known: Any) -> dict[str, Ranking]:
            """What is known of the order, of some or all."""
            said = (heard.moments, weights, current, self.criterion)
            return rank_axes(axes, *said, relevance=relevance, **known)

        share = partial(
            allot,
            chosen,
            self.budget,
            costs=costs,
            widths=self.widths,
            current=mine,
            limits=self.limits,
            multiple=self.multiple,
            progress=progress,
            kept=kept,
        )
        rankings: dict[str, Ranking] | None = None
        if self.widths == "global" or self.budget.kind == "keep_information":
            rankings = rank()
        widths = share(rankings=rankings)
        if rankings is not None and relevance == "readers":  # of which only some are kept above
            rankings = rank(widths=widths)
            widths = share(rankings=rankings)
        crossed = [axis for axis in chosen if axis.crossed in mine]
        for _ in range(_SWEEPS if crossed else 0):
            if rankings is not None:
                known = rankings
                beside = {a.name: known[a.name].kept(widths[a.name]) for a in crossed}
                rankings = {**known, **rank(crossed, beside=beside)}
                widths = share(rankings=rankings)
        widths = {name: min(width, mine[name]) for name, width in widths.items()}
        if widths == mine:
            return None
        bounds = self.limits.resolve(chosen, mine, multiple=self.multiple)
        told = {name for name, (_, most) in bounds.items() if not most}
        check_left(axes, {**now, **widths}, told, self.budget)
        if rankings is None:  # of all, so that what is lost can be set beside what there was
            rankings = rank(widths=widths)
        return select(
            chosen,
            heard.moments,
            weights,
            widths,
            current,
            self.criterion,
            relevance=relevance,
            rankings=rankings,
            fold_in=self.fold_in,
            ridge=getattr(self.criterion, "ridge", 1.0),
        )

    def _relevance(self, heard: Heard) -> RelevanceSource:
        if self.relevance != "gradient":
            return self.relevance
        gradients = heard.gradients or {}
        if not gradients:
            raise PruningError(
                "relevance='gradient' asks for training steps, but none were heard. Train first, "
                "give a loss, or use relevance='readers', which needs none."
            )
        return relevance_of(gradients)


def _check_table(path: str, here: Device) -> None:
    """Refuse a file of another device, and one that could not be written after minutes of work."""
    if not os.path.isfile(path):  # Path.is_file may raise
        check_writable(path, "The latency table")
        return
    table = LatencyTable.load(path)
    cast = table.device.dtype in ("bfloat16", "float16")  # calls will tell
    table.check_device(replace(here, dtype=table.device.dtype) if cast else here)


def pull_back(
    module: nn.Module,
    axes: Sequence[WidthAxis],
    current: Plan,
    selection: Selection,
    method: Method,
    heard: Heard,
    add: Sum = lambda sums: sums,
    rank: int = 0,
    world: int = 1,
) -> Selection:
    """Refit what a selection leaves, on a cut copy; the model itself is only run.

    Args:
        module: The model as it stands.
        axes: All its axes.
        current: The plan it carries.
        selection: What will be cut.
        method: How.
        heard: What was heard.
        add: Adds sums up over ranks.
        rank: This process.
        world: Processes that solve together, each on its own calls.

    Returns:
        The selection with the refitted weights.

    Raises:
        PruningError: If the stored sample is smaller than what there is to learn from it.
    """
    found = readings(axes, current, selection.plan, selection.turned)
    if not method.refit or not found:
        return selection
    cut = copied(module, {axis.network for axis in axes})
    apply(cut, axes, selection.plan, current=current, folded=selection.folded)
    solved = refit_all(
        module,
        cut,
        found,
        heard.ranks,
        positions=method.refit_positions,
        ridge=method.refit_ridge,
        add=add,
        rank=rank,
        world=world,
    )
    return replace(selection, folded={**selection.folded, **solved})
