from __future__ import annotations

import math

import pytest
import torch

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.moments import Moments
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.families import find_groups
from tests.conftest import count_hooks
from tests.support.models import CONFIGS, HEADS, batch, build


def test_sums_over_batches_are_the_moments_of_all():
    x = torch.randn(300, 7, dtype=torch.float64) * 5 + 3
    moments = Moments(7)
    for part in x.split([1, 99, 200]):
        moments.update(part.float())
    mean, covariance = moments.compute()
    x = x.float().double()
    assert torch.allclose(mean, x.mean(0))
    assert torch.allclose(covariance, x.T.cov(correction=0), atol=1e-10)


@pytest.mark.parametrize("dimension", [1, 383, 384, 385, 900])
def test_only_one_triangle_is_summed_and_nothing_is_lost(dimension):
    """Sums of whole numbers are exact in whatever order; what a checkpoint holds goes on."""
    x = torch.randint(-9, 10, (64, dimension))
    moments = Moments(dimension)
    moments.update(x[:40].float())
    again = Moments(dimension).unpack(moments.packed())
    for each in (moments, again):
        each.update(x[40:].float())
        each.count += 64  # 128 samples: what follows is exact as well
        mean, covariance = each.statistics()
        outer = (x.T @ x).double() / 128
        assert torch.equal(mean, x.sum(0) / 128.0)
        assert torch.equal(covariance, outer - torch.outer(mean, mean))
    rows, columns = torch.triu_indices(dimension, dimension)
    assert torch.equal(again.packed()[1 + dimension :], (x.T @ x)[rows, columns].double())


def test_one_triangle_is_as_accurate_as_the_whole_product():
    x = torch.randn(2000, 500, dtype=torch.float64) * 3 + 1
    moments = Moments(500)
    for part in x.split(300):
        moments.update(part)
    left, right = torch.randint(500, (2, 200)).tolist()
    exact = [math.fsum((x[:, i] * x[:, j]).tolist()) for i, j in zip(left, right, strict=True)]
    mean, covariance = moments.statistics()
    found = (covariance + torch.outer(mean, mean))[left, right] * 2000
    bound = 20 * torch.finfo(torch.float64).eps * (x.abs().T @ x.abs())[left, right]
    assert ((found - torch.tensor(exact, dtype=torch.float64)).abs() <= bound).all()
    assert torch.equal(covariance, covariance.mT)


def test_two_ranks_add_up_and_reset_starts_again():
    x = torch.randn(50, 4)
    whole, left, right = Moments(4), Moments(4), Moments(4)
    whole.update(x)
    left.update(x[:20])
    right.update(x[20:])
    for state, how in left._reductions.items():
        summed = how(torch.stack([getattr(left, state), getattr(right, state)]))
        assert torch.allclose(summed, getattr(whole, state))
    whole.reset()
    assert int(whole.count) == 0
    assert not whole.outer.any()
    whole.update(x)
    assert torch.allclose(whole.outer, left.outer + right.outer)


def test_memory_is_one_matrix_an_group():
    moments = Moments(64)
    for _ in range(3):
        moments.update(torch.ones(5, 64))
    held = [*vars(moments).values(), *moments._defaults.values()]
    size = sum(t.untyped_storage().nbytes() for t in held if isinstance(t, torch.Tensor))
    assert size < 8 * 64 * (64 + 4)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("head", HEADS)
def test_padding_is_not_heard(family, head):
    model, inputs = build(family, head), batch()
    groups = find_groups(model)
    with ActivationRecorder(model, groups) as heard, torch.inference_mode():
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
            assert int(heard.moments[key].count) == expected, key


