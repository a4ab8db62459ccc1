"""Sums of gradients of training steps do not depend on how training computes them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_mi_prune import MutualInformationPruning, PruningError
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.calibration.gradients import (
    GradientRecorder,
    check_gradients,
    empty_sums,
    position_weights,
    relevance_of,
)
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.pipeline import PipelineOptions, decide
from tests.conftest import count_hooks
from tests.support.boring import Classifier, Sentences, trainer
from tests.support.graphs import groups_of
from tests.support.models import batch, build
from tests.support.pruning import pruning_units
from tests.support.relevance import weighted_rows
from tests.support.runs import PRECISIONS

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def small_net():
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 1))
    return net, [linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])]


def gradient_sums(net, groups, loss, steps=1, *, scale=1.0, **options):
    """Sums of gradients over some steps, each of which runs ``loss(step)`` backward."""
    hooks = count_hooks(net)
    with GradientRecorder(net, groups, **options) as recorder:
        for step in range(steps):
            with recorder.step(step, scale=scale):
                loss(step).backward()
    assert count_hooks(net) == hooks
    return recorder.sums


def same(one, two, tolerance=1e-5):
    assert one.keys() == two.keys()
    for key in one:
        assert torch.equal(one[key].counts, two[key].counts), key
        for name in ("matrix", "taylor"):
            a, b = getattr(one[key], name), getattr(two[key], name)
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def test_sums_of_wide_layers_are_whole_matrices():
    """Only one triangle is added up while steps run; here it takes several products."""
    torch.manual_seed(0)
    net, seen = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 430), nn.Tanh()), []
    group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
    handle = net[2].register_forward_hook(lambda *given: _note_gradient(given[-1], seen))
    with GradientRecorder(net, [group]) as recorder, recorder.step(0):
        net(torch.randn(20, 3)).square().sum(1).mean().backward()
    handle.remove()
    (grad,) = seen
    expected = 20**2 * (grad.double().mT @ grad.double())
    torch.testing.assert_close(recorder.sums["hidden"].matrix, expected, rtol=1e-4, atol=1e-6)


def _note_gradient(output, seen):
    output.register_hook(seen.append)


def texts(step, rows=6):
    return {**batch(rows, seed=step), "labels": torch.arange(rows) % 3}


def bert(**options):
    """A network without dropout, its groups, and the loss of a step."""
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = build("bert", **none).train()
    groups = choose_groups(groups_of(model))
    return model, groups, lambda step: model(**texts(step)).loss


@pytest.mark.parametrize("positions", [(), (5,)])
def test_sums_are_those_computed_by_hand(positions):
    net, groups = small_net()
    batches = [torch.randn(rows, *positions, 3) for rows in (4, 6)]

    def loss_of(output):
        return functional.mse_loss(output, torch.ones(*output.shape[:-1], 1).to(output))

    sums = gradient_sums(net, groups, lambda i: loss_of(net(batches[i])), 2, taylor=True)["hidden"]
    net.double()
    matrix, taylor = torch.zeros(2, 2).double(), torch.zeros(4).double()
    for x in batches:
        hidden = net[:2](x.double())
        z = net[2](hidden)
        (g,) = torch.autograd.grad(
            loss_of(net[3:](z)) * len(x), z
        )  # an example's loss is not divided
        rows, weighted = g.reshape(len(x), -1, 2), weighted_rows(g, (z - net[2].bias).detach())
        matrix += weighted.mT @ weighted
        change = (hidden.reshape(len(x), -1, 4) * (rows @ net[2].weight)).sum(1)
        taylor += change.square().sum(0)
    torch.testing.assert_close(sums.matrix, matrix.detach(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(sums.taylor, taylor.detach(), rtol=1e-5, atol=1e-8)
    assert sums.counts.tolist() == [10, 2, 0]
    relevance = relevance_of({"hidden": sums})["hidden"]
    torch.testing.assert_close(relevance.matrix, matrix.detach() / 10, rtol=1e-5, atol=1e-8)


def test_gradients_of_heads_and_neurons_are_those_at_the_outputs_of_their_consumers():
    model, groups, loss = bert()
    sums = gradient_sums(model, groups, loss)
    for group in groups:
        outputs = []
        handle = model.get_submodule(group.consumers[0]).register_forward_hook(
            lambda *args, outputs=outputs: outputs.append(args[-1])
        )
        (g,) = torch.autograd.grad(loss(0) * 6, outputs)
        handle.remove()
        bias = model.get_parameter(f"{group.consumers[0]}.bias")
        g = weighted_rows(g, (outputs[0] - bias).detach())
        torch.testing.assert_close(sums[group.name].matrix, g.mT @ g, rtol=1e-4, atol=1e-7)


def test_a_position_whose_output_is_next_to_nothing_cannot_be_most_of_the_relevance():
    """Behind a norm its gradient is huge, since the norm divides by the output."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Identity(), nn.Linear(2, 2, bias=False))
    for layer in (net[0], net[2]):
        nn.init.eye_(layer.weight)
    group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
    x = torch.ones(4, 8, 2)
    x[:, 0] = 1e-3

    def loss(step):
        y = functional.normalize(net(x), dim=-1)
        return -(y[:, 0, 1].sum() + y[:, 1:, 0].sum()) / len(x)  # the first position wants 1

    relevance = relevance_of(gradient_sums(net, [group], loss))["hidden"].matrix
    # Gradients are at right angles to the output; those of seven positions against one small one.
    g = torch.tensor([-1.0, 1.0], dtype=torch.float64) / 8**0.5
    wanted = torch.outer(g, g) * (7 + 1e6 * 1e-6)
    torch.testing.assert_close(relevance, wanted, rtol=1e-3, atol=0)


