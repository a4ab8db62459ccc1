"""Networks for pictures, pruned inside ``fit`` beside torch-pruning, and their speed afterwards.

Every method gets the same training: same weights at the start, same batches, learning rates and
epochs. torch-pruning cuts in the same epochs as ours, each time to the multiply-accumulates (MACs)
that ours had after that cut.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks import pictures
from benchmarks.baselines import pruned_by_library, torch_pruning
from benchmarks.comparison import name_of
from benchmarks.methods import OURS, Name
from benchmarks.pictures import (
    RECIPES,
    Batch,
    Classifier,
    fashion_mnist,
    held_out,
    in_batches,
    training_batches,
)
from benchmarks.records import Figures, Job, Record, Store, cpu_name, single
from benchmarks.subjects import Kept, score, size_of
from benchmarks.tasks import trainer_for
from lightning_mi_prune import (
    CKALayerPruning,
    MutualInformationPruning,
    PruningPlan,
    apply_plan,
    discover,
    options,
)
from lightning_mi_prune.allocation.macs import count_macs
from lightning_mi_prune.allocation.measuring import measure_latency
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.graph.graph import PruningGraph, choose_groups
from lightning_mi_prune.importance.layer_criteria import LayerCriterion

__all__ = ["BATCHES", "DENSE", "WAYS", "vision", "vision_latency", "vision_layers"]

MODELS, SEEDS, SPARSITIES = ("resnet", "vit"), (0, 1, 2), (0.5, 0.75)
BATCHES = (1, 64)
Targets = Mapping[int, int]  # the MACs to cut to, by the epoch that starts with the cut


# ---------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Way:
    """A way to prune while a model trains.

    Args:
        method: Its name, as in the other comparisons.
        widths: "global" where all layers compete, "uniform" where all keep the same share.
        weights: What happens to the weights that stay.
        given: Options of our callback; what is None is one of torch-pruning's.
        counted: What its budget counts: a share of the parameters, or the MACs that ours has then.
        kinds: Kinds of unit that may go; None is those that our callback cuts by default.
        seeds: Seeds that are measured.
        models: Models that it is for.
    """

    method: str
    widths: str
    weights: str
    given: Mapping[str, Any] | None = field(default=None, hash=False)
    counted: Literal["parameters", "MACs"] = "MACs"
    kinds: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = SEEDS
    models: tuple[str, ...] = MODELS

    @property
    def name(self) -> Name:
        """What distinguishes it from all others."""
        return self.method, self.widths, self.weights

    def callback(self, sparsity: float, seed: int, macs: int) -> MutualInformationPruning:
        """Ours, or a criterion to compare with in our callback."""
        by_macs = self.counted == "MACs"
        method: Any = "layerwise" if self.weights == "reconstruction" else self.weights
        kinds = None if self.kinds is None else [*self.kinds]
        solved = options.Reconstruction(method)
        schedule = options.Schedule(cuts=min(4, pictures.EPOCHS // 2))
        given: dict[str, Any] = {"reconstruction": solved, "schedule": schedule, "kinds": kinds}
        given |= self.given or {}
        return MutualInformationPruning(
            None if by_macs else sparsity,
            target_macs=macs if by_macs else None,
            widths="uniform" if self.widths == "uniform" else "global",
            seed=seed,
            verbose=False,
            **given,
        )


def _with(criterion: Any) -> dict[str, Any]:
    return {"importance": options.Importance(criterion)}


# The widths with which torch-pruning's two scores did better on seed 0, so the others have these.
BETTER = {"resnet": "uniform", "vit": "global"}
FINE = {"constraints": options.Constraints(multiple=1)}  # widths as fine as torch-pruning's
DENSE = Way("dense", "uniform", "none")
MINE = Way(*OURS.name, given={}, counted="parameters")
WAYS = (
    MINE,
    *(
        Way(
            f"torch-pruning-{score}",
            widths,
            "none",
            seeds=SEEDS if widths == BETTER[model] else (0,),
            models=(model,),
        )
        for model in MODELS
        for score in ("magnitude", "taylor")
        for widths in ("uniform", "global")
    ),
    *(
        Way(
            name,
            "global",
            "reconstruction",
            given=_with(name.replace("-", "_")),
            counted="parameters",
        )
        for name in ("taylor", "activation-norm", "magnitude", "random")
    ),
    Way("relevance-mi", "global", "none", given={}, counted="parameters"),
    Way("relevance-mi-macs", "global", "reconstruction", given={}, models=("resnet",)),
    Way("relevance-mi-macs", "uniform", "reconstruction", given=FINE, models=("resnet",)),
)


# ---------------------------------------------------------------------------------------- training


@cache
def split(seed: int) -> tuple[pictures.Pictures, list[Batch], list[Batch]]:
    """Pictures to train on, batches to calibrate with, batches of the test."""
    training, validation = held_out(seed)
    return training, in_batches(validation, pictures.BATCH), in_batches(fashion_mnist("test"))


def example(rows: int = 2) -> dict[str, torch.Tensor]:
    """Some pictures, as arguments of a network."""
    return {"pixel_values": fashion_mnist("test").pixels[:rows]}


def macs_of(network: nn.Module) -> int:
    """Multiply-accumulates for one picture."""
    return count_macs(network, RecordedCall((), example(1)))


@cache
def graph_of(model: str) -> PruningGraph:
    """All that a network can lose."""
    return discover(RECIPES[model].build().eval(), **example())


def fitted(model: str, seed: int, callbacks: Sequence[pl.Callback]) -> tuple[nn.Module, float]:
    """A network after its training, and the seconds of the processor that it took."""
    training, validation, _ = split(seed)
    pl.seed_everything(seed, workers=True, verbose=False)
    module = Classifier(RECIPES[model], pictures.EPOCHS * pictures.STEPS)
    trainer = trainer_for(pictures.EPOCHS, callbacks)
    started = time.process_time()
    batches: Any = validation  # a list is data enough for a loader
    held = DataLoader(batches, batch_size=None)
    trainer.fit(module, training_batches(training, seed), held)
    return module.network.eval(), time.process_time() - started


def about(model: str, seed: int, way: Way, sparsity: float) -> dict[str, Any]:
    """The setting of a record."""
    method, widths, weights = way.name
    task, steps = f"fashion-mnist-{model}", pictures.EPOCHS * pictures.STEPS
    known = {"task": task, "model": model, "method": method, "widths": widths, "weights": weights}
    return known | {"sparsity": sparsity, "steps": steps, "seed": seed}


def recorded(folder: Path, model: str, seed: int, way: Way, sparsity: float) -> Record:
    """A record that others are compared with.

    Raises:
        LookupError: If there is none.
    """
    wanted = about(model, seed, way, sparsity)
    found = Store("vision", folder).find(**wanted)
    if not found:
        raise LookupError(f"no record of {wanted}: run `python -m benchmarks run vision`")
    return found[-1]


def vision(
    folder: Path,
    models: Sequence[str] = MODELS,
    seeds: Sequence[int] = SEEDS,
    sparsities: Sequence[float] = SPARSITIES,
    methods: Sequence[str] = (),
) -> Iterator[Job]:
    """A CNN and a vision transformer pruned inside `fit`, beside torch-pruning at equal MACs."""
    asked = [(DENSE, 0.0), *((MINE, sparsity) for sparsity in sparsities)]
    others = [way for way in WAYS if way != MINE and (not methods or way.method in methods)]
    asked += [(way, sparsity) for way in others for sparsity in sparsities]
    for seed, model in ((seed, model) for seed in seeds for model in models):
        for way, sparsity in asked:
            if model in way.models and seed in way.seeds:
                setting = about(model, seed, way, sparsity)
                yield single(setting, measured, folder, model, seed, way, sparsity)


def measured(folder: Path, model: str, seed: int, way: Way, sparsity: float) -> Figures:
    """Train with the callback of a way, and test."""
    callbacks: list[Any] = []
    targets: Targets = {}
    if way != DENSE and way.counted == "MACs":
        targets = dict(recorded(folder, model, seed, MINE, sparsity)["cuts"])
    if way != DENSE and way.given is not None:
        callbacks = [way.callback(sparsity, seed, [*targets.values()][-1] if targets else 0)]
    elif way != DENSE:
        callbacks = [LibraryPruning(way, targets, split(seed)[1])]
    network, seconds = fitted(model, seed, callbacks)
    accuracy, cross_entropy = score(network, split(seed)[2])
    groups = choose_groups(graph_of(model).groups, kinds=way.kinds)
    found = {
        "n_test": len(fashion_mnist("test").labels),
        "accuracy": accuracy,
        "cross_entropy": cross_entropy,
        "macs": macs_of(network),
        "cpu_seconds": seconds,
        **size_of(network, groups),
    }
    if way == DENSE:
        dense: Mapping[str, Any] = found
    else:
        dense = recorded(folder, model, seed, DENSE, 0.0).figures
        found["cuts"] = [[*cut] for callback in callbacks for cut in made(callback)]
    names = ("accuracy", "cross_entropy", "macs", "parameters", "cpu_seconds")
    return found | {f"dense_{name}": dense[name] for name in names}


def made(callback: Any) -> list[tuple[int, int]]:
    """The epochs that began with a cut, and the MACs after it."""
    if isinstance(callback, LibraryPruning):
        return [*callback.made.items()]
    return [(cut.epoch, cut.macs) for cut in callback.report.cuts]


# ----------------------------------------------------------------------------------- torch-pruning

GRID = 1000  # ratios are tried in thousandths


def heads_ratio(ratio: float, sizes: Mapping[str, int], built: Mapping[str, int]) -> float:
    """Share of the heads to remove beside a share of the neurons.

    The package rounds heads down. It does so once, not again in every cut, if as large a share of
    those that were built goes as of the neurons.

    Args:
        ratio: Share of the neurons to remove.
        sizes: Heads and neurons that there are, by kind.
        built: The same before the first cut.

    Example:
        >>> built = {"heads": 24, "ffn": 1000}
        >>> round(heads_ratio(0.25, built, built), 3)
        0.25
        >>> heads_ratio(0.2, {"heads": 12, "ffn": 750}, built)  # 60 % of 24 are more than 12
        0.0
    """
    if "heads" not in sizes:
        return ratio
    kept = (1 - ratio) * sizes["ffn"] / built["ffn"] * built["heads"]
    return max(0.0, 1 - kept / sizes["heads"] - 1e-6)


class LibraryPruning(pl.Callback):
    """torch-pruning at the start of some epochs, with all of the validation split for Taylor.

    Its pruner makes new parameters, so the optimizer begins anew, as in its examples; learning
    rates go on.

    Args:
        way: Which of its scores, and whether all layers compete.
        targets: The MACs to cut to, by epoch.
        batches: Batches for Taylor.
    """

    def __init__(self, way: Way, targets: Targets, batches: Sequence[Batch]) -> None:
        self.way, self.targets, self.batches = way, targets, batches
        self.made: dict[int, int] = {}
        self.built: Counter[str] = Counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Cut, where a cut is due."""
        if trainer.current_epoch not in self.targets:
            return
        wanted = self.targets[trainer.current_epoch]
        network = module.network.eval()
        module.network = self.cut(network, wanted).train()
        self.made[trainer.current_epoch] = macs_of(module.network)
        (optimizer,) = trainer.optimizers
        optimizer.param_groups[0]["params"] = [*module.network.parameters()]
        optimizer.state.clear()

    def cut(self, network: nn.Module, wanted: int) -> nn.Module:
        """Prune with the ratio that comes closest to some MACs, found by bisection."""
        package = torch_pruning().importance
        importance: Any = package.GroupMagnitudeImportance(p=2)
        network.zero_grad(set_to_none=True)
        if self.way.method.startswith("torch-pruning-taylor"):
            importance = package.GroupTaylorImportance()
            for batch in self.batches:
                (network(**batch).loss / len(self.batches)).backward()
        groups = choose_groups(discover(network, **example()).groups, kinds=self.way.kinds)
        at = partial(pruned_by_library, network, groups, self.batches[0], importance=importance)
        sizes = Counter[str]()
        for group in groups:
            sizes[group.kind] += group.size
        self.built = self.built or sizes
        together = self.way.widths == "global"
        low, high, best = 1, GRID - 1, (float("inf"), network)
        while low <= high:
            step = (low + high) // 2
            heads = heads_ratio(step / GRID, sizes, self.built)
            found = at(ratio=step / GRID, together=together, heads_ratio=heads)
            reached = macs_of(found)
            if (apart := abs(reached - wanted)) < best[0]:
                best = apart, found
            low, high = (step + 1, high) if reached > wanted else (low, step - 1)
        best[1].zero_grad(set_to_none=True)
        return best[1]


