"""CKALayerPruning: whole layers removed by CKA similarity (MPruner), as one callback."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_mi_prune.calibration.activations import Recorder
from lightning_mi_prune.calibration.calls import update_calls
from lightning_mi_prune.calibration.data import CalibrationData, LayerComparison
from lightning_mi_prune.calibration.layers import StackRecorder
from lightning_mi_prune.callbacks.base import PruningCallback, as_misconfiguration, checked_options
from lightning_mi_prune.callbacks.distributed import gather_ranks, sum_over_ranks, sum_tensor
from lightning_mi_prune.callbacks.losses import BatchCollection, measure_removal
from lightning_mi_prune.callbacks.schedule import CutSchedule, validation_batches
from lightning_mi_prune.callbacks.state import PendingCut, Session
from lightning_mi_prune.callbacks.verification import check_surroundings, without_frozen
from lightning_mi_prune.core import options
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.graph.containers import layer_paths, stack_at
from lightning_mi_prune.graph.graph import PruningGraph, check_within
from lightning_mi_prune.graph.groups import LayerStack, is_within
from lightning_mi_prune.importance.layer_criteria import LayerCriterion, LayerSelector, StackCut
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.removed_layers import compensate_removed_layers
from lightning_mi_prune.reporting.records import Cut
from lightning_mi_prune.surgery.optimizer_state import check_optimizers

__all__ = [
    "CKALayerPruning",
    "LayerStrategy",
]

_LARGEST_STEP = 3  # MPruner stops when every third layer of a cluster is too much to lose


class LayerStrategy:
    """Removes layers.

    Args:
        selector: How the layers that go are chosen.
        similarity: How they are compared.
        reconstruction: Whether the layers that stay make up for them.
        schedule: When to cut; ``cuts`` is the largest number of attempts.
        stacks: Paths of the containers; None finds them.
        module: Path of the submodule to search for them; "" searches all.
        guarded: Whether a cut that costs too much is rolled back.
    """

    order = 0
    goal = 1.0
    budget = ""
    late: bool

    def __init__(
        self,
        selector: LayerSelector,
        similarity: options.Similarity,
        reconstruction: options.Reconstruction,
        schedule: options.Schedule,
        *,
        stacks: list[str] | None,
        module: str,
        guarded: bool,
    ) -> None:
        cuts = schedule.cuts if schedule.cuts is not None or guarded else 1
        self.schedule = replace(schedule, ramp="linear", cuts=cuts)
        # Layers are reconstructed best in a well-trained model; attempts need time to be undone.
        self.late = not guarded
        self.selector = selector
        self.steps: BatchCollection | None = None
        if selector.criterion == "measured_loss":
            self.steps = BatchCollection(similarity.loss_steps)
        self._similarity, self._calls = similarity, reconstruction.stored_positions
        self._paths, self._within = stacks, module
        self.needs_graph = stacks is None
        self._stacks: list[LayerStack] = []

    @property
    def _stored(self) -> int:
        """Positions of inputs to store: none where it is not known what layers add."""
        return self._calls if any(stack.residual_branches for stack in self._stacks) else 0

    @property
    def _names(self) -> list[str]:
        return [stack.name for stack in self._stacks]

    def check_paths(self, module: nn.Module) -> None:
        check_within(module, self._within)
        for path in dict.fromkeys(self._paths or ()):
            stack = stack_at(module, path)
            if stack is None or stack.size > 1:  # a stack may have been cut to one layer
                layer_paths(module, path)
        _check_reached(module, self._paths or ())

    def _add_given(self, session: Session) -> None:
        """Add stacks that only the user knows of: a call does not show that layers can go."""
        known = {stack.name for stack in session.graph.stacks}
        given = [stack_at(session.module, path) for path in self._paths or () if path not in known]
        added = tuple(stack for stack in given if stack is not None)
        if added:
            session.tracker.extend(PruningGraph(stacks=added))

    def prepare(self, session: Session) -> Mapping[str, object]:
        self._add_given(session)
        module, stacks, state = session.module, session.graph.stacks, session.state
        if self._paths is None:  # one layer, as in a short decoder, is no stack to shorten
            mine = [stack for stack in stacks if is_within(stack.name, self._within)]
            mine = [stack for stack in mine if stack.size > 1] or mine
        else:
            mine = [stack for stack in stacks if stack.name in self._paths]
        if not mine:
            refused = [r for r in session.graph.refused if r.kind == "depth"]
            why = "; ".join(f"{each.name!r} can lose none: {each.reason}" for each in refused)
            raise PruningError(
                f"No stack of layers was found in {type(module).__name__}"
                f"{f' below module={self._within!r}' if self._within else ''}; expected layers "
                f"that run one after another. There are {[s.name for s in stacks] or 'none'}."
                f"{f' {why}.' if why else ''}"
            )
        self._stacks = without_frozen(module, mine)
        _check_reached(module, self._names)
        check_surroundings(session, self.parameters(session), set(self._names))
        for stack in self._stacks:
            if session.plan.width(stack.name) > 1 or stack.size < 2:
                layer_paths(module, stack.name)
            target = self.selector.target or 1
            if target > stack.size:
                raise PruningError(
                    f"target_layers={target}, but {stack.name!r} has "
                    f"{counted(stack.size, 'layer')} as built; expected no more."
                )
        if not state.report.parameters:
            left, report = self._parameters_left(session), session.begin_report()
            state.report = replace(
                report,
                prunable_parameters=left + session.absent_parameters(self._names),
                start={**report.start, "prunable_parameters": left},
            )
        check_optimizers(session.trainer.strategy.optimizers, self.parameters(session))
        return {f"the size of {stack.name!r}": stack.size for stack in self._stacks}

    def reconcile(self, session: Session) -> list[str]:
        state, plan, dropped = session.state, session.plan, []
        names, data = set(self._names), state.calibration
        present = {name: plan.kept[name] for name in names if plan.width(name) > 1}
        if data is not None and {n: c.layers for n, c in data.stacks.items()} != present:
            state.calibration = None
            dropped.append("Calibration was of other layers; a cut waits for validation.")
        elif data is not None and self._stored and not any(data.ranks):
            state.calibration = None
            dropped.append("No inputs were stored to reconstruct from; a cut waits for validation.")
        elif data is not None and not self._is_measured(
            data, self._goal(session, state.calibration_epoch)
        ):
            state.calibration = None
            dropped.append("Losses were measured without other layers; a cut waits for validation.")
        if self.steps is not None:
            self.steps.resume(session)
        else:
            state.batches = []
        if state.pending is not None and not (
            set(state.comparison.stacks) <= names and self._would_choose(session, state.pending)
        ):
            state.pending = None
            dropped.append("The pending cut was chosen by other options; it is chosen again.")
        return dropped

    def _would_choose(self, session: Session, pending: PendingCut) -> bool:
        """Whether the present options lead to a cut that is decided."""
        kept = pending.decision.plan.kept
        if not self._is_measured(session.state.comparison, pending.sparsity):
            return False
        choices = self._choices(session, session.state.comparison, pending.sparsity)
        return all(kept.get(choice.name, choice.before) == choice.after for choice in choices)

    def parameters(self, session: Session) -> list[nn.Parameter]:
        layers = [session.module.get_submodule(name) for name in self._names]
        return [parameter for layer in layers for parameter in layer.parameters()]

    def _parameters_left(self, session: Session) -> int:
        return sum(p.numel() for p in self.parameters(session))

    def plan_to_verify(self, session: Session) -> PruningPlan | None:
        plan = session.plan
        shorter = {
            stack.name: plan.kept[stack.name][:-1]
            for stack in self._stacks
            if plan.width(stack.name) > max(1, stack.fixed)
        }
        return session.graph.keep_layers(plan, shorter) if shorter else None

    def recorder(self, session: Session) -> StackRecorder:
        return StackRecorder(
            session.module,
            [stack for stack in self._stacks if session.plan.width(stack.name) > 1],
            positions=self._similarity.positions,
            kernel=self._similarity.kernel,
            bandwidth=self._similarity.bandwidth,
            seed=self.selector.seed,
            calls=-(-self._stored // session.world),
            batches=validation_batches(session.trainer),
        )

    def collect(self, session: Session, recorder: Recorder) -> CalibrationData | None:
        assert isinstance(recorder, StackRecorder)  # noqa: S101
        state, strategy = session.state, session.trainer.strategy
        state.examples = update_calls(state.examples, recorder.examples)
        state.seconds |= {"calibration": recorder.seconds}
        sum_over_ranks(strategy, recorder.sums)
        stacks = recorder.compared(session.plan)
        if self.steps is not None:
            started = time.perf_counter()
            measured = self._measured(session, stacks)
            if measured is None:
                rank_zero_warn(
                    f"The cut of epoch {session.trainer.current_epoch + 1} waits: no training step "
                    "to measure a loss in ran before the last validation of this epoch."
                )
                return None
            stacks, state.batches = measured, []
            state.seconds["calibration"] += time.perf_counter() - started
        data = CalibrationData(stacks=stacks)
        if self._stored:
            data.ranks = gather_ranks(strategy, move_tensors(recorder.stored, torch.device("cpu")))
        return data

    def _goal(self, session: Session, epoch: int) -> float:
        """How far the cut after the validation of an epoch goes."""
        return session.state.schedule.due(epoch + 1, session.state.reached) or 1.0

    def _measured(
        self, session: Session, stacks: Mapping[str, LayerComparison]
    ) -> dict[str, LayerComparison] | None:
        """The same with losses for the goal that is next; None where there is no batch."""
        built = {stack.name: stack for stack in self._stacks}
        found = dict(stacks)
        for name, compared in stacks.items():
            goal = self._goal(session, session.trainer.current_epoch)
            count = self._count(name, compared, goal)
            if count:
                losses = measure_removal(session, built[name], count, compared.fixed)
                if losses is None:
                    return None
                found[name] = replace(compared, losses=losses)
        return found

    def _count(self, name: str, compared: LayerComparison, goal: float) -> int:
        built = {stack.name: stack.size for stack in self._stacks}
        return self.selector.number_to_remove(compared, goal, built[name])

    def _is_measured(self, data: CalibrationData, goal: float) -> bool:
        """Whether losses are known for the numbers of layers that go, where they decide."""
        return self.steps is None or all(
            len(compared.losses.removed if compared.losses else ())
            == self._count(name, compared, goal)
            for name, compared in data.stacks.items()
        )

    def decide(self, session: Session, data: CalibrationData, goal: float) -> Decision | None:
        choices = self._choices(session, data, goal)
        layers = {choice.name: choice.after for choice in choices if choice.removed}
        return Decision(session.graph.keep_layers(session.plan, layers), {}, {}) if layers else None

    def _choices(
        self, session: Session, data: CalibrationData, goal: float
    ) -> tuple[StackCut, ...]:
        sizes = {stack.name: stack.size for stack in self._stacks}
        return tuple(
            self.selector.choose(
                name,
                compared,
                every=session.state.cluster_step,
                progress=goal,
                built=sizes[name],
            )
            for name, compared in sorted(data.stacks.items())
        )

    def reconstruct(self, session: Session, decision: Decision, data: CalibrationData) -> Decision:
        if not self._stored:
            if self._calls:
                rank_zero_info(
                    f"Nothing is reconstructed: what layers of {self._names} add is not known."
                )
            return decision
        try:
            return compensate_removed_layers(
                session.module,
                session.graph,
                session.plan,
                decision,
                data,
                positions=self._calls,
                add=partial(sum_tensor, session.trainer.strategy),
                rank=session.trainer.global_rank,
                world=session.world,
            )
        except PruningError as error:  # a layer can go without; training will make up for it
            rank_zero_warn(f"No layer makes up for the removed ones: {error}")
            return decision

    def record(self, session: Session, pending: PendingCut, before: PruningPlan) -> Cut:
        state, left = session.state, self._parameters_left(session)
        choices = self._choices(session, state.comparison, pending.sparsity)
        return Cut(
            epoch=pending.epoch,
            sparsity=1 - left / state.report.prunable_parameters,
            parameters=sum(p.numel() for p in session.module.parameters()),
            prunable_parameters=left,
            macs=session.count_macs(),
            groups=(),
            seconds=state.seconds,
            stacks=tuple(choice for choice in choices if choice.removed),
        )

    def sizes(self, session: Session) -> dict[str, float]:
        left, built = self._parameters_left(session), session.state.report.prunable_parameters
        depths = {f"depth/{name}": session.plan.width(name) for name in self._names}
        return {**depths, "sparsity": 1 - left / built}

    def retry(self, session: Session, failed: float, end: float) -> str:
        state, epoch = session.state, session.trainer.current_epoch

        def removed() -> list[tuple[int, ...]]:
            choices = self._choices(session, state.comparison, failed)
            return [choice.removed for choice in choices]

        left, tried = state.schedule.left(failed), removed()
        state.schedule, state.cluster_step = CutSchedule(), state.cluster_step + 1
        while state.cluster_step <= _LARGEST_STEP and removed() == tried:
            state.cluster_step += 1
        if not left or state.cluster_step > _LARGEST_STEP or self.selector.criterion != "cka":
            return "no further cut"
        # The model is the one that was compared: it needs no calibration again.
        state.calibration, state.calibration_epoch = replace(state.comparison), epoch - 1
        step = (1 - failed) / max(1, len(left) - 1)
        goals = tuple(failed + step * place for place in range(len(left)))
        state.schedule = CutSchedule((epoch, *left[1:]), goals)
        return f"one of {state.cluster_step} layers of a cluster now"

    def name_goal(self, goal: float) -> str:
        return "fewer layers"

    def no_cut(self, session: Session, data: CalibrationData, goal: float) -> tuple[str, str]:
        session.state.schedule = CutSchedule()
        near = [f"{c.largest_neighbor_cka:.3f} in {name!r}" for name, c in data.stacks.items()]
        return (
            f"No layer is left to remove: the most alike neighbours have CKA "
            f"{', '.join(near) or '(none)'}, threshold={self.selector.threshold}, "
            f"target_layers={self.selector.target}.",
            "Lower threshold, or set target_layers and threshold=None.",
        )


class CKALayerPruning(PruningCallback):
    """Take layers out of a model while it trains, where others compute much the same.

    Validation compares all layers of a stack (centered kernel alignment). Neighbours that are alike
    form clusters; the next epoch starts with all but the first of each taken out. The first makes
    up for the others, and training goes on. With ``max_drop`` a cut that costs too much
    after its recovery is rolled back exactly, and every second, then every third layer of a cluster
    is tried instead.

    Args:
        threshold: Least CKA with the first layer of a cluster, above 0 and up to 1. None takes the
            clusters that lose least on the way to ``target_layers``.
        target_layers: Fewest layers that stay in every stack; None leaves it to the threshold.
        criterion: ``"cka"``, or one that needs ``target_layers``: ``"measured_loss"`` removes those
            without which the loss of ``training_step``, on ``similarity.loss_steps`` batches, is
            lowest, greedily or as one run of neighbours. Or what people do instead: ``"angle"``
            removes the layers that turn their input least (ShortGPT), ``"angular_run"`` the run of
            layers that together turn it least (Gromov et al.), ``"last"`` the top ones,
            ``"random"`` any.
        stacks: Paths of the containers whose layers may go, such as ``"model.encoder.block"`` or
            ``"backbone.layer3"``; default: all that are found.
        module: Path of the submodule to search for them; default: the whole module.
        graph: What the model can lose, or a file that holds it; default: what describes the model,
            else what its first batch shows.
        max_drop: Largest loss of ``monitor``, in its own unit, that a cut may cost once it has
            recovered, against the best value of the models before it. None keeps every cut.
        monitor: Metric that ``max_drop`` compares, as validation logs it.
        similarity: How layers are compared.
        reconstruction: Whether layers that stay make up for the removed ones above them, by least
            squares on stored inputs, before training goes on; where all that layers add comes from
            linear layers. ``"layerwise"`` or ``"none"``.
        schedule: ``cuts`` is the largest number of attempts. Default: 1, half-way through the run;
            with ``max_drop`` what fits, at most 4.
        monitoring: How metrics are compared while the model changes its size.
        seed: Seed of the draw of positions, and of ``"random"``.
        verbose: Whether each cut prints a table on rank zero.
        write_report: Whether a run that cut something ends with ``report.html`` and
            ``report.json`` in the folder of the logger, if there is one; or a path of either, to
            write that instead.

    Raises:
        MisconfigurationException: If an option is outside its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = CKALayerPruning(max_drop=0.01, monitor="val_acc")
        >>> trainer = pl.Trainer(max_epochs=8, callbacks=[callback], logger=False)

    See Also:
        Hu et al., "MPruner", 2024 (arXiv 2408.13482). Beside MutualInformationPruning in
        one Trainer, layers go in the first half of the run and units in the second.
    """

    def __init__(
        self,
        threshold: float | None = 0.98,
        *,
        target_layers: int | None = None,
        criterion: LayerCriterion = "cka",
        stacks: list[str] | None = None,
        module: str | None = None,
        graph: PruningGraph | str | None = None,
        max_drop: float | None = None,
        monitor: str | None = None,
        similarity: options.Similarity = options.Similarity(),
        reconstruction: options.Reconstruction = options.Reconstruction(),
        schedule: options.Schedule = options.Schedule(),
        monitoring: options.Monitoring = options.Monitoring(),
        seed: int = 0,
        verbose: bool = True,
        write_report: bool | str = True,
    ) -> None:
        given = checked_options(CKALayerPruning, locals())
        if stacks is not None and (isinstance(stacks, str) or not stacks or module):
            raise MisconfigurationException(
                f"stacks={stacks!r}, module={module!r}; expected one of the two, stacks as a list "
                "of paths such as ['model.encoder.layer']."
            )
        if reconstruction.method == "compensation":
            raise MisconfigurationException(
                "reconstruction.method='compensation' is for units; expected 'layerwise' or 'none' "
                "where whole layers go."
            )
        if schedule.ramp not in (None, "linear"):
            raise MisconfigurationException(
                f"schedule.ramp={schedule.ramp!r} is for units; whole layers are removed at a "
                "linear rate. Drop ramp."
            )
        with as_misconfiguration():
            selector = LayerSelector(threshold, target_layers, criterion, seed)
        super().__init__(
            LayerStrategy(
                selector,
                similarity,
                reconstruction,
                schedule,
                stacks=stacks,
                module=module or "",
                guarded=max_drop is not None,
            ),
            given,
            graph=graph,
            max_drop=max_drop,
            monitor=monitor,
            monitoring=monitoring,
            verbose=verbose,
            write_report=write_report,
        )


def _check_reached(module: nn.Module, stacks: Sequence[str]) -> None:
    """Refuse stacks that are only reached through attribute access of a wrapper."""
    unknown = sorted(set(stacks) - {name for name, _ in module.named_modules()})
    if unknown:
        raise PruningError(
            f"{unknown} are reached through a wrapper, such as that of PEFT; expected paths as "
            "named_modules() has them. Merge adapters first (merge_and_unload), or give those."
        )
