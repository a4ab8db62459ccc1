"""Files that lie: whatever they hold is read, or refused in one sentence, with bounded work."""

from __future__ import annotations

import copy
import inspect
import json
import os
import random
import warnings
from collections import OrderedDict
from dataclasses import is_dataclass, replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mi_prune import CKALayerPruning, MutualInformationPruning, PruningError
from lightning_mi_prune import pipeline as method_module
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.latency import Device, LatencyCurve, LatencyTable
from lightning_mi_prune.allocation.measuring import cached_table, measure_table
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.callbacks.distributed import differences
from lightning_mi_prune.callbacks.resume import check_snapshot
from lightning_mi_prune.callbacks.state import RunState, Snapshot, read, write
from lightning_mi_prune.checkpoint.validation import PLAN_KEY
from lightning_mi_prune.core.errors import PruningWarning
from lightning_mi_prune.core.files import check_writable, write_whole
from lightning_mi_prune.core.options import Latency
from lightning_mi_prune.core.plan import PruningPlan, Ranking
from lightning_mi_prune.core.untrusted import check_nesting, described
from lightning_mi_prune.pipeline import PipelineOptions, check
from lightning_mi_prune.reporting.report import PruningReport
from lightning_mi_prune.surgery.optimizers import (
    parameter_names,
    restore_state,
    snapshot_state,
    update_optimizers,
)
from lightning_mi_prune.surgery.units import apply_plan
from tests.callbacks.test_rollback import BUDGET, Scored
from tests.reporting.test_report import CUT, stack_cut
from tests.support.boring import Classifier, trainer
from tests.support.graphs import groups_of, tracker_of
from tests.support.models import batch, build, random_plan
from tests.support.pruning import pruning_units
from tests.support.runs import Point, fit, sha

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")

HUGE = torch.zeros(1).expand(2**32)
LOOP: list = []
LOOP.append(LOOP)
CIRCLE: dict = {}
CIRCLE["a"] = {"b": CIRCLE}

NEURONS = "bert.encoder.layer.0.ffn"


def doubled(times):
    """A list that names the one before it twice, again and again."""
    found: list = []
    for _ in range(times):
        found = [found, found]
    return found


def nested(depth):
    found: list = []
    for _ in range(depth):
        found = [found]
    return found


def quantized(dtype):
    with warnings.catch_warnings():  # deprecated, but files may hold one
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, dtype)


class Hostile:
    def __repr__(self):
        raise AssertionError("printed")

    __str__ = __eq__ = __repr__
    __hash__ = object.__hash__


JUNK = [
    *(None, True, -1, 0, 2**70, 10**400, 10**5000, 1.5, float("nan"), float("inf"), "", "x" * 9999),
    *([], {}, (), [[]], {"a": 1}, {1: 2}, {"a", "b"}, b"bytes", OrderedDict(a=1), Hostile()),
    *(
        LOOP,
        CIRCLE,
        nested(5000),
        doubled(60),
        HUGE,
        torch.tensor(1.0),
        torch.full((3,), torch.nan),
    ),
    *(torch.ones(2, 2).to_sparse(), torch.ones(3, device="meta"), torch.zeros(3, dtype=torch.int8)),
    quantized(torch.qint8),
    torch.ones(2, dtype=torch.complex64),
    torch.ones(3, requires_grad=True),
]


def refusal(read, value):
    """The one sentence with which something is refused; empty where it is read."""
    try:
        read(value)
    except PruningError as error:
        return str(error)
    return ""


class Touched(TorchDispatchMode):
    """Counts the elements that operations look at; views look at none."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not any(r.alias_info for r in func._schema.returns):
            leaves = tree_leaves((args, kwargs))
            self.count += sum(x.numel() for x in leaves if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", JUNK, ids=lambda value: type(value).__name__)
def test_any_value_is_described_in_a_few_words_and_without_looking_at_elements(value):
    with Touched() as touched:
        text = described(value)
    assert 0 < len(text) < 150
    assert "\n" not in text
    assert touched.count == 0


@pytest.mark.parametrize("value", [LOOP, CIRCLE, nested(5000), doubled(60)], ids=range(4))
def test_containers_without_measure_are_refused(value):
    with pytest.raises(ValueError, match=r"itself|nests more|repeated"):
        check_nesting({"a": (value,)})


def test_containers_that_share_parts_are_read():
    shared = [[1.0] * 100] * 3
    check_nesting({"a": shared, "b": shared, "c": [shared, ()], "d": HUGE})


# ---------------------------------------------------------------- the state of a callback


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A checkpoint of a run with a cut on probation."""
    folder = tmp_path_factory.mktemp("stopped")
    points = {"on trial": Point("on_train_batch_end", 1, 1)}
    fit(folder, module=Scored, pruning={**BUDGET, "sparsity": 0.6}, points=points, max_epochs=6)
    return folder / "0.ckpt"


