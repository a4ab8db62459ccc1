"""One call, no Trainer: prune()."""

from __future__ import annotations

import copy
import re
from functools import partial

import datasets
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from transformers import T5Config, T5ForConditionalGeneration

from lightning_mi_prune import PruningError, PruningGraph, discover, load_pruned, prune
from lightning_mi_prune import pipeline as method
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.allocation.macs import count_macs
from lightning_mi_prune.allocation.measuring import measure_table
from lightning_mi_prune.calibration.calls import RecordedCall
from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.core.options import Constraints, Importance, Latency, Reconstruction
from lightning_mi_prune.graph.describe import linear_group
from tests.support.boring import Classifier, Sentences
from tests.support.graphs import graph_of
from tests.support.models import batch, build, outputs, pictures

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch):
    monkeypatch.setattr(method, "measure_table", partial(measure_table, seconds=0.005))


def batches(count=6):
    return [batch(64, seed=i) for i in range(count)]


def labelled(count=6):
    return [{**b, "labels": b["input_ids"][:, 1] % 3} for b in batches(count)]


def loss(model, inputs):
    return model(**inputs).loss


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[n], t) for n, t in before.items()
    )


@pytest.mark.parametrize("selection", ["conditional", "topk"])
def test_a_stream_is_ranked_though_some_that_read_it_are_gone(selection):
    """With the consumers kept above, a sublayer that vanished has no say and does no harm."""
    model = build()
    method = {
        "importance": Importance(selection=selection, relevance="weights"),
        "constraints": Constraints(pins={"layer\\.0\\.(ffn|heads)": 0}),
        "reconstruction": Reconstruction("compensation"),
    }
    rows = [batch(seed=seed) for seed in range(12)]
    done = prune(model, rows, 0.7, **method, kinds=["ffn", "heads", "hidden"])
    gone = [name for name in done.plan.kept if "layer.0." in name and not name.endswith("head_dim")]
    assert {len(done.plan.kept[name]) for name in gone} == {0}
    assert done.plan.width("bert.hidden") > 0
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("widths", ["global", "uniform"])
@pytest.mark.parametrize("relevance", ["gradient", "weights", None])
def test_one_call_makes_a_network_smaller(widths, relevance):
    net = build()
    state = torch.get_rng_state()
    how = {"importance": Importance(relevance=relevance), "widths": widths}
    done = prune(net, labelled(), 0.5, loss=loss, **how)
    assert 0.5 <= done.sparsity < 0.6
    assert done.parameters[1] == sum(p.numel() for p in net.parameters()) < done.parameters[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    units = [name for name in done.plan.sizes if name != "bert.encoder.layer"]
    assert net.config.pruning_plan == done.plan.only(units).bare().to_json()
    assert outputs(net, batch()).isfinite().all()


def test_the_plan_travels_and_keeps_the_order():
    net = build()
    done = prune(net, batches(), 0.5)
    units = {name for name in done.plan.sizes if name.endswith(("ffn", "heads"))}
    assert set(done.plan.rankings) == units
    again = load_pruned_from(net)
    assert torch.equal(outputs(again, batch()), outputs(net, batch()))
    name = next(n for n in done.plan.rankings if n.endswith("ffn"))
    assert done.plan.rankings[name].kept(done.plan.width(name)) == done.plan.kept[name]


def load_pruned_from(net):
    import tempfile

    with tempfile.NamedTemporaryFile() as file:
        torch.save(net.state_dict(), file.name)
        return load_pruned(build(seed=7), file.name)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(target_parameters=7000),
        Budget(target_macs=60_000),
        Budget(keep_information=0.8),
        Budget(target_latency_ms=1e6),
    ],
    ids=lambda budget: budget.kind,
)
def test_every_budget_is_met(budget):
    net = build()
    before = copy.deepcopy(net)
    inputs = {name: t[:1] for name, t in batch().items()}
    if budget.kind == "target_latency_ms":  # as built it is met already
        with pytest.raises(PruningError, match=r"meets target_latency_ms=.* already"):
            prune(net, batches(), budget)
        assert same(net, before.state_dict())
        return
    done = prune(net, batches(), budget)
    assert done.parameters[1] < done.parameters[0]
    if budget.kind == "target_parameters":
        assert done.parameters[1] <= 7000
    elif budget.kind == "target_macs":
        assert (
            count_macs(net, RecordedCall((), inputs))
            <= 60_000
            < count_macs(before, RecordedCall((), inputs))
        )
    else:
        total = sum(r.nats[-1] for r in done.plan.rankings.values())
        lost = sum(r.lost(done.plan.width(n))[1] for n, r in done.plan.rankings.items())
        assert 0.2 >= lost / total > 0.1


