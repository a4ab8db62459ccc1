"""Folders of models pruned to widths of their config open with plain transformers, without us."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch
import transformers

from lightning_mi_prune import from_pretrained, prune
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.core.options import Constraints, Reconstruction
from lightning_mi_prune.core.plan import PruningPlan, recorded_plan
from lightning_mi_prune.discovery.config_fields import check_described
from lightning_mi_prune.discovery.discover import discover
from lightning_mi_prune.surgery.configs import config_fields, config_value
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.families import FAMILIES
from tests.support.models import batch, build

DATA = [batch(64, seed=seed) for seed in range(2)]
_OPENS = """
import json, sys
sys.modules["lightning_mi_prune"] = None  # as where it is not installed
try:
    import lightning_mi_prune
except ImportError:
    pass
else:
    raise SystemExit("the package could be imported")
import torch, transformers

def tensors(out):
    return [out[n] for n in ("logits", "logits_per_image", "text_embeds") if n in out]

found = {}
for name, (auto, folder) in json.loads(sys.argv[1]).items():
    model, info = getattr(transformers, auto).from_pretrained(folder, output_loading_info=True)
    saved = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        got = tensors(model.eval()(**saved["inputs"]))
    equal = len(got) == len(saved["outputs"]) > 0
    equal = equal and all(map(torch.equal, got, saved["outputs"]))
    found[name] = [equal, len(info["missing_keys"]), len(info["mismatched_keys"])]
