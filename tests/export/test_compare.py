"""What is measured of two networks is what one computes by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from lightning_mi_prune import PruningError
from lightning_mi_prune.allocation.macs import count_macs
from lightning_mi_prune.export import compare
from lightning_mi_prune.export.compare import (
    Comparison,
    compare_networks,
    metric_of,
    network_called,
    recorded_calls,
    resized_call,
)
from tests.support.models import CONFIGS, batch, build, outputs


def decoder() -> Any:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=1, n_head=2)
    )


def cut_batches(rows: dict[str, Tensor], *sizes: int) -> list[dict[str, Tensor]]:
    parts = zip(*(x.split(sizes) for x in rows.values()), strict=True)
    return [dict(zip(rows, part, strict=True)) for part in parts]


@pytest.mark.parametrize("labelled", [True, False])
def test_perplexity_counts_every_token_once(labelled: bool) -> None:
    net, rows = decoder().eval(), batch(6, 9)
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    given = rows | ({"labels": labels} if labelled else {})
    with torch.no_grad():
        logits = net(**rows).logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    found = metric_of(net, cut_batches(given, 5, 1))
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-5)


def test_masked_tokens_are_not_shifted() -> None:
    net, rows = build("bert", "masked-lm"), batch(4)
    labels = torch.where(torch.rand(4, 12) < 0.5, rows["input_ids"], -100)
    with torch.no_grad():
        loss = cross_entropy(net(**rows).logits.flatten(0, 1), labels.flatten())
    found = metric_of(net, cut_batches(rows | {"labels": labels}, 1, 3))
    assert found["perplexity"] == pytest.approx(math.exp(min(700, float(loss))), rel=1e-4)


def test_accuracy_of_tokens_leaves_ignored_labels_out() -> None:
    net, rows = build("bert", "token"), batch(4)
    labels = torch.randint(3, (4, 12)).masked_fill(rows["attention_mask"] == 0, -100)
    with torch.no_grad():
        right = (net(**rows).logits.argmax(-1) == labels)[labels >= 0]
    found = metric_of(net, cut_batches(rows | {"labels": labels}, 3, 1))
    assert found == {"accuracy": pytest.approx(right.float().mean().item())}


def test_a_regression_is_measured_by_its_loss() -> None:
    torch.manual_seed(0)
    config = CONFIGS["bert"](num_labels=1)
    net, rows = AutoModelForSequenceClassification.from_config(config).eval(), batch(4)
    labels = torch.randn(4)
    found = metric_of(net, cut_batches(rows | {"labels": labels}, 3, 1))
    expected = (outputs(net, rows).squeeze(-1) - labels).square().mean()
    assert found == {"loss": pytest.approx(float(expected), rel=1e-5)}


def test_the_network_stays_as_it_is() -> None:
    net = build("bert").train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random = torch.get_rng_state()
    metric_of(net, [batch(4) | {"labels": torch.zeros(4, dtype=torch.long)}])
    compare_networks(net, net, batch=[1], length=[4], seconds=0.01)
    assert net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_both_are_timed_in_turn_at_every_size(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []

    def clock(calls: dict[str, Any], **_: Any) -> dict[str, float]:
        for call in calls.values():
            call()
        return {"dense": 4.0, "pruned": 2.0}

    monkeypatch.setattr(compare, "measure_latency", clock)
    net = build(family, "image" if family == "vit" else "sequence")
    net.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(next(iter(given.values())).shape)),
        with_kwargs=True,
    )
    found = compare_networks(net, net, batch=[1, 3], length=[4, 6])
    lengths = [4, 6] if family == "bert" else [0]
    assert [(r.batch, r.length) for r in found.latency] == [
        (size, n) for size in (1, 3) for n in lengths
    ]
    tail = (2, 8, 8)
    timed = [(size, n) if n else (size, *tail) for size in (1, 3) for n in lengths for _ in "ab"]
    assert shapes[2:] == timed
    assert {row[3] for row in found.table().rows if row[0].endswith("ms")} == {"2.00x"}
    assert found.measured().latency == found.latency


def test_macs_are_those_of_one_example() -> None:
    net = build("bert")
    found = compare_networks(net, net, batch=[], length=[10])
    call = resized_call(compare.RecordedCall((), batch(2)), 1, 10)
    assert found.macs == (count_macs(net, call),) * 2
    assert found.latency == ()
    assert found.machine == ""


class Net(nn.Module):
    """Two parts, called by a step, or by a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_the_network_in_a_module_is_found_by_its_call() -> None:
    net, x = Net(), torch.randn(5, 3)
    with recorded_calls(net) as calls:
        net(x)
    found = network_called(net, calls)
    assert found is not None
    assert found[0] is net
    assert torch.equal(found[1].args[0], x)
    with recorded_calls(net) as calls:
        net.b(net.a(x))
    assert network_called(net, calls) is None
    with recorded_calls(net) as calls:
        net.a(x)
    found = network_called(net, calls)
    assert found is not None
    assert found[0] is net.a
    assert not net._forward_pre_hooks
    assert not net.a._forward_pre_hooks


def test_what_cannot_be_measured_is_refused() -> None:
    net = build("bert")
    with pytest.raises(PruningError, match=r"no column 'labels' that BertForSequenceClassific"):
        metric_of(net, [batch(2)])
    with pytest.raises(PruningError, match=r"no rows with labels"):
        metric_of(net, [])
    with pytest.raises(PruningError, match=r"shapes .*\(1, 41\).*Is the length more"):
        compare_networks(net, net, batch=[1], length=[41], seconds=0.01)
    small = BertConfig(vocab_size=64, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    with pytest.raises(PruningError, match=r"_Labelled returns no loss"):
        metric_of(
            _Labelled(small), [batch(2) | {"labels": torch.zeros(2, 12, 8, dtype=torch.float)}]
        )
    with pytest.raises(PruningError, match=r"batch=0"):
        compare_networks(net, net, batch=[0])


class _Labelled(BertModel):
    def forward(self, input_ids=None, attention_mask=None, labels=None):  # type: ignore[no-untyped-def]
        return super().forward(input_ids, attention_mask)


def test_a_metric_that_was_not_measured_before_has_no_change() -> None:
    found = Comparison((2, 1), metrics={"f1": (None, 0.5)})
    assert found.table().rows[-1] == ("f1", "not measured", "0.5", "")
    assert found.to_dict()["dense"]["metrics"] == {"f1": None}
