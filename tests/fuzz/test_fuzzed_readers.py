"""Whatever a file holds, it is read and sound, or refused in a sentence, and leaves no trace.

``make test`` reads a few inputs that never change, ``make fuzz`` thousands of new ones.
"""

from __future__ import annotations

import copy
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from lightning_mi_prune import (
    MutualInformationPruning,
    PruningGraph,
    PruningPlan,
    from_pretrained,
    load_pruned,
    save_pretrained,
)
from lightning_mi_prune.allocation.latency import LatencyTable
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.callbacks.resume import OptimizerPlan
from lightning_mi_prune.callbacks.state import saved_graph, write
from lightning_mi_prune.checkpoint.recorded import recorded_networks
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.checkpoint.validation import PLAN_KEY
from lightning_mi_prune.cli.building import numbers_of_checkpoint
from lightning_mi_prune.cli.config import block_of, read_words, section_of
from lightning_mi_prune.cli.options import values_of
from lightning_mi_prune.cli.pruning import OPTIONS
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.export.batches import read_batches
from lightning_mi_prune.reporting.report import PruningReport
from lightning_mi_prune.surgery.units import apply_plan
from tests.core.test_untrusted import JUNK, PLAN, TABLE, trained
from tests.fuzz import mutations
from tests.fuzz.limits import check, fuzzed
from tests.reporting.test_report import CUT, stack_cut
from tests.support.boring import Classifier, trainer
from tests.support.graphs import graph_of
from tests.support.models import batch, outputs, random_plan

BATCH = batch(2, 6)
KEY = "model." + PLAN_KEY


def cut(model, tracker):
    plan = tracker.plan.joined(random_plan(tracker.groups))
    apply_plan(model, tracker.groups, plan)
    tracker.plan = plan


class Sound:
    """Files of one pruned model, made once; nothing changes them."""

    def __init__(self, folder):
        self.folder = folder
        module = Classifier()
        self.dense = folder / "dense"
        module.model.save_pretrained(self.dense)
        tracker = PlanTracker.of(module)
        tracker.adopt(graph_of(module))
        cut(module, tracker)
        rankings = {
            group.name: Ranking(tuple(range(group.size)), (0.0,) * group.size, (0.0,) * group.size)
            for group in tracker.groups[:2]
        }
        self.plan = replace(tracker.plan, rankings=rankings)
        self.graph, self.state = tracker.graph, module.state_dict()
        self.tensors = {k: v for k, v in self.state.items() if k != KEY}
        self.fresh = Classifier()
        run = trainer()
        run.strategy.connect(module)
        run.save_checkpoint(folder / "run.ckpt", weights_only=True)
        self.checkpoint = torch.load(folder / "run.ckpt", weights_only=True)
        self.archive = saved(self.state)
        self.network = module.model
        self.hub = folder / "hub"
        self.network.save_pretrained(self.hub)
        self.ours = save_pretrained(module, folder / "ours", code=True, calibration=[BATCH])
        self.delta = save_pretrained(module, folder / "delta", delta_of=self.dense)
        self.shards = folder / "shards"
        self.network.save_pretrained(self.shards, max_shard_size="20KB")
        self.bin = folder / "bin"
        shutil.copytree(self.hub, self.bin)
        (self.bin / "model.safetensors").unlink()
        torch.save(dict(self.network.state_dict()), self.bin / "pytorch_model.bin")

    def module(self):
        """A module as built, and the assertion that it still is as it was."""
        module = copy.deepcopy(self.fresh)
        before = {name: (id(t), t.clone()) for name, t in tensors_of(module)}
        config = module.model.config.to_dict()

        def unchanged():
            now = tensors_of(module)
            assert [name for name, _ in now] == list(before)
            for name, tensor in now:
                assert id(tensor) == before[name][0]
                assert torch.equal(tensor, before[name][1])
            assert module.model.config.to_dict() == config
            assert PlanTracker.held_by(module) is None

        return module, unchanged


def tensors_of(module):
    return [*module.named_parameters(), *module.named_buffers()]


def saved(value):
    target = io.BytesIO()
    torch.save(value, target)
    return target.getvalue()


