"""Runs that resume with something changed, or where Lightning skips what we rely on."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_mi_prune import MutualInformationPruning, PruningError, load_pruned
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.callbacks.state import RunState
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.reporting.report import PruningReport
from lightning_mi_prune.surgery.units import apply_plan
from tests.callbacks.test_rollback import BUDGET, Painless, Scored
from tests.support.boring import Classifier, Sentences, trainer
from tests.support.graphs import groups_of, tracker_of
from tests.support.models import entries_of, random_plan
from tests.support.runs import Batches, Module, Point, fit, resumed_equals_straight, sha

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def widths(module, kind):
    groups = [a for a in groups_of(module) if a.kind == kind]
    return [module.get_parameter(a.tensors[0].tensor).shape[0] // entries_of(a) for a in groups]


def stopped(folder, point, **options):
    fit(folder, points={"here": point}, **options)
    return folder / "0.ckpt"


def resumed(folder, path, match=None, **options):
    if match is None:
        return fit(folder, resume=path, **options)
    with pytest.warns(UserWarning, match=match):
        return fit(folder, resume=path, **options)


PLACES = (
    ("on_train_batch_end", 0),
    ("on_train_batch_end", 2),
    ("on_train_batch_end", 3),
    ("on_validation_batch_end", 1),
    ("on_validation_end", None),
    ("on_train_epoch_end", None),
)
RHYTHMS = (
    {"val_check_interval": 3},
    {"val_check_interval": 2},
    {"check_val_every_n_epoch": None, "val_check_interval": 6},
    {"check_val_every_n_epoch": 2, "pruning": {"cuts": 1}},
)


@pytest.mark.filterwarnings("ignore:The cut of epoch 1 waits")
@pytest.mark.parametrize("number", range(len(RHYTHMS)), ids=lambda number: str(RHYTHMS[number]))
def test_wherever_validation_falls_a_resumed_run_equals_the_straight_one(tmp_path, number):
    """Every second of all points, so that each place meets each epoch and each rhythm."""
    points = {
        f"{hook} {epoch} {batch}": Point(hook, epoch, batch)
        for epoch in (0, 1, 2, 3)
        for place, (hook, batch) in enumerate(PLACES)
        if (epoch + place + number) % 2 == 0
    }
    found = resumed_equals_straight(tmp_path, points, max_epochs=6, **RHYTHMS[number])
    reached = {k: v for k, v in found.items() if v != "the point was never reached"}
    assert len(reached) > 6
    assert not any(reached.values()), reached


@pytest.mark.parametrize(
    ("point", "options"),
    [
        (Point("on_train_epoch_end", 0), {}),
        (Point("on_train_batch_end", 0, 3), {"val_check_interval": 3}),
    ],
    ids=["pending", "heard"],
)
@pytest.mark.parametrize(
    ("before", "after", "ffn", "heads"),
    [
        ({"kinds": ["ffn"]}, {"kinds": ["ffn", "heads"]}, [20, 20], [2, 2]),
        ({}, {"exclude": r"layer\.0"}, [40, 20], [4, 2]),
    ],
    ids=["more", "less"],
)
def test_other_units_are_chosen_anew(tmp_path, point, options, before, after, ffn, heads):
    even = {"widths": "uniform"}
    path = stopped(tmp_path, point, pruning=before | even, **options)
    _, module, _ = resumed(tmp_path, path, "other groups", pruning=after | even, **options)
    assert widths(module, "ffn") == ffn
    assert widths(module, "heads") == heads


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"relevance": "weights"}, {}),
        ({"method": "compensation"}, {}),
        ({"kinds": ["ffn"], "gradient_steps": 3}, {}),
        ({}, {"relevance": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_the_options_now_ask_for_is_heard_anew(tmp_path, before, after, batch):
    """Batch 3 comes after the validation of its epoch, batch 1 while gradients are gathered."""
    options = {"val_check_interval": 3, "max_epochs": 3}
    path = stopped(tmp_path, Point("on_train_batch_end", 0, batch), pruning=before, **options)
    lacks = batch == 3 and after != {"relevance": None}
    match = "Calibration (has less than the options ask for|was of other groups)" if lacks else None
    _, _, watch = resumed(tmp_path, path, match, pruning=after, **options)
    (cut,) = watch.pruning.report.cuts
    assert cut.epoch == 1 + lacks


def test_another_budget_on_resume_is_met(tmp_path):
    first, second = ({"sparsity": None, "target_parameters": n} for n in (10_000, 8_000))
    path = stopped(tmp_path, Point("on_train_epoch_end", 2), pruning=first, max_epochs=4)
    said = "The budget was target_parameters=10000; the schedule begins anew"
    _, module, watch = resumed(tmp_path, path, said, pruning=second, max_epochs=8)
    assert sum(p.numel() for p in module.parameters()) <= 8_000
    assert watch.pruning.report.cuts[-1].epoch > 2


def test_without_its_budget_a_trial_ends_and_the_cut_stays(tmp_path):
    run = {"module": Scored, "max_epochs": 8}
    path = stopped(tmp_path, Point("on_validation_end", 1), pruning=BUDGET, **run)
    free = {k: v for k, v in BUDGET.items() if k not in ("max_drop", "monitor")}
    stopping = EarlyStopping("score", patience=2, min_delta=10, mode="max", strict=False)
    _, _, watch = resumed(
        tmp_path, path, "the last cut is kept", pruning=free, callbacks=[stopping], **run
    )
    assert watch.pruning.engine.state.snapshot is None
    assert len(watch.pruning.report.cuts) == 2
    assert max(watch.digests) < 7


def test_the_best_of_another_metric_is_not_compared(tmp_path):
    run = {"module": Painless, "max_epochs": 8}
    path = stopped(tmp_path, Point("on_train_epoch_end", 0), pruning=BUDGET, **run)
    other = {**BUDGET, "monitor": "val_loss", "mode": "min", "max_drop": 0.5}
    _, _, watch = resumed(tmp_path, path, pruning=other, **run)
    assert watch.pruning.report.undone == []
    assert watch.pruning.engine.state.best < 3


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 3}, {"accumulate_grad_batches": 4, "val_check_interval": 2}]
)
def test_a_cut_is_taken_back_between_epochs_with_no_gradient_left(tmp_path, options):
    seen = []

    class Watching(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            prune = trainer.callbacks[0]
            grads = any(p.grad is not None for p in pl_module.parameters())
            seen.append((trainer.current_epoch, batch_idx, len(prune.report.undone), grads))

    budget = {**BUDGET, "on_drop": "stop"}
    fit(tmp_path, module=Scored, pruning=budget, callbacks=[Watching()], max_epochs=6, **options)
    epoch, batch, _, grads = next(s for s in seen if s[2] == 1)
    assert batch == 0
    assert epoch > 1
    assert not grads


def test_buffers_that_grew_or_take_no_copy_are_put_back(tmp_path):
    class Queue(Scored):
        def __init__(self, **options):
            super().__init__(**options)
            self.register_buffer("queue", torch.zeros(4))
            self.register_buffer("wide", torch.zeros(1).expand(4))

        def on_train_batch_end(self, *_):
            self.queue = torch.cat([self.queue, torch.ones(1)])

    sizes = []

    class Watching(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            sizes.append(len(pl_module.queue))

    fit(tmp_path, module=Queue, pruning={**BUDGET, "on_drop": "stop"}, callbacks=[Watching()],
        max_epochs=4)  # fmt: skip
    assert sizes[:3] == [4, 8, 8]  # taken back at the start of the third epoch


def test_pruning_may_begin_in_the_middle_of_a_run(tmp_path):
    dense = trainer(max_epochs=6)
    dense.fit(Module())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    _, _, watch = resumed(tmp_path, tmp_path / "dense.ckpt", max_epochs=12, pruning={"cuts": 3})
    assert [cut.epoch for cut in watch.pruning.report.cuts] == [7, 8, 9]
    found = [cut.sparsity for cut in watch.pruning.report.cuts]
    assert found == sorted(found)
    with pytest.raises(Exception, match="lasts 1 epoch; expected at least 2"):
        fit(tmp_path, resume=tmp_path / "dense.ckpt", max_epochs=7)


def test_a_run_that_got_longer_fits_a_new_schedule_and_keeps_its_cuts(tmp_path):
    even = {"widths": "uniform"}
    path = stopped(tmp_path, Point("on_train_epoch_end", 2), pruning=even, max_epochs=4)
    _, module, watch = resumed(tmp_path, path, pruning=even, max_epochs=8)
    cuts = watch.pruning.report.cuts
    assert [cut.epoch for cut in cuts][:2] == [1, 2]
    assert widths(module, "ffn") == [20, 20]


def test_the_last_cut_is_followed_by_a_validation(tmp_path):
    with pytest.raises(Exception, match="No validation runs before and after epochs 4 to 4"):
        fit(tmp_path, pruning={"first_epoch": 4, "last_epoch": 4, "cuts": 1}, max_epochs=5,
            check_val_every_n_epoch=2)  # fmt: skip


def test_streams_hear_a_validation_again_too(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(Sentences(64))

    class Streaming(Module):
        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=16)

    epochs = {}
    for hook, batch in (("on_validation_start", None), ("on_validation_batch_end", 1)):
        path = stopped(tmp_path, Point(hook, 1, batch), module=Streaming)
        _, _, watch = resumed(tmp_path, path, module=Streaming)
        epochs[hook] = [cut.epoch for cut in watch.pruning.report.cuts]
    assert set(map(tuple, epochs.values())) == {(1, 2)}


def test_loggers_hear_of_the_size_that_came_back(tmp_path):
    run, module, watch = fit(
        tmp_path, module=Scored, pruning={**BUDGET, "on_drop": "stop"}, max_epochs=6
    )
    assert watch.pruning.report.cuts == []
    assert run.callback_metrics["prune/sparsity"] == 0
    assert run.callback_metrics["prune/parameters"] == sum(p.numel() for p in module.parameters())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_network_that_came_pruned_has_no_second_tracker(tmp_path):
    small = Classifier()
    groups = groups_of(small.model)
    tracker_of(small.model).plan = random_plan(groups, 0.75)
    apply_plan(small.model, groups, random_plan(groups, 0.75))
    torch.save(small.model.state_dict(), tmp_path / "net.pt")
    module = Module()
    load_pruned(module.model, tmp_path / "net.pt")
    run, module, _ = fit(tmp_path, module=lambda **_: module)
    run.save_checkpoint(tmp_path / "whole.ckpt")
    state = module.state_dict()
    keys = [key for key in state if "lightning_mi_prune" in key]
    assert [key.partition("lightning")[0] for key in keys] == ["model.bert.", "model."]
    for again in (module, Module()):
        found = load_pruned(again, tmp_path / "whole.ckpt")
        for name, value in found.state_dict().items():
            assert torch.equal(value, state[name])


def test_plans_of_parts_are_read_by_the_whole():
    inner = nn.ModuleDict({"net": Classifier().model})
    root = nn.ModuleDict({"part": inner})
    tracker = tracker_of(inner)
    plan = random_plan(tracker.groups)
    apply_plan(inner, tracker.groups, plan)
    tracker.plan = plan
    state = root.state_dict()
    keys = [key for key in state if "lightning_mi_prune" in key]
    assert [key.partition("lightning")[0] for key in keys] == ["part.net.bert.", "part.net."]
    fresh = nn.ModuleDict({"part": nn.ModuleDict({"net": Classifier().model})})
    outer = PlanTracker.of(fresh)
    fresh.load_state_dict(state)
    assert outer.plan == plan.prefixed("part")


GOOD = RunState().to_dict()
LYING = torch.zeros(1, dtype=torch.float64).expand(1 + 20_000 + 20_000 * 20_001 // 2)
NAN = torch.full((3,), torch.nan, dtype=torch.float64)
SUMS = (1, 1, False, torch.ones(5, dtype=torch.float64))
CALL = vars(RecordedCall((torch.ones(1, 2),), {}, torch.ones(1, 2)))
DATA = {
    "moments": {"a": (1, torch.ones(3, dtype=torch.float64))},
    "gradients": {"a": SUMS},
    "ranks": [{"": [CALL]}],
    "examples": {},
    "stacks": {},
}


def collected(**change):
    return {"calibration": {**DATA, **change}}


DECISION = {"plan": "{}", "compensated": {}, "information": {}, "rotated": {}}
PENDING = {"epoch": 1, "sparsity": 0.5, "decision": DECISION}
SNAPSHOT = {"epoch": 1, "reached": 0.0, "information_kept": 1.0, "plan": "{}", "weights": {},
         "optimizers": [], "groups": [], "failed_epoch": None}  # fmt: skip
ALIKE = {"layers": [0, 2], "similarity": [[1.0, 0.5], [0.5, 1.0]], "angles": [[0.0] * 3] * 3,
         "fixed": 0}  # fmt: skip


def pending(**change):
    return {"pending": {**PENDING, "decision": {**DECISION, **change}}}


PLAN = '{"kept":{"a":[0]},"sizes":{"a":2},"version":1}'


@pytest.mark.parametrize(
    "change",
    [
        None,
        [],
        {"version": 1},
        {"version": 2},
        {"version": None},
        {"reached": float("nan")},
        {"reached": 1e9},
        {"reached": "0.5"},
        {"reached": True},
        {"best": "x"},
        {"begin": -1},
        {"begin": 2**70},
        {"calibration_epoch": 0.5},
        {"fitted": {"epochs": [float("inf")], "sparsities": [0.5]}},
        {"fitted": {"epochs": [1, 2], "sparsities": [0.5]}},
        {"schedule": {"epochs": [1], "sparsities": [1.5]}},
        {"schedule": 3},
        {"information_kept": 1.5},
        {"information_kept": None},
        {"gradients": 3},
        {"gradients": {"a": SUMS[:3]}},
        {"gradients": {"a": (20_000, 1, False, LYING)}},
        {"gradients": {"a": (-1, 1, False, SUMS[3])}},
        {"gradients": {"a": (1, 2**62, False, SUMS[3])}},
        {"gradients": {"a": (2, 1, False, SUMS[3])}},
        {"gradients": {"a": (*SUMS[:3], SUMS[3] * torch.inf)}},
        {"gradients": {"a": (*SUMS[:3], SUMS[3].float())}},
        {"gradients": {"a": (*SUMS[:3], None)}},
        {"calibration": {}},
        collected(moments={"a": (20_000, LYING)}),
        collected(moments={"a": (-1, torch.zeros(3))}),
        collected(moments={"a": (2**62, torch.zeros(3))}),
        collected(moments={"a": (100_000, torch.zeros(3))}),
        collected(moments={"a": (1, torch.zeros(3))}),
        collected(moments={"a": (1, NAN)}),
        collected(moments={"a": 3}),
        collected(gradients={"a": (1, 1, False, LYING)}),
        collected(gradients={"a": (1, 1, False, NAN)}),
        collected(gradients=[SUMS]),
        collected(ranks=None),
        collected(ranks=[3]),
        collected(ranks=[{"": [{}]}]),
        collected(ranks=[{"": [{**CALL, "args": CALL["args"][0]}]}]),
        collected(ranks=[{"": [{**CALL, "args": ({"x": [LYING]},)}]}]),
        collected(ranks=[{"": [{**CALL, "mask": LYING}]}]),
        collected(stacks=None),
        collected(stacks={"a": {**ALIKE, "similarity": [[1.0]]}}),
        {
            "comparison": {
                **DATA,
                "stacks": {"a": {**ALIKE, "angles": [[0.0] * 3, [0.0] * 3, [0.0]]}},
            }
        },
        {"comparison": {**DATA, "stacks": {"a": {**ALIKE, "layers": [0, -1]}}}},
        {"comparison": {**DATA, "stacks": {"a": {**ALIKE, "fixed": 3}}}},
        {"comparison": {**DATA, "stacks": {"a": {**ALIKE, "angles": [[float("nan")] * 3] * 3}}}},
        {"cluster_step": -1},
        {"pending": {}},
        {"pending": PENDING},
        pending(plan=PLAN, compensated={"x": 3}),
        pending(plan=PLAN, compensated={"x": LYING}),
        {"pending": {**pending(plan=PLAN)["pending"], "epoch": "1"}},
        {"snapshot": SNAPSHOT},
        {"snapshot": {**SNAPSHOT, "plan": PLAN, "weights": None}},
        {"snapshot": {**SNAPSHOT, "plan": PLAN, "weights": {"w": LYING}}},
        {"snapshot": {**SNAPSHOT, "plan": PLAN, "failed_epoch": "no"}},
        {"snapshot": {**SNAPSHOT, "plan": PLAN, "information_kept": float("nan")}},
        {"snapshot": {**SNAPSHOT, "plan": PLAN, "optimizers": [3]}},
        {"snapshot": {**SNAPSHOT, "plan": PLAN, "groups": [3]}},
        {"examples": {"a": {"args": 3, "kwargs": {}, "mask": None}}},
        {"examples": {"a": {"args": (), "kwargs": {}, "mask": None, "autocast": "exec"}}},
        {"seconds": {"a": None}},
        {"report": {}},
        {"report": {**PruningReport().state_dict(), "cuts": [{"epoch": 1}]}},
    ],
    ids=lambda change: str(change)[:50],
)
def test_a_damaged_state_is_one_clear_error(change):
    state = change if not isinstance(change, dict) else {**GOOD, **change}
    with pytest.raises(PruningError):
        MutualInformationPruning().load_state_dict(state)


def test_an_undamaged_state_is_read():
    callback = MutualInformationPruning()
    callback.load_state_dict(GOOD)
    assert callback.state_dict() == GOOD
    for part in (
        collected(),
        {"gradients": {"a": SUMS}, "information_kept": 0.5},
        pending(plan=PLAN),
        {"snapshot": {**SNAPSHOT, "plan": PLAN}},
    ):
        callback.load_state_dict(GOOD | part)
        assert sha(callback.state_dict()) == sha(GOOD | part)
    assert Batches(64, 16, seed=0).state_dict() == {"served": 0}


@pytest.mark.filterwarnings("ignore:The cut of epoch . waits")
def test_a_cut_that_is_too_late_to_train_on_is_not_made(tmp_path):
    """The only validation comes with the last batch but one of the run."""
    with pytest.warns(UserWarning, match="ended after 0 of 1"):
        _, module, watch = fit(
            tmp_path, max_epochs=3, check_val_every_n_epoch=None, val_check_interval=11
        )
    assert watch.pruning.engine.state.pending is None
    assert widths(module, "ffn") == [40, 40]
