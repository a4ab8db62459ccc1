"""Several ranks prune as one. Every launch runs many checks, because starting one takes seconds."""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import weakref
from itertools import product
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.utils.data import DataLoader

from lightning_mi_prune.callbacks import units as mutual_information
from lightning_mi_prune.callbacks.distributed import _forget_shapes
from lightning_mi_prune.callbacks.engine import RunEngine
from lightning_mi_prune.callbacks.units import UnitStrategy
from lightning_mi_prune.core.plan import PruningPlan
from tests.support.boring import Sentences, trainer
from tests.support.ranks import launch, launch_nodes, recorded
from tests.support.runs import Batches, Module, fit, sha

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
CUTS = 2
INSIDE = {"kinds": ["ffn", "heads", "head_dim"]}


OPTIONS = {  # of rank 0 and of rank 1
    "sparsity": (0.4, 0.5),
    "kinds": (["heads"], ["ffn"]),
    "constraints.multiple": (4, 2),
    "constraints.floors": ({"ffn": 4}, {"ffn": 8}),
    "reconstruction.method": ("compensation", "none"),
    "importance.selection": ("conditional", "topk"),
    "seed": (0, 1),
    "importance.relevance": ("weights", None),
    "calibration.positions": (600, 601),
    "schedule.cuts": (1, 2),
}


class Log(pl.Callback):
    """What a rank sees: sums of every cut, its gradients, its wrapper."""

    def __init__(self):
        self.counts, self.grads, self.inputs, self.wrappers, self.alive = [], [], [], [], []
        self.old, self.wraps = [], 0

    def setup(self, trainer, pl_module, stage):
        original = trainer.strategy._setup_model

        def setup_model(model):
            self.wraps += 1
            wrapped = original(model)
            self.wrappers.append(weakref.ref(wrapped))
            return wrapped

        trainer.strategy._setup_model = setup_model

    def on_validation_end(self, trainer, pl_module):
        pending = trainer.callbacks[0].engine.state.pending
        if pending is not None:
            self.old = [weakref.ref(p) for p in pl_module.parameters()]

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.inputs.append(sha(batch["input_ids"]))
        gc.collect()
        self.alive.append(sum(wrapper() is not None for wrapper in self.wrappers))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append(sha(*(p.grad for p in pl_module.parameters() if p.grad is not None)))


def seen(folder, **options):
    """What one run did on this rank."""
    log, name = Log(), f"{len(list(folder.iterdir()))}"
    (folder / name).mkdir(exist_ok=True)
    strategy = options.pop("strategy", None) or DDPStrategy()
    world = int(os.environ.get("WORLD_SIZE", 1))
    trainer, module, watch = fit(
        folder / name, strategy=strategy, devices=world, callbacks=[log], **options
    )
    prune = trainer.callbacks[0]
    return {
        "digests": watch.digests,
        "plan": prune.plan.to_json(),
        "cuts": [cut.epoch for cut in prune.report.cuts],
        "grads": log.grads,
        "inputs": log.inputs,
        "alive": log.alive,
        "wraps": log.wraps,
        "old": sum(p() is not None and p() not in set(module.parameters()) for p in log.old),
        "norms": [type(m).__name__ for m in module.modules() if "BatchNorm" in type(m).__name__],
    }


class Uneven(Module):
    """Rank 1 has half of the validation batches of rank 0."""

    def val_dataloader(self):
        return Batches(128 if self.global_rank == 0 else 64, 32, seed=1)


class Padded(Module):
    """An ordinary loader: the distributed sampler repeats one example on the last rank."""

    def val_dataloader(self):
        return DataLoader(Sentences(129, seed=1), batch_size=16)


class Empty(Module):
    """Rank 1 has nothing to validate on."""

    def __init__(self, **options):
        super().__init__(**options)
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def val_dataloader(self):
        found = Batches(128, 32, seed=1)
        found.size = 32 if self.global_rank == 0 else 4096
        return found


