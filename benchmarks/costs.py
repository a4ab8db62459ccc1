"""What calibration, scores and cuts cost, beside other ways to do the same.

Weights and data are random: the time depends on shapes only. Every shape is measured in a process
of its own. What grows linearly with the number of neurons or batches is measured on a few of them
and extrapolated; the records say on how many.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from benchmarks.measuring import (
    Cost,
    Part,
    cost_of_hooks,
    in_fresh_process,
    peak_memory,
    spread,
    take_turns,
    timed,
)
from benchmarks.records import Figures, Job, single
from benchmarks.rivals import pruned_by_library, torch_pruning
from lightning_mi_prune import (
    Budget,
    Listener,
    Method,
    MutualInformation,
    Plan,
    Ranking,
    WidthAxis,
    apply,
    find_axes,
    rank_axes,
    select,
)
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.competition import allot
from lightning_mi_prune.costs import ParameterCosts
from lightning_mi_prune.evidence import Evidence, gather
from lightning_mi_prune.information import diagonal_blocks, unit_information
from lightning_mi_prune.method import pull_back
from lightning_mi_prune.moments import Moments
from lightning_mi_prune.sample import Heard

__all__ = ["SHAPES", "bert", "costs", "demo", "halved", "log_det_information", "noisy", "one_cut"]

SHAPES = {
    "MiniLM-L6": {"num_hidden_layers": 6, "hidden_size": 384, "intermediate_size": 1536},
    "BERT-base": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 3072},
    "tiny": {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48},
}
REAL = ("MiniLM-L6", "BERT-base")


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        batch: Sequences in a batch.
        length: Positions in a sequence.
        batches: Batches of validation, all of whose positions are samples.
        timed_batches: Of these, how many are measured.
        neurons: Neurons for which determinants are taken.
        ridge: Noise on the layer above, the same for us and for the determinants.
        repeats: Rounds.
    """

    batch: int = 32
    length: int = 64
    batches: int = 8
    timed_batches: int = 2
    neurons: int = 16
    ridge: float = 1.0
    repeats: int = 3


QUICK = Settings(4, 32, batches=2, timed_batches=1, neurons=2, repeats=1)


def bert(shape: Mapping[str, int]) -> nn.Module:
    """A random BERT of the given shape, with twelve heads."""
    torch.manual_seed(0)
    config = BertConfig(**shape, num_attention_heads=12, vocab_size=1000)
    model: nn.Module = BertForSequenceClassification(config)
    return model.eval()


