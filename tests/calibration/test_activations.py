"""Inputs of consumers: which positions are summed, and how hooks come and go."""

from __future__ import annotations

import pytest
import torch

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.errors import PruningError
from tests.conftest import count_hooks
from tests.support.graphs import groups_of
from tests.support.models import SOME, batch, build


@pytest.mark.parametrize(("family", "head"), [pair for pair in SOME if pair[1] != "image"])
def test_padding_is_left_out(family, head):
    model, inputs = build(family, head), batch()
    groups = groups_of(model)
    with ActivationRecorder(model, groups) as recorder, torch.inference_mode():
        model(**inputs)
    rows, real = len(inputs["input_ids"]), int(inputs["attention_mask"].sum())
    shared = 2 if family == "albert" else 1  # one layer that runs twice
    for group in groups:
        for key, consumers in group.inputs.items():
            pooled = any(
                word in consumers[0] for word in ("pooler", "classifier", "sequence_summary")
            )
            within = ".layer" in consumers[0] or "layers." in consumers[0]
            expected = rows if pooled and head == "sequence" else real * (shared if within else 1)
            assert int(recorder.moments[key].count) == expected, key


def test_samples_are_the_inputs_of_the_consumer():
    model, inputs = build(), batch()
    group = next(a for a in groups_of(model) if a.kind == "ffn")
    seen = []
    consumer = model.get_submodule(group.consumers[0])
    handle = consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with ActivationRecorder(model, [group]) as recorder:
        model(inputs["input_ids"], inputs["attention_mask"])  # positional arguments
    handle.remove()
    rows = seen[0][inputs["attention_mask"].bool()].double()
    mean, covariance = recorder.moments[group.name].compute()
    assert torch.allclose(mean, rows.mean(0))
    assert torch.allclose(covariance, rows.T.cov(correction=0), atol=1e-10)


def test_positions_are_bounded_spread_over_batches_and_drawn_alike():
    model = build()
    groups = [a for a in groups_of(model) if a.kind in ("ffn", "heads")]
    state = torch.get_rng_state()

    def record():
        with (
            ActivationRecorder(model, groups, positions=100, batches=5) as recorder,
            torch.no_grad(),
        ):
            counts = []
            for i in range(7):
                model(**batch(seed=i))
                counts.append(int(recorder.moments[groups[0].name].count))
        return recorder, counts

    first, counts = record()
    second, _ = record()
    assert counts == [20, 40, 60, 80, 100, 100, 100]
    assert torch.equal(torch.get_rng_state(), state)
    for group in groups:
        assert torch.equal(first.moments[group.name].outer, second.moments[group.name].outer)


def test_only_our_hooks_are_removed_at_the_end_of_the_block():
    model = build()
    model.register_forward_hook(lambda *a: None)

    def fail():
        with ActivationRecorder(model, groups_of(model)):
            assert count_hooks(model) > 1
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert count_hooks(model) == 1


def test_autocast_and_inference_leave_ordinary_float64_sums():
    model, inputs = build(), batch()
    groups = groups_of(model)
    with ActivationRecorder(model, groups) as recorder:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        moments = recorder.moments["bert.encoder.layer.0.ffn"]
        moments.update(torch.ones(1, 40))
    assert moments.outer.dtype == torch.float64
    assert not moments.outer.is_inference()


def test_one_example_is_kept_for_counting():
    model = build()
    with ActivationRecorder(model, groups_of(model)) as recorder:
        model(**batch())
    example = recorder.examples[""]
    assert example.kwargs["input_ids"].shape[0] == 1
    model(**example.kwargs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_are_named(bad):
    model, inputs = build(), batch()
    groups = groups_of(model)
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.bias[0] = bad
    with ActivationRecorder(model, groups) as recorder:
        model(**inputs)
    with pytest.raises(
        PruningError, match=r"NaN or infinite activations at 'bert.encoder.layer.1.ffn'"
    ):
        recorder.check()


def test_a_layer_that_never_ran_is_named():
    model = build()
    with ActivationRecorder(model, groups_of(model)) as recorder:
        pass
    with pytest.raises(PruningError, match="No activations were collected at"):
        recorder.check()


def test_longer_validation_needs_no_more_products(monkeypatch):
    """The same positions, in however many batches; sums can be read at any time."""
    ran, update = [], Moments.update
    monkeypatch.setattr(Moments, "update", lambda self, x: (ran.append(len(x)), update(self, x)))
    model = build()
    groups = [a for a in groups_of(model) if a.kind == "ffn"]
    counts = {}
    for batches in (4, 64):
        ran.clear()
        with (
            torch.no_grad(),
            ActivationRecorder(model, groups, positions=1024, batches=batches) as recorder,
        ):
            for seed in range(batches):
                recorder.start_batch()
                model(**batch(64, seed=seed))
            assert not recorder.is_full or batches == 4 or len(ran) < batches
        counts[batches] = len(ran)
        assert {int(m.count) for m in recorder.moments.values()} == {1024}
        assert recorder.is_full
    assert counts[64] <= counts[4] <= 4 * len(groups)
    with torch.no_grad(), ActivationRecorder(model, groups) as recorder:
        for seed in range(2):
            model(**batch(2, seed=seed))
            assert len({int(m.count) for m in recorder.moments.values()} - {0}) == 1
    both = [batch(2, seed=seed) for seed in range(2)]
    assert int(next(iter(recorder.moments.values())).count) == sum(
        int(b["attention_mask"].sum()) for b in both
    )