class Normed(Module):
    """Has a batch norm, which turns into a SyncBatchNorm."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm = nn.BatchNorm1d(4).eval()


class Lonely(Module):
    """Logs a metric on rank 0 only, as Lightning allows."""

    def on_validation_epoch_end(self):
        if self.global_rank == 0:
            self.log("lonely", 1.0, rank_zero_only=True)


def failing(folder, **options):
    """The error of this rank."""
    try:
        seen(folder, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class Steps(pl.Callback):
    """Counts collectives inside of training steps, the saving of gradients included."""

    def __init__(self, counts):
        self.counts, self.before = counts, 0

    def on_train_batch_start(self, *_):
        self.before = sum(map(len, self.counts.values()))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts["in steps"].append(sum(map(len, self.counts.values())) - self.before)


def collectives(folder, pruning):
    """Collectives that Python code starts in one run, by name, in bytes."""
    counts: dict[str, list[int]] = {"in steps": [], "refitted": [], "gathered": []}
    dist = torch.distributed
    places = [(dist, "all_reduce", "all_reduce"), (dist, "all_gather", "all_gather")]
    places += [
        (mutual_information, "sum_tensor", "refitted"),
        (mutual_information, "gather_ranks", "gathered"),
    ]

    def counted(name, original):
        def call(*args, **kwargs):
            tensors = [a for a in args if isinstance(a, torch.Tensor)]
            counts.setdefault(name, []).append(sum(t.numel() * t.element_size() for t in tensors))
            return original(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, label in places:
            patch.setattr(owner, name, counted(label, getattr(owner, name)))
        if pruning:
            fit(folder, devices=2, strategy="ddp", callbacks=[Steps(counts)])
        else:
            plain = trainer(Steps(counts), devices=2, strategy="ddp", num_sanity_val_steps=0)
            plain.fit(Module())
    return counts


def place(folder):
    """This rank, and a folder of its own."""
    folder = folder / os.environ["RANK"]
    folder.mkdir()
    return int(os.environ["RANK"]), folder


def two_ranks(folder):
    """Everything that two ranks are asked."""
    rank, folder = place(folder)

    def broken(self, *args, **kwargs):
        raise ZeroDivisionError("a bug in a criterion")

    found = {
        "plain": seen(folder),
        "static": seen(folder, strategy=DDPStrategy(static_graph=True)),
        "views": seen(folder, strategy=DDPStrategy(gradient_as_bucket_view=True)),
        "unused": seen(folder, strategy=DDPStrategy(find_unused_parameters=True)),
        "manual static": seen(
            folder, optimizer="two-manual", strategy=DDPStrategy(static_graph=True)
        ),
        "accumulated": seen(folder, accumulate_grad_batches=3),
        "uneven": seen(folder, module=Uneven),
        "padded": seen(folder, module=Padded),
        "low memory": seen(folder, pruning={"memory": "low"}),
        "inside heads": seen(folder, pruning=INSIDE),
        "with": collectives(folder, True),
        "without": collectives(folder, False),
        "empty": failing(folder, module=Empty),
        "budget": failing(folder, pruning={"max_drop": 0.5, "monitor": "val_acc"} if rank else {}),
        "metric": failing(folder, module=Lonely, pruning={"max_drop": 0.5, "monitor": "lonely"}),
        **{
            name: failing(folder, pruning={name.rpartition(".")[2]: v[rank]})
            for name, v in OPTIONS.items()
        },
    }
    found["epoch"] = late(folder) if rank else failing(folder)
    original, UnitStrategy.decide = UnitStrategy.decide, broken
    found["bug"] = failing(folder)
    UnitStrategy.decide = original
    found["after"] = seen(folder)["digests"]
    return found


def late(folder):
    """The error of a rank on which no schedule can be fitted."""

    def fail(self, *args):
        raise ValueError("no epoch is left")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunEngine, "_fit", fail)
        return failing(folder)


def four_ranks(folder):
    _, folder = place(folder)
    return {"plain": seen(folder), "padded": seen(folder, module=Padded)}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    found = {}
    runs = {"plain": {}, "padded": {"module": Padded}, "inside heads": {"pruning": INSIDE}}
    for name, options in runs.items():
        trainer, _, watch = fit(folder, **options)
        prune = trainer.callbacks[0]
        found[name] = {"plan": prune.plan.to_json(), "digests": watch.digests}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return launch(2, two_ranks, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return launch(4, four_ranks, tmp_path_factory.mktemp("four"))


ALIKE = (
    *("plain", "static", "views", "unused", "manual static", "accumulated", "uneven", "padded"),
    *("inside heads", "low memory"),
)


@pytest.mark.parametrize("name", ALIKE)
def test_all_ranks_have_the_same_weights_state_and_plan_after_every_epoch(two, name):
    first, second = two[0][name], two[1][name]
    assert first["cuts"] == second["cuts"] == [1, 2]
    assert first["digests"] == second["digests"]
    assert len(first["digests"]) == 4


@pytest.mark.parametrize("name", ALIKE)
def test_gradients_are_reduced_before_and_after_every_cut(two, name):
    first, second = two[0][name], two[1][name]
    assert first["grads"] == second["grads"]
    assert len(set(first["grads"])) > 4
    assert not set(first["inputs"]) & set(second["inputs"])


@pytest.mark.parametrize("name", ALIKE)
def test_the_model_is_wrapped_once_for_each_cut_and_the_old_wrapper_is_gone(two, name):
    for rank in (0, 1):
        assert two[rank][name]["wraps"] == 1 + CUTS
        assert set(two[rank][name]["alive"]) == {1}
        assert two[rank][name]["old"] == 0


def test_options_of_the_wrapper_change_nothing(two):
    for name in ("static", "views", "unused"):
        assert two[0][name]["digests"] == two[0]["plain"]["digests"]


def test_sums_from_files_change_nothing(two):
    assert two[0]["low memory"]["digests"] == two[0]["plain"]["digests"]


@pytest.mark.parametrize("name", ["plain", "padded"])
def test_one_two_and_four_ranks_keep_the_same_units(one, two, four, name):
    plans = [PruningPlan.from_json(run[name]["plan"]) for run in (one, two[0], four[0])]
    assert plans[0].kept == plans[1].kept == plans[2].kept
    rankings = [plan.rankings for plan in plans]
    if name == "plain":
        orders = [{n: ranking.order for n, ranking in each.items()} for each in rankings]
        assert orders[0] == orders[1] == orders[2]
    # The mean loss of a rank with few tokens counts as much as that of one with many, so that
    # padded runs train a little differently.
    for other, (group, ranking) in product(rankings[1:], rankings[0].items()):
        assert other[group].loss == pytest.approx(ranking.loss, rel=0.05)
    assert all(four[rank][name]["digests"] == four[0][name]["digests"] for rank in range(4))


def test_one_and_two_ranks_keep_the_same_dimensions(one, two):
    first, second = (PruningPlan.from_json(run["inside heads"]["plan"]) for run in (one, two[0]))
    assert first.kept == second.kept
    assert any(first.width(n) < s for n, s in first.sizes.items() if n.endswith("head_dim"))


def test_a_cut_costs_two_large_all_reduces_one_a_refit_and_a_step_nothing(two):
    """float64: count, sums and one triangle of outer products; heads and neurons of two layers.

    Of gradients: counts, one number a unit, and one triangle over the outputs of its consumer.
    """
    with_, without = two[0]["with"], two[0]["without"]
    moments = 2 * sum(8 * (1 + d + d * (d + 1) // 2) for d in (24, 40))
    gradients = 2 * sum(8 * (3 + units + 24 * 25 // 2) for units in (4, 40))
    extra = list(with_["all_reduce"])
    for size in [*without["all_reduce"], *with_["refitted"]]:
        extra.remove(size)
    assert extra[:2] == [moments, gradients]
    assert len(extra) == 2 * CUTS
    assert extra[2] < moments
    assert extra[3] < gradients
    assert len(with_["refitted"]) >= 4 * CUTS  # output projections of two layers, at least
    assert with_["in steps"] == without["in steps"]
    assert len(with_["gathered"]) == CUTS
    gathered = len(with_["all_gather"]) - len(without.get("all_gather", []))
    # What is known as fit starts, then what the first batch shows; two steps are tried on a copy.
    assert gathered == 4 + 2 + 2 * CUTS
    assert set(with_["all_gather"]) <= {32, *without.get("all_gather", [])}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("budget", "disagree on what to prune and how.*: max_drop is None on rank 0 and 0.5 on"),
        ("empty", "disagree on whether there are validation batches.* is True on rank 0 and False"),
        *((name, "disagree on what to prune and how") for name in OPTIONS),
    ],
)
def test_ranks_that_disagree_all_fail_with_the_same_sentence(two, name, message):
    assert two[0][name] == two[1][name]
    assert two[0][name].startswith("PruningError: Ranks [1] and rank 0 ")
    assert re.search(message, two[0][name])
    if name in OPTIONS:
        first, second = OPTIONS[name]
        assert f"{name} is {first!r} on rank 0 and {second!r} on rank 1" in two[0][name]


def test_an_error_on_one_rank_stops_all(two):
    assert "Ranks [1] and rank 0 disagree on the schedule of the cuts" in two[0]["epoch"]
    assert "the error is absent on rank 0 and 'ValueError: no epoch is left'" in two[0]["epoch"]
    assert two[1]["epoch"] == "ValueError: no epoch is left"


def test_a_metric_that_rank_zero_logs_is_enough(two):
    assert two[0]["metric"] == two[1]["metric"] == "no error"


def test_an_error_where_it_is_decided_is_an_error_everywhere(two):
    assert two[0]["bug"] == "ZeroDivisionError: a bug in a criterion"
    assert two[1]["bug"].startswith("PruningError: Rank 0 could not decide. ZeroDivisionError: a")
    assert two[0]["after"] == two[0]["plain"]["digests"]


def read(folder):
    return [
        {int(k): v for k, v in json.loads((folder / f"{rank}.json").read_text()).items()}
        for rank in (0, 1)
    ]


def test_lightnings_own_launcher_gives_the_same_run(two, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.ranks", str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(tmp_path) == [two[0]["plain"]["digests"]] * 2


def test_torchrun_over_two_nodes_gives_the_same_run(two, tmp_path):
    """Two agents on one machine, one process each: what a cluster starts on two."""
    assert launch_nodes(2, recorded, tmp_path, 1, 2) == [0, 0]
    assert read(tmp_path) == [two[0]["plain"]["digests"]] * 2


def test_a_stateful_communication_hook_starts_anew():
    state = PowerSGDState(process_group=None, matrix_approximation_rank=1)
    state.iter = 1500
    state.error_dict[0] = state.p_memory_dict[0] = state.q_memory_dict[0] = torch.ones(3)
    _forget_shapes(state)
    assert state.iter == 0
    assert state.error_dict == state.p_memory_dict == state.q_memory_dict == {}
    _forget_shapes(None)


def on_gpus(folder):
    _, folder = place(folder)
    hooked = DDPStrategy(ddp_comm_hook=fp16_compress_hook)
    options = {"accelerator": "gpu", "sync_batchnorm": True, "module": Normed}
    return seen(folder, strategy=hooked, **options)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_gpus_hooks_and_synchronized_norms_are_kept(tmp_path):
    first, second = launch(2, on_gpus, tmp_path).values()
    assert first["digests"] == second["digests"]
    assert first["grads"] == second["grads"]
    assert first["wraps"] == 1 + CUTS
    assert first["norms"] == ["SyncBatchNorm"]
