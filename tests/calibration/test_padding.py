"""Torch's own encoder: samples without padding, and padded tensors where hooks are on."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_mi_prune import MutualInformationPruning
from lightning_mi_prune.allocation.macs import count_macs, measure_macs
from lightning_mi_prune.allocation.measuring import measure_table
from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.calls import RecordedCall, merge_calls, split_call
from lightning_mi_prune.calibration.gradients import GradientRecorder
from lightning_mi_prune.calibration.layers import LayerRecorder
from lightning_mi_prune.core.options import Importance, Reconstruction
from lightning_mi_prune.graph.containers import layer_paths
from lightning_mi_prune.graph.describe import linear_group
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.pruner import prune
from lightning_mi_prune.reconstruction.block_runs import BlockRuns
from tests.conftest import count_hooks
from tests.support import graphs
from tests.support.boring import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:enable_nested_tensor is True:UserWarning",
    "ignore:.*nested tensors is in prototype:UserWarning",
)

WIDTH, LONG, SHORT = 16, 10, 7


class Net(nn.Module):
    """Embeddings, torch's encoder, and a head on the first position."""

    def __init__(self, *, layers=2, positions_first=False, inside=False, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, WIDTH)
        self.positions_first, self.inside = positions_first, inside
        first = not (positions_first or inside)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=first, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(WIDTH, 3)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, 0, 0.3)

    def forward(self, x, padding=None):
        x = self.embed(x)
        x = x.transpose(0, 1) if self.inside else x
        x = self.encoder(x, src_key_padding_mask=padding)
        return self.head(x[0] if self.inside or self.positions_first else x[:, 0])


def groups_of(net):
    """The neurons of torch's own encoder, or the groups of a Hugging Face model."""
    if not isinstance(net, Net):
        return graphs.groups_of(net)
    found = []
    for i, layer in enumerate(net.encoder.layers):
        path = f"encoder.layers.{i}"
        ends = {"producers": [f"{path}.linear1"], "consumers": [f"{path}.linear2"]}
        group = linear_group(net, f"ffn{i}", kind="ffn", level=i, **ends)
        stream = f"{path}.norm2" if layer.norm_first else f"{path}.linear1"
        found.append(replace(group, residual=stream))
    return found


def neurons(net):
    """A graph of those groups."""
    return PruningGraph.of(groups_of(net))


def batches(net, *, padded, masked=True, rows=24, count=3, filler=0):
    """The same texts with and without padding, which holds tokens shifted by ``filler``."""
    found = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 50, (rows, LONG), generator=generator)
        ids[:, SHORT:] = (ids[:, SHORT:] + filler) % 50
        padding = (torch.arange(LONG) >= SHORT).expand(rows, LONG)
        if not padded:
            ids, padding = ids[:, :SHORT], padding[:, :SHORT]
        ids = ids.mT.contiguous() if net.positions_first else ids
        found.append((ids, padding.clone()) if masked else (ids,))
    return found


VARIANTS = {
    "nested": {},
    "four layers": {"layers": 4},
    "norm first": {"norm_first": True},
    "no bias": {"bias": False},
    "odd heads": {"activation": nn.Tanh()},
    "positions first inside": {"inside": True},
    "positions first": {"positions_first": True},
    "positions first inside, norm first": {"inside": True, "norm_first": True, "bias": False},
}


@torch.no_grad()
def stream(net, data):
    """What comes out of the encoder at real positions, of all batches."""
    found = []
    net.encoder.register_forward_hook(lambda _, args, output: found.append(output))
    for batch in data:
        net(*batch)
    swapped = net.inside or net.positions_first
    outputs = [output.transpose(0, 1) if swapped else output for output in found]
    masked = len(data[0]) > 1
    return torch.cat([output[:, :SHORT] if masked else output for output in outputs])


def loss(net, batch):
    return net(*batch).square().mean()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "bare"])
def test_it_is_pruned_and_reconstructed_in_one_call(options, masked):
    net = Net(**options)
    data, whole = batches(net, padded=True, masked=masked), copy.deepcopy(net)
    done = prune(net, data, 0.5, loss=loss, graph=neurons(net))
    assert done.sparsity == pytest.approx(0.5, abs=0.05)
    assert not count_hooks(net)
    prune(
        compensated := copy.deepcopy(whole),
        data,
        0.5,
        loss=loss,
        reconstruction=Reconstruction("compensation"),
    )
    want, got, worse = (stream(m.eval(), data) for m in (whole, net, compensated))
    assert (got - want).square().mean() < (worse - want).square().mean()