@pytest.fixture(scope="module")
def state(stopped):
    """The state of its callback, with everything in it that there can be."""
    saved = torch.load(stopped, weights_only=True)
    (state,) = (s for key, s in saved["callbacks"].items() if "MutualInformation" in key)
    assert state["snapshot"] is not None
    call = vars(RecordedCall((torch.ones(1, 2),), {"x": [1, "a", None]}, torch.ones(1, 2)))
    sums = (1, 1, False, torch.ones(5, dtype=torch.float64))
    alike = {"layers": [0, 2], "similarity": [[1.0, 0.5], [0.5, 1.0]], "angles": [[0.0] * 3] * 3}
    state["calibration"] = state["comparison"] = {
        "moments": {"a": (1, torch.ones(3, dtype=torch.float64))},
        "gradients": {"a": sums},
        "ranks": [{"": [call]}],
        "examples": {},
        "stacks": {"s": {**alike, "fixed": 0, "losses": None}},
    }
    ranking = {"a": Ranking((1, 0), (0.0, 1.0), (0.0, 2.0))}
    state["pending"] = {
        "epoch": 1,
        "sparsity": 0.5,
        "decision": {
            "plan": PruningPlan({"a": 2}, {"a": (0,)}, ranking).to_json(),
            "compensated": {"w": torch.ones(2)},
            "rotated": {"w": {0: torch.ones(1, 2, 2)}},
            "information": {"a": {"total": 2.0, "kept": 1.0}},
        },
    }
    layers = replace(CUT, groups=(), stacks=(stack_cut(),))
    state["report"] = PruningReport(100, 80, 9, [CUT, layers], {"macs": 1}, [CUT]).state_dict()
    return state


def places(value, path=()):
    """Every place in nested containers."""
    if not isinstance(value, (dict, list, tuple)):
        return
    for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value, path, change):
    """The containers with another value at a place; ``change`` gets the container and the key."""
    key, *rest = path
    new = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        new[key] = changed(value[key], rest, change)
    else:
        change(new, key)
    return tuple(new) if isinstance(value, tuple) else new


def mutations(value, count, junk, seed=0):
    """Seeded small changes: another value, an entry gone, one more, one twice, two swapped."""
    draw = random.Random(seed)  # noqa: S311
    known = list(places(value))

    def put(new, key):
        new[key] = draw.choice(junk)

    def drop(new, key):
        del new[key]

    def add(new, key):
        if isinstance(new, dict):
            new[draw.choice([7, "more", ("a",), b"x"])] = draw.choice(junk)
        else:
            new.append(draw.choice(junk))

    def double(new, key):
        new[key] = [new[key], new[key]]

    def trade(new, key):
        other = draw.choice(list(new) if isinstance(new, dict) else range(len(new)))
        new[key], new[other] = new[other], new[key]

    for _ in range(count):
        # Deep places are many: half of the draws are from those near the top.
        near = [place for place in known if len(place) <= draw.choice((1, 2, 3, 99))]
        place = draw.choice(near)
        yield place, changed(value, place, draw.choice((put, put, put, drop, add, double, trade)))


def elements(value):
    storages = {t.untyped_storage().data_ptr(): t for t in tree_leaves(value)
                if isinstance(t, torch.Tensor)}  # fmt: skip
    return sum(t.untyped_storage().nbytes() for t in storages.values())


def test_the_state_of_a_run_is_read_and_written_again(state):
    callback = MutualInformationPruning()
    callback.load_state_dict(state)
    again = callback.state_dict()
    for key in again:
        leaves = [sorted(map(sha, tree_leaves(found[key]))) for found in (again, state)]
        assert leaves[0] == leaves[1], key


def test_mutated_states_are_read_or_refused_in_one_sentence_with_bounded_work(state):
    most, refused = 4 * elements(state) + 10**6, 0
    for place, mutated in mutations(state, 500, JUNK):
        callback = MutualInformationPruning()
        with Touched() as touched:
            error = refusal(callback.load_state_dict, mutated)
        assert touched.count < most, place
        assert len(error) < 600, place
        assert "\n" not in error, place
        refused += bool(error)
        callback.state_dict()  # what was read can be written
    assert refused > 200