def runs(module):
    """What was accepted computes something of the right shape, at the plan that it carries."""
    model = module.model if isinstance(module, Classifier) else module
    assert outputs(model, BATCH).shape == (2, 3)
    holder = PlanTracker.held_by(module)
    if holder is not None and holder.is_known:
        for name, size in holder.plan.sizes.items():
            assert 0 <= holder.plan.width(name) <= size


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    torch.manual_seed(0)
    return Sound(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder in a folder, in which the process is; nothing may appear in either."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    return tmp_path


def place(root, name="file.json"):
    return root / "a" / "b" / name


def canary(root):
    """A command that leaves a file, which no reader may run."""
    return f"touch {root}/canary"


def written(path, content):
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8", errors="surrogatepass")
    else:
        path.write_bytes(content)
    return path.stat().st_size


# ---------------------------------------------------------------- plans, graphs, tables, reports


def plan_is_sound(plan):
    assert PruningPlan.from_json(plan.to_json()) == plan
    for name, size in plan.sizes.items():
        assert list(plan.kept[name]) == sorted({p for p in plan.kept[name] if 0 <= p < size})


def graph_is_sound(graph):
    assert PruningGraph.from_json(graph.to_json()) == graph


def table_is_sound(table):
    assert LatencyTable.from_json(table.to_json()) == table


TEXTS = {
    "plan": (PruningPlan.from_json, plan_is_sound),
    "graph": (PruningGraph.from_json, graph_is_sound),
    "table": (LatencyTable.from_json, table_is_sound),
}


@pytest.fixture(scope="module")
def texts(sound):
    return {"plan": sound.plan.to_json(), "graph": sound.graph.to_json(), "table": TABLE.to_json()}


@pytest.mark.parametrize("kind", TEXTS)
@fuzzed(0.11, 30)
@given(data=st.data())
def test_texts_of_plans_graphs_and_tables(kind, texts, data):
    read, is_sound = TEXTS[kind]
    text = data.draw(mutations.json_text(json.loads(texts[kind])))
    check(f"text of a {kind}", len(text), lambda: read(text), is_sound)


FILES = {"graph": (PruningGraph.load, graph_is_sound), "table": (LatencyTable.load, table_is_sound)}


@pytest.mark.parametrize("kind", FILES)
@fuzzed(0.05, 20)
@given(data=st.data())
def test_files_of_graphs_and_tables(kind, texts, root, data):
    read, is_sound = FILES[kind]
    content = data.draw(mutations.raw(texts[kind].encode()))
    path = place(root)
    size = written(path, content)
    check(f"file of a {kind}", size, lambda: read(path), is_sound, watched=root)


@fuzzed(0.06, 30)
@given(data=st.data())
def test_states_of_reports(data):
    layers = replace(CUT, groups=(), stacks=(stack_cut(),))
    state = PruningReport(100, 80, 9, [CUT, layers], {"macs": 1}, [CUT]).state_dict()
    odd = data.draw(mutations.tree(state, most=1, odd=mutations.one_of(JUNK) | mutations.JUNK))

    def is_sound(report):
        assert PruningReport.from_state(report.state_dict()) == report
        json.dumps(report.to_dict())

    check("report", 10**4, lambda: PruningReport.from_state(odd), is_sound)


# ---------------------------------------------------------------- the graph of a file for a model


@fuzzed(0.03, 20)
@given(data=st.data())
def test_graphs_that_are_adopted(sound, data):
    """A graph of a file that is well formed may still lie about the model."""
    text = data.draw(mutations.json_text(json.loads(sound.graph.to_json()), most=2))
    module, unchanged = sound.module()

    def read():
        graph = PruningGraph.from_json(text)
        tracker = PlanTracker(module)
        try:
            tracker.adopt(graph)
        except BaseException:
            tracker.close()
            raise
        return tracker

    def is_sound(tracker):
        cut(module, tracker)
        runs(module)

    check("graph for a model", len(text), read, is_sound, unchanged)


# ---------------------------------------------------------------- weights


def stored(body):
    """The entry of a plan in a state dict."""
    content = body if isinstance(body, bytes) else body.encode("utf-8", "surrogatepass")
    return torch.frombuffer(bytearray(content or b" "), dtype=torch.uint8)


@fuzzed(0.04, 25)
@given(data=st.data())
def test_plans_in_state_dicts(sound, data):
    body = bytes(sound.state[KEY].tolist())
    change = data.draw(
        st.one_of(
            mutations.json_text(json.loads(body)),
            mutations.json_text(json.loads(body), most=1),
            mutations.raw(body),
        )
    )
    state = {**sound.state, KEY: stored(change)}
    module, unchanged = sound.module()
    PlanTracker(module)
    tracker = PlanTracker.held_by(module)

    def read():
        try:
            module.load_state_dict(state)
        except BaseException:
            tracker.close()
            raise
        return module

    check("plan in a state dict", len(change), read, runs, unchanged)


def opened(sound, root, name, content, reader, *, size=None):
    path = place(root, name)
    written_size = written(path, content)
    module, unchanged = sound.module()
    watched = {"watched": root}
    check(
        reader, size or written_size, lambda: load_pruned(module, path), runs, unchanged, **watched
    )


@fuzzed(0.02, 12)
@given(data=st.data())
def test_weights_in_files_of_torch(sound, root, data):
    state = data.draw(mutations.weights(sound.state))
    opened(sound, root, "file.pt", saved(state), "torch file, weights")


@fuzzed(0.02, 12)
@given(data=st.data())
def test_checkpoints_of_a_trainer(sound, root, data):
    checkpoint = dict(sound.checkpoint)
    odd = data.draw(mutations.tree({k: v for k, v in checkpoint.items() if k != "state_dict"},
                                   odd=mutations.JUNK | mutations.tensors()))  # fmt: skip
    if isinstance(odd, dict):
        odd.setdefault("state_dict", checkpoint["state_dict"])
    opened(sound, root, "file.ckpt", saved(odd), "checkpoint for a module")


@fuzzed(0.015, 10)
@given(data=st.data())
def test_checkpoints_that_build_a_class(sound, root, data):
    state = data.draw(st.just(sound.checkpoint["state_dict"]) | mutations.weights(sound.state))
    odd = {k: v for k, v in sound.checkpoint.items() if k != "state_dict"}
    odd["hyper_parameters"] = {"lr": 0.1, "validation_rows": 8, "_class_path": "os.system"}
    odd = data.draw(mutations.tree(odd))
    if isinstance(odd, dict):
        odd.setdefault("state_dict", state)
    path = place(root, "file.ckpt")
    size = written(path, saved(odd))
    check("checkpoint for a class", size, lambda: load_pruned(Classifier, path), runs,
          watched=root)  # fmt: skip


@fuzzed(0.05, 30)
@given(data=st.data())
def test_archives_of_torch(sound, root, data):
    content = data.draw(
        st.one_of(
            mutations.torch_file(sound.archive, canary(root)),
            mutations.torch_file(sound.archive, canary(root)),
            mutations.raw(sound.archive),
        )
    )
    opened(sound, root, "file.pt", content, "torch file, archive")


@fuzzed(0.01, 8)
@given(data=st.data())
def test_numbers_that_the_command_reads_from_a_checkpoint(sound, root, data):
    content = data.draw(mutations.torch_file(saved(sound.checkpoint), canary(root)))
    path = place(root, "file.ckpt")
    size = written(path, content)

    def are_numbers(found):
        assert all(type(value) in (bool, int, float) for value in found.values())

    check(
        "numbers of a checkpoint",
        size,
        lambda: numbers_of_checkpoint(str(path)),
        are_numbers,
        watched=root,
    )


@fuzzed(0.04, 20)
@given(data=st.data())
def test_files_of_safetensors(sound, root, data):
    plain = to_safetensors({k: v.contiguous() for k, v in sound.state.items()})
    content = data.draw(
        st.one_of(
            mutations.safetensors_file(plain),
            mutations.raw(plain),
            mutations.weights(sound.state).map(as_safetensors),
        )
    )
    opened(sound, root, "file.safetensors", content, "safetensors")


def as_safetensors(state):
    plain = {
        name: value.detach().contiguous()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and not value.is_meta and value.layout == torch.strided
        if value.numel() < 10**6 and name
    }
    return to_safetensors({name: value.clone() for name, value in plain.items()})


# ---------------------------------------------------------------- folders of transformers


def folder_with(root, source, name, content):
    """A copy of a folder with other content in one file; the files beside it are links."""
    target = place(root, "folder")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for path in source.iterdir():
        if path.name != name:
            shutil.copyfile(path, target / path.name)
    return target, written(target / name, content)


ITS_OWN = (OSError, ValueError, ImportError)  # of transformers, whose message names the problem


@pytest.mark.parametrize("cls", [AutoModelForSequenceClassification, BertForSequenceClassification])
@fuzzed(0.015, 12)
@given(data=st.data())
def test_configs_of_folders(cls, sound, root, data):
    config = json.loads((sound.hub / "config.json").read_text())
    plain = json.dumps(config).encode()
    odd = mutations.json_text(config) | mutations.json_text(config, most=1) | mutations.raw(plain)
    text = data.draw(odd)
    folder, size = folder_with(root, sound.hub, "config.json", text)
    (folder / "code.py").write_text(f"import os; os.system({canary(root)!r})")
    weights = (folder / "model.safetensors").stat().st_size
    check(f"config of a folder for {cls.__name__}", size + weights,
          lambda: from_pretrained(cls, folder), lambda m: outputs(m, BATCH), errors=ITS_OWN,
          watched=root)  # fmt: skip


@fuzzed(0.015, 12)
@given(data=st.data())
def test_configs_that_name_the_package(sound, root, data):
    config = json.loads((sound.ours / "config.json").read_text())
    text = data.draw(mutations.json_text(config) | mutations.json_text(config, most=1))
    folder, size = folder_with(root, sound.ours, "config.json", text)
    weights = sum(path.stat().st_size for path in folder.iterdir())
    check("config that names the package", size + weights,
          lambda: AutoModelForSequenceClassification.from_pretrained(
              folder, trust_remote_code=False),
          lambda m: outputs(m, BATCH),
          # AutoConfig reads auto_map before it knows that the type is of this package.
          errors=(*ITS_OWN, RecursionError, TypeError), watched=root)  # fmt: skip


@fuzzed(0.015, 12)
@given(data=st.data())
def test_parts_in_a_config(sound, root, data):
    config = json.loads((sound.ours / "config.json").read_text())
    parts = json.loads(config["pruned_parts"])
    config["pruned_parts"] = data.draw(mutations.json_text(parts, most=2))
    folder, size = folder_with(root, sound.ours, "config.json", json.dumps(config))
    weights = sum(path.stat().st_size for path in folder.iterdir())
    check("parts in a config", size + weights,
          lambda: from_pretrained(AutoModelForSequenceClassification, folder),
          lambda m: outputs(m, BATCH), errors=ITS_OWN, watched=root)  # fmt: skip


@pytest.mark.parametrize("name", ["delta.json", "delta.safetensors", "config.json"])
@fuzzed(0.008, 6)
@given(data=st.data())
def test_deltas(name, sound, root, data):
    plain = (sound.delta / name).read_bytes()
    damaged = mutations.raw(plain)
    if name.endswith("json"):
        damaged |= mutations.json_text(json.loads(plain))
    else:
        damaged |= mutations.safetensors_file(plain)
    folder, size = folder_with(root, sound.delta, name, data.draw(damaged))
    dense = sum(path.stat().st_size for path in sound.dense.iterdir())
    check(f"{name} of a delta", size + dense,
          lambda: from_pretrained(AutoModelForSequenceClassification, folder),
          lambda m: outputs(m, BATCH), errors=ITS_OWN, watched=root)  # fmt: skip


@fuzzed(0.01, 10)
@given(data=st.data())
def test_stored_batches(sound, root, data):
    plain = (sound.ours / "calibration.safetensors").read_bytes()
    content = data.draw(mutations.safetensors_file(plain) | mutations.raw(plain))
    size = written(root / "calibration.safetensors", content)
    check("stored batches", size, lambda: read_batches(root),
          lambda found: [batch["input_ids"].shape for batch in found if "input_ids" in batch],
          watched=root)  # fmt: skip


@fuzzed(0.015, 12)
@given(data=st.data())
def test_indices_of_shards(sound, root, data):
    name = "model.safetensors.index.json"
    index = json.loads((sound.shards / name).read_text())
    text = data.draw(mutations.json_text(index) | mutations.raw(json.dumps(index).encode()))
    folder, size = folder_with(root, sound.shards, name, text)
    weights = sum(path.stat().st_size for path in folder.iterdir())
    check("index of shards", size + weights,
          lambda: from_pretrained(AutoModelForSequenceClassification, folder),
          lambda model: same(model, sound.network), errors=ITS_OWN, watched=root)  # fmt: skip


def same(model, other):
    assert torch.equal(outputs(model, BATCH), outputs(other, BATCH))


@fuzzed(0.015, 10)
@given(data=st.data())
def test_weights_of_folders(sound, root, data):
    plain = (sound.hub / "model.safetensors").read_bytes()
    content = data.draw(mutations.safetensors_file(plain) | mutations.raw(plain))
    folder, size = folder_with(root, sound.hub, "model.safetensors", content)
    check("safetensors of a folder", size,
          lambda: from_pretrained(AutoModelForSequenceClassification, folder),
          lambda m: outputs(m, BATCH), errors=ITS_OWN, watched=root)  # fmt: skip


@fuzzed(0.015, 10)
@given(data=st.data())
def test_torch_files_of_folders(sound, root, data):
    plain = (sound.bin / "pytorch_model.bin").read_bytes()
    content = data.draw(mutations.torch_file(plain, canary(root)) | mutations.raw(plain))
    folder, size = folder_with(root, sound.bin, "pytorch_model.bin", content)
    check("torch file of a folder", size,
          lambda: from_pretrained(AutoModelForSequenceClassification, folder),
          lambda m: outputs(m, BATCH), errors=ITS_OWN, watched=root)  # fmt: skip


@fuzzed(0.02, 15)
@given(data=st.data())
def test_records_in_configs_of_networks(sound, data):
    """A network that was opened by someone else carries a config of unknown origin."""
    network = copy.deepcopy(sound.network)
    records = {name: getattr(network.config, name) for name in ("pruning_plan", "pruning_graph")}
    for name, value in data.draw(mutations.tree(records)).items():
        if name in records:
            setattr(network.config, name, mutations.dumped(value) if type(value) is dict else value)
    for part in network.modules():
        holder = PlanTracker.held_by(part)
        if holder is not None:
            holder.close()

    def read():
        recorded_networks(network)
        tracker = PlanTracker.of(network)
        return tracker.plan if tracker.is_known else PruningPlan({}, {})

    check("records in a config", len(str(records)), read, plan_is_sound)


# ---------------------------------------------------------------- callbacks


@pytest.fixture(scope="module")
def run_state():
    """The state of a callback with everything in it that there can be."""
    *_, trial = trained()
    state = MutualInformationPruning().state_dict()
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
    decision = {
        "plan": PLAN.to_json(),
        "compensated": {"w": torch.ones(2)},
        "rotated": {"w": {0: torch.ones(1, 2, 2)}},
        "information": {"a": {"total": 2.0, "kept": 1.0}},
    }
    state["pending"] = {"epoch": 1, "sparsity": 0.5, "decision": decision}
    state["snapshot"] = write(trial)
    state["examples"] = {"": call}
    state["report"] = PruningReport(100, 80, 9, [CUT], {"macs": 1}, [CUT]).state_dict()
    MutualInformationPruning().load_state_dict(state)
    return state


@fuzzed(0.08, 40)
@given(data=st.data())
def test_states_of_callbacks(run_state, data):
    junk = mutations.JUNK | mutations.tensors()
    odd = data.draw(
        mutations.tree(run_state, most=2, odd=junk)
        | mutations.tree(run_state, most=1, odd=mutations.one_of(JUNK))
    )  # fmt: skip

    def read():
        callback = MutualInformationPruning()
        callback.load_state_dict(odd)
        return callback

    check("state of a callback", 10**6, read, lambda callback: callback.state_dict())


@fuzzed(0.02, 15)
@given(data=st.data())
def test_what_callbacks_read_of_checkpoints(sound, data):
    checkpoint = {
        "callbacks": {"key": {"graph": sound.graph.to_json()}},
        "lightning_mi_prune": {"optimizers_of": sound.plan.to_json()},
        "optimizer_states": [{"param_groups": [{"params": [0, 1]}]}],
    }
    odd = data.draw(mutations.tree(checkpoint, odd=mutations.JUNK | mutations.tensors()))
    module, unchanged = sound.module()
    tracker = PlanTracker(module, sound.graph)

    def read():
        try:
            saved_graph(odd, "key")
            OptimizerPlan().load(module, tracker, odd)
        finally:
            tracker.close()
            module.__dict__.pop("configure_optimizers", None)

    check("graph and plan of a run", len(str(checkpoint)), read, lambda _: unchanged(), unchanged)


# ---------------------------------------------------------------- the command

CONFIG = {
    "seed_everything": 3,
    "fit": {
        "model": {"class_path": "tests.support.boring.Classifier", "init_args": {"lr": 0.1}},
        "data": "mypackage.MyData",
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "precision": 32},
        "sparsity": 0.5,
        "schedule": {"cuts": 1},
        "constraints": {"multiple": 8, "floors": {"ffn": 1}},
        "calibration": {"positions": 100},
        "widths": {"ffn": 3},
    },
}