def test_the_width_of_the_stream_goes_down_to_the_word_embeddings():
    net = build()
    how = {"constraints": Constraints(pins={"hidden": 16, "heads": 2})}
    done = prune(net, labelled(), 0.4, loss=loss, **how, kinds=["ffn", "heads", "hidden"])
    assert done.plan.width("bert.hidden") == 16
    assert net.bert.embeddings.word_embeddings.weight.shape == (64, 16)
    assert net.bert.encoder.layer[0].attention.output.LayerNorm.normalized_shape == (16,)
    assert net(**batch()).logits.isfinite().all()


def test_vision_models_and_plain_tuples_of_inputs():
    net = build("vit", "image")
    data = [(pictures(32)["pixel_values"],) for _ in range(4)]
    assert prune(net, data, 0.5).sparsity >= 0.5


def test_a_lightning_module_brings_its_own_steps():
    module = Classifier(validation_rows=256)
    module.train()
    loader = DataLoader(Sentences(256, seed=1), batch_size=64)
    optimizer = torch.optim.AdamW(module.parameters())
    module.loss(next(iter(loader))).backward()
    optimizer.step()
    gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    done = prune(module, loader, 0.5, training=module.train_dataloader(), optimizers=[optimizer])
    assert done.sparsity >= 0.5
    assert module.training
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:  # of tensors that were not cut
            assert torch.equal(parameter.grad, gradients[name])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    module.loss(next(iter(loader))).backward()
    optimizer.step()


def test_metrics_and_what_the_user_hung_on_the_module_stay():
    module = Classifier(validation_rows=256)
    module.metric = MeanMetric()
    module.metric.update(torch.tensor(2.0))
    step = module.validation_step
    module.validation_step = lambda batch, index: (step(batch, index), module.metric.update(40.0))
    module.log = mine = lambda *a, **k: None
    loader = DataLoader(Sentences(256, seed=1), batch_size=64, shuffle=True)
    state = torch.get_rng_state()
    # A step that runs the original whatever it is given shows nothing on a copy.
    with pytest.raises(PruningError, match="runs BertForSequenceClassification of the original"):
        prune(module, loader, 0.5)
    prune(module, loader, 0.5, graph=graph_of(module))
    assert float(module.metric.compute()) == 2.0
    assert module.log is mine
    assert torch.equal(torch.get_rng_state(), state)


def test_parameters_of_the_whole_module_count_what_others_cut_before():
    net = build()
    prune(net, batches(), 0.3, kinds=["hidden"])
    left = sum(p.numel() for p in net.parameters())
    target = int(0.8 * left)
    prune(net, batches(), Budget(target_parameters=target))
    assert sum(p.numel() for p in net.parameters()) <= target


def test_two_layers_may_read_the_same_units():
    net = nn.Module()
    net.a, net.b, net.c = nn.Linear(6, 16), nn.Linear(16, 4), nn.Linear(16, 3)
    net.forward = lambda x: torch.cat([net.b(net.a(x).relu()), net.c(net.a(x).relu())], dim=-1)

    group = linear_group(net, "h", kind="ffn", producers=["a"], consumers=["b", "c"])
    data = [torch.randn(300, 6) for _ in range(3)]
    graph = PruningGraph.of([group])
    done = prune(net, data, 0.5, loss=lambda m, x: m(x).square().mean(), graph=graph)
    assert done.plan.width("h") == net.a.out_features == 8


def nan_loss(model, inputs):
    return model(**inputs).loss * float("nan")


def by_hand(model, inputs):
    return cross_entropy(
        model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, inputs["labels"]
    )