@pytest.mark.parametrize("value", JUNK, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(
    "key",
    [
        "version",
        "outdated",
        "budget",
        "calibration",
        "snapshot",
        "report",
        "examples",
        "seconds",
        "cluster_step",
    ],
)
def test_junk_for_any_entry_is_one_sentence(state, key, value):
    callback = MutualInformationPruning()
    harmless = (key == "outdated" and value is True) or (
        key == "budget" and type(value) is str and value == ""
    )
    harmless |= value is None and key in ("calibration", "snapshot")
    harmless |= isinstance(value, dict) and not value and key in ("examples", "seconds")
    if harmless:
        return
    if key == "seconds" and type(value) in (dict, OrderedDict) and value in ({"a": 1},):
        return
    with Touched() as touched, pytest.raises(PruningError) as error:
        callback.load_state_dict({**state, key: value})
    assert touched.count < 4 * elements(state) + 10**6
    assert len(str(error.value)) < 600


def test_a_thousand_views_of_one_tensor_are_refused(state):
    large = torch.zeros(2**16)
    weights = {f"w{i}": large.view(-1) for i in range(10_000)}
    with Touched() as touched, pytest.raises(PruningError, match="again and again"):
        RunState.from_dict({**state, "snapshot": {**state["snapshot"], "weights": weights}})
    assert touched.count < 10**6


# ---------------------------------------------------------------- a cut on probation


def trained(optimizer=torch.optim.AdamW, steps=1):
    """A small model after a step, with its tracker, its optimizer, and a snapshot of both."""
    model = build()
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    model.register_buffer("unset", torch.full((2,), torch.nan))
    model.constant = nn.Parameter(torch.full((2,), -torch.inf), requires_grad=False)
    tracker = tracker_of(model)
    adam = optimizer(model.parameters(), lr=1e-3)
    for _ in range(steps):
        model(**batch()).logits.square().mean().backward()
        adam.step()
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = {name: t.detach().clone() for name, t in tensors}
    kept = snapshot_state([adam], names)
    trial = Snapshot(1, 0.0, 1.0, tracker.plan, weights, kept, parameter_names([adam], names))
    return model, tracker, adam, trial


def known(trial):
    return read(Snapshot, write(trial))


def edited(trial, name, **change):
    """The trial with other values in the state of one parameter, or of all."""
    states = copy.deepcopy(trial.optimizers)
    for found in states[0].values() if name is None else [states[0][name]]:
        for key, new in change.items():
            if found and new is None:
                del found[key]
            elif found:
                found[key] = new(found[key]) if callable(new) else new
    return replace(trial, optimizers=states)


FFN = "bert.encoder.layer.0.intermediate.dense.weight"


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop]
)
def test_a_sound_trial_is_never_refused(optimizer, steps):
    """Also with an infinite mask, a statistic that is not set, and squares that overflowed."""
    model, tracker, made, trial = trained(optimizer, steps)
    trial = edited(trial, FFN, exp_avg_sq=torch.full((40, 24), torch.inf)) if (
        optimizer is torch.optim.AdamW and steps) else trial  # fmt: skip
    found = known(trial)
    assert sha(*found.weights.values()) == sha(*trial.weights.values())
    check_snapshot(found, model, tracker.graph, tracker.plan, [made])


