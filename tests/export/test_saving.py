"""Folders of save_pretrained open elsewhere, or name what opens them; nothing is half written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import AutoModelForSequenceClassification as AutoClassifier

from lightning_mi_prune import PruningError, PruningPlan, apply_plan, discover, from_pretrained
from lightning_mi_prune.checkpoint.plain import why_not_plain, with_layer_fields
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.export.card import Latency, Measured
from lightning_mi_prune.export.saving import PLAN_FILE, network_of, save_pretrained
from lightning_mi_prune.graph.groups import PrunableDim, count_parameters, full_plan
from tests.support.graphs import graph_of, groups_of
from tests.support.models import CONFIGS, PICTURES, batch, build, outputs, pictures, random_plan

FAMILIES = [*CONFIGS, *PICTURES]
KINDS = ("half", "empty", "equal", "whole")
PLAIN = ("bert", "albert", "vit")  # of the kinds that need no code
CASES = [
    (family, kind)
    for family in FAMILIES
    for kind in KINDS
    if kind in ("half", "empty") or family in PLAIN
]


def cut(family: str, kind: str) -> nn.Module:
    """Half of the units gone; sublayers gone too; as a config describes it; or nothing gone."""
    model = build(family, "image" if family in PICTURES else "sequence")
    groups = groups_of(model)
    plan = full_plan(groups)
    kept = dict(plan.kept)
    if kind in ("half", "empty"):
        # What reads the pooler is in another class.
        kept = {**kept, **random_plan(groups).kept}
    if kind == "empty":
        heads = [group for group in groups if group.kind == "heads"]
        ffn = [group for group in groups if group.kind == "ffn"]
        if len(heads) > 1:
            kept |= {heads[0].name: (), ffn[-1].name: ()}
    if kind == "equal":
        for group in groups:
            if group.kind == "ffn":
                kept[group.name] = tuple(range(0, group.size, 2))
    apply_plan(model, groups, PruningPlan(plan.sizes, kept))
    return model.eval()


def inputs_of(family: str) -> dict[str, torch.Tensor]:
    inputs = (pictures if family in PICTURES else batch)(4)
    inputs.pop("labels", None)
    return inputs


def auto_of(family: str) -> type:
    return AutoModelForImageClassification if family in PICTURES else AutoClassifier


CHILD = """
import json, sys
sys.modules["lightning_mi_prune"] = None  # any import of it fails
import torch, transformers
folder, found = sys.argv[1], {}
inputs = torch.load(f"{folder}/inputs.pt", weights_only=True)
for name, (family, auto) in json.load(open(f"{folder}/names.json")).items():
    auto = getattr(transformers, auto)
    try:
        plain = auto.from_pretrained(f"{folder}/{name}", trust_remote_code=False)
    except Exception as error:
        found[name] = str(error)
        plain = auto.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    with torch.no_grad():
        logits = plain.eval()(**inputs[family]).logits
    torch.save(logits, f"{folder}/{name}.pt")
try:
    transformers.AutoModel.from_pretrained(f"{folder}/no-code")
except Exception as error:
    found["no-code"] = str(error)