def halved(axes: Sequence[WidthAxis]) -> Plan:
    """The plan that keeps the first half of every axis."""
    sizes = {axis.name: axis.size for axis in axes}
    return Plan(sizes, {name: tuple(range(size // 2)) for name, size in sizes.items()})


def costs(shapes: Sequence[str] = REAL, repeats: int = 3) -> Iterator[Job]:
    """Seconds and memory of calibration, scores and cuts beside other ways, all in turn."""
    for shape in shapes:
        settings = replace(QUICK if shape == "tiny" else Settings(), repeats=repeats)
        run = partial(in_fresh_process, parts_of, SHAPES[shape], settings)
        yield single({"shape": shape}, lambda run=run, settings=settings: asdict(settings) | run())


def parts_of(shape: Mapping[str, int], settings: Settings) -> dict[str, Any]:
    """Every part at one shape, in groups that take turns."""
    torch.manual_seed(0)
    model = bert(shape)
    axes = choose_axes(find_axes(model))
    layers = shape["num_hidden_layers"]
    ids = torch.randint(5, 1000, (settings.batch, settings.length))
    found: dict[str, Moments] = {}
    rounds = partial(take_turns, repeats=settings.repeats)
    parts = rounds(_sums(axes[: len(axes) // layers], layers, settings), warm=True)
    parts |= rounds(_calibration(model, axes, ids, settings, found))
    # As if the same batches had come again until all of them were there.
    for moments in found.values():
        moments.unpack(settings.batches // settings.timed_batches * moments.packed())
    weights, plan = dict(model.named_parameters()), full_plan(axes)
    known: dict[str, Any] = {"moments": found, "weights": weights, "kept": plan.kept}
    sites = [gather(axis, **known, current=plan, axes=axes)[0] for axis in axes]
    ffn = next(site for site in sites if site.entries == 1)
    parts |= rounds(_scores(sites, ffn, layers, settings), warm=True)
    del sites, ffn  # as large as the moments
    rankings: dict[str, Ranking] = {}
    widths = {axis.name: axis.size // 2 for axis in axes}

    def order() -> None:
        rankings.update(rank_axes(axes, found, weights, plan, relevance="readers"))

    def compensate() -> None:
        select(axes, found, weights, widths, plan, rankings=rankings)

    parts |= rounds({"order": Part(order), "compensation": Part(compensate)})
    found.clear()
    parts |= rounds(_cutting(model, axes, ids, settings))
    return {"parts": parts}


def _sums(axes: Sequence[WidthAxis], layers: int, settings: Settings) -> dict[str, Part]:
    """Our sums of the inputs of one layer in a batch, and the plain products of matrices."""
    rows, widths = settings.batch * settings.length, [axis.size * axis.entries for axis in axes]
    x = [torch.randn(rows, width) for width in widths]
    doubles = [each.double() for each in x]
    ours = [Moments(width) for width in widths]
    plain = [torch.zeros(width, width, dtype=torch.float64) for width in widths]

    def add_up() -> None:
        for moments, each in zip(ours, x, strict=True):
            moments.update(each)

    def multiply() -> None:
        for total, each in zip(plain, doubles, strict=True):
            total.addmm_(each.mT, each)

    part = partial(Part, timed=1, of=layers * settings.batches, unit="layer_batches")
    return {"sums": part(add_up), "product": part(multiply)}


def _calibration(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    ids: Tensor,
    settings: Settings,
    found: dict[str, Moments],
) -> dict[str, Part]:
    """Some batches without hooks, and what the hooks take."""
    modules = [model.get_submodule(axis.readers[0]) for axis in axes]
    positions = settings.batches * ids.numel()

    def validate() -> None:
        with torch.inference_mode():
            for _ in range(settings.timed_batches):
                model(ids)

    def calibrate() -> Cost:
        listener = Listener(model, axes, positions=positions, batches=settings.batches)
        cost = cost_of_hooks(modules, listener, validate)
        found.update(listener.moments)
        return cost

    part = partial(Part, timed=settings.timed_batches, of=settings.batches, unit="batches")
    return {"validation": part(validate), "calibration": part(calibrate)}


def _scores(
    sites: Sequence[Evidence], ffn: Evidence, layers: int, settings: Settings
) -> dict[str, Part]:
    """Each unit's information with the layer above: all of ours, a determinant for a few neurons.

    Args:
        sites: What is known of every axis.
        ffn: What is known of the neurons of one layer.
        layers: How many there are.
        settings: How much is measured.
    """
    topk = MutualInformation("topk", ridge=settings.ridge)
    joint = noisy(ffn, settings.ridge)
    few, neurons = min(settings.neurons, ffn.units), layers * ffn.units
    return {
        "scores": Part(lambda: [topk.scores(site) for site in sites]),
        "scores_of_covariances": Part(lambda: unit_information(*joint), 1, layers, "layers"),
        "log_det": Part(lambda: log_det_information(*joint, few), few, neurons, "neurons"),
    }


def noisy(site: Evidence, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(Sxx, Sxy, Syy)`` with the noise on the layer above that `MutualInformation` puts there."""
    covariance, cross, above = site.joint()
    return covariance, cross, above + site.noise(ridge) * torch.eye(len(above)).to(above)


def _cutting(
    model: nn.Module, axes: Sequence[WidthAxis], ids: Tensor, settings: Settings
) -> dict[str, Part]:
    """Half of every layer goes, here and with torch-pruning's Taylor importance; both on a copy."""
    plan = halved(axes)
    batch = {"input_ids": ids, "labels": torch.zeros(len(ids), dtype=torch.long)}
    importance = torch_pruning().importance.GroupTaylorImportance()

    def gradients() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    def taylor() -> None:
        pruned_by_library(model, axes, batch, 0.5, importance, together=False)

    return {
        "cut": Part(lambda: apply(copy.deepcopy(model), axes, plan)),
        "gradients": Part(gradients, 1, settings.batches, "batches"),
        "taylor_step": Part(taylor),
    }


# ------------------------------------------------------------------------- other ways, to be timed


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


def one_cut(shapes: Sequence[str] = REAL, repeats: int = 3) -> Iterator[Job]:
    """Seconds of every step of one cut, bytes of the sums, peak memory."""
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
    axes = find_axes(model)
    chosen = choose_axes(axes)
    ids = torch.randint(5, 1000, (32, 64))
    batches = -(-positions // ids.numel())
    method = Method(Budget(sparsity=0.5))

    def validate() -> None:
        with torch.inference_mode():
            for _ in range(batches):
                model(ids)

    validate()  # the first pass is slower, which the calibration would seem to save
    result = {"validation_s": timed(validate)}
    before = peak_memory()
    options = {"positions": positions, "batches": batches, "calls": method.refit_positions}
    with Listener(model, chosen, **options) as listener:
        result["calibration_s"] = timed(validate) - result["validation_s"]
    sums = [t for m in listener.moments.values() for t in vars(m).values() if isinstance(t, Tensor)]
    result["sums_mb"] = sum(t.nbytes for t in sums) / 1e6
    weights, plan = dict(model.named_parameters()), full_plan(axes)
    found = Heard(listener.moments, ranks=[listener.stored])
    rankings: dict[str, Ranking] = {}

    def rank(criterion: MutualInformation) -> None:
        known = chosen, found.moments, weights, plan, criterion
        rankings.update(rank_axes(*known, relevance="readers"))

    for criterion in (MutualInformation("topk"), MutualInformation("conditional", ridge=1.0)):
        result[f"order_{criterion.selection}_s"] = timed(partial(rank, criterion))
    started = time.perf_counter()
    widths = allot(chosen, method.budget, costs=ParameterCosts(chosen), rankings=rankings)
    selection = select(chosen, found.moments, weights, widths, plan, rankings=rankings)
    result["allocation_s"] = time.perf_counter() - started
    found.moments = {}
    listener.moments.clear()
    started = time.perf_counter()
    selection = pull_back(model, axes, plan, selection, method, found)
    result["reconstruction_s"] = time.perf_counter() - started
    result["cutting_s"] = timed(partial(apply, model, axes, selection.plan))
    return result | {"peak_above_model_mb": (peak_memory() - before) / 1e6}


# ---------------------------------------------------------------------------------------- the demo

CONFIG = "examples/text_classification/demo.yaml"


def demo(seeds: Sequence[int] = (0, 1, 2)) -> Iterator[Job]:
    """The demo with several seeds: split, head and order of training change with them."""
    for seed in seeds:
        yield single({"config": CONFIG, "seed": seed}, _demo, seed)


def _demo(seed: int) -> Figures:
    name = f"demo-seed-{seed}"
    options = ["--seed_everything", str(seed), "--data.seed", str(seed), "--name", name]
    command = [sys.executable, "-m", "examples.text_classification", "fit", "--config", CONFIG]
    subprocess.run([*command, *options], check=True)  # noqa: S603
    return demo_figures(json.loads(Path("runs", name, "report.json").read_text(encoding="utf-8")))


def demo_figures(report: Mapping[str, Any]) -> dict[str, float]:
    """What the README shows of a report."""
    before, after = report["before"], report["after"]
    figures = {
        "dense accuracy, %": 100 * before["metrics"]["accuracy"],
        "pruned accuracy, %": 100 * after["metrics"]["accuracy"],
    }
    figures["difference, points"] = figures["pruned accuracy, %"] - figures["dense accuracy, %"]
    for dense, pruned in zip(before["latency_ms"], after["latency_ms"], strict=True):
        name = f"encoder speed-up, batch {dense['batch_size']}"
        figures[name] = dense["median"] / pruned["median"]
    spent = sum(sum(cut["seconds"].values()) for cut in report["cuts"])
    figures["pruning, % of the time of training"] = 100 * spent / after["fit_seconds"]
    figures["training, seconds"] = after["fit_seconds"]
    figures["dense training, seconds"] = before["fit_seconds"]
    return figures