def test_a_sound_trial_fits_the_model_that_was_cut_since():
    model, tracker, adam, trial = trained()
    plan = random_plan(tracker.groups)
    update_optimizers([adam], apply_plan(model, tracker.groups, plan))
    check_snapshot(known(trial), model, tracker.graph, plan, [adam])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exp_avg": 3}, "'exp_avg' of .* is no tensor, that of other parameters is a tensor"),
        ({"exp_avg": "text"}, "is 'text'; the parameter has shape"),
        ({"exp_avg": lambda x: x.int()}, "is a tensor of other numbers, that of other"),
        ({"exp_avg": lambda x: x * torch.nan}, "'exp_avg' of .* holds NaN or infinite"),
        ({"exp_avg": lambda x: x - torch.inf}, "'exp_avg' of .* holds NaN or infinite"),
        (
            {"exp_avg": lambda x: x[:5]},
            "shape \\(5, 24\\) .*; the parameter has shape \\(40, 24\\)",
        ),
        ({"exp_avg": lambda x: x.to_sparse()}, "is a Tensor of shape .*; the parameter has shape"),
        ({"step": float("nan")}, "'step' of .* (is no tensor|holds NaN)"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_a_damaged_trial_is_refused_when_it_is_read(change, message):
    _, _, _, trial = trained()
    with pytest.raises(ValueError, match=message):
        known(edited(trial, FFN, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"weights": {**t.weights, FFN: t.weights[FFN] * torch.nan}}, "holds NaN"),
        (lambda t: {"weights": {**t.weights, FFN: 3}}, "3 is no tensor"),
        (lambda t: {"weights": {k: v for k, v in t.weights.items() if k != FFN}}, "has no weight"),
        (lambda t: {"groups": []}, "does not have 1 entries"),
        (lambda t: {"groups": [[["x"]]]}, "no group of an optimizer holds"),
        (lambda t: {"groups": [[torch.ones(3)]]}, "is not a list"),
        (lambda t: {"optimizers": {"a": {}}}, "is not a list"),
        (lambda t: {"plan": torch.ones(3)}, "is a Tensor .*; expected JSON text"),
    ],
    ids=range(8),
)
def test_parts_of_a_trial_that_do_not_belong_together_are_refused(change, message):
    _, _, _, trial = trained()
    with pytest.raises((ValueError, TypeError, PruningError), match=message):
        read(Snapshot, {**write(trial), **change(trial)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: edited(t, None, exp_avg=3), "'exp_avg' of .* is 3; AdamW keeps a Tensor"),
        (lambda t: edited(t, None, exp_avg=None), r"has \['exp_avg_sq', 'step'\]; AdamW keeps"),
        (lambda t: edited(t, None, exp_avg=lambda x: x.int()), "of shape .*int32; AdamW keeps"),
        (lambda t: edited(t, FFN, exp_avg=None), r"has \['exp_avg_sq', 'step'\]; AdamW keeps"),
        (lambda t: replace(t, optimizers=[], groups=[]), "has 0 optimizers, not 1"),
        (
            lambda t: replace(t, weights={**t.weights, "classifier.bias": torch.ones(9)},
                              optimizers=[{}]),
            r"'classifier.bias' is .* \(9,\) .*; expected shape \(3,\)",
        ),
        (
            lambda t: replace(t, weights={**t.weights, "mask": torch.ones(3).to_sparse()}),
            "'mask' is a Tensor",
        ),
        (
            lambda t: replace(t, weights={**t.weights, "constant": torch.ones(2).int()}),
            "'constant' is a Tensor .*int32; expected",
        ),
        (lambda t: replace(t, plan=PruningPlan.full({**t.plan.sizes, NEURONS: 41})),
         "has size 41, not 40"),
        (
            lambda t: replace(t, plan=t.plan.then(
                PruningPlan({"bert.encoder.layer.0.ffn": 40}, {"bert.encoder.layer.0.ffn": (1,)}))),
            "has units now that it had not then",
        ),
    ],
    ids=range(10),
)  # fmt: skip
def test_a_trial_of_another_model_or_optimizer_is_refused(change, message):
    model, tracker, adam, trial = trained()
    before = sha(*model.state_dict().values())
    with pytest.raises(PruningError, match=message) as error:
        check_snapshot(known(change(trial)), model, tracker.graph, tracker.plan, [adam])
    assert "resume without max_drop" in str(error.value)
    assert sha(*model.state_dict().values()) == before


def test_a_run_refuses_a_damaged_trial_before_its_first_batch(stopped, tmp_path):
    saved = torch.load(stopped, weights_only=True)
    (state,) = (s for key, s in saved["callbacks"].items() if "MutualInformation" in key)
    for values in state["snapshot"]["optimizers"][0].values():
        values.pop("exp_avg", None)
    torch.save(saved, tmp_path / "damaged.ckpt")
    steps = []

    class Watched(Scored):
        def training_step(self, batch, index):
            steps.append(index)
            return super().training_step(batch, index)

    pruning = {**BUDGET, "sparsity": 0.6}
    with pytest.raises(PruningError, match=r"snapshot before the last cut is damaged.*exp_avg"):
        fit(tmp_path, module=Watched, pruning=pruning, resume=tmp_path / "damaged.ckpt",
            max_epochs=6)  # fmt: skip
    assert steps == []