REFUSED = {
    "no loss": (
        {"importance": Importance()},
        "asks for training steps, but there is no loss",
    ),
    "nan loss": ({"loss": nan_loss}, "loss of all 3 batches is NaN"),
    "no steps": ({"loss": by_hand, "training": []}, "there were none at"),
    "out of reach": (
        {"sparsity": Budget(target_parameters=100)},
        "target_parameters=100 is out of reach",
    ),
    "all of it": ({"sparsity": 1.0}, "sparsity=1.0; expected a number above 0 and below 1"),
    "nothing": ({"include": "nowhere"}, "include='nowhere' matches no group"),
    "pin": (
        {"importance": Importance(relevance=None), "constraints": Constraints(pins={"ffn": 41})},
        "41",
    ),
    "small": ({"data": [batch(2, 6)]}, "Only .* at .* but scoring against"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_and_nothing_changes(case):
    options, message = REFUSED[case]
    net = build()
    before = snapshot(net)
    arguments = {"data": labelled(3), "sparsity": 0.5, **options}
    with pytest.raises(PruningError, match=message):
        prune(net, **arguments)
    assert same(net, before)
    assert not hasattr(net.config, "pruning_plan")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_a_latency_table_of_another_device_is_refused(tmp_path):
    net, path = build(), tmp_path / "table.json"
    fast = {"importance": Importance(relevance=None), "latency": Latency(str(path))}
    with pytest.raises(PruningError, match="already"):
        prune(net, batches(), Budget(target_latency_ms=1e6), **fast)
    assert path.exists()
    other = (
        path.read_text()
        .replace('"type": "cpu"', '"type": "cuda"')
        .replace('"type":"cpu"', '"type":"cuda"')
    )
    path.write_text(other)
    before = snapshot(net)
    with pytest.raises(PruningError, match="cuda"):
        prune(net, batches(), Budget(target_latency_ms=1.0), **fast)
    assert same(net, before)


def test_a_data_set_is_calibration_data(tmp_path):
    """A Dataset, its folder, and its rows as batches of the same order prune alike."""
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [row.tolist() for row in batch(64, seed=3)["input_ids"]],
            "label": [i % 2 for i in range(64)],
        }
    )
    rows.save_to_disk(tmp_path / "rows")
    found = []
    for data in (rows, str(tmp_path / "rows"), list(batches_of(rows, batch_size=16))):
        net = build()
        given = {"input_ids"}

        def forward(model, inputs, given=given):
            return model(**{k: v for k, v in inputs.items() if k in given})

        result = prune(net, data, 0.5, forward=forward, batch_size=16)
        found.append(result.plan)
    assert found[0] == found[1] == found[2]
    assert found[0].width("bert.encoder.layer.0.ffn") < 40


class Hand(nn.Module):
    """Nothing describes it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.down(self.up(x).relu())


def points(count=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 8, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("given", ["found", "graph", "file"])
def test_what_nothing_describes_is_found_in_the_first_batch(given, tmp_path):
    net, graph = Hand(), None
    if given != "found":
        graph = discover(net, points()[0])
        graph.save(tmp_path / "graph.json")
        graph = graph if given == "graph" else str(tmp_path / "graph.json")
    done = prune(net, points(), 0.5, graph=graph)
    assert done.sparsity >= 0.5
    assert net.up.weight.shape[0] == net.down.weight.shape[1] == net.up.out_features <= 16
    assert net(points()[0]).shape == (64, 3)


def test_channels_of_a_network_of_convolutions_go():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 2)
    )
    rows = [torch.randn(32, 3, 8, 8) for _ in range(8)]
    done = prune(net, rows, 0.5, loss=lambda model, x: model(x).square().mean())
    assert done.sparsity >= 0.5
    assert net(rows[0]).shape == (32, 2)


def test_a_function_that_runs_another_model_than_the_one_it_gets_is_refused():
    net = Hand()
    before = snapshot(net)
    with pytest.raises(PruningError, match="forward runs Hand of the original model"):
        prune(net, points(), 0.5, forward=lambda model, x: net(x))
    assert same(net, before)


def test_a_graph_of_another_model_is_refused():
    graph = discover(Hand(), points()[0])
    net = Hand()
    net.up = nn.Linear(8, 40)
    with pytest.raises(PruningError, match="made for another model"):
        prune(net, points(), 0.5, graph=graph)


def test_tied_heads_of_several_layers_and_their_dimensions() -> None:
    """The cross-attentions of a T5 lose the same heads; their dimensions rotate layer by layer."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2}
    config = T5Config(vocab_size=50, decoder_start_token_id=0, **sizes)
    model = T5ForConditionalGeneration(config).eval()
    rows = [
        {name: torch.randint(1, 50, (16, n)) for name, n in (("input_ids", 12), ("labels", 10))}
        for _ in range(8)
    ]
    graph = discover(model, **rows[0])
    heads = next(group for group in graph.groups if len(group.partners) == 2)
    constraints = Constraints(pins={re.escape(heads.name): 2, r"head_dim$": 4})
    share = 0.4
    done = prune(
        *(model, rows, share),
        kinds=["ffn", "heads", "head_dim"],
        constraints=constraints,
        loss=lambda model, batch: model(**batch).loss,
    )
    assert done.plan.width(heads.name) == 2
    assert {done.plan.width(name) for name, _ in heads.partners} == {4}
    for layer in model.decoder.block:
        attention = layer.layer[1].EncDecAttention
        assert attention.q.weight.shape == attention.v.weight.shape == (8, 32)
        assert attention.o.weight.shape == (32, 8)
    assert model(**rows[0]).loss.isfinite()