assert not any(name.startswith("lightning") for name in sys.modules if sys.modules[name])
print("FOUND " + json.dumps(found))
"""


@torch.no_grad()
def outputs(model, inputs):
    out = model(**inputs)
    return [out[name] for name in ("logits", "logits_per_image", "text_embeds") if name in out]


def cut(name, folder):
    """A model of a family, pruned to widths of its config and saved by its own method."""
    family = FAMILIES[name]
    model = family.build()
    with warnings.catch_warnings():  # of CLIP, no hidden size can be cut; few samples are enough
        warnings.simplefilter("ignore", PruningWarning)
        graph = discover(model, **family.batch())
        result = prune(
            model,
            [family.batch(seed) for seed in (1, 2)],
            family.sparsity,
            kinds=family.kinds,
            graph=graph,
            widths="config",
            constraints=Constraints(pins=family.pins, multiple=2),
            reconstruction=Reconstruction("compensation"),
        )
    model.save_pretrained(folder)
    expected = {"inputs": family.batch(7), "outputs": outputs(model, family.batch(7))}
    torch.save(expected, folder / "expected.pt")
    return model, graph, result


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    made = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        made[name] = (*cut(name, folder), folder)
    return made


@pytest.fixture(scope="module")
def opened(pruned):
    """What a process without the package finds in the folders."""
    where = {name: (FAMILIES[name].auto, str(pruned[name][-1])) for name in FAMILIES}
    done = subprocess.run(
        [sys.executable, "-c", _OPENS, json.dumps(where)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    return json.loads(line.removeprefix("FOUND "))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_process_without_the_package_gets_the_same_outputs(name, opened):
    equal, missing, mismatched = opened[name]
    assert equal
    assert (missing, mismatched) == (0, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_its_config_says_the_widths_of_the_plan(name, pruned):
    model, graph, result, folder = pruned[name]
    fields = json.loads((folder / "config.json").read_text())
    widths, narrower = result.plan.widths, set()
    for group in graph.groups:
        for field in config_fields(group) if group.config else ():
            assert config_value(model.config, field), field
        if group.config is not None:
            value = fields
            for step in group.config.split("."):
                value = value[step]
            assert value == widths[group.name], group.name
        if widths[group.name] < group.size:
            assert group.config or group.tie, group.name
            narrower.add(group.kind)
    assert "ffn" in narrower
    assert not FAMILIES[name].pins or "heads" in narrower
    for part, whole in FAMILIES[name].ties:
        assert fields[whole] % fields[part] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_its_folder_carries_the_plan_and_opens_with_ours_as_well(name, pruned):
    model, _, result, folder = pruned[name]
    again = from_pretrained(getattr(transformers, FAMILIES[name].auto), folder).eval()
    inputs = FAMILIES[name].batch(7)
    assert all(map(torch.equal, outputs(again, inputs), outputs(model, inputs)))
    kept = {n: k for n, k in recorded_plan(again).kept.items() if n in result.plan.kept}
    assert kept == {n: k for n, k in result.plan.kept.items() if n in kept}
    assert kept
    assert json.loads((folder / "config.json").read_text())["pruning_plan"]


@cache
def graph_of_bert():
    return discover(build("bert"), **DATA[0])


def test_groups_that_no_field_describes_are_named_and_stay(caplog):
    model = build("bert")
    with caplog.at_level(logging.WARNING):
        result = prune(
            model,
            DATA,
            0.3,
            graph=graph_of_bert(),
            widths="config",
            constraints=Constraints(multiple=2),
        )
    [record] = [r for r in caplog.records if "widths='config'" in r.message]
    assert "heads. They change with hidden_size" in record.message
    assert all(w == 4 for name, w in result.plan.widths.items() if name.endswith("heads"))
    widths = {w for name, w in result.plan.widths.items() if name.endswith("ffn")}
    assert len(widths) == 1
    assert widths < {*range(40)}


def test_what_the_config_cannot_say_is_refused_before_anything_changes():
    model = build("bert")
    with pytest.raises(PruningError, match=r"out of reach.*can only change intermediate_size"):
        prune(model, DATA, 0.9, graph=graph_of_bert(), widths="config")
    with pytest.raises(PruningError, match="found no field of a Hugging Face config"):
        prune(model, DATA, 0.3, graph=graph_of_bert(), widths="config", kinds=["heads"])
    pins = Constraints(pins={"0.ffn": 16, "1.ffn": 24})
    with pytest.raises(PruningError, match=r"one width, the intermediate_size.*in common"):
        prune(model, DATA, 0.3, graph=graph_of_bert(), widths="config", constraints=pins)
    pins = Constraints(pins={"heads": 2})
    with pytest.raises(
        PruningError, match=r"cannot describe that .*heads' has fewer.*a cap or pin"
    ):
        prune(model, DATA, 0.3, graph=graph_of_bert(), widths="config", constraints=pins)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    with pytest.raises(PruningError, match="found no field"):
        prune(net, [torch.randn(64, 4)], 0.5, widths="config")
    assert (net[0].out_features, model.config.intermediate_size) == (16, 40)


def test_an_earlier_cut_that_no_config_says_is_refused():
    model = build("bert")
    graph = graph_of_bert()
    name = next(g.name for g in graph.groups if g.kind == "heads")
    prune(model, DATA, 0.3, graph=graph, constraints=Constraints(pins={name: 3}, multiple=2))
    with pytest.raises(PruningError, match=r"cannot describe that .*heads'.*an earlier cut"):
        prune(
            model,
            DATA,
            0.5,
            graph=graph_of_bert(),
            widths="config",
            constraints=Constraints(multiple=2),
        )


def test_a_plan_that_the_config_does_not_describe_is_refused():
    model = build("bert")
    groups = graph_of_bert().groups
    first, second = (g for g in groups if g.kind == "ffn")
    sizes = {g.name: g.size for g in groups}
    whole = {g.name: tuple(range(g.size)) for g in groups}
    even = PruningPlan(sizes, {**whole, first.name: (1, 2, 5), second.name: (0, 3, 4)})
    check_described(model, groups, even)
    odd = PruningPlan(sizes, {**whole, first.name: (1, 2), second.name: (0, 3, 4)})
    with pytest.raises(PruningError, match=r"intermediate\.dense\.\w+' has shape .*and \(40"):
        check_described(model, groups, odd)
    apply_plan(model, groups, even)
    check_described(model, groups, even)
