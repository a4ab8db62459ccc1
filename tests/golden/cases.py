"""Small seeded runs of everything the package computes, each with a plain record of its results.

A record holds numbers, digests, and names of parameters and groups of the models. It holds no name
of a class, function, option or field of the package, so renaming those changes no record.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import random
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.support.graphs import groups_of

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from torch import Tensor, nn

from lightning_mi_prune import PruningGraph, apply_plan, linear_group, prune
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.latency import LatencyCurve, LatencyTable
from lightning_mi_prune.allocation.measuring import device_of
from lightning_mi_prune.calibration.data import LayerComparison
from lightning_mi_prune.checkpoint.validation import PLAN_KEY
from lightning_mi_prune.core.options import (
    Calibration,
    Constraints,
    Importance,
    Latency,
    Reconstruction,
)
from lightning_mi_prune.importance.layer_criteria import LayerSelector
from tests.support.boring import Classifier
from tests.support.models import CONFIGS, PICTURES, batch, build, pictures
from tests.support.ranks import launch
from tests.support.runs import Module, Point, fit, sha
from tests.support.stacks import Deep, Tolerant

# Kinds of unit, with which the names of groups end. Where the package renames one, its constant
# changes, and the name on the right, under which it is recorded, does not. Random alone depends on
# the whole name of a group: its seed does.
FFN, HEADS, DIMS, POOLER, RESIDUAL = "ffn", "heads", "head_dim", "pooler", "hidden"
RECORDED = {FFN: "ffn", HEADS: "heads", DIMS: "dims", POOLER: "pooler", RESIDUAL: "residual"}

# How the options of the package are written, in one place.
GRADIENT, READERS = "gradient", "weights"
ALONE, JOINT = "topk", "conditional"
UNIFORM = "uniform"
LAYER_CRITERIA = ("cka", "angle", "angular_run", "last", "random")

Record = dict[str, Any]
DIGESTS = ("weights", "orders", "run")  # equal on the machine that recorded them only
LONG = 200  # a longer list of numbers is recorded as a digest


RESULTS = Path(__file__).parent / "results.json"


def load() -> tuple[str, dict[str, Record]]:
    """The machine that recorded the results, and the record of every case."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found["machine"], found["cases"]