# ------------------------------------------------------------------------------------------ layers


class LayerWay(NamedTuple):
    """A way to remove layers while a model trains.

    Args:
        criterion: What chooses them.
        reconstruction: Whether the layers that stay are reconstructed.
    """

    criterion: LayerCriterion
    reconstruction: bool


# Nothing is known to reconstruct where a normalisation follows the last convolution of a block.
LAYERS: Mapping[str, Sequence[LayerWay]] = {
    "resnet": [LayerWay(criterion, False) for criterion in ("cka", "last", "random")],
    "vit": [
        *(LayerWay(criterion, True) for criterion in ("cka", "measured_loss", "last", "random")),
        LayerWay("cka", False),
    ],
}


def vision_layers(
    folder: Path, models: Sequence[str] = MODELS, seeds: Sequence[int] = SEEDS
) -> Iterator[Job]:
    """A third of the layers of every stack removed inside `fit`, beside a dense control."""
    steps = pictures.EPOCHS * pictures.STEPS
    for seed, model in ((seed, model) for seed in seeds for model in models):
        for way in LAYERS[model]:
            setting = {"task": f"fashion-mnist-{model}", "model": model, "steps": steps}
            setting |= {**way._asdict(), "seed": seed}
            yield single(setting, shortened, folder, model, seed, way)