def test_weights_of_positions_depend_on_nothing_but_their_example():
    gradients, values = torch.randn(3, 5, 4), torch.randn(3, 5, 2) * torch.rand(3, 5, 1).exp()
    gradients[1, 3:] = 0  # padding
    power = values.square().sum(-1)
    found = position_weights(gradients, power)
    assert found.min() > 0
    assert found.max() == 1
    for example in range(3):
        alone = position_weights(gradients[example, None], power[example, None])
        assert torch.equal(alone[0], found[example])
    short = position_weights(gradients[1:2, :3], power[1:2, :3])
    assert torch.equal(short[0], found[1, :3])
    assert torch.equal(position_weights(gradients[:, 0], power[:, 0]), torch.ones(3))
    assert position_weights(torch.zeros(2, 5, 4), torch.zeros(2, 5)).isfinite().all()
    rows = weighted_rows(gradients, values)
    assert torch.allclose(
        (gradients.double().flatten(0, 1) * found.flatten().sqrt()[:, None]), rows
    )


@pytest.mark.parametrize("scale", [1 / 4, 2.0**12, 3.0])
def test_neither_accumulation_nor_a_loss_scale_changes_the_sums(scale):
    """The scale of the loss of a step is passed to ``step``."""
    model, groups, loss = bert()
    scaled = gradient_sums(model, groups, lambda step: loss(step) * scale, 2, scale=scale)
    same(scaled, gradient_sums(model, groups, loss, 2))


def test_steps_of_different_scale_have_the_same_weight():
    model, groups, loss = bert()
    with GradientRecorder(model, groups) as recorder:
        for step, scale in enumerate((2.0**10, 2.0**9)):
            with recorder.step(step, scale=scale):
                (loss(step) * scale).backward()
    same(recorder.sums, gradient_sums(model, groups, loss, 2))


def test_a_step_that_is_not_finite_is_left_out_everywhere_and_then_refused():
    net, groups = small_net()
    groups.append(linear_group(net, "upper", kind="ffn", producers=["2"], consumers=["4"]))
    x, seen = torch.randn(4, 3), []
    net[3].register_forward_hook(lambda *args: seen.append(args[-1]))

    def loss(step):
        output = net(x)
        # Only what is below the upper consumer becomes infinite.
        return (output + (math.inf if step == 1 else 0.0) * seen.pop()[:, :1]).sum()

    sums = gradient_sums(net, groups, loss, 3)
    assert {tuple(s.counts.tolist()) for s in sums.values()} == {(8, 2, 1)}
    assert all(s.matrix.isfinite().all() for s in sums.values())
    with pytest.raises(PruningError, match="NaN or infinite gradients at 'hidden' in 1 of 3"):
        check_gradients(sums)
    check_gradients(sums, scaled=True)  # a scaler looks for the largest scale without overflow
    sums = gradient_sums(net, groups, lambda _: loss(1), 2)
    with pytest.raises(PruningError, match=r"in 2 of 2 training steps.*relevance='weights'"):
        check_gradients(sums, scaled=True)