def test_what_is_heard_is_what_the_reader_receives():
    model, inputs = build(), batch()
    group = next(a for a in find_groups(model) if a.kind == "ffn")
    seen = []
    consumer = model.get_submodule(group.consumers[0])
    handle = consumer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with ActivationRecorder(model, [group]) as heard:
        model(inputs["input_ids"], inputs["attention_mask"])  # positional arguments
    handle.remove()
    rows = seen[0][inputs["attention_mask"].bool()].double()
    mean, covariance = heard.moments[group.name].compute()
    assert torch.allclose(mean, rows.mean(0))
    assert torch.allclose(covariance, rows.T.cov(correction=0), atol=1e-10)


def test_positions_are_bounded_spread_over_batches_and_drawn_alike():
    model = build()
    groups = [a for a in find_groups(model) if a.kind in ("ffn", "heads")]
    state = torch.get_rng_state()

    def listen():
        with ActivationRecorder(model, groups, positions=100, batches=5) as heard, torch.no_grad():
            counts = []
            for i in range(7):
                model(**batch(seed=i))
                counts.append(int(heard.moments[groups[0].name].count))
        return heard, counts

    first, counts = listen()
    second, _ = listen()
    assert counts == [20, 40, 60, 80, 100, 100, 100]
    assert torch.equal(torch.get_rng_state(), state)
    for group in groups:
        assert torch.equal(first.moments[group.name].outer, second.moments[group.name].outer)


def test_hooks_leave_with_the_block_and_only_ours():
    model = build()
    model.register_forward_hook(lambda *a: None)

    def fail():
        with ActivationRecorder(model, find_groups(model)):
            assert count_hooks(model) > 1
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert count_hooks(model) == 1


def test_autocast_and_inference_leave_ordinary_float64_sums():
    model, inputs = build(), batch()
    groups = find_groups(model)
    with ActivationRecorder(model, groups) as heard:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        moments = heard.moments["bert.encoder.layer.0.ffn"]
        moments.update(torch.ones(1, 40))
    assert moments.outer.dtype == torch.float64
    assert not moments.outer.is_inference()


def test_one_example_is_kept_for_counting():
    model = build()
    with ActivationRecorder(model, find_groups(model)) as heard:
        model(**batch())
    example = heard.examples[""]
    assert example.kwargs["input_ids"].shape[0] == 1
    model(**example.kwargs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_activations_are_named(bad):
    model, inputs = build(), batch()
    groups = find_groups(model)
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.bias[0] = bad
    with ActivationRecorder(model, groups) as heard:
        model(**inputs)
    with pytest.raises(
        PruningError, match=r"NaN or infinite activations at 'bert.encoder.layer.1.ffn'"
    ):
        heard.check()


def test_silence_is_named():
    model = build()
    with ActivationRecorder(model, find_groups(model)) as heard:
        pass
    with pytest.raises(PruningError, match="Nothing was heard at"):
        heard.check()


def test_longer_validation_needs_no_more_products(monkeypatch):
    """The same positions, in however many batches; what was heard can be read any time."""
    ran, update = [], Moments.update
    monkeypatch.setattr(Moments, "update", lambda self, x: (ran.append(len(x)), update(self, x)))
    model = build()
    groups = [a for a in find_groups(model) if a.kind == "ffn"]
    counts = {}
    for batches in (4, 64):
        ran.clear()
        with (
            torch.no_grad(),
            ActivationRecorder(model, groups, positions=1024, batches=batches) as heard,
        ):
            for seed in range(batches):
                heard.start_batch()
                model(**batch(64, seed=seed))
            assert not heard.is_full or batches == 4 or len(ran) < batches
        counts[batches] = len(ran)
        assert {int(m.count) for m in heard.moments.values()} == {1024}
        assert heard.is_full
    assert counts[64] <= counts[4] <= 4 * len(groups)
    with torch.no_grad(), ActivationRecorder(model, groups) as heard:
        for seed in range(2):
            model(**batch(2, seed=seed))
            assert len({int(m.count) for m in heard.moments.values()} - {0}) == 1
    both = [batch(2, seed=seed) for seed in range(2)]
    assert int(next(iter(heard.moments.values())).count) == sum(
        int(b["attention_mask"].sum()) for b in both
    )