def test_state_of_another_precision_is_brought_back_in_that_of_now():
    weight = nn.Parameter(torch.ones(3))
    sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.ones(3)
    sgd.step()
    saved = {"momentum_buffer": torch.full((3,), 2.0, dtype=torch.float64)}
    restore_state([sgd], {}, {id(weight): "w"}, [{"w": saved}])
    assert sgd.state[weight]["momentum_buffer"].dtype == torch.float32
    sgd.step()
    with pytest.raises(PruningError, match="does not fit"):
        restore_state(
            [sgd], {}, {id(weight): "w"}, [{"w": {"momentum_buffer": torch.ones(3).int()}}]
        )


# ---------------------------------------------------------------- plans, reports, tables

PLAN = PruningPlan(
    {"a": 4, "b": 2}, {"a": (0, 2, 3), "b": (1,)}, {"a": Ranking((3, 0, 2), (0, 1, 2.5), (0, 1, 2))}
)
TABLE = LatencyTable(
    Device("cpu", "a processor", 2, "2.9.0", "float32"), 8, 32, 10.0,
    (LatencyCurve(("a",), (64, 32, 0), (0.0, 1.0, 3.0)),),
)  # fmt: skip
JSON_JUNK = [
    *(None, True, -1, 0, 2**70, 10**400, 1.5, 1e308, "", "x" * 999, [], {}, [[1]], {"a": 1}),
    *(nested(30), float("nan"), float("inf"), "\ud800"),
]


@pytest.mark.parametrize(
    "read", [PruningPlan.from_json, LatencyTable.from_json], ids=["plan", "table"]
)
def test_mutated_json_is_read_or_refused_in_one_sentence(read):
    good = (PLAN if read == PruningPlan.from_json else TABLE).to_json()
    draw, refused = random.Random(1), 0  # noqa: S311
    body = json.loads(good)
    texts = [json.dumps(mutated) for _, mutated in mutations(body, 300, JSON_JUNK)
             if all(isinstance(key, str) for key in tree_keys(mutated))]  # fmt: skip
    for _ in range(200):  # characters gone, twice, or others
        start = draw.randrange(len(good))
        end = start + draw.randrange(6)
        texts.append(
            good[:start] + draw.choice(["", good[start:end] * 2, "9", '"', "e9"]) + good[end:]
        )
    for text in texts:
        error = refusal(read, text)
        assert len(error) < 500
        assert "\n" not in error
        assert error or read(read(text).to_json()) == read(text)
        refused += bool(error)
    assert refused > 150


def tree_keys(value):
    if isinstance(value, dict):
        yield from value
    for part in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from tree_keys(part)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"version":true,"sizes":{},"kept":{}}', "version True"),
        ('{"version":1.0,"sizes":{},"kept":{}}', "version 1.0"),
        ('{"version":1,"sizes":{"a":2,"a":3},"kept":{"a":[0]}}', "the key 'a' occurs twice"),
        ('{"version":1,"sizes":{"a":NaN},"kept":{"a":[0]}}', "NaN is not a number"),
        ('{"version":1,"sizes":{"a":-Infinity},"kept":{"a":[0]}}', "-Infinity is not a number"),
        (f'{{"version":1,"sizes":{{"a":1{"0" * 9000}}},"kept":{{"a":[0]}}}}', "not valid JSON"),
        (f'{{"version":1,"sizes":{{"a":1{"0" * 900}}},"kept":{{"a":[0]}}}}', "an int of .* bits"),
    ],
    ids=range(7),
)
def test_json_is_read_strictly(text, message):
    with pytest.raises(PruningError, match=message):
        PruningPlan.from_json(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": [[1], 0]}, "not a whole number"),
        ({"order": [True, 0]}, "not a whole number"),
        ({"loss": [0, 10**400]}, "an int of 1329 bits is not a finite number"),
        ({"nats": [0, "1"]}, "'1' is not a number"),
        ({"nats": [0, -1]}, "-1 is not a finite number from 0"),
        ({"loss": 3}, "need 'order', 'loss' and 'nats'"),
    ],
    ids=str,
)
def test_a_damaged_ranking_is_refused(change, message):
    ranking = {"order": [1, 0], "loss": [0, 1], "nats": [0, 1], **change}
    body = {"version": 1, "sizes": {"a": 2}, "kept": {"a": [0]}, "rankings": {"a": ranking}}
    with pytest.raises(PruningError, match=message):
        PruningPlan.from_json(json.dumps(body))


