"""MutualInformationPruning: the method of Fan et al. (2021) as one callback, in our reading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_mi_prune.axes import WidthAxis, choose_axes
from lightning_mi_prune.budget import uniform_widths
from lightning_mi_prune.callbacks.accuracy import AccuracyBudget
from lightning_mi_prune.callbacks.base import PruningCallback
from lightning_mi_prune.callbacks.companions import BestOf
from lightning_mi_prune.callbacks.options import (
    at_least,
    between,
    check_budget,
    check_order,
    check_regex,
    is_one_of,
)
from lightning_mi_prune.callbacks.schedule import Ramp, Schedule, fit_schedule, judging_epoch
from lightning_mi_prune.criteria import MutualInformation
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.selection import Selection, select

__all__ = ["MutualInformationPruning"]


class MutualInformationPruning(PruningCallback):
    """Make the encoder smaller while it trains, keeping the units that inform the layer above.

    During validation the callback listens to the input of every output projection. At the end of
    the epoch it sweeps from the top of the network down and keeps, on each axis, the units with
    the most mutual information with what was kept above. At the start of the next epoch it swaps
    in smaller dense layers, carries the optimizer's state across, and training goes on.

    Args:
        sparsity: Share of the prunable parameters to remove by the last cut, against the model as
            built; between 0 and 1.
        units: Kinds of unit to cut: ``"ffn"``, ``"heads"``, ``"pooler"``. Default: the first two
            (whichever the model has).
        module: Path of the submodule to search, such as ``"encoder"``; default: the whole module.
        include: Regular expression; only axes whose name it finds are cut.
        exclude: Regular expression; axes whose name it finds are left alone.
        selection: ``"conditional"`` (joint information, exact backward elimination) or ``"topk"``
            (every unit alone, the literal reading of the paper's abstract).
        ridge: Noise on the layer above as a share of its mean variance.
        fold_in: Whether the readers' weights absorb the dropped units by least squares.
        multiple: Neuron widths are multiples of this.
        floor: Smallest share of an axis that always stays.
        positions: Samples to listen to on each axis in a validation run.
        ramp: ``"cubic"``, ``"linear"`` or ``"one_shot"`` growth of the sparsity over the cuts.
        cuts: Number of cuts; default: what fits, at most 4.
        first_epoch: Training epoch (from 1) that starts with the first cut; default 1.
        last_epoch: Epoch of the last cut; default: half-way through the run.
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
        sparsity: float = 0.5,
        *,
        units: list[str] | None = None,
        module: str | None = None,
        include: str | None = None,
        exclude: str | None = None,
        selection: Literal["conditional", "topk"] = "conditional",
        ridge: float = 0.1,
        fold_in: bool = True,
        multiple: int = 8,
        floor: float = 0.05,
        positions: int = 16_384,
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
        between("sparsity", sparsity, 0, 1)
        between("floor", floor, 0, 1, closed=True)
        for name, given, kinds in (
            ("ridge", ridge, (int, float)),
            ("include", include, (str, type(None))),
            ("exclude", exclude, (str, type(None))),
            ("module", module, (str, type(None))),
            ("fold_in", fold_in, (bool,)),
            ("verbose", verbose, (bool,)),
        ):
            is_one_of(name, given, kinds)
        for name, value, least in (
            ("seed", seed, 0),
            ("multiple", multiple, 1),
            ("positions", positions, 2),
            ("cuts", cuts, 1),
            ("first_epoch", first_epoch, 1),
            ("last_epoch", last_epoch, 1),
        ):
            at_least(name, value, least)
        check_order(ramp, cuts, first_epoch, last_epoch)
        for name, expression in (("include", include), ("exclude", exclude)):
            check_regex(name, expression)
        if units is not None and (isinstance(units, str) or not units):
            raise MisconfigurationException(
                f"units={units!r}; expected a list of kinds such as ['ffn', 'heads']."
            )
        check_budget(max_drop, monitor, mode, on_drop)
        if best_of not in get_args(BestOf):
            raise MisconfigurationException(
                f"best_of={best_of!r}; expected one of {get_args(BestOf)}."
            )
        budget = None
        if max_drop is not None and monitor is not None:
            budget = AccuracyBudget(float(max_drop), monitor, mode, on_drop)
        super().__init__(
            module=module or "",
            positions=positions,
            seed=seed,
            verbose=verbose,
            best_of=best_of,
            budget=budget,
        )
        try:
            self._criterion = MutualInformation(selection=selection, ridge=ridge)
        except PruningError as error:
            raise MisconfigurationException(str(error)) from error
        self.sparsity = float(sparsity)
        self._units = units
        self._include, self._exclude = include, exclude
        self._fold_in, self._multiple, self._floor = fold_in, multiple, floor
        self._ramp: Ramp = ramp
        self._cuts, self._first, self._last = cuts, first_epoch, last_epoch

    @override
    def choose(self, axes: list[WidthAxis]) -> list[WidthAxis]:
        return choose_axes(axes, units=self._units, include=self._include, exclude=self._exclude)

    @override
    def check(self, axes: list[WidthAxis]) -> None:
        uniform_widths(axes, self.sparsity, multiple=self._multiple, floor=self._floor)

    @override
    def schedule(self, length: float, every: int, begin: int) -> Schedule:
        try:
            found = fit_schedule(
                length,
                self.sparsity,
                ramp=self._ramp,
                cuts=self._cuts,
                first_epoch=self._first,
                last_epoch=self._last,
                every=every,
                begin=begin,
                recovery=1 if self._budget is None else 2,
            )
        except PruningError as error:
            raise MisconfigurationException(str(error)) from error
        judged = judging_epoch(found.epochs[-1], None, length, every)
        if self._budget is not None and (judged + 1) % every:
            raise MisconfigurationException(
                f"No validation comes after the last cut at epoch {found.epochs[-1]} in time to "
                f"take it back in a run of {length:g} epochs; lower last_epoch or raise max_epochs."
            )
        return found

    @override
    def widths(self, axes: list[WidthAxis], sparsity: float) -> dict[str, int]:
        # No step may go below the end of the ramp: rounding heads up makes neurons go further down.
        step, end = (
            uniform_widths(axes, s, multiple=self._multiple, floor=self._floor)
            for s in (sparsity, self.sparsity)
        )
        return {name: max(width, end[name]) for name, width in step.items()}

    @override
    def select(
        self,
        axes: list[WidthAxis],
        moments: Mapping[str, Moments],
        weights: Mapping[str, Tensor],
        widths: Mapping[str, int],
        current: Plan,
    ) -> Selection:
        return select(
            axes,
            moments,
            weights,
            widths,
            current,
            self._criterion,
            fold_in=self._fold_in,
            ridge=self._criterion.ridge,
        )