@pytest.mark.parametrize("masked", [True, False], ids=["padded", "bare"])
def test_the_order_of_examples_and_positions_does_not_matter(masked):
    """Examples or positions, in the encoder or in the inputs too: the same units and weights."""
    found = []
    for options in ({}, {"inside": True}, {"positions_first": True}):
        net = Net(**options)
        data = batches(net, padded=True, masked=masked)
        done = prune(
            net,
            data,
            0.5,
            loss=loss,
            graph=neurons(net),
            importance=Importance(relevance="weights"),
        )
        found.append((done.plan.kept, dict(net.named_parameters())))
    for kept, weights in found[1:]:
        assert kept == found[0][0]
        for name, value in found[0][1].items():
            assert torch.allclose(weights[name], value, atol=1e-4), name


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_padding_is_not_among_the_samples(options):
    """Sums, chosen units and solved weights are those of the same texts without padding."""
    found = []
    for padded, filler in ((True, 13), (False, 0)):
        net = Net(**options)
        data = batches(net, padded=padded, filler=filler)
        groups = groups_of(net)
        with ActivationRecorder(net.eval(), groups) as recorder, torch.no_grad():
            for batch in data:
                net(*batch)
        plain = {"importance": Importance(relevance="weights")}
        done = prune(net, data, 0.5, loss=loss, graph=neurons(net), **plain)
        found.append((recorder.moments, done.plan.kept, dict(net.named_parameters())))
    (moments, kept, weights), (bare, expected, wanted) = found
    for name, sums in bare.items():
        assert int(moments[name].count) == int(sums.count) == 3 * 24 * SHORT
        assert torch.allclose(moments[name].packed(), sums.packed(), rtol=1e-4, atol=1e-3)
    assert kept == expected
    for name, value in wanted.items():
        assert torch.allclose(weights[name], value, atol=1e-3), name


def test_outputs_are_the_same_with_hooks_and_without():
    """Zeros at the padding included: a mean over all positions must not change."""
    net = Net().eval()
    flags = {k: v for m in net.modules() for k, v in vars(m).items() if "nested" in k}
    (ids, padding) = batches(net, padded=True)[0]
    with torch.no_grad():
        x = net.embed(ids)
        want = net.encoder(x, src_key_padding_mask=padding)
        assert (want[:, SHORT:] == 0).all()
        with (
            ActivationRecorder(net, groups_of(net)),
            LayerRecorder(net, layer_paths(net, "encoder.layers")),
        ):
            got = net.encoder(x, src_key_padding_mask=padding)
    assert torch.allclose(got, want, atol=1e-5)
    assert (got[:, SHORT:] == 0).all()
    assert flags == {k: v for m in net.modules() for k, v in vars(m).items() if "nested" in k}
    assert torch.backends.mha.get_fastpath_enabled()