BYTES = torch.frombuffer(bytearray(PLAN.to_json().encode()), dtype=torch.uint8)


class Odd(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "entry",
    [
        BYTES.to_sparse(),
        BYTES.to("meta"),
        BYTES.as_subclass(Odd),
        torch.zeros(1, dtype=torch.uint8).expand(2**32),
        quantized(torch.quint8),
        LOOP,
        HUGE,
    ],
    ids=range(7),
)
def test_an_entry_of_another_kind_is_no_plan_and_is_not_looked_at(entry):
    root = Classifier()
    tracker_of(root)
    state = root.state_dict()
    with Touched() as touched, pytest.raises(PruningError, match=r"not a plan"):
        root.load_state_dict({**state, PLAN_KEY: entry})
    assert touched.count < 10**6


def test_mutated_reports_are_read_or_refused():
    layers = replace(CUT, groups=(), stacks=(stack_cut(),))
    good = PruningReport(100, 80, 9, [CUT, layers], {"macs": 1}, [CUT]).state_dict()
    refused = 0
    for place, mutated in mutations(good, 300, JUNK):
        with Touched() as touched:
            error = refusal(PruningReport.from_state, mutated)
        assert touched.count == 0, place
        assert len(error) < 500, place
        refused += bool(error)
        if not error:
            json.dumps(PruningReport.from_state(mutated).to_dict(), allow_nan=False)
    assert refused > 100
    for junk in JUNK:
        with pytest.raises(PruningError, match="report"):
            PruningReport.from_state(junk)