def shortened(folder: Path, model: str, seed: int, way: LayerWay) -> Figures:
    """Train with layers removed half-way, and test."""
    stacks = graph_of(model).stacks
    target = min(stack.size for stack in stacks) * 2 // 3
    given: dict[str, Any] = {"target_layers": target, "criterion": way.criterion, "seed": seed}
    method: Any = "layerwise" if way.reconstruction else "none"
    given["reconstruction"] = options.Reconstruction(method)
    callback = CKALayerPruning(None, verbose=False, **given)
    network, seconds = fitted(model, seed, [callback])
    accuracy, cross_entropy = score(network, split(seed)[2])
    dense = recorded(folder, model, seed, DENSE, 0.0)
    names = ("accuracy", "cross_entropy", "macs", "parameters", "cpu_seconds")
    return {
        "n_test": len(fashion_mnist("test").labels),
        "accuracy": accuracy,
        "cross_entropy": cross_entropy,
        "macs": macs_of(network),
        "parameters": sum(p.numel() for p in network.parameters()),
        "cpu_seconds": seconds,
        "layers": sum(stack.size for stack in stacks),
        "removed": [[[*s.removed] for s in cut.stacks] for cut in callback.report.cuts],
        **{f"dense_{name}": dense[name] for name in names},
    }


