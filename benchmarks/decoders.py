"""Decoders with real weights: perplexity after neurons, and KV heads with their queries, are gone.

All methods share one calibration of a model and seed: 64 pieces of 128 tokens. Perplexity is that
of 48 pieces of other files. `decoders` cuts in one shot, `decoders_trained` inside `Trainer.fit`.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler, TensorDataset

from benchmarks.baselines import pruned_by_library, torch_pruning
from benchmarks.language import MODELS, as_batches, brown, loaded, pieces_of, score_tokens
from benchmarks.methods import CRITERIA as METHOD_CRITERIA
from benchmarks.methods import Name, Widths
from benchmarks.records import Figures, Job, single
from benchmarks.subjects import Subject, calibrate_gradients, cut, graph_of
from benchmarks.tasks import Batch, trainer_for
from benchmarks.zoo.measuring import TimeLimitError, time_limit
from examples.decoder import LanguageModel
from lightning_mi_prune import MutualInformationPruning, PruningPlan, apply_plan
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.macs import macs_of_calls
from lightning_mi_prune.calibration.collect import collect_activations
from lightning_mi_prune.core.options import Importance, Reconstruction
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import DependencyGroup, count_parameters, full_plan
from lightning_mi_prune.importance.criteria import MutualInformation
from lightning_mi_prune.importance.elimination import Elimination
from lightning_mi_prune.importance.statistics import UnitStatistics, unit_statistics
from lightning_mi_prune.pipeline import PipelineOptions

__all__ = [
    "COMPENSATIONS",
    "METHODS",
    "OURS",
    "WAYS",
    "Way",
    "decoders",
    "decoders_trained",
    "name_of",
]

CALIBRATION, TEST = 64, 48  # pieces
SPARSITIES = (0.15, 0.25, 0.4)
UNITS = ("ffn", "heads")
LIMIT = 60.0  # seconds of the processor for a cut by a library


class Fluctuation:
    """The score of FLAP without its biases and its widths: see `fluctuations`."""

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """Order the units by it, smallest first."""
        scores = torch.stack([fluctuations(each).sum(1) for each in statistics]).sum(0)
        order = torch.argsort(scores, stable=True)
        return Elimination(tuple(order.tolist()), tuple(scores[order].tolist()))


@dataclass(frozen=True)
class Remembered(MutualInformation):
    """Mutual information whose orders are found once: with gradients they depend on no budget.

    Args:
        found: Orders by group, with the seconds of the processor that they took.
        spared: Seconds that were spared since it was emptied.
    """

    found: dict[str, tuple[Elimination, float]] = field(default_factory=dict)
    spared: list[float] = field(default_factory=list)

    def rank(self, statistics: Sequence[UnitStatistics], keep: int) -> Elimination:
        """The whole order of the units, as the package puts them."""
        name = statistics[0].name
        if name in self.found:
            self.spared.append(self.found[name][1])
        else:
            started = time.process_time()
            order = super().rank(statistics, 0)
            self.found[name] = order, time.process_time() - started
        return self.found[name][0]


@lru_cache(maxsize=1)
def remembered(name: str, seed: int, units: str) -> Remembered:
    """The orders of a model and seed; where heads go too, dimensions are shared with them."""
    return Remembered()


CRITERIA = METHOD_CRITERIA | {"fluctuation": lambda seed: Fluctuation()}


@dataclass(frozen=True)
class Way:
    """A method with its widths and what it does to the weights that stay.

    Args:
        method: Its name.
        widths: Whether groups compete for the budget or all keep the same share.
        compensation: What is done to the weights that stay: what `Reconstruction.method` names,
            or "bias".
    """

    method: str
    widths: Widths
    compensation: Literal["none", "compensation", "layerwise", "bias"]

    @property
    def name(self) -> Name:
        """What distinguishes it from all others."""
        return self.method, self.widths, self.compensation

    def options(self, sparsity: float, seed: int) -> PipelineOptions:
        """The options of the package for one budget."""
        assert self.compensation != "bias"  # noqa: S101
        return PipelineOptions(
            Budget(sparsity=sparsity),
            self.widths,
            reconstruction=Reconstruction(self.compensation),
            criterion=CRITERIA[self.method](seed),
        )


DENSE = Way("dense", "uniform", "none")
OURS = Way("relevance-mi", "global", "layerwise")
FLAP, LIBRARY = "flap", "torch-pruning-"
WAYS = (
    # As published: ours, and what others do.
    OURS,
    Way("activation-norm", "uniform", "none"),
    Way(FLAP, "global", "bias"),
    Way("taylor", "uniform", "none"),
    Way("taylor", "global", "none"),
    Way("magnitude", "uniform", "none"),
    Way("random", "uniform", "none"),
    Way(f"{LIBRARY}magnitude", "uniform", "none"),
    Way(f"{LIBRARY}taylor", "uniform", "none"),
    # Parts of ours, and the scores of others with our widths and our weights.
    Way("relevance-mi", "global", "none"),
    Way("relevance-mi", "global", "compensation"),
    Way("relevance-mi", "uniform", "layerwise"),
    *(
        Way(method, "global", weights)
        for weights in ("compensation", "layerwise")
        for method in ("activation-norm", "fluctuation", "taylor", "magnitude", "random")
    ),
)
COMPENSATIONS = ("none", "compensation", "layerwise", "bias")
METHODS = (*dict.fromkeys(way.method for way in WAYS),)


def name_of(record: Mapping[str, Any] | Any) -> Name:
    """Method, widths and compensation of a record."""
    return record["method"], record["widths"], record["compensation"]


def decoders(
    models: Sequence[str] = MODELS,
    seeds: Sequence[int] = (0,),
    sparsities: Sequence[float] = SPARSITIES,
    methods: Sequence[str] = (),
    units: Sequence[str] = ("ffn", "ffn+heads"),
    compensations: Sequence[str] = (),
) -> Iterator[Job]:
    """Perplexity of decoders in one shot, beside the dense model."""
    places = (
        (s, m, u, share) for s in seeds for m in models for u in units for share in sparsities
    )
    for seed, model, kinds, sparsity in places:
        for way in WAYS:
            if (not methods or way.method in methods) and (
                not compensations or way.compensation in compensations
            ):
                yield single(
                    _about(model, kinds, way, sparsity, 0) | {"seed": seed},
                    *(measured, model, seed, kinds, way, sparsity),
                )


def _about(model: str, units: str, way: Way, sparsity: float, steps: int) -> dict[str, Any]:
    names = {"method": way.method, "widths": way.widths, "compensation": way.compensation}
    about = {"task": "brown", "model": model, "units": units, **names}
    return about | {"sparsity": sparsity, "steps": steps}


# ----------------------------------------------------------------------------------- calibration


def examine(
    seed: int, model: nn.Module, validation: Sequence[Batch], test: Sequence[Batch]
) -> Subject:
    """Calibrate on some batches and test the dense model on others."""
    groups = graph_of(model).groups
    chosen = choose_groups(groups, kinds=UNITS)
    count = sum(batch["input_ids"].numel() for batch in validation)
    calibration = collect_activations(
        model,
        chosen,
        [{"input_ids": batch["input_ids"]} for batch in validation],
        lambda network, batch: network(**batch),
        positions=count,
        stored_positions=count,
        seed=seed,
    )
    calibration.gradients = calibrate_gradients(model, chosen, validation)
    known = model, groups, chosen, calibration, validation, test
    return Subject(seed, *known, *score_tokens(model, test))


@lru_cache(maxsize=1)  # jobs of one model follow one another
def opened(name: str, seed: int) -> Subject:
    """A model with its calibration; the draw of the pieces depends on the seed."""
    model, tokenizer = loaded(name)
    rows = pieces_of(brown("calibration"), tokenizer, CALIBRATION, seed=seed)
    test = pieces_of(brown("test"), tokenizer, TEST)
    return examine(seed, model, as_batches(rows), as_batches(test))


# ------------------------------------------------------------------------------------------- FLAP


def fluctuations(statistics: UnitStatistics) -> Tensor:
    """Variance of each entry times the squared norm of the weights that read it ``(units, g)``."""
    variance = statistics.mean_squares() - statistics.mean.square()
    power = variance * statistics.weight.square().sum(0)
    return power.view(-1, statistics.entries)


def standardised(scores: Tensor) -> Tensor:
    """Scores of the entries of one layer, with mean 0 and deviation 1; a mean for each unit.

    Example:
        >>> standardised(torch.tensor([[1.0], [2.0], [3.0]])).tolist()
        [-1.0, 0.0, 1.0]
    """
    return ((scores - scores.mean()) / scores.std().clamp_min(1e-12)).mean(1)


def flap(subject: Subject, sparsity: float) -> tuple[nn.Module, PruningPlan]:
    """FLAP (An et al. 2023, arXiv 2312.11983), after the authors' code: WIFV, AL-AM, with biases.

    Units of all layers and kinds are put in one order by their standardised fluctuation; units
    stay, from the top, while their parameters fit. What removed units gave on average becomes a
    bias of the layer that read them.
    """
    model, groups = copy.deepcopy(subject.model), subject.chosen
    current, weights = full_plan(subject.groups), dict(model.named_parameters())
    statistics, scores = {}, {}
    for group in groups:
        known = subject.calibration.moments, weights, current.kept, current, groups
        (statistics[group.name],) = unit_statistics(group, *known)
        scores[group.name] = standardised(fluctuations(statistics[group.name]))
    kept = widths_by_score(groups, scores, sparsity)
    plan = PruningPlan(
        {g.name: g.size for g in subject.groups},
        {**{g.name: tuple(range(g.size)) for g in subject.groups}, **kept},
    )
    apply_plan(model, subject.groups, plan, current=current)
    for group in groups:
        given, (consumer,) = statistics[group.name], group.consumers
        lost = torch.ones(group.size, dtype=torch.bool)
        lost[list(kept[group.name])] = False
        entries = lost.repeat_interleave(given.entries)
        layer: Any = model.get_submodule(consumer)
        gone = (given.weight[:, entries] @ given.mean[entries]).to(layer.weight)
        layer.bias = nn.Parameter(gone if layer.bias is None else layer.bias.detach() + gone)
    return model, plan


def widths_by_score(
    groups: Sequence[DependencyGroup], scores: Mapping[str, Tensor], sparsity: float
) -> dict[str, tuple[int, ...]]:
    """The best units of all groups whose parameters fit; the best of each group always stays."""
    cost = {g.name: count_parameters([g]) / g.size for g in groups}
    room = (1 - sparsity) * count_parameters(groups)
    kept: dict[str, list[int]] = {g.name: [int(scores[g.name].argmax())] for g in groups}
    room -= sum(cost.values())
    order = sorted(
        ((-float(score), g.name, unit) for g in groups for unit, score in enumerate(scores[g.name]))
    )
    for _, name, unit in order:
        if unit not in kept[name]:
            if cost[name] > room:
                break
            kept[name].append(unit)
            room -= cost[name]
    return {name: tuple(sorted(units)) for name, units in kept.items()}


# --------------------------------------------------------------------------------- torch-pruning


def by_library(subject: Subject, score: str, sparsity: float) -> nn.Module:
    """torch-pruning with its group magnitude, or its Taylor score of all calibration batches."""
    package, model = torch_pruning().importance, copy.deepcopy(subject.model)
    importance = package.GroupMagnitudeImportance(p=2)
    if score == "taylor":
        importance = package.GroupTaylorImportance()
        for batch in subject.validation:
            (model(**batch).loss / len(subject.validation)).backward()
    first = {name: tensor[:1] for name, tensor in subject.validation[0].items()}
    with time_limit(LIMIT):  # it does not end on some graphs
        found = pruned_by_library(
            model, subject.chosen, first, sparsity, importance, together=False
        )
    found.zero_grad(set_to_none=True)
    return found


# --------------------------------------------------------------------------------------- one shot


def measured(name: str, seed: int, units: str, way: Way, sparsity: float) -> Figures:
    """Prune a copy of the dense model in one shot and test it."""
    subject = opened(name, seed).cutting(units.split("+"))
    started, plan, spared = time.process_time(), None, 0.0
    if way.method.startswith(LIBRARY):
        try:
            model = by_library(subject, way.method.removeprefix(LIBRARY), sparsity)
            score_tokens(model, subject.test[:1])
        except (Exception, TimeLimitError) as error:  # that a library does not run is a result
            return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
    elif way.method == FLAP:
        model, plan = flap(subject, sparsity)
    else:
        options, orders = way.options(sparsity, seed), remembered(name, seed, units)
        if way.method == OURS.method:
            options = replace(options, criterion=orders)
        model, plan = cut(subject, options)
        spared = sum(orders.spared)
        orders.spared.clear()
    seconds = time.process_time() - started + spared
    return figures_of(subject, model, plan) | {"cpu_seconds": seconds}


def figures_of(subject: Subject, model: nn.Module, plan: PruningPlan | None) -> dict[str, Any]:
    """Perplexity and size of a pruned model, beside the dense one."""
    accuracy, nats = score_tokens(model, subject.test)
    examples = subject.calibration.examples
    left, before = (sum(p.numel() for p in net.parameters()) for net in (model, subject.model))
    kept: dict[str, list[int]] = {}
    for group in sorted(subject.chosen, key=lambda group: group.level):
        if plan is None:
            break
        kept.setdefault(group.kind, []).append(plan.width(group.name))
    return {
        "n_test": sum(batch["labels"][:, 1:].numel() for batch in subject.test),
        "perplexity": math.exp(nats),
        "dense_perplexity": math.exp(subject.cross_entropy),
        "accuracy": accuracy,
        "dense_accuracy": subject.accuracy,
        "macs": macs_of_calls(model, examples),
        "dense_macs": macs_of_calls(subject.model, examples),
        "parameters": left,
        "dense_parameters": before,
        "reached": (before - left) / count_parameters(subject.chosen),
        "kept": kept,
    }


# ---------------------------------------------------------------------------------- with training

DISCOVERY = 600.0  # seconds
EPOCHS, RATE, ROWS = 4, 3e-5, 2  # learning rate, constant; pieces of a training batch
NAMES: dict[str, Importance] = {
    "relevance-mi": Importance(),
    "activation-norm": Importance("activation_norm"),
    "taylor": Importance("taylor"),
}
# As the callback is used: ours as it is; the same with the score of others; others as published.
TRAINED = (
    DENSE,
    OURS,
    Way("activation-norm", "global", "layerwise"),
    Way("taylor", "global", "layerwise"),
    Way("activation-norm", "uniform", "none"),
)


def decoders_trained(
    models: Sequence[str] = MODELS[:1],
    seeds: Sequence[int] = (0,),
    sparsities: Sequence[float] = (0.25,),
    methods: Sequence[str] = (),
    units: Sequence[str] = ("ffn",),
    steps: Sequence[int] = (200,),
) -> Iterator[Job]:
    """Perplexity of decoders that the callback cuts while they train, beside a dense control."""
    places = ((s, m, u, n) for s in seeds for m in models for u in units for n in steps)
    for seed, model, kinds, count in places:
        for way in TRAINED:
            for sparsity in sparsities if way != DENSE else (0.0,):
                if not methods or way.method in methods:
                    yield single(
                        _about(model, kinds, way, sparsity, count) | {"seed": seed},
                        *(trained, model, seed, kinds, way, sparsity, count),
                    )


def trained(
    name: str, seed: int, units: str, way: Way, sparsity: float, steps: int
) -> dict[str, Any]:
    """Train a copy of the dense model while the callback cuts it, and test it."""
    subject = opened(name, seed).cutting(units.split("+"))
    rows = training_pieces(name, seed, ROWS * steps)
    started = time.process_time()
    module = LanguageModel(copy.deepcopy(subject.model), RATE)
    fit(module, subject, rows, callbacks_of(way, module, units, sparsity))
    seconds = time.process_time() - started
    return figures_of(subject, module.network.eval(), None) | {"cpu_seconds": seconds}


def training_pieces(name: str, seed: int, count: int) -> Tensor:
    """Pieces of files that neither calibrate nor test, in an order that depends on the seed."""
    return pieces_of(brown("training"), loaded(name)[1], count, seed=seed)


def callbacks_of(way: Way, module: LanguageModel, units: str, sparsity: float) -> list[pl.Callback]:
    """The callback with its default options but for what a way changes; none for the control.

    What can be cut is found beforehand, on a few tokens: in the first batch that a busy machine
    runs, the time that the callback allows itself may not be enough.
    """
    if way == DENSE:
        return []

    def run(net: Any) -> Tensor:
        logits: Tensor = net.network(input_ids=torch.arange(16).view(2, 8)).logits
        return logits

    graph = discover_run(module, run, seconds=DISCOVERY, kinds=UNITS)
    assert way.compensation != "bias"  # noqa: S101
    return [
        MutualInformationPruning(
            sparsity,
            kinds=units.split("+"),
            graph=graph,
            widths=way.widths,
            importance=NAMES[way.method],
            reconstruction=Reconstruction(way.compensation),
            verbose=False,
        )
    ]


class NextPart(Sampler[int]):
    """The rows of an epoch: each takes the next part, so that none is trained on twice.

    Args:
        rows: Rows of all epochs together.
    """

    def __init__(self, rows: int) -> None:
        self.size, self.epoch = rows // EPOCHS, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.size, (self.epoch + 1) * self.size))


def fit(
    module: LanguageModel, subject: Subject, rows: Tensor, callbacks: list[pl.Callback]
) -> None:
    """Train once on each piece, in epochs that end with a validation to calibrate in."""
    held = torch.cat([batch["input_ids"] for batch in subject.validation])
    training = DataLoader(TensorDataset(rows), ROWS, sampler=NextPart(len(rows)))
    with isolate_rng():
        torch.manual_seed(subject.seed)
        trainer = trainer_for(EPOCHS, callbacks)
        trainer.fit(module, training, DataLoader(TensorDataset(held), ROWS))
