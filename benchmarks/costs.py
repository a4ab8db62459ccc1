"""What calibration, scores and cuts cost, beside other implementations of the same.

Weights and data are random: the time depends on shapes only. Every shape is measured in a process
of its own. What grows linearly with the number of neurons or batches is measured on a few of them
and extrapolated; the records have the number measured.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.baselines import pruned_by_library, torch_pruning
from benchmarks.measuring import (
    Cost,
    Part,
    cost_of_hooks,
    in_fresh_process,
    peak_memory,
    spread,
    take_turns,
)
from benchmarks.records import Figures, Job, single
from benchmarks.subjects import entries_of
from examples.text_classification.__main__ import TextClassificationCLI
from examples.text_classification.data import TextDataModule
from examples.text_classification.model import TextClassifier
from lightning_mi_prune import PruningPlan, apply_plan, discover
from lightning_mi_prune.allocation.allocate import allocate
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.costs import ParameterCosts
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.options import Reconstruction
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import DependencyGroup, full_plan
from lightning_mi_prune.importance.criteria import MutualInformation
from lightning_mi_prune.importance.information import diagonal_blocks, unit_information
from lightning_mi_prune.importance.ranking import rank_groups
from lightning_mi_prune.importance.statistics import UnitStatistics, unit_statistics
from lightning_mi_prune.pipeline import reconstruct
from lightning_mi_prune.reconstruction import least_squares, ridge
from lightning_mi_prune.reconstruction.compensation import select_units

__all__ = ["SHAPES", "Run", "costs", "demo", "log_det_information", "noisy", "one_cut"]

SHAPES = {
    "TinyBERT-L4": {"num_hidden_layers": 4, "hidden_size": 312, "intermediate_size": 1200},
    "MiniLM-L6": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "BERT-base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48},
}
REAL = ("MiniLM-L6", "BERT-base")
STEPS = ("TinyBERT-L4", *REAL)
# Sequences in a batch, their length, batches; batches and neurons that are really measured.
REAL_SIZES, TINY = (32, 64, 8, 2, 16), (4, 32, 2, 1, 2)
RIDGE = 1.0  # noise on the layer above, the same for us and for the determinants


def bert(shape: Mapping[str, int]) -> nn.Module:
    """A random BERT of the given shape, with twelve heads."""
    torch.manual_seed(0)
    config = BertConfig(**shape, num_attention_heads=12, vocab_size=1000)
    model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


class Run:
    """A random model, batches of random tokens, and what a calibration on them finds.

    Args:
        shape: Of the model.
        rows: Sequences of ``length`` positions in a batch.
        batches: Batches of validation, of which the first ``timed`` are really run; None is all.
        positions: How many of their positions are samples.
    """

    def __init__(
        self,
        shape: Mapping[str, int],
        rows: int,
        length: int,
        batches: int,
        positions: int,
        timed: int | None = None,
    ) -> None:
        self.model, self.batches, self.positions = bert(shape), batches, positions
        self.timed = batches if timed is None else timed
        self.groups = choose_groups(discover(self.model).groups)
        self.ids = torch.randint(5, 1000, (rows, length))
        self.weights, self.plan = dict(self.model.named_parameters()), full_plan(self.groups)
        self.moments: Mapping[str, Moments] = {}
        self.rankings: dict[str, Ranking] = {}
        self.sizes = {group.name: group.size for group in self.groups}

    def validation(self) -> None:
        """The batches without hooks."""
        with torch.inference_mode():
            for _ in range(self.timed):
                self.model(self.ids)

    def calibration(self) -> Cost:
        """What hooks and sums take in a validation."""
        sizes: dict[str, Any] = {"positions": self.positions, "batches": self.batches}
        recorder = ActivationRecorder(self.model, self.groups, **sizes)
        modules = [self.model.get_submodule(group.consumers[0]) for group in self.groups]
        cost = cost_of_hooks(modules, recorder, self.validation)
        self.moments = recorder.moments
        return cost

    def order(self) -> None:
        """The whole order of every group, by conditional information."""
        known = self.groups, self.moments, self.weights, self.plan
        self.rankings = rank_groups(*known, relevance="weights")

    def compensation(self) -> None:
        """Compensate the weights for half of the units."""
        known = self.groups, self.moments, self.weights
        widths = {name: size // 2 for name, size in self.sizes.items()}
        select_units(*known, widths, self.plan, rankings=self.rankings)

    def cut(self) -> None:
        """Remove half of every group, of a copy."""
        kept = {name: tuple(range(size // 2)) for name, size in self.sizes.items()}
        apply_plan(copy.deepcopy(self.model), self.groups, PruningPlan(self.sizes, kept))


def costs(shapes: Sequence[str] = REAL, repeats: int = 3) -> Iterator[Job]:
    """Seconds and memory of calibration, scores and cuts beside other ways, all in turn."""
    for shape in shapes:
        yield single({"shape": shape}, in_fresh_process, parts_of, shape, repeats)


def parts_of(shape: str, repeats: int) -> Figures:
    """Every part at one shape, in groups that take turns."""
    rows, length, batches, few_batches, few = TINY if shape == "tiny" else REAL_SIZES
    layers = SHAPES[shape]["num_hidden_layers"]
    run = Run(SHAPES[shape], rows, length, batches, batches * rows * length, few_batches)
    rounds = partial(take_turns, repeats=repeats)
    lowest = run.groups[: len(run.groups) // layers]
    parts = rounds(_sums(lowest, rows * length, layers * batches), warm=True)
    part = partial(Part, timed=few_batches, of=batches, unit="batches")
    parts |= rounds({"validation": part(run.validation), "calibration": part(run.calibration)})
    # As if the measured batches were repeated until there are all of them.
    for moments in run.moments.values():
        moments.unpack(batches // few_batches * moments.packed())
    known: dict[str, Any] = {"moments": run.moments, "weights": run.weights, "kept": run.plan.kept}
    statistics = [
        unit_statistics(group, **known, current=run.plan, groups=run.groups)[0]
        for group in run.groups
    ]
    parts |= rounds(_scores(statistics, layers, few), warm=True)
    del statistics  # as large as the moments
    parts |= rounds({"order": Part(run.order), "compensation": Part(run.compensation)})
    run.moments = {}
    parts |= rounds(_cutting(run))
    about = {"batch": rows, "length": length, "batches": batches, "repeats": repeats}
    return about | {"parts": parts}


def _sums(groups: Sequence[DependencyGroup], rows: int, of: int) -> dict[str, Part]:
    """Our sums of the inputs of one layer in a batch, and the plain products of matrices."""
    widths = [group.size * entries_of(group) for group in groups]
    x = [torch.randn(rows, width) for width in widths]
    doubles = [each.double() for each in x]
    ours = [Moments(width) for width in widths]
    plain = [torch.zeros(width, width, dtype=torch.float64) for width in widths]

    def sum_tensor() -> None:
        for moments, each in zip(ours, x, strict=True):
            moments.update(each)

    def multiply() -> None:
        for total, each in zip(plain, doubles, strict=True):
            total.addmm_(each.mT, each)

    part = partial(Part, timed=1, of=of, unit="layer_batches")
    return {"sums": part(sum_tensor), "product": part(multiply)}


def _scores(statistics: Sequence[UnitStatistics], layers: int, neurons: int) -> dict[str, Part]:
    """Each unit's information with the layer above: all of ours, determinants for a few neurons."""
    topk = MutualInformation("topk", ridge=RIDGE)
    ffn = next(found for found in statistics if found.entries == 1)
    joint, few, of = noisy(ffn, RIDGE), min(neurons, ffn.units), layers * ffn.units
    return {
        "scores": Part(lambda: [topk.scores(found) for found in statistics]),
        "scores_of_covariances": Part(lambda: unit_information(*joint), 1, layers, "layers"),
        "log_det": Part(lambda: log_det_information(*joint, few), few, of, "neurons"),
    }


