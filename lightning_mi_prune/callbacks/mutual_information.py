"""MutualInformationPruning: the method of Fan et al. (2021) as one callback, in our reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.budget import Budget, asked_budget
from lightning_mi_prune.callbacks.companions import BestOf
from lightning_mi_prune.callbacks.options import (
    accuracy_budget,
    between,
    check_choices,
    check_counts,
    check_order,
    check_regex,
    check_types,
    check_units,
    without_private,
)
from lightning_mi_prune.callbacks.schedule import Ramp, Schedule
from lightning_mi_prune.callbacks.widths import WidthPruning
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.criteria import MutualInformation
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.limits import Limits
from lightning_mi_prune.method import Method, pull_back
from lightning_mi_prune.sample import Heard
from lightning_mi_prune.selection import Selection
from lightning_mi_prune.strategies import add_up, world_size
from lightning_mi_prune.wording import number

__all__ = ["MutualInformationPruning"]


class MutualInformationPruning(WidthPruning):
    """Make the encoder smaller while it trains, keeping the units that inform the layer above.

    During validation the callback listens to the input of every output projection. At the end of
    the epoch it sweeps from the top of the network down and keeps, on each axis, the units with
    the most mutual information with what was kept above. At the start of the next epoch it swaps
    in smaller dense layers, carries the optimizer's state across, and training goes on.

    Args:
        sparsity: Share of the prunable parameters to remove. Above 0 and below 1, against the model
            as built. Default 0.5, unless one of the four budgets below is given.
        target_parameters: Instead: parameters of the whole module in the end.
        target_macs: Instead: multiply-accumulates of one validation example in the end.
        target_latency_ms: Instead: milliseconds of one forward pass of ``latency_batch`` examples.
            They are predicted from a table that is measured on this device.
        keep_information: Instead: share of the information with the layers above, in nats and
            summed over all axes, that stays.
        units: Kinds of unit to cut: ``"ffn"``, ``"heads"`` (default), ``"dims"`` (dimensions of
            heads), ``"pooler"``, ``"residual"`` (the width of stream and word embeddings).
        module: Path of the submodule to search, such as ``"encoder"``; default: the whole module.
        include: Regular expression; only axes whose name it finds are cut.
        exclude: Regular expression; axes whose name it finds are left alone.
        widths: ``"global"`` lets heads and neurons of all layers compete for the budget,
            ``"uniform"`` keeps the same share everywhere. They compete by what is lost for the
            cost that is saved.
        floors: Least units of an axis by regular expression on its name. An int counts units, a
            float is a share of the axis as built.
        caps: Most units, likewise.
        pins: Exact units, likewise.
        floor: Smallest share of every axis that stays. With 0 whole sublayers may vanish.
        multiple: Neuron widths are multiples of this.
        relevance: Which part of the layer above matters: ``"gradient"`` (what the loss depends on),
            ``"readers"`` (what the weights kept above use) or None (all of it alike). Gradients
            are taken from ordinary training steps.
        relevance_steps: Training steps to take gradients from. Those of an epoch, over all ranks.
        selection: ``"conditional"`` (joint information) or ``"topk"`` (every unit alone). The first
            is exact backward elimination, the second the literal reading of the paper's abstract.
        fold_in: Whether the readers' weights absorb the dropped units by least squares.
        refit: Whether output projections are solved again on the inputs of the cut model.
        refit_positions: Validation positions to store for that. Over all ranks; more are better.
        positions: Samples to collect for each axis. In one validation run.
        latency_table: JSON file of measured latencies; measured and written if it is not there.
        latency_batch: Examples in the call that is timed.
        ramp: ``"cubic"``, ``"linear"`` or ``"one_shot"`` growth of the sparsity over the cuts.
        cuts: Number of cuts; default: what fits, at most 4.
        first_epoch: Epoch that starts with the first cut, by Lightning's number
            (``trainer.current_epoch``, which counts from 0); at least 1, because a validation
            comes before it. Default 1.
        last_epoch: Epoch that starts with the last cut, by the same number; default: half-way
            through the run.
        seed: Seed of the draw of positions.
        verbose: Whether each cut prints a table on rank zero.
        max_drop: Largest loss of ``monitor``, in its own unit, that a cut may cost once it has
            recovered, against the best value of the models before it. A cut that costs more is
            taken back: weights, optimizer state and plan. None keeps every cut.
        monitor: Metric that ``max_drop`` watches, as validation logs it.
        mode: ``"max"`` if more of it is better, ``"min"`` if less is.
        on_drop: After a cut was taken back, ``"halve"`` the step or ``"stop"`` cutting.
        best_of: Which models ``ModelCheckpoint(monitor=...)``, ``EarlyStopping`` and
            ``ReduceLROnPlateau`` may compare. ``"final_size"``: those of the present size;
            checkpoints of other sizes are the first to be replaced. ``"each_size"``: the same, but
            the best of every size stays on disk. ``"any_size"``: all, as if nothing was pruned.
            Unless it is ``"any_size"``, early stopping waits for the last cut.

    Raises:
        MisconfigurationException: If an option is outside its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = MutualInformationPruning(sparsity=0.5)
        >>> trainer = pl.Trainer(max_epochs=8, callbacks=[callback], logger=False)

    See Also:
        Fan et al., "Layer-wise Model Pruning based on Mutual Information", EMNLP 2021. Only its
        abstract fixed this reading: the estimator, the treatment of heads and the schedule are
        ours.
    """

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        target_parameters: int | None = None,
        target_macs: int | None = None,
        target_latency_ms: float | None = None,
        keep_information: float | None = None,
        units: list[str] | None = None,
        module: str | None = None,
        include: str | None = None,
        exclude: str | None = None,
        widths: Literal["global", "uniform"] = "global",
        floors: dict[str, int | float] | None = None,
        caps: dict[str, int | float] | None = None,
        pins: dict[str, int | float] | None = None,
        floor: float = 0.0,
        multiple: int = 8,
        relevance: Literal["gradient", "readers"] | None = "gradient",
        relevance_steps: int = 64,
        selection: Literal["conditional", "topk"] = "conditional",
        fold_in: bool = True,
        refit: bool = True,
        refit_positions: int = 16384,
        positions: int = 16_384,
        latency_table: str | None = None,
        latency_batch: int = 1,
        ramp: Ramp = "cubic",
        cuts: int | None = None,
        first_epoch: int | None = None,
        last_epoch: int | None = None,
        seed: int = 0,
        verbose: bool = True,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        on_drop: Literal["halve", "stop"] = "halve",
        best_of: BestOf = "final_size",
    ) -> None:
        options = without_private(locals())
        between("floor", floor, 0, 1, closed=True)
        check_types(
            include=include,
            exclude=exclude,
            module=module,
            latency_table=latency_table,
            fold_in=fold_in,
            refit=refit,
            verbose=verbose,
        )
        check_counts(
            seed=seed,
            multiple=multiple,
            positions=positions,
            refit_positions=refit_positions,
            relevance_steps=relevance_steps,
            latency_batch=latency_batch,
            cuts=cuts,
            first_epoch=first_epoch,
            last_epoch=last_epoch,
        )
        check_choices(widths=widths, relevance=relevance, best_of=best_of)
        check_order(ramp, cuts, first_epoch, last_epoch)
        check_regex("include", include)
        check_regex("exclude", exclude)
        check_units(units)
        targets = (target_parameters, target_macs, target_latency_ms, keep_information)
        try:
            self.method = Method(
                budget=asked_budget(sparsity, *targets),
                criterion=MutualInformation(selection=selection),
                widths=widths,
                relevance=relevance,
                fold_in=fold_in,
                refit=refit,
                refit_positions=refit_positions,
                limits=Limits(floors or {}, caps or {}, pins or {}, floor),
                multiple=multiple,
                latency_table=latency_table,
                latency_batch=latency_batch,
            )
        except PruningError as error:
            raise MisconfigurationException(str(error)) from error
        super().__init__(
            module=module or "",
            positions=positions,
            calls=refit_positions if refit else 0,
            steps=relevance_steps if relevance == "gradient" else 0,
            seed=seed,
            verbose=verbose,
            best_of=best_of,
            budget=accuracy_budget(max_drop, monitor, mode, on_drop),
        )
        self._options = options
        self._units, self._include, self._exclude = units, include, exclude
        self._ramp: Ramp = ramp
        self._cuts, self._first, self._last = cuts, first_epoch, last_epoch

    @override
    def choose(self, axes: list[WidthAxis], modules: list[str]) -> list[WidthAxis]:
        return choose_axes(
            axes,
            units=self._units,
            include=self._include,
            exclude=self._exclude,
            modules=modules,
        )

    @override
    def check(
        self, module: pl.LightningModule, axes: list[WidthAxis], widths: Mapping[str, int]
    ) -> None:
        method, sparsity = self.method, self.left_to_reach(self._goal)
        if method.budget.kind == "sparsity":
            if sparsity <= 0:  # layers that are gone were enough
                return
            method = replace(method, budget=Budget(sparsity))
        allowed, has = method.budget.target_parameters, sum(p.numel() for p in module.parameters())
        if allowed is not None and allowed >= has and self._kept().plan.is_full:
            raise PruningError(
                f"target_parameters={allowed}, but the module has {number(has)} as built: "
                "nothing to cut. Ask for fewer."
            )
        method.check(module, self._kept().axes, axes, widths, writes=module.trainer.is_global_zero)

    @property
    def _goal(self) -> float:
        """Where the schedule ends: the sparsity, or all of the way to another budget."""
        budget = self.method.budget
        return budget.amount if budget.kind == "sparsity" else 1.0

    @override
    def aim(self) -> str:
        budget = self.method.budget
        return "" if budget.kind == "sparsity" else str(budget)

    @override
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        return self._fit(length, self._goal, every, begin, ramp=self._ramp, cuts=self._cuts)

    @override
    def decide(
        self, module: pl.LightningModule, heard: Heard, goal: float, kept: float
    ) -> Selection | None:
        keeper = self._kept()
        heard.examples = self._run.examples
        if self.method.budget.kind == "sparsity":
            goal = self.left_to_reach(goal)
        if goal <= 0:
            return None
        return self.method.decide(
            module,
            keeper.axes,
            self._standing,
            keeper.plan,
            heard,
            progress=min(1.0, goal / self._goal),
            kept=kept,
            tables=self._run.tables,
        )

    @override
    def pull_back(
        self, trainer: pl.Trainer, module: pl.LightningModule, selection: Selection, heard: Heard
    ) -> Selection:
        keeper, strategy = self._kept(), trainer.strategy
        return pull_back(
            module,
            keeper.axes,
            keeper.plan,
            selection,
            self.method,
            heard,
            partial(add_up, strategy),
            trainer.global_rank,
            world_size(strategy),
        )