def test_nested_tensors_of_the_user():
    net = Net().eval()
    texts = [torch.randn(n, WIDTH) for n in (3, 5, 2)]
    given = torch.nested.nested_tensor(texts)
    with torch.no_grad():
        want = net.encoder(given)
        with ActivationRecorder(net, groups_of(net), calls=100) as recorder:
            got = net.encoder(given)
        assert got.is_nested
        for one, other in zip(got.unbind(), want.unbind(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert int(recorder.moments["ffn0"].count) == 10
    assert not recorder.stored


def test_frozen_layers_get_nested_tensors_with_gradients_on():
    net = Net().eval()
    net.encoder.requires_grad_(False)
    net.embed.requires_grad_(False)
    with GradientRecorder(net, groups_of(net)) as recorder, recorder.step(0):
        loss(net, batches(net, padded=True)[0]).backward()
    for sums in recorder.sums.values():
        assert sums.matrix.isfinite().all()
        assert sums.counts[1] == 1
    assert recorder.sums["ffn0"].matrix.abs().sum() > 0


def test_first_order_changes_are_summed_by_example_whatever_comes_first():
    sums = []
    for options in ({}, {"inside": True}, {"positions_first": True}):
        net = Net(dropout=0.0, **options).train()
        with GradientRecorder(net, groups_of(net), taylor=True) as recorder, recorder.step(0):
            loss(net, batches(net, padded=True)[0]).backward()
        sums.append(recorder.sums["ffn1"].taylor)
        assert recorder.sums["ffn1"].counts[0] == 24
    assert torch.allclose(sums[0], sums[1], rtol=1e-3)
    assert torch.allclose(sums[0], sums[2], rtol=1e-3)


@pytest.mark.parametrize("first", [True, False])
def test_masks_that_are_added_to_scores(first):
    net = Net(inside=not first).eval()
    ids, padding = batches(net, padded=True)[0]
    added = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    with ActivationRecorder(net, groups_of(net)) as recorder, torch.no_grad():
        net(ids, added)
    assert int(recorder.moments["ffn0"].count) == 24 * SHORT


@pytest.mark.parametrize("first", [True, False])
def test_decoders_leave_out_the_padding_of_their_own_positions(first):
    torch.manual_seed(0)
    net = nn.Transformer(WIDTH, 4, 1, 1, 32, batch_first=first).eval()
    groups = [
        linear_group(net, side, kind="ffn", producers=[f"{p}.linear1"], consumers=[f"{p}.linear2"])
        for side, p in (("source", "encoder.layers.0"), ("target", "decoder.layers.0"))
    ]
    source, target = torch.randn(3, 5, WIDTH), torch.randn(3, 5, WIDTH)
    lay = (lambda x: x) if first else (lambda x: x.transpose(0, 1))
    pads = {"src_key_padding_mask": torch.arange(5).expand(3, 5) >= 4}
    for given, expected in (({}, 15), ({"tgt_key_padding_mask": pads["src_key_padding_mask"]}, 12)):
        with ActivationRecorder(net, groups) as recorder, torch.no_grad():
            net(lay(source), lay(target), **pads, **given)
        assert int(recorder.moments["source"].count) == 12
        assert int(recorder.moments["target"].count) == expected


class Block(nn.Module):
    """A hand-written layer around torch's attention."""

    def __init__(self, first):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=first)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, x, ignored):
        x = x + self.attention(x, x, x, key_padding_mask=ignored)[0]
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("rows", [3, 6])
def test_hand_written_layers_around_torchs_attention(first, rows):
    net = Block(first).eval()
    group = linear_group(net, "ffn", kind="ffn", producers=["up"], consumers=["down"])
    x, ignored = torch.randn(rows, 6, WIDTH), torch.arange(6).expand(rows, 6) >= 4
    with ActivationRecorder(net, [group]) as recorder, torch.no_grad():
        net(x if first else x.transpose(0, 1), ignored)
        net(x if first else x.transpose(0, 1), None)  # the mask of the last call does not count
    assert int(recorder.moments["ffn"].count) == rows * (4 + 6)


@pytest.mark.parametrize("options", [{}, {"inside": True}, {"positions_first": True}])
def test_layers_of_a_stack_are_compared_without_padding(options):
    found = []
    for padded in (True, False):
        net = Net(layers=3, **options).eval()
        blocks = layer_paths(net, "encoder.layers")
        with LayerRecorder(net, blocks, positions=1000, calls=100) as recorder, torch.no_grad():
            net(*batches(net, padded=padded)[0])
        assert recorder.angles.count == 24 * SHORT
        found.append((recorder.alignment.compute(), recorder.angles.compute()))
        (call,) = recorder.stored[""]
        assert call.mask.shape[0] == call.rows
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"inside": True}, {"positions_first": True}])
def test_stored_calls_bring_their_mask_and_can_be_joined(options):
    net = Net(**options).eval()
    long, short = batches(net, padded=True)[0], batches(net, padded=False, rows=9)[0]
    with ActivationRecorder(net, groups_of(net), calls=2000) as recorder, torch.no_grad():
        net(*long)
        net(*short)
    stored = recorder.stored[""]
    assert [call.rows for call in stored] == [24, 9]
    assert all(torch.equal(call.mask.bool(), ~call.args[1]) for call in stored)
    whole = merge_calls(stored, 10_000)
    assert whole.rows == 33
    assert int(whole.mask.sum()) == 33 * SHORT
    assert torch.equal(whole.mask.bool(), ~whole.args[1])
    with torch.no_grad():
        want = torch.cat([net(*call.args) for call in stored])
        assert torch.allclose(net(*whole.args).sum(0), want.sum(0), atol=1e-4)
        parts = [net(*piece.args) for piece in split_call(whole)]
        assert torch.allclose(torch.cat(parts).sum(0), want.sum(0), atol=1e-4)
    first = recorder.calls(groups_of(net))[""]
    assert first.rows == 1
    assert first.args[0].numel() == LONG