# ---------------------------------------------------------------- files


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def bad_paths(tmp_path):
    """Paths that no file can be written to."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("here")
    os.mkfifo(tmp_path / "pipe")
    return [
        tmp_path / "folder",
        tmp_path / "file" / "below.json",
        tmp_path / "file" / "far" / "below.json",
        tmp_path / ("long" * 100),
        tmp_path / "new" / ("long" * 100),
        tmp_path / ("long" * 100) / "x",
        tmp_path / "null\0",
        tmp_path / "pipe",
    ]


def test_a_path_that_takes_no_file_is_refused_and_nothing_stays_behind(bad_paths, tmp_path):
    before = content(tmp_path)
    for path in bad_paths:
        with pytest.raises(
            PruningError, match=r"The note cannot be written to .* \(.+\); expected"
        ):
            check_writable(path, "The note")
        assert content(tmp_path) == before
    check_writable(tmp_path / "new" / "folders" / "x.json", "The note")
    check_writable(tmp_path / "file", "The note")
    assert content(tmp_path) == before
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.parametrize(
    "write", [lambda path: TABLE.write(path), lambda path: PruningReport().write(path)]
)
def test_a_failed_write_leaves_what_was_there_and_no_draft(write, bad_paths, tmp_path, monkeypatch):
    before = content(tmp_path)
    with pytest.raises(PruningError, match="cannot be written to"):
        write(tmp_path / "folder")
    with pytest.raises(PruningError, match="cannot be written to"):
        write(tmp_path / "file" / "below.json")
    assert content(tmp_path) == before

    def full(self, *args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(PruningError, match="No space left on device"):
        write(tmp_path / "file")
    assert content(tmp_path) == before
    assert (tmp_path / "file").read_text() == "here"


def test_an_interrupted_write_leaves_no_draft(tmp_path, monkeypatch):
    def interrupted(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "x", "text", "The note")
    assert content(tmp_path) == []


def test_pictures_of_stacks_with_odd_names_have_names_of_files(tmp_path):
    odd = replace(stack_cut(), name="../../net/layer" + "x" * 300)
    cut = replace(CUT, groups=(), stacks=(odd,))
    PruningReport(30, 12, 9, cuts=[cut]).write(tmp_path / "deep" / "report.json")
    assert len(content(tmp_path)) == 3
    written = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert (tmp_path / "deep" / written["cuts"][0]["stacks"][0]["picture"]).is_file()


def test_a_pipe_in_place_of_a_table_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PruningError, match="no regular file"):
        LatencyTable.load(tmp_path / "pipe")


def quick(monkeypatch):
    """Lets tables be measured in no time; returns lists that grow when one is, and is asked for."""
    measured = []

    def measure(*args, **options):
        measured.append(1)
        return measure_table(*args, **options, clock=lambda calls: {"dense": 10.0, "cut": 9.0})

    def table(*args):
        asked.append(1)
        return cached_table(*args)

    asked: list = []
    monkeypatch.setattr(method_module, "measure_table", measure)
    monkeypatch.setattr(method_module, "cached_table", table)
    return measured, asked


def by_time(path):
    return pruning_units(
        target_latency_ms=9.0, latency_table=path and str(path), verbose=False, cuts=2,
        relevance="weights", method="compensation",
    )  # fmt: skip


def test_a_table_that_could_not_be_written_is_refused_before_the_first_batch(
    bad_paths, tmp_path, monkeypatch
):
    (measured, _), before = quick(monkeypatch), content(tmp_path)
    for path in (bad_paths[0], bad_paths[1], bad_paths[3]):
        with pytest.raises(PruningError, match="The latency table cannot be written to"):
            trainer(by_time(path), max_epochs=4).fit(Classifier())
    assert measured == []
    assert content(tmp_path) == before


def test_a_process_that_writes_no_table_may_have_another_disk(bad_paths):
    model = build()
    groups = groups_of(model)
    sizes = {group.name: group.size for group in groups}
    method = PipelineOptions(Budget(target_latency_ms=9.0), latency=Latency(str(bad_paths[1])))
    chosen = [group for group in groups if group.kind == "ffn"]
    check(method, model, groups, chosen, sizes, writes=False)
    with pytest.raises(PruningError, match="cannot be written to"):
        check(method, model, groups, chosen, sizes)


@pytest.mark.parametrize("written", [True, False, None])
def test_a_table_is_measured_once_in_a_run_wherever_it_stays(written, tmp_path, monkeypatch):
    measured, asked = quick(monkeypatch)
    path = None if written is None else tmp_path / "table.json"
    callback = by_time(path)
    if written is False:
        monkeypatch.setattr(
            "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.warns(
            PruningWarning, match=r"cannot be written to .*\(full\).* in memory"
        ) as found:
            trainer(callback, max_epochs=6).fit(Classifier())
        assert sum("in memory" in str(w.message) for w in found) == 1
    else:
        trainer(callback, max_epochs=6).fit(Classifier())
    assert callback.report.cuts
    assert len(asked) == 2
    assert measured == [1]
    assert content(tmp_path) == (["table.json"] if written else [])
    trainer(callback, max_epochs=6).fit(Classifier())
    assert len(measured) == (1 if written else 2)  # another run measures again


def test_a_known_table_is_taken_before_the_file(tmp_path):
    known: dict = {}
    path = tmp_path / "file" / "x.json"
    path.parent.write_text("no folder")
    with pytest.warns(PruningWarning, match="stays in memory"):
        assert cached_table(path, lambda: TABLE, TABLE.device, known) is TABLE
    assert cached_table(path, pytest.fail, TABLE.device, known) is TABLE
    other = replace(TABLE.device, threads=1)
    assert cached_table(None, lambda: TABLE, other, known) is TABLE
    assert set(known) == {TABLE.device, other}


# ---------------------------------------------------------------- options of ranks


def test_every_option_that_decides_on_the_result_is_compared():
    for kind in (MutualInformationPruning, CKALayerPruning):
        named = set()
        for name, parameter in inspect.signature(kind).parameters.items():
            values = vars(parameter.default) if is_dataclass(parameter.default) else None
            named |= {name} if values is None else {f"{name}.{field}" for field in values}
        assert set(kind().engine.options) == named - {"verbose", "latency.table"}


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([{"a": "1"}, {"a": "1"}, {"a": "2"}], "a is 1 on rank 0 and 2 on rank 2"),
        ([{"a": "1"}, {}], "a is 1 on rank 0 and absent on rank 1"),
        (
            [{"a": "1"}, {"the error": "'E: x'"}],
            "the error is absent on rank 0 and 'E: x' on rank 1",
        ),
        (
            [{"a": "x" * 5000 + "1"}, {"a": "x" * 5000 + "2"}],
            f"a is ...{'x' * 20}1 on rank 0 and ...{'x' * 20}2 on rank 1",
        ),
        ([dict.fromkeys("abcdefgh", "1"), {}], "e is 1 on rank 0 and absent on rank 1, and 3 more"),
    ],
    ids=range(5),
)
def test_what_differs_between_ranks_is_named(entries, expected):
    found = differences(entries)
    assert found.endswith(expected)
    assert len(found) < 600
