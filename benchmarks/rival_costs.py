"""What listening, scoring and cutting cost beside other ways to do the same.

    python -m benchmarks.rival_costs

For MiniLM-L6 and BERT-base shapes, with random weights and data: the time depends on shapes only.
Ours and the rivals take turns in one process. What grows linearly with the number of neurons or
batches is measured on a few of them and extrapolated; ``timed_neurons`` and the like in
``benchmarks/results/rival_costs.json`` say on how many. ``--busy`` notes that other work ran.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cost import SHAPES, build, halved
from benchmarks.cost_tables import goals_table, rivals_table
from benchmarks.measuring import (
    Cost,
    Part,
    cost_of_hooks,
    in_fresh_process,
    in_this_process,
    machine,
    options,
    take_turns,
    write,
)
from benchmarks.rival_scores import (
    log_det_from_samples,
    log_det_information,
    neighbour_information,
    symmetric_sum,
)
from examples.benchmark.rivals.torchpruning import library, pruned
from lightning_mi_prune import (
    Listener,
    MutualInformation,
    Ranking,
    WidthAxis,
    apply,
    find_axes,
    rank_axes,
    select,
)
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.evidence import Evidence, gather
from lightning_mi_prune.information import unit_information
from lightning_mi_prune.moments import Moments

__all__ = ["RESULTS", "Settings", "main", "measure"]

RESULTS = Path(__file__).parent / "results" / "rival_costs.json"
TINY = {"tiny": {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48}}


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Args:
        batch: Sequences in a batch.
        length: Positions in a sequence.
        batches: Batches of validation, all of whose positions are heard.
        timed_batches: Of these, how many are measured.
        neurons: Neurons for which determinants are taken.
        samples: Neurons for which a covariance or neighbours are looked for among the samples.
        ridge: Noise on the layer above, the same for us and for the determinants.
        repeats: Rounds.
        seed: Seed of the data; weights have seed 0.
    """

    batch: int = 32
    length: int = 64
    batches: int = 8
    timed_batches: int = 2
    neurons: int = 16
    samples: int = 2
    ridge: float = 1.0
    repeats: int = 3
    seed: int = 0

    @property
    def positions(self) -> int:
        """Positions that are heard."""
        return self.batches * self.batch * self.length


QUICK = Settings(batch=4, length=32, batches=2, timed_batches=1, neurons=2, samples=1, repeats=2)