def machine() -> str:
    """What decides on the last bit of a result."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__} {capability} {platform.machine()}"


def record(name: str) -> Record:
    """The results of a case: one thread, fixed seeds, no warnings."""
    threads = torch.get_num_threads()
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            logger.setLevel(logging.ERROR)
            torch.set_num_threads(1)
            torch.manual_seed(0)
            random.seed(0)
            return json.loads(json.dumps(short(CASES[name](Path(folder)))))
        finally:
            torch.set_num_threads(threads)
            logger.setLevel(level)


# What is recorded


def called(name: str) -> str:
    """The name of a group, or of a kind of unit, as results record it."""
    head, dot, last = name.rpartition(".")
    return head + dot + RECORDED.get(last, last)


def plan_record(plan: Any) -> Record:
    """Units kept of every group; orders and what is lost on the way, where they are known."""
    stacks = {n for n in plan.kept if n.rpartition(".")[2] in ("layer", "layers")}
    whole = {n for n in stacks if len(plan.kept[n]) == plan.sizes[n]}
    groups = sorted(set(plan.kept) - whole, key=called)
    ranked = [n for n in groups if n in plan.rankings]
    orders = [[called(n), list(plan.rankings[n].order)] for n in ranked]
    curves = [[list(plan.rankings[n].loss), list(plan.rankings[n].nats)] for n in ranked]
    return {
        "plan": [[called(n), plan.sizes[n], list(plan.kept[n])] for n in groups],
        "losses": [[sum(loss), sum(nats)] for loss, nats in curves],
        "orders": sha(orders, curves),
    }


def weights_record(module: nn.Module) -> Record:
    """A digest of all parameters and buffers, and a number that other machines can compare."""
    state = {n: t for n, t in sorted(module.state_dict().items()) if not n.endswith(PLAN_KEY)}
    tensors = [x for item in state.items() for x in item]
    norms = [float(t.double().norm()) for t in state.values() if isinstance(t, Tensor)]
    return {"weights": sha(*tensors), "norms": math.fsum(norms), "tensors": len(state)}


def report_record(report: Any) -> Record:
    """Values of a report in a fixed order; the seconds are left out."""
    return {
        "sizes": [report.parameters, report.prunable_parameters, report.macs],
        "cuts": [_cut(cut) for cut in report.cuts],
        "undone": [_cut(cut) for cut in report.undone],
    }


def _cut(cut: Any) -> list[Any]:
    groups = [
        [
            called(a.name),
            called(a.kind),
            a.before,
            a.after,
            a.information_nats,
            a.information_fraction,
        ]
        for a in cut.groups
    ]
    sizes = [cut.parameters, cut.prunable_parameters, cut.macs]
    stacks = [_stack(stack) for stack in cut.stacks]
    return [cut.epoch, cut.sparsity, *sizes, groups, stacks, cut.information_kept]


def _stack(cut: Any) -> list[Any]:
    similarity = [list(row) for row in cut.similarity]
    clusters = [list(cluster) for cluster in cut.clusters]
    layers = [list(cut.before), list(cut.after), list(cut.removed)]
    return [cut.name, *layers, similarity, clusters, cut.threshold, cut.every]


def short(value: Any) -> Any:
    """The same with every list of more than :data:`LONG` numbers replaced by its digest."""
    if isinstance(value, dict):
        return {key: short(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        if len(value) > LONG:
            return sha(list(value))
        return [short(part) for part in value]
    return value


# One call


def one_shot(
    model: nn.Module,
    data: Iterable[Any],
    budget: Any = 0.5,
    *,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    **options: Any,
) -> Record:
    """Prune a model in one call and record what came out."""
    done = prune(model, data, budget, optimizers=optimizers, **options)
    names = sorted(done.information, key=called)
    found = plan_record(done.plan) | {
        "sparsity": done.sparsity,
        "sizes": [*done.parameters, *done.prunable_parameters, *done.macs],
        "information": [
            [called(n), done.information[n].total, done.information[n].kept] for n in names
        ],
    }
    if optimizers:
        states = [
            value for o in optimizers for s in o.state.values() for _, value in sorted(s.items())
        ]
        found["run"] = sha(*states)
    return found | weights_record(model)


def texts(count: int = 5) -> list[dict[str, Tensor]]:
    """Labelled batches of token ids with padding."""
    return [
        {**b, "labels": b["input_ids"][:, 1] % 3} for b in (batch(48, seed=i) for i in range(count))
    ]


def images(count: int = 5) -> list[dict[str, Tensor]]:
    """Labelled batches of pixels."""
    found = [pictures(40, seed=i) for i in range(count)]
    return [{**b, "labels": torch.arange(40) % 3} for b in found]


def own_loss(model: nn.Module, inputs: Any) -> Tensor:
    """The loss of a Hugging Face model with labels."""
    return model(**inputs).loss


def squares(model: nn.Module, inputs: Any) -> Tensor:
    """A loss without labels."""
    return (model(*inputs) if isinstance(inputs, tuple) else model(inputs)).square().mean()


def kinds_of(model: nn.Module) -> list[str]:
    """Every kind of unit of a model that can be ranked."""
    groups = groups_of(model)
    return sorted({group.kind for group in groups if group.kind != DIMS or group.rotation})


def family(kind: str, every: bool, _: Path) -> Record:
    """A tiny model of a family: neurons and heads, or all kinds of unit that it has."""
    picture = kind in PICTURES
    model = build(kind, "image" if picture else "sequence")
    units = kinds_of(model) if every else None
    data = images() if picture else texts()
    return one_shot(model, data, 0.4, loss=own_loss, kinds=units)


def head(kind: str, _: Path) -> Record:
    """A BERT with another head, all kinds of unit, without gradients."""
    model = build("bert", kind)
    units = [unit for unit in kinds_of(model) if unit != DIMS]
    return one_shot(model, [batch(48, seed=i) for i in range(5)], 0.4, kinds=units)


def bert(
    _: Path,
    budget: Any = 0.5,
    *,
    gradients: bool = True,
    importance: Mapping[str, Any] | None = None,
    **options: Any,
) -> Record:
    """A tiny BERT with other options."""
    how = Importance(**{"relevance": GRADIENT if gradients else None} | dict(importance or {}))
    loss = own_loss if how.relevance == GRADIENT else None
    return one_shot(build(), texts(), budget, loss=loss, importance=how, **options)


def milliseconds(folder: Path) -> Record:
    """A budget in milliseconds, by a table that is given: nothing is timed."""
    model = build()
    groups = [group for group in groups_of(model) if group.kind != DIMS]
    groups.sort(key=lambda group: group.kind == "hidden")
    curves = tuple(
        LatencyCurve((group.name,), (group.size, group.size // 2, 0), (0.0, 0.5 + i / 8, 2.0))
        for i, group in enumerate(groups)
    )
    path = folder / "table.json"
    LatencyTable(device_of(model), 1, 12, 10.0, curves).write(path)
    budget = Budget(target_latency_ms=6.0)
    return one_shot(model, texts(), budget, loss=own_loss, latency=Latency(str(path)))


def twice(_: Path) -> Record:
    """Two calls after each other: plans compose, an optimizer follows, a fresh model too."""
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for inputs in texts(2):
        optimizer.zero_grad()
        own_loss(model, inputs).backward()
        optimizer.step()
    one_shot(model, texts(), 0.3, loss=own_loss, optimizers=[optimizer])
    found = one_shot(
        model, texts(), 0.6, loss=own_loss, optimizers=[optimizer], kinds=[FFN, HEADS, DIMS]
    )
    return found | {"classes": [len(optimizer.state), model.config.num_labels]}


def fresh(_: Path) -> Record:
    """A plan applied to a model that was never cut, and the order followed further down."""
    model, other = build(), build(seed=7)
    done = prune(model, texts(), 0.4, loss=own_loss, kinds=[FFN, HEADS])
    widths = {n: max(1, done.plan.width(n) // 2) for n in done.plan.rankings}
    further = {n: r.kept(widths[n]) for n, r in done.plan.rankings.items()}
    plan = replace(done.plan, kept={**done.plan.kept, **further})
    apply_plan(other, groups_of(other), plan)
    return plan_record(plan) | weights_record(other)


class Normed(nn.Module):
    """Linear blocks with a skip and a BatchNorm; two layers read the last units."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(10, 48), nn.Linear(48, 10), nn.BatchNorm1d(10)
        self.mid, self.one, self.two = nn.Linear(10, 32), nn.Linear(32, 3), nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.down(self.up(x).relu()))
        x = self.mid(x).tanh()
        return torch.cat([self.one(x), self.two(x)], dim=-1)