def test_without_training_steps_or_gradients_there_is_no_relevance():
    model, groups, loss = bert()
    with pytest.raises(PruningError, match="needs training steps, but there were none at"):
        check_gradients(empty_sums(model, groups))
    method, full = (
        PipelineOptions(Budget(sparsity=0.5)),
        PruningPlan.full({a.name: a.size for a in groups}),
    )
    with pytest.raises(
        PruningError, match=r"asks for training steps, but none were collected\. Train"
    ):
        decide(method, model, groups, groups, full, CalibrationData({}))
    sums = gradient_sums(model, groups, lambda step: loss(step) * 0.0)
    with pytest.raises(PruningError, match=r"No gradient reached .* in 1 training step"):
        check_gradients(sums)


@pytest.mark.parametrize(
    ("steps", "batches", "recorded"),
    [
        (2, 8, [3, 7]),
        (3, 8, [1, 3, 5]),
        (8, 8, [*range(8)]),
        (99, 8, [*range(8)]),
        (2, None, [0, 1]),
    ],
)
def test_recorded_steps_are_spread_evenly(steps, batches, recorded):
    net, groups = small_net()
    found = []
    with GradientRecorder(net, groups, steps=steps, batches=batches) as recorder:
        for index in range(8):
            before = float(recorder.sums["hidden"].counts[1])
            with recorder.step(index):
                net(torch.randn(4, 3)).sum().backward()
            found += [index] * int(recorder.sums["hidden"].counts[1] - before)
    assert found == recorded


def test_nothing_is_summed_outside_of_a_step_or_of_one_that_failed():
    net, groups = small_net()
    with GradientRecorder(net, groups) as recorder:
        net(torch.randn(4, 3)).sum().backward()
        recorder.begin(0)
        with torch.no_grad():
            net(torch.randn(4, 3))
        net(torch.randn(4, 3)).sum().backward()
        recorder.begin(1)  # the first step failed
        recorder.end()
    assert not any(s.counts.any() or s.matrix.any() for s in recorder.sums.values())


def saving(forward, reentrant, *args, **kwargs):
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False], ids=["network", "layers"])
def test_activation_checkpoints_change_nothing(reentrant, whole):
    model, groups, loss = bert()
    wanted = gradient_sums(model, groups, loss, 2, taylor=True)
    if not whole:
        for layer in model.bert.encoder.layer:
            layer.forward = partial(saving, layer.forward, reentrant)
        same(gradient_sums(model, groups, loss, 2, taylor=True), wanted)
        return

    def within(step):
        given, needs = texts(step), torch.zeros(1, requires_grad=True)
        return checkpoint(lambda _: model(**given).loss, needs, use_reentrant=reentrant)

    same(gradient_sums(model, groups, within, 2, taylor=True), wanted)


def test_gradients_of_a_frozen_bottom_half_come_from_above_it():
    model, groups, loss = bert()
    wanted = gradient_sums(model, groups, loss)
    model.zero_grad()
    model.bert.embeddings.requires_grad_(False)
    model.bert.encoder.layer[0].requires_grad_(False)
    same(gradient_sums(model, groups, loss), wanted)
    for name, parameter in model.named_parameters():
        frozen = "embeddings" in name or "layer.0" in name
        assert (parameter.grad is None) == frozen, name


def test_operations_in_place_on_the_output_of_a_frozen_consumer_work():
    net, groups = small_net()
    net[3] = nn.ReLU(inplace=True)
    x = torch.randn(4, 3)
    wanted = gradient_sums(net, groups, lambda _: net(x).sum())
    net[:3].requires_grad_(False)
    same(gradient_sums(net, groups, lambda _: net(x).sum()), wanted)


class Holder(nn.Module):
    """A module that others call the parts of, as steps of a LightningModule do."""

    def __init__(self, network):
        super().__init__()
        self.parts = nn.ModuleList([network])

    def forward(self, x):
        return self.parts[0](x)


def test_a_step_may_call_the_parts_of_a_module():
    holder, x = Holder(small_net()[0]), torch.randn(5, 3)
    layers = {"producers": ["parts.0.0"], "consumers": ["parts.0.2"]}
    groups = [linear_group(holder, "hidden", kind="ffn", **layers)]
    whole, part = (
        gradient_sums(holder, groups, lambda _, run=run: run(x).square().mean(), taylor=True)
        for run in (holder, holder.parts[0])
    )
    assert int(whole["hidden"].counts[0]) == 5
    same(part, whole, 0)
    with ActivationRecorder(holder, groups, calls=100) as recorder:
        holder.parts[0](x)
    assert int(recorder.moments["hidden"].count) == 5
    assert [*recorder.stored] == [*recorder.calls(groups)] == ["parts.0"]