def measure(shape: Mapping[str, int], settings: Settings) -> dict[str, Any]:
    """Every part at one shape, in groups that take turns."""
    torch.manual_seed(settings.seed)
    model = build(shape)
    axes = choose_axes(find_axes(model))
    layers = shape["num_hidden_layers"]
    ids = torch.randint(5, 1000, (settings.batch, settings.length))
    heard: dict[str, Moments] = {}
    rounds = partial(take_turns, repeats=settings.repeats)
    found = rounds(_sums(axes[: len(axes) // layers], layers, settings), warm=True)
    found |= rounds(_listening(model, axes, ids, settings, heard))
    # As if the same batches had come again until all of them were there.
    for moments in heard.values():
        moments.unpack(settings.batches // settings.timed_batches * moments.packed())
    known = partial(
        gather,
        moments=heard,
        weights=dict(model.named_parameters()),
        kept=full_plan(axes).kept,
        current=full_plan(axes),
        axes=axes,
    )
    sites = [known(axis)[0] for axis in axes]
    ffn = next(site for site in sites if site.entries == 1)
    found |= rounds(_scores(sites, ffn, layers, settings), warm=True)
    found |= rounds(_neighbours(ffn, layers, settings))
    del sites, ffn  # as large as the moments
    found |= rounds(_choosing(model, axes, heard))
    heard.clear()
    found |= rounds(_cutting(model, axes, ids, settings))
    units = {kind: sum(a.size for a in axes if a.kind == kind) for kind in ("ffn", "heads")}
    return {**shape, "neurons": units["ffn"], "heads": units["heads"], "parts": found}


def _sums(axes: Sequence[WidthAxis], layers: int, settings: Settings) -> dict[str, Part]:
    """Our sums of what one layer says in a batch, and the plain products of matrices."""
    rows, widths = settings.batch * settings.length, [axis.size * axis.entries for axis in axes]
    x = [torch.randn(rows, width) for width in widths]
    doubles = [each.double() for each in x]
    ours = [Moments(width) for width in widths]
    plain = [torch.zeros(width, width, dtype=torch.float64) for width in widths]
    single = [torch.zeros(width, width) for width in widths]
    triangle = [torch.zeros(width, width, dtype=torch.float64).numpy().T for width in widths]

    def listen() -> None:
        for moments, each in zip(ours, x, strict=True):
            moments.update(each)

    def multiply(totals: Sequence[Tensor], samples: Sequence[Tensor]) -> None:
        for total, each in zip(totals, samples, strict=True):
            total.addmm_(each.mT, each)

    def half() -> None:
        for total, each in zip(triangle, doubles, strict=True):
            symmetric_sum(each.numpy(), total)

    part = partial(Part, timed=1, of=layers * settings.batches, unit="layer_batches")
    return {
        "moments": part(listen),
        "product": part(partial(multiply, plain, doubles)),
        "product_of_one_triangle": part(half),
        "product_float32": part(partial(multiply, single, x)),
    }


def _listening(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    ids: Tensor,
    settings: Settings,
    heard: dict[str, Moments],
) -> dict[str, Part]:
    """Some batches without hooks, and what the hooks take."""
    readers = [model.get_submodule(axis.readers[0]) for axis in axes]

    def validate() -> None:
        with torch.inference_mode():
            for _ in range(settings.timed_batches):
                model(ids)

    def listen() -> Cost:
        listener = Listener(model, axes, positions=settings.positions, batches=settings.batches)
        cost = cost_of_hooks(readers, listener, validate)
        heard.update(listener.moments)
        return cost

    part = partial(Part, timed=settings.timed_batches, of=settings.batches, unit="batches")
    return {"validation": part(validate), "listening": part(listen)}


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
    few = min(settings.neurons, ffn.units)
    return {
        "scores": Part(lambda: [topk.scores(site) for site in sites]),
        "scores_of_covariances": Part(lambda: unit_information(*joint), 1, layers, "layers"),
        "log_det": Part(
            lambda: log_det_information(*joint, few), few, layers * ffn.units, "neurons"
        ),
    }


def noisy(site: Evidence, ridge: float) -> tuple[Tensor, Tensor, Tensor]:
    """``(Sxx, Sxy, Syy)`` with the noise on the layer above that `MutualInformation` puts there."""
    covariance, cross, above = site.joint()
    return covariance, cross, above + site.noise(ridge) * torch.eye(len(above)).to(above)


def _neighbours(ffn: Evidence, layers: int, settings: Settings) -> dict[str, Part]:
    """What starts from the samples again for each neuron."""
    few, readouts = settings.samples, len(ffn.readout)
    x = torch.randn(settings.positions, ffn.units)
    y = x @ ffn.readout.float().mT
    first = x[:, :few]
    neighbour_information(first[:99].numpy(), y[:99, 0].numpy())  # the import is not to be timed

    def neighbours() -> None:
        neighbour_information(first.numpy(), y[:, 0].numpy())

    neurons = layers * ffn.units
    return {
        "log_det_of_samples": Part(
            lambda: log_det_from_samples(first.double(), y.double(), few), few, neurons, "neurons"
        ),
        "neighbours_one_readout": Part(neighbours, few, neurons, "neurons"),
        "neighbours_all_readouts": Part(neighbours, few, neurons * readouts, "pairs"),
    }


def _choosing(
    model: nn.Module, axes: Sequence[WidthAxis], heard: Mapping[str, Moments]
) -> dict[str, Part]:
    """The default's whole order of every axis, and weights that take over half of the units."""
    weights, plan = dict(model.named_parameters()), full_plan(axes)
    rankings: dict[str, Ranking] = {}
    widths = {axis.name: axis.size // 2 for axis in axes}
    return {
        "order": Part(
            lambda: rankings.update(rank_axes(axes, heard, weights, plan, relevance="readers"))
        ),
        "fold_in": Part(lambda: select(axes, heard, weights, widths, plan, rankings=rankings)),
    }


def _cutting(
    model: nn.Module, axes: Sequence[WidthAxis], ids: Tensor, settings: Settings
) -> dict[str, Part]:
    """Half of every layer goes, here and with torch-pruning's Taylor importance; both on a copy."""
    plan = halved(axes)
    batch = {"input_ids": ids, "labels": torch.zeros(len(ids), dtype=torch.long)}
    importance = library().importance.GroupTaylorImportance()

    def gradients() -> None:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()

    return {
        "cut": Part(lambda: apply(copy.deepcopy(model), axes, plan)),
        "gradients": Part(gradients, 1, settings.batches, "batches"),
        "taylor_step": Part(lambda: pruned(model, axes, batch, 0.5, importance, everywhere=False)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every shape in a process of its own, write the records, print the tables."""
    asked = options(__doc__ or "", RESULTS).parse_args(arguments)
    settings = QUICK if asked.quick else Settings()
    settings = replace(settings, repeats=asked.repeats or settings.repeats)
    call = in_this_process if asked.quick else in_fresh_process
    records = [
        {"shape": name, **call(measure, shape, settings)}
        for name, shape in (TINY if asked.quick else SHAPES).items()
    ]
    body = {
        "machine": machine(busy=asked.busy),
        "settings": {**asdict(settings), "positions": settings.positions},
        "records": records,
    }
    write(asked.results, body)
    print("\n".join(rivals_table(body) + goals_table(body)))


if __name__ == "__main__":
    main()