# ----------------------------------------------------------------------------------------- latency


def vision_latency(
    folder: Path,
    models: Sequence[str] = MODELS,
    sparsities: Sequence[float] = SPARSITIES,
    seconds: float = 2.0,
    rounds: int = 10,
) -> Iterator[Job]:
    """Milliseconds of networks with our widths and torch-pruning's, in turn with the dense one."""
    for model, sparsity in ((model, sparsity) for model in models for sparsity in sparsities):
        for found in Store("vision", folder).find(model=model, sparsity=sparsity):
            known = {name: found[name] for name in ("task", "model", "method", "widths", "weights")}
            library = found["method"].startswith("torch-pruning")
            if found.seed == 0 and (library or name_of(found) == MINE.name):
                setting = known | {"sparsity": sparsity, "cpu": cpu_name(), "kept": found["kept"]}
                yield single(setting, speed, model, found["kept"], seconds, rounds)


def shaped(model: str, kept: Kept) -> nn.Module:
    """A network with random weights and these widths."""
    network = RECIPES[model].build().eval()
    groups = choose_groups(graph_of(model).groups, kinds=[*kept])
    widths = {kind: iter(values) for kind, values in kept.items()}
    ordered = sorted(groups, key=lambda group: group.level)
    places = {group.name: tuple(range(next(widths[group.kind]))) for group in ordered}
    apply_plan(network, groups, PruningPlan({group.name: group.size for group in groups}, places))
    return network


def speed(model: str, kept: Kept, seconds: float, rounds: int) -> Figures:
    """Latency in ms of the dense network and of a shape, in turn, for every batch size."""
    networks, found = {"dense_": RECIPES[model].build().eval(), "": shaped(model, kept)}, {}
    for rows in BATCHES:
        given = example(rows)
        calls: dict[str, Callable[[], Any]] = {
            name: partial(_forward, network, given) for name, network in networks.items()
        }
        for name, ms in measure_latency(calls, seconds=seconds, rounds=rounds).items():
            found[f"{name}ms_b{rows}"] = ms
    return {f"{name}macs": macs_of(network) for name, network in networks.items()} | found


def _forward(network: nn.Module, given: Mapping[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        network(**given)