json.dump(found, open(f"{folder}/refused.json", "w"))
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of all families, opened in a process that does not have the package."""
    top = tmp_path_factory.mktemp("elsewhere")
    names = {}
    for family, kind in CASES:
        name = f"{family}-{kind}"
        save_pretrained(cut(family, kind), top / name, code=True)
        names[name] = family, auto_of(family).__name__
    save_pretrained(cut("bert", "half"), top / "no-code")
    torch.save({family: inputs_of(family) for family in FAMILIES}, top / "inputs.pt")
    (top / "names.json").write_text(json.dumps(names))
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(top / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(top)],
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return top


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_a_folder_opens_without_the_package(elsewhere: Path, family: str, kind: str) -> None:
    name = f"{family}-{kind}"
    model = cut(family, kind)
    assert torch.equal(
        torch.load(elsewhere / f"{name}.pt", weights_only=True), outputs(model, inputs_of(family))
    )
    fields = json.loads((elsewhere / name / "config.json").read_text())
    plain = why_not_plain(model) is None
    assert (fields["model_type"] != "lightning_mi_prune") == plain
    assert plain or kind in ("half", "empty")
    refused = json.loads((elsewhere / "refused.json").read_text())
    assert plain != (name in refused)
    assert plain or "trust_remote_code" in refused[name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["half", "empty"])
def test_auto_classes_open_a_folder_with_the_package(
    elsewhere: Path, family: str, kind: str
) -> None:
    name = f"{family}-{kind}"
    model, auto = cut(family, kind), auto_of(family)
    for opened in (
        auto.from_pretrained(elsewhere / name),
        from_pretrained(auto, elsewhere / name),
        from_pretrained(type(model), elsewhere / name),
        auto.from_pretrained(elsewhere / name, config=AutoConfig.from_pretrained(elsewhere / name)),
    ):
        assert type(opened) is type(model)
        assert type(opened.config) is type(model.config)
        assert torch.equal(
            outputs(opened.eval(), inputs_of(family)), outputs(model, inputs_of(family))
        )
    half = auto.from_pretrained(elsewhere / name, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_without_code_the_error_of_transformers_names_the_package(elsewhere: Path) -> None:
    refused = json.loads((elsewhere / "refused.json").read_text())
    assert "model type `lightning_mi_prune`" in refused["no-code"]
    fields = json.loads((elsewhere / "no-code" / "config.json").read_text())
    assert "import lightning_mi_prune before" in fields["how_to_open"]
    assert not (elsewhere / "no-code" / "modeling_pruned.py").exists()


def test_weights_hold_the_tensors_of_the_model_and_no_plan(tmp_path: Path) -> None:
    model = cut("bert", "half")
    PlanTracker(model, graph_of(model))  # as prune() leaves it
    save_pretrained(model, tmp_path / "small")
    stored = load_file(tmp_path / "small" / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(stored[name], p) for name, p in model.named_parameters())


def test_the_file_shrinks_as_the_parameters(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertModel(BertConfig(vocab_size=200, intermediate_size=512, **sizes))
    counts, files = [], []
    for name in ("dense", "small"):
        folder = save_pretrained(model, tmp_path / name)
        counts.append(sum(p.numel() for p in model.parameters()))
        files.append((folder / "model.safetensors").stat().st_size)
        apply_plan(model, groups_of(model), random_plan(groups_of(model))) if name == "dense" else 0
    assert files[1] / files[0] == pytest.approx(counts[1] / counts[0], rel=0.02)


class Classifier(LightningModule):
    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        for name, network in networks.items():
            setattr(self, name, network)


def test_the_network_of_a_module_is_saved_with_its_rankings(tmp_path: Path) -> None:
    network = cut("bert", "half")
    module = Classifier(network=network)
    tracker = PlanTracker(module, graph_of(module))
    name = next(n for n in tracker.plan.sizes if n.endswith("ffn"))
    order = tuple(range(tracker.plan.sizes[name]))
    losses = tuple(map(float, order))
    tracker.plan = PruningPlan(
        tracker.plan.sizes, tracker.plan.kept, {name: Ranking(order, losses, losses)}
    )
    folder = save_pretrained(module, tmp_path / "small")
    plan = PruningPlan.from_json((folder / PLAN_FILE).read_text())
    assert plan.prefixed("network") == tracker.plan
    assert plan.prefixed("network").rankings == tracker.plan.rankings
    assert torch.equal(
        outputs(AutoClassifier.from_pretrained(folder), batch(4)), outputs(network, batch(4))
    )


def test_a_module_with_two_networks_is_refused() -> None:
    with pytest.raises(PruningError, match=r"several networks, \['a', 'b'\].*model.a"):
        network_of(Classifier(a=build("bert"), b=build("bert")))


@pytest.mark.parametrize(
    ("content", "overwrite", "message"),
    [
        ("notes.txt", True, "other files; expected a new or empty one"),
        ("config.json", False, "overwrite=True"),
    ],
)
def test_a_folder_with_something_else_is_refused(
    tmp_path: Path, content: str, overwrite: bool, message: str
) -> None:
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / content).write_text("mine")
    with pytest.raises(PruningError, match=message):
        save_pretrained(build("bert"), folder, overwrite=overwrite)
    assert [path.name for path in tmp_path.rglob("*")] == ["there", content]


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("mine")
    with pytest.raises(PruningError, match="is a file"):
        save_pretrained(build("bert"), tmp_path / "small")


class Failing:
    def save_pretrained(self, folder: Path) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    old = save_pretrained(build("bert"), tmp_path / "model")
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(PruningError, match="No space left on device"):
        save_pretrained(cut("bert", "half"), old, processor=Failing(), overwrite=True)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert [*tmp_path.iterdir()] == [old]
    save_pretrained(cut("bert", "half"), old, overwrite=True)
    assert (old / PLAN_FILE).is_file()
    assert [*tmp_path.iterdir()] == [old]


def test_an_edited_type_is_refused(tmp_path: Path) -> None:
    folder = save_pretrained(cut("bert", "half"), tmp_path / "small")
    path = folder / "config.json"
    fields = json.loads(path.read_text())
    for odd in (None, 3, "lightning_mi_prune", "no-such-model"):
        path.write_text(json.dumps({**fields, "pruned_model_type": odd}))
        for opener in (
            AutoClassifier.from_pretrained,
            lambda f: from_pretrained(AutoClassifier, f),
        ):
            with pytest.raises(PruningError, match="pruned_model_type"):
                opener(folder)


def test_a_card_states_what_was_measured(tmp_path: Path) -> None:
    model = cut("bert", "half")
    groups = groups_of(model)
    measured = Measured(
        "TREC-6, test",
        (0, 1),
        {"accuracy": (0.957, 0.941), "loss": (None, 0.2)},
        macs=(2_000, 1_000),
        latency=(Latency(32, 16, 2.0, 6.0), Latency(1, 0, 0.5)),
        machine="a processor, 1 thread",
    )
    card = (save_pretrained(model, tmp_path / "small", measured=measured) / "README.md").read_text()
    now = sum(p.numel() for p in model.parameters())
    plan = PruningPlan.from_json((tmp_path / "small" / PLAN_FILE).read_text())
    built = now + count_parameters(groups) - count_parameters(groups, plan.widths)
    assert built == sum(p.numel() for p in build("bert").parameters())
    for line in (
        f"| parameters | {built:,} | {now:,} |",
        "| accuracy | 0.957 | 0.941 |",
        "| loss |  | 0.2 |",
        "| 32 | 16 | 6 | 2 | 3.00 |",
        "| 1 |  |  | 0.5 |  |",
        "Measured on TREC-6, test, seeds 0, 1.",
        "| multiply-accumulates of an example | 2,000 | 1,000 |",
        plan.digest(),
    ):
        assert line in card
    for group in groups:
        width, built_size = plan.width(group.name), group.size
        assert f"| `{group.name}` | {group.kind} | {width} | {built_size} |" in card


def test_a_card_states_nothing_else(tmp_path: Path) -> None:
    card = (save_pretrained(cut("bert", "half"), tmp_path / "small") / "README.md").read_text()
    assert "## Quality" not in card
    assert "## Latency" not in card
    assert "multiply-accumulates" not in card
    dense = (save_pretrained(build("bert"), tmp_path / "dense") / "README.md").read_text()
    assert "not pruned" in dense
    assert "## Widths" not in dense


def test_latencies_need_a_machine() -> None:
    with pytest.raises(PruningError, match="without a machine"):
        Measured(latency=(Latency(1, 0, 0.5),))
    with pytest.raises(PruningError, match="expected a pair"):
        Measured(metrics={"accuracy": 0.9})  # type: ignore[dict-item]


def test_a_cut_buffer_that_is_computed_anew_is_not_plain() -> None:
    """Its shape is that of the config, but only the plan records which entries stayed."""
    model = build("bert").eval()
    model.register_buffer("scale", torch.arange(40.0), persistent=False)
    built = type(model)

    class Scaled(built):  # type: ignore[misc, valid-type]
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.register_buffer(
                "scale", torch.arange(float(config.intermediate_size)), persistent=False
            )

    model.__class__ = Scaled
    groups = [
        replace(group, config="intermediate_size")
        for group in groups_of(model)
        if group.kind == "ffn"
    ]
    assert why_not_plain(model) is None
    layout = ((groups[0].name,),)
    dims = [PrunableDim("scale", 0, (40,), layout, buffer=True)]
    first = replace(groups[0], tensors=(*groups[0].tensors, *dims))
    kept = tuple(range(0, 40, 2))
    plan = PruningPlan({g.name: 40 for g in groups}, {g.name: kept for g in groups})
    apply_plan(model, [first, *groups[1:]], plan)
    assert model.scale.shape == (20,)
    assert "'scale' is computed anew" in (why_not_plain(model) or "")


class LayeredConfig(PreTrainedConfig):
    """Fields that may differ from layer to layer."""

    model_type = "layered"

    def __init__(self, hidden_size=8, intermediate_size=12, num_hidden_layers=2, **kwargs):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kwargs)


class LayeredBlock(nn.Module):
    def __init__(self, config, index: int) -> None:
        super().__init__()
        width = config.per_layer_config[index].intermediate_size
        self.up = nn.Linear(config.hidden_size, width)
        self.down = nn.Linear(width, config.hidden_size)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class LayeredModel(PreTrainedModel):
    config_class = LayeredConfig
    base_model_prefix = "model"

    def __init__(self, config) -> None:
        super().__init__(config)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(LayeredBlock(config, index) for index in layers)
        self.post_init()

    def forward(self, inputs):
        for layer in self.layers:
            inputs = layer(inputs)
        return inputs


def test_widths_by_layer_are_written_where_the_class_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = LayeredModel(LayeredConfig()).eval(), torch.randn(3, 8)
    graph = discover(model, x)
    kept = {**graph.full.kept, "layers.0.ffn": (0, 3, 5), "layers.1.ffn": (1, 2, 4, 6, 11)}
    apply_plan(model, graph.groups, PruningPlan(graph.full.sizes, kept))
    assert why_not_plain(model) is not None
    assert with_layer_fields(model) == {0: {"intermediate_size": 3}, 1: {"intermediate_size": 5}}
    folder = save_pretrained(model, tmp_path / "small")
    fields = json.loads((folder / "config.json").read_text())
    assert fields["model_type"] == "layered"
    widths = {int(i): layer["intermediate_size"] for i, layer in fields["per_layer_config"].items()}
    assert widths == {0: 3, 1: 5}
    again = LayeredModel.from_pretrained(folder).eval()  # transformers alone
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        assert torch.equal(from_pretrained(LayeredModel, folder).eval()(x), model(x))


def test_widths_by_layer_are_not_written_where_the_class_does_not_read_them(tmp_path: Path) -> None:
    model = cut("bert", "half")
    assert with_layer_fields(model) is None
    folder = save_pretrained(model, tmp_path / "small")
    assert "per_layer_config" not in json.loads((folder / "config.json").read_text())