def hostile_yaml(command):
    """Texts that expand, run, refer to themselves, or that a YAML reader stumbles over."""
    bomb = "\n".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12)
    )
    texts = [
        bomb,
        f"model: !!python/object/apply:os.system ['{command}']",
        f"model: !!python/object/new:os.system ['{command}']",
        f"? !!python/object/apply:os.system ['{command}']\n: 1",
        "model: file.yaml",
        "fit: {model: ./file.yaml}",
        "model: ../../x.yaml",
        "model: /dev/zero.yaml",
        "a: &a {b: *a}",
        "a: &a [*a]\nmodel: *a",
        "date: 2001-99-99",
        "time: 2001-01-01 99:99:99",
        "[1, 2]: 3",
        "{a: 1}: 3",
        "a: 1\na: 2",
        "<<: [1]",
        "<<: {a: 1}",
        "- a\n- b",
        "a: " + "[" * 5000,
        "a: " + "{a: " * 5000,
        "- " * 5000,
        "a: !!int x",
        "a: !!float x",
        "a: !!binary '@'",
        "a: !!timestamp x",
        "a: !!set [1]",
        "a: 0b2\nb: 0o9\nc: 0x\nd: 1:99999\ne: 1e99999\nf: " + "9" * 5000,
        "a: \x07",
        "\ufeffa: 1",
        "%YAML 9.9\n---\na: 1",
        "--- a\n--- b",
        "sparsity: 0.5: 3",
        "sparsity: [0.5]",
        "model: {class_path: [1]}",
        "trainer: 3",
        "fit: [1]",
        "widths: {a: {b: 1}}",
    ]
    return mutations.one_of(texts)