def test_masks_that_are_added_are_joined_as_such():
    def call(rows, length):
        padding = torch.zeros(rows, length)
        padding[0, length - 1] = -torch.inf
        return RecordedCall((torch.ones(rows, length).long(), padding), {}, padding == 0)

    whole = merge_calls([call(2, 3), call(4, 5)], 1000)
    assert torch.equal(whole.args[1] == 0, whole.mask.bool())


def test_calls_without_a_mask_are_not_padded():
    """The network would take what is filled in for text."""
    calls = [
        RecordedCall((torch.ones(rows, n).long(),), {}, torch.arange(n).expand(rows, n) < 3)
        for rows, n in ((4, 5), (2, 4))
    ]
    assert merge_calls(calls, 1000).rows == 4


@pytest.mark.parametrize("options", [{}, {"inside": True}, {"positions_first": True}])
def test_layers_of_several_calls_are_visited_without_their_padding(options):
    net, seen = Net(**options).eval(), []

    class Spot:
        layer, residual = "encoder.layers.1.linear2", "encoder.layers.1"

    def visit(number, spot, part):
        seen.append(len(part.valid(part.x)))
        assert len(part.valid(part.stream)) == len(part.valid(part.output)) == seen[-1]

    data = [batches(net, padded=True, rows=4)[0], batches(net, padded=True, rows=LONG)[0]]
    runs = BlockRuns(net, [Spot], "", [RecordedCall(batch, {}) for batch in data])
    runs.visit([Spot], visit)
    assert seen == [4 * SHORT, LONG * SHORT]


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_work_is_counted_at_all_positions_and_timed_on_the_fast_path():
    net = Net().eval()
    ids, padding = batches(net, padded=True)[0]
    one, groups = RecordedCall((ids[:1], padding[:1]), {}), groups_of(net)
    weights = sum(p.numel() for p in net.encoder.parameters() if p.ndim > 1)
    expected = LONG * weights + 2 * 2 * LONG**2 * WIDTH + net.head.weight.numel()
    assert count_macs(net, one) == expected
    assert measure_macs(net, groups, {"": one}).total({}) == expected
    seen = Operators()

    def clock(calls):
        with seen:
            for call in calls.values():
                call()
        return dict.fromkeys(calls, 1.0)

    measure_table(copy.deepcopy(net), groups, {"": one}, clock=clock)
    assert any("transformer_encoder_layer_fwd" in name for name in seen.names)


def test_a_budget_of_macs_is_met():
    net = Net()
    data = batches(net, padded=True)
    one = RecordedCall(tuple(x[:1] for x in data[0]), {})
    goal = int(0.8 * count_macs(net, one))
    prune(net, data, target_macs=goal, loss=loss, graph=neurons(net))
    assert 0.95 * goal < count_macs(net, one) <= goal


def test_hooks_are_removed_after_an_error():
    net = Net().eval()
    with pytest.raises(RuntimeError, match="stop"), ActivationRecorder(net, groups_of(net)):
        raise RuntimeError("stop")
    assert not count_hooks(net)


class Trained(pl.LightningModule):
    """A module that knows nothing of pruning, validated in inference mode."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def training_step(self, batch, index):
        return loss(self.net, batch)

    def validation_step(self, batch, index):
        self.log("val_loss", loss(self.net, batch))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)

    def train_dataloader(self):
        return DataLoader(batches(self.net, padded=True), batch_size=None)

    val_dataloader = train_dataloader


@pytest.mark.parametrize(
    "options", [{}, {"positions_first": True}], ids=["nested", "positions first"]
)
def test_it_is_pruned_while_it_trains(options):
    module = Trained(Net(**options))
    callback = MutualInformationPruning(0.5, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="MACs")
        trainer(callback).fit(module)
    assert module.net.encoder.layers[0].linear1.out_features < 32
    assert callback.report.cuts[-1].macs < callback.report.macs
    assert not count_hooks(module)