def noisy(found: UnitStatistics, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(Sxx, Sxy, Syy)`` with the noise on the layer above that `MutualInformation` adds."""
    covariance, cross, above = found.joint()
    return covariance, cross, above + found.noise(ridge) * torch.eye(len(above)).to(above)


def _cutting(run: Run) -> dict[str, Part]:
    """Remove half of every layer, of a copy: ours, and torch-pruning with Taylor importance."""
    batch = {"input_ids": run.ids, "labels": torch.zeros(len(run.ids), dtype=torch.long)}
    importance = torch_pruning().importance.GroupTaylorImportance()

    def gradients() -> None:
        run.model.zero_grad(set_to_none=True)
        run.model(**batch).loss.backward()

    def taylor() -> None:
        pruned_by_library(run.model, run.groups, batch, 0.5, importance, together=False)

    gradient_part = Part(gradients, 1, run.batches, "batches")
    return {"cut": Part(run.cut), "gradients": gradient_part, "taylor_step": Part(taylor)}


# ----------------------------------------------------------------------------- the same, otherwise


def log_det_information(
    sxx: Tensor, sxy: Tensor, syy: Tensor, units: int, entries: int = 1
) -> Tensor:
    """``I(x_i; Y) = 1/2 (ln|S_ii| + ln|S_yy| - ln|S_(i,y)|)``, unit after unit, in nats.

    Both determinants with ``Y`` are taken anew for each unit, as the public re-implementation of
    Fan et al. (2021) does.

    Args:
        sxx: Covariance of the entries ``(d, d)``.
        sxy: With the layer above ``(d, m)``.
        syy: Of the layer above ``(m, m)``.
        units: How many units to score, from the first.
        entries: Entries per unit.

    Example:
        >>> one = torch.ones(1, 1, dtype=torch.float64)
        >>> log_det_information(one, 0.8 * one, one, units=1)
        tensor([0.5108], dtype=torch.float64)
    """
    blocks = diagonal_blocks(sxx, entries)
    scores = []
    for unit in range(units):
        rows = slice(unit * entries, (unit + 1) * entries)
        left = torch.cat([blocks[unit], sxy[rows].mT])
        joint = torch.cat([left, torch.cat([sxy[rows], syy])], dim=1)
        parts = [torch.linalg.slogdet(matrix).logabsdet for matrix in (blocks[unit], syy, joint)]
        scores.append((parts[0] + parts[1] - parts[2]) / 2)
    return torch.stack(scores)


# ---------------------------------------------------------------------------- one cut, step by step


def one_cut(shapes: Sequence[str] = STEPS, repeats: int = 3) -> Iterator[Job]:
    """Processor seconds of every step of one cut, bytes of the sums, peak memory."""
    for shape in shapes:
        yield single({"shape": shape}, _one_cut, shape, repeats)


def _one_cut(shape: str, repeats: int) -> Figures:
    positions = 256 if shape == "tiny" else 16_384
    runs = [in_fresh_process(steps_of, SHAPES[shape], positions) for _ in range(repeats)]
    about: dict[str, Any] = {"repeats": repeats, "positions": positions}
    return about | {key: spread([run[key] for run in runs]) for key in runs[0]}


def steps_of(shape: Mapping[str, int], positions: int) -> dict[str, float]:
    """One pass of the whole method at half of the parameters, positions in batches of 32 x 64."""
    model = bert(shape)
    groups = discover(model).groups
    chosen = choose_groups(groups)
    ids = torch.randint(5, 1000, (32, 64))
    batches = -(-positions // ids.numel())
    reconstruction = Reconstruction()
    result: dict[str, float] = {}

    def validate() -> None:
        with torch.inference_mode():
            for _ in range(batches):
                model(ids)

    validate()  # the first pass is slower, which the calibration would seem to save
    with _clock(result, "validation"):
        validate()
    before = peak_memory()
    options: dict[str, Any] = {"positions": positions, "batches": batches, "calls": positions}
    with ActivationRecorder(model, chosen, **options) as recorder, _clock(result, "calibration"):
        validate()
    result["calibration"] -= result["validation"]
    sums = [t for m in recorder.moments.values() for t in vars(m).values() if isinstance(t, Tensor)]
    weights, plan = dict(model.named_parameters()), full_plan(groups)
    found = CalibrationData(recorder.moments, ranks=[recorder.stored])
    with _clock(result, "order of all groups"):
        rankings = rank_groups(chosen, found.moments, weights, plan, relevance="weights")
    with _clock(result, "allocation and compensation"):
        costs = ParameterCosts(chosen)
        widths = allocate(chosen, Budget(sparsity=0.5), costs=costs, rankings=rankings)
        selection = select_units(chosen, found.moments, weights, widths, plan, rankings=rankings)
    found.moments = {}
    del recorder
    inside = {
        "sums": (least_squares._LinearSums, "add"),
        "strengths": (ridge, "choose_strengths"),
    }
    with _clock(result, "reconstruction"), ExitStack() as stack:
        for part, (owner, name) in inside.items():
            stack.enter_context(_clocked(result, f"of which {part}", owner, name))
        selection = reconstruct(model, groups, plan, selection, reconstruction, found)
    with _clock(result, "cut"):
        apply_plan(model, groups, selection.plan)
    seconds = {f"{part}, CPU s": value for part, value in result.items()}
    memory = {"sums, MB": sum(t.nbytes for t in sums), "peak, MB": peak_memory() - before}
    return seconds | {name: value / 1e6 for name, value in memory.items()}


@contextmanager
def _clock(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the processor seconds of a block to those of a part."""
    started = time.process_time()
    yield
    seconds[part] = seconds.get(part, 0.0) + time.process_time() - started


@contextmanager
def _clocked(seconds: dict[str, float], part: str, owner: Any, name: str) -> Iterator[None]:
    """A block in which the calls of a function count as a part."""
    function = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        with _clock(seconds, part):
            return function(*args, **kwargs)

    with patch.object(owner, name, counted):
        yield


# ---------------------------------------------------------------------------------------- the demo

CONFIG = "examples/text_classification/demo.yaml"
DENSE, EPOCHS, LONG = 0, 6, 10
METHODS = ("layerwise", "compensation")
DEFAULT = (1, "layerwise")  # what a run does by itself
_BY_HAND = {4: ["--trainer.callbacks.schedule.last_epoch", "4"]}  # later than by itself
_PARTS = ("discovery", "gradients", "calibration", "ranking", "reconstruction", "surgery")


def demo(
    seeds: Sequence[int] = (0, 1, 2),
    cuts: Sequence[int] = (DENSE, 1, 2, 4),
    compensations: Sequence[str] = METHODS,
) -> Iterator[Job]:
    """The demo with several seeds: split, head and order of training change with them.

    Without cuts it is the dense control. What a run does by itself is also run for more epochs.
    """
    for number in cuts:
        for method in compensations:
            if method != DEFAULT[1] and number != DEFAULT[0]:
                continue
            for seed in seeds:
                yield _demo_job(seed, number, method if number else "", EPOCHS)
    if DEFAULT[0] in cuts and DEFAULT[1] in compensations:
        yield _demo_job(seeds[0], *DEFAULT, LONG)


def _demo_job(seed: int, cuts: int, method: str, epochs: int) -> Job:
    about = {"config": CONFIG, "cuts": cuts, "compensation": method, "epochs": epochs}
    known = (seed, cuts, method, epochs)
    return single(about | {"seed": seed}, in_fresh_process, _demo, *known)


def _demo(seed: int, cuts: int, method: str, epochs: int) -> Figures:
    """One run, with every clock that of the processor: other load does not count."""
    name = f"demo-{cuts}-cuts-{method or 'dense'}-{epochs}-epochs-seed-{seed}"
    options = ["--seed_everything", str(seed), "--data.seed", str(seed), "--name", name]
    options += ["--trainer.max_epochs", str(epochs), "--trainer.enable_progress_bar", "false"]
    if cuts:
        options += ["--control", "false", "--trainer.callbacks.schedule.cuts", str(cuts)]
        options += ["--trainer.callbacks.reconstruction.method", method, *_BY_HAND.get(cuts, [])]
    else:
        options += ["--trainer.callbacks", "null"]
    with patch("time.perf_counter", time.process_time):
        cli = TextClassificationCLI(
            TextClassifier,
            TextDataModule,
            save_config_kwargs={"overwrite": True},
            args=["fit", "--config", CONFIG, *options],
        )
    accuracy = cli.trainer.callback_metrics["test_accuracy"]
    figures = {"accuracy, %": 100 * float(accuracy), "training, CPU s": cli.seconds}
    if not cuts:
        return figures
    report = json.loads(Path("runs", name, "report.json").read_text(encoding="utf-8"))
    for dense, pruned in zip(
        report["before"]["latency_ms"], report["after"]["latency_ms"], strict=True
    ):
        ratio = dense["median"] / pruned["median"]
        figures[f"encoder speed-up, batch {dense['batch_size']}"] = ratio
    for part in _PARTS:
        seconds = [cut["seconds"].get(part, 0.0) for cut in report["cuts"]]
        figures[f"{part}, % of training"] = 100 * sum(seconds) / cli.seconds
    figures["pruning, % of training"] = sum(figures[f"{p}, % of training"] for p in _PARTS)
    return figures | {"steps": cli.steps}