@fuzzed(0.04, 40)
@given(data=st.data())
def test_files_of_the_command(root, data):
    content = data.draw(
        st.one_of(
            mutations.tree(CONFIG).map(mutations.dumped),
            mutations.tree(CONFIG, most=1).map(mutations.dumped),
            mutations.raw(json.dumps(CONFIG, indent=1).encode()),
            hostile_yaml(canary(root)),
        )
    )
    path = place(root, "file.yaml")
    size = written(path, content)

    def read():
        request = read_words([f"--config={path}"], [option.name for option in OPTIONS])
        sections = [section_of(body)[0] for body in request.files.values()]
        options = values_of(OPTIONS, sections, request.options)
        for key in ("model", "data"):
            block = block_of(key, sections, None)
            for section in sections:
                if section.get(key) is not None:
                    block.normalized(section[key])
        return options

    def is_sound(options):
        assert set(options) >= {"sparsity", "output"}

    check("file of the command", size, read, is_sound, watched=root)


@fuzzed(0.04, 25)
@given(data=st.data())
def test_words_of_the_command(root, data):
    names = [option.name for option in OPTIONS]
    plain = st.sampled_from(
        ["0.5", "-1", "1e999", "nan", "[1", "{a: 1}", "null", *mutations.OUTSIDE]
    )
    word = st.builds("--{}={}".format, st.sampled_from([*names, "model", "x"]), plain | st.text())
    words = data.draw(
        st.lists(word | plain | st.sampled_from(["--", "-c", "--config"]), max_size=4)
    )

    def read():
        request = read_words(words, names)
        return values_of(OPTIONS, [], request.options)

    check("words of the command", len(str(words)), read, lambda _: None, watched=root)


# ---------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    from datasets import Dataset

    path = tmp_path_factory.mktemp("rows")
    Dataset.from_dict({"x": [[1, 2], [3, 4], [5, 6]], "label": [0, 1, 0]}).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@fuzzed(0.01, 8)
@given(data=st.data())
def test_folders_of_data_sets(name, rows, root, data):
    plain = (rows / name).read_bytes()
    change = mutations.json_text(json.loads(plain)) if name.endswith("json") else truncated(plain)
    folder, size = folder_with(root, rows, name, data.draw(change))

    def is_sound(batches):
        if not isinstance(batches, str):
            assert all(isinstance(v, torch.Tensor) for b in batches for v in b.values())

    check(f"data set, {Path(name).suffix[1:]}", size + 10**4,
          lambda: batches_of(str(folder), batch_size=2), is_sound, watched=root)  # fmt: skip


def truncated(sound):
    return st.integers(0, len(sound) - 1).map(lambda size: sound[:size]) | st.binary(max_size=64)