def own_network(gradients: bool, _: Path) -> Record:
    """A network whose groups are described by hand."""

    low = {"producers": ["up"], "consumers": ["down"], "level": 0}
    high = {"producers": ["mid"], "consumers": ["one", "two"], "level": 1}
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(150, 10, generator=generator) * 2 + 1 for _ in range(4)]
    net = Normed().train()
    for data in rows:
        net(data)
    groups = [linear_group(net, n, kind=FFN, **g) for n, g in (("low", low), ("high", high))]
    graph = PruningGraph.of(groups)
    return one_shot(net, rows, 0.5, loss=squares if gradients else None, graph=graph)


class Encoder(nn.Module):
    """Embeddings, torch's own encoder, and a head on the first position."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x), src_key_padding_mask=padding)[:, 0])


def torch_encoder(norm_first: bool, _: Path) -> Record:
    """The neurons of ``nn.TransformerEncoder``, with padding and the residual stream named."""
    net, found = Encoder(norm_first=norm_first).eval(), []
    for i in range(2):
        path = f"encoder.layers.{i}"
        ends = {"producers": [f"{path}.linear1"], "consumers": [f"{path}.linear2"]}
        group = linear_group(net, f"ffn{i}", kind=FFN, level=i, **ends)
        stream = f"{path}.norm2" if norm_first else f"{path}.linear1"
        found.append(replace(group, residual=stream))
    data = []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 50, (32, 10), generator=generator)
        data.append((ids, (torch.arange(10) >= 7).expand(32, 10).clone()))
    return one_shot(net, data, 0.5, loss=squares, graph=PruningGraph.of(found))


def lightning_module(_: Path) -> Record:
    """A LightningModule brings its own loss and its own way to run."""
    module = Classifier(validation_rows=192)
    optimizer = torch.optim.AdamW(module.parameters())
    module.loss(next(iter(module.val_dataloader()))).backward()
    optimizer.step()
    training = module.train_dataloader()
    return one_shot(module, module.val_dataloader(), optimizers=[optimizer], training=training)


# Training


def trained(folder: Path, **options: Any) -> Record:
    """A run of the Trainer: the plan, the report, weights, and all that training goes on from."""
    run, module, watch = fit(folder, **options)
    return run_record(run, module, watch)


def run_record(run: Any, module: Any, watch: Any) -> Record:
    """What a finished run is compared by."""
    parts = ("optimizers", "lr", "metrics")  # of every epoch; weights at the end
    epochs = [[epoch, *(d[key] for key in parts)] for epoch, d in sorted(watch.digests.items())]
    metrics = {k: float(v) for k, v in sorted(run.callback_metrics.items()) if k.startswith("val")}
    found = plan_record(watch.pruning.plan) | report_record(watch.pruning.report)
    return found | weights_record(module) | {"run": sha(epochs), "metrics": list(metrics.values())}


class Scored(Module):
    """Its score falls with the share of neurons that are gone, beyond what costs nothing."""

    free = 0.0

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        super().validation_step(batch, index)
        layers = self.model.bert.encoder.layer
        left = sum(layer.intermediate.dense.weight.numel() for layer in layers) / (2 * 24 * 40)
        score = torch.tensor(min(1.0, left + self.free), dtype=torch.float64)
        self.log("score", score, batch_size=1)


class Tough(Scored):
    """It can do without a third."""

    free = 0.35


GUARD = {"max_drop": 0.1, "monitor": "score", "ramp": "linear", "cuts": 2, "first_epoch": 1}


def resumed(folder: Path, **options: Any) -> Record:
    """A run that was stopped inside an epoch and goes on from its checkpoint."""
    (folder / "first").mkdir()
    (folder / "second").mkdir()
    stop = {"here": Point("on_train_batch_end", 1, 1)}
    fit(folder / "first", points=stop, **options)
    return trained(folder / "second", resume=folder / "first" / "0.ckpt", **options)


def rank_run(folder: Path) -> Record:
    """What one of two ranks ends with."""
    own = folder / os.environ["RANK"]
    own.mkdir()
    return trained(own, strategy="ddp", devices=2, pruning={"kinds": [FFN, HEADS]})


def two_ranks(folder: Path) -> Record:
    """Two processes with gloo; every rank must record the same."""
    found = launch(2, rank_run, folder)
    # Optimizers, rates and metrics of every epoch are digested in "run", and metrics may be local.
    alike = [{k: v for k, v in r.items() if k != "run"} for r in found.values()]
    return found[0] | {"ranks": len(found), "alike": alike[0] == alike[1]}


def thinned(criterion: str, target: int | None, _: Path) -> Record:
    """Which layers each criterion chooses, for given likenesses and angles."""
    generator = torch.Generator().manual_seed(3)
    steps = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    points = 4 + (steps * torch.rand(9, 1, generator=generator)).cumsum(0)
    cosine = torch.nn.functional.cosine_similarity(points[:, None], points[None], dim=-1)
    alike, angles = cosine[1:, 1:], cosine.clamp(-1, 1).arccos() / math.pi
    compared = LayerComparison(
        tuple(range(8)), *(tuple(map(tuple, m.tolist())) for m in (alike, angles))
    )
    found = []
    for progress in (0.5, 1.0):
        for every in (1, 2):
            how = LayerSelector(0.99 if target is None else None, target, criterion, seed=1)
            cut = how.choose("stack", compared, every=every, progress=progress)
            found.append([list(cut.after), list(map(list, cut.clusters)), cut.threshold, cut.every])
    return {"chosen": found}


CRITERIA: dict[str, dict[str, Any]] = {
    "joint information": {"selection": JOINT},
    "information alone": {"selection": ALONE},
    "taylor": {"criterion": "taylor"},
    "magnitude": {"criterion": "magnitude"},
    "activation norm": {"criterion": "activation_norm"},
    "random": {"criterion": "random"},
}
METHODS: dict[str, dict[str, Any]] = {
    "relevance of weights": {"importance": {"relevance": READERS}, "gradients": False},
    "weights above, alone": {
        "importance": {"relevance": READERS, "selection": ALONE},
        "gradients": False,
    },
    "no relevance": {"gradients": False},
    "uniform widths": {"widths": UNIFORM},
    "uniform widths, weights above": {
        "widths": UNIFORM,
        "importance": {"relevance": READERS},
        "gradients": False,
    },
    "no reconstruction": {"reconstruction": Reconstruction("compensation")},
    "neither": {"reconstruction": Reconstruction("none")},
    "floors, caps, pins": {
        "constraints": Constraints(
            floors={r"layer\.0\.": 0.5},
            caps={r"layer\.1\.": 0.5},
            pins={f"0.*{HEADS}": 3},
            multiple=4,
        ),
        "budget": 0.45,
    },
    "whole sublayers": {"constraints": Constraints(pins={r"layer\.0\.": 0}), "budget": 0.6},
    "dimensions of heads": {"kinds": [DIMS]},
    "dimensions and neurons, no reconstruction": {
        "kinds": [DIMS, FFN],
        "reconstruction": Reconstruction("compensation"),
    },
    "dimensions and heads, uniform": {"kinds": [DIMS, HEADS], "widths": UNIFORM},
    "hidden size": {"kinds": [RESIDUAL]},
    "pooler": {"kinds": [POOLER]},
    "few samples": {"calibration": Calibration(150, 2), "seed": 5},
    "one layer": {"include": r"layer\.1\."},
    "all but some": {"exclude": rf"layer\.0\.{HEADS}"},
    "parameters": {"budget": Budget(target_parameters=7000)},
    "multiply-accumulates": {"budget": Budget(target_macs=45_000)},
    "multiply-accumulates, all kinds": {
        "budget": Budget(target_macs=60_000),
        "kinds": [FFN, HEADS, DIMS, RESIDUAL],
    },
    "information": {"budget": Budget(keep_information=0.8)},
}
ALL = [FFN, HEADS, DIMS, POOLER, RESIDUAL]
TRAINING: dict[str, dict[str, Any]] = {
    "two cuts": {},
    "three cuts": {"pruning": {"ramp": "cubic", "cuts": 3, "last_epoch": 3}, "max_epochs": 5},
    "all kinds": {"pruning": {"kinds": ALL}},
    "relevance of weights": {"pruning": {"relevance": READERS}},
    "no relevance, uniform": {"pruning": {"relevance": None, "widths": UNIFORM}},
    "information alone": {"pruning": {"selection": ALONE, "method": "compensation"}},
    "multiply-accumulates": {"pruning": {"sparsity": None, "target_macs": 70_000}},
    "information": {"pruning": {"sparsity": None, "keep_information": 0.8}},
    "few samples": {"pruning": {"positions": 300, "reconstruction_positions": 200, "seed": 5}},
    "bounds": {
        "pruning": {"floor": 0.25, "floors": {r"layer\.0\.": 0.5}, "caps": {FFN: 32}, "multiple": 4}
    },
    "sgd": {"optimizer": "sgd-momentum"},
    "two optimizers": {"optimizer": "two-manual"},
    "bf16": {"precision": "bf16-mixed"},
    "rollback": {"pruning": {**GUARD, "sparsity": 0.6}, "module": Scored, "max_epochs": 8},
    "rollback of one": {"pruning": {**GUARD, "sparsity": 0.8}, "module": Tough, "max_epochs": 8},
}
DEPTH: dict[str, dict[str, Any]] = {
    "layers by threshold": {"layers": {}},
    "layers by threshold, rbf": {"layers": {"kernel": "rbf", "threshold": 0.9}},
    "layers, no reconstruction": {"layers": {"method": "none"}},
    "layers, then units": {"layers": {}, "pruning": {"sparsity": 0.4}, "max_epochs": 6},
    "layers, rollback": {
        "layers": {"max_drop": 0.01, "monitor": "score"},
        "module": Tolerant,
        "max_epochs": 6,
    },
} | {
    f"layers by {criterion}": {"layers": {"criterion": criterion, "target_layers": 2} | more}
    for criterion, more in zip(LAYER_CRITERIA, [{"threshold": None}, {}, {}, {}, {}], strict=True)
}

CASES: dict[str, Callable[[Path], Record]] = {
    **{f"family {k}": partial(family, k, False) for k in (*CONFIGS, *PICTURES)},
    **{f"family {k}, all kinds": partial(family, k, True) for k in (*CONFIGS, *PICTURES)},
    **{f"head {k}": partial(head, k) for k in ("token", "question", "masked-lm")},
    **{
        f"criterion {k}{', no relevance' if not gradients else ''}": partial(
            bert, importance=criterion, gradients=gradients
        )
        for k, criterion in CRITERIA.items()
        for gradients in (True, False)
        if gradients or k != "taylor"
    },
    **{f"method {k}": partial(bert, **options) for k, options in METHODS.items()},
    "method milliseconds": milliseconds,
    "two calls": twice,
    "a plan on a fresh model": fresh,
    "a LightningModule": lightning_module,
    "own network": partial(own_network, True),
    "own network, no gradients": partial(own_network, False),
    "torch encoder": partial(torch_encoder, False),
    "torch encoder, norm first": partial(torch_encoder, True),
    **{f"training {k}": partial(trained, **options) for k, options in TRAINING.items()},
    "training resumed": resumed,
    "training over two ranks": two_ranks,
    **{f"training {k}": partial(trained, **{"module": Deep, **o}) for k, o in DEPTH.items()},
    **{
        f"training layers of {k}": partial(
            trained,
            layers={"threshold": None, "target_layers": 1},
            module=partial(Module, family=k),
            max_epochs=3,
        )
        for k in CONFIGS
        if k not in ("bert", "xlm-roberta", "albert")
    },
    "training layers resumed": partial(resumed, layers={"first_epoch": 2}, module=Deep),
    **{f"choice of layers by {k}": partial(thinned, k, 3) for k in LAYER_CRITERIA},
    "choice of layers by threshold": partial(thinned, "cka", None),
}