def test_every_network_counts_the_same_examples():
    pair = nn.ModuleDict({"a": build("bert"), "b": build("distilbert", seed=1)})
    sums = gradient_sums(pair, choose_groups(groups_of(pair)), lambda step: sum(
        pair[name](**texts(step)).loss for name in pair
    ))  # fmt: skip
    alone = gradient_sums(
        pair["a"], choose_groups(groups_of(pair["a"])), lambda s: pair["a"](**texts(s)).loss
    )
    same(
        {f"a.{key}": s for key, s in alone.items()}, {k: s for k, s in sums.items() if k[0] == "a"}
    )


class Constant(Classifier):
    """Learns nothing, so that every run sees the same gradients."""

    def __init__(self, **options):
        super().__init__(optimizer=lambda p, lr: torch.optim.SGD(p, lr=0.0), validation_rows=256)
        self.options = options

    def train_dataloader(self):
        return torch.utils.data.DataLoader(Sentences(64), batch_size=16)


class Manual(Constant):
    """Two optimizers and two losses, by hand."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        halves = self.model.bert.parameters(), self.model.classifier.parameters()
        return [torch.optim.SGD(half, lr=0.0) for half in halves]


class Checkpointing(Constant):
    def loss(self, batch):
        if not self.training:
            return super().loss(batch)
        needs = torch.zeros(1, requires_grad=True)
        return checkpoint(lambda _: self.model(**batch).loss, needs, **self.options)


class Half(Constant):
    def __init__(self):
        super().__init__()
        self.model.bert.embeddings.requires_grad_(False)
        self.model.bert.encoder.layer[0].requires_grad_(False)


def sums_of_a_run(module, **options):
    """The gradients that the first cut of a run was decided from."""
    found = []

    callback = MutualInformationPruning(0.5, verbose=False)
    decide = callback.engine.strategy.decide

    def noting(session, data, goal):
        found.append(data.gradients)
        return decide(session, data, goal)

    callback.engine.strategy.decide = noting
    trainer(callback, max_epochs=2, **options).fit(module)
    assert count_hooks(module) == 0
    return found[0]


@pytest.fixture(scope="module")
def ordinary():
    torch.manual_seed(0)
    found = sums_of_a_run(Constant())
    assert {tuple(s.counts.tolist()) for s in found.values()} == {(64, 4, 0)}
    return found


RUNS = {
    "accumulation": (Constant, {"accumulate_grad_batches": 3}, 1e-5),
    "clipping": (Constant, {"gradient_clip_val": 1e-3}, 1e-5),
    "bf16-mixed": (Constant, {"precision": "bf16-mixed"}, 0.1),
    "two optimizers by hand": (Manual, {}, 1e-5),
    "two optimizers by hand, bf16-mixed": (Manual, {"precision": "bf16-mixed"}, 0.1),
    "checkpoints": (lambda: Checkpointing(use_reentrant=False), {}, 1e-5),
    "checkpoints, reentrant": (lambda: Checkpointing(use_reentrant=True), {}, 1e-5),
    "frozen bottom half": (Half, {}, 1e-5),
}


@pytest.mark.parametrize("name", RUNS)
def test_however_a_run_trains_the_sums_are_the_same(ordinary, name):
    make, options, tolerance = RUNS[name]
    same(sums_of_a_run(make(), **options), ordinary, tolerance)


@pytest.mark.parametrize("module", [Constant, Manual])
def test_a_gradient_scaler_changes_nothing(ordinary, module):
    """Half precision rounds; the scale of 65536, squared, would show."""
    same(sums_of_a_run(module(), **PRECISIONS["16-mixed"]()), ordinary, 0.02)


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_sums_have_their_own_precision(precision):
    found = sums_of_a_run(Manual(), precision=precision)
    assert all(s.matrix.dtype == torch.float64 and s.matrix.any() for s in found.values())


def test_a_run_that_needs_no_gradients_records_none():
    counts = []

    class Counting(Constant):
        def training_step(self, batch, index):
            if self is self.trainer.strategy.lightning_module:  # no copy of it
                counts.append(count_hooks(self))
            return super().training_step(batch, index)

    callback = pruning_units(0.5, relevance="weights", verbose=False)
    trainer(callback, max_epochs=2).fit(Counting())
    assert set(counts) == {0}
    counts.clear()
    trainer(MutualInformationPruning(0.5, verbose=False), max_epochs=3).fit(Counting())
    assert min(counts[:4]) > 0
    assert set(counts[4:]) == {0}  # no further cut follows
