"""Running statistics of BatchNorm after a cut without training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_mi_prune import PruningGraph, PruningPlan, linear_group, prune
from lightning_mi_prune.core.errors import PruningError, PruningWarning
from lightning_mi_prune.graph.groups import LayerStack
from lightning_mi_prune.surgery.batch_norm import reestimate_batch_norm
from lightning_mi_prune.surgery.layers import remove_layers


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        return self.norm(x + self.down(self.up(x).relu()))


class Net(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.drop, self.unused = nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(8, track_running_stats=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(self.blocks(x)))


ROWS = [torch.randn(200, 8, generator=torch.Generator().manual_seed(i)) * 3 + 1 for i in range(4)]


def trained():
    torch.manual_seed(0)
    net = Net().train()
    for _ in range(20):
        for rows in ROWS:
            net(rows)
    net.blocks[1].norm.momentum = None
    net.blocks[1].eval()
    return net


def statistics(net):
    return {n: b.clone() for n, b in net.named_buffers() if "running" in n}


def test_the_statistics_are_the_means_over_the_batches_and_nothing_else_moves():
    net = trained()
    parameters = {n: p.clone() for n, p in net.named_parameters()}
    modes = {n: m.training for n, m in net.named_modules()}
    state = torch.get_rng_state()
    reestimate_batch_norm(net, ROWS, lambda net, x: net(x))
    x = [nn.functional.relu(net.blocks[0].up(rows)) for rows in ROWS]
    inputs = [rows + net.blocks[0].down(h) for rows, h in zip(ROWS, x, strict=True)]
    mean = torch.stack([rows.mean(0) for rows in inputs]).mean(0)
    variance = torch.stack([rows.var(0) for rows in inputs]).mean(0)
    assert torch.allclose(net.blocks[0].norm.running_mean, mean, atol=1e-5)
    assert torch.allclose(net.blocks[0].norm.running_var, variance, atol=1e-4)
    assert torch.equal(net.unused.running_var, torch.ones(3))
    assert [b.norm.momentum for b in net.blocks] == [0.1, None, 0.1]
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert all(torch.equal(p, parameters[n]) for n, p in net.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_leaves_them_as_they_were():
    net = trained()
    before = statistics(net)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        reestimate_batch_norm(net, [*ROWS, torch.ones(4, 7)], lambda net, x: net(x))
    assert all(torch.equal(value, before[name]) for name, value in statistics(net).items())
    assert [b.norm.momentum for b in net.blocks] == [0.1, None, 0.1]


def test_without_statistics_no_batch_is_run():
    calls = []
    reestimate_batch_norm(nn.Linear(2, 2), ROWS, lambda *_: calls.append(1))
    assert not calls


def test_a_last_batch_of_one_row_is_left_out():
    """As a loader gives it where the rows do not divide; it has no variance."""
    several, one = trained(), trained()
    reestimate_batch_norm(several, ROWS, lambda net, x: net(x))
    reestimate_batch_norm(one, [*ROWS, ROWS[0][:1]], lambda net, x: net(x))
    assert all(torch.equal(a, b) for a, b in zip(several.buffers(), one.buffers(), strict=True))
    before = statistics(one)
    with pytest.warns(PruningWarning, match="stay as they were before the cut"):
        reestimate_batch_norm(one, [ROWS[0][:1]], lambda net, x: net(x))
    assert all(torch.equal(value, before[name]) for name, value in statistics(one).items())
    with pytest.raises(ValueError, match="of the user"):
        reestimate_batch_norm(one, ROWS, raising(ValueError("of the user")))


def raising(error):
    def forward(net, batch):
        raise error

    return forward


def test_a_synchronised_norm_without_other_ranks_is_one_of_them():
    net, plain = nn.Sequential(nn.SyncBatchNorm(8)), nn.Sequential(nn.BatchNorm1d(8))
    for made in (net, plain):
        reestimate_batch_norm(made, ROWS, lambda net, x: net(x))
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), plain.buffers(), strict=True))
    assert int(net[0].num_batches_tracked) == len(ROWS)


def gap(net):
    """How far outputs by running statistics are from those by the statistics of the data."""
    by_batch = copy.deepcopy(net).eval()
    for part in by_batch.modules():
        if isinstance(part, nn.BatchNorm1d):
            part.train()
    rows = torch.cat(ROWS)
    with torch.no_grad():
        return float((net.eval()(rows) - by_batch(rows)).abs().mean())


def test_layers_that_go_without_training_take_their_statistics_along():
    plan, groups = PruningPlan({"blocks": 3}, {"blocks": (0, 2)}), [LayerStack("blocks", 3)]
    stale, fresh = trained(), trained()
    with pytest.warns(PruningWarning, match="BatchNorm statistics of this Net are those of the"):
        remove_layers(stale, groups, plan)
    remove_layers(fresh, groups, plan, batches=ROWS)
    assert gap(fresh) < 0.5 * gap(stale)


def test_layers_come_back_where_the_statistics_cannot_be_had():
    plan, groups = PruningPlan({"blocks": 3}, {"blocks": (0, 2)}), [LayerStack("blocks", 3)]
    net = trained()
    blocks, before = list(net.blocks), {n: b.clone() for n, b in net.named_buffers()}
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        remove_layers(net, groups, plan, batches=[torch.ones(4, 7)])
    with pytest.raises(PruningError, match="batches is empty"):
        remove_layers(net, groups, plan, batches=iter(()))
    assert list(net.blocks) == blocks
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())


def test_a_loader_that_shuffles_leaves_the_random_state_alone():
    plan, groups = PruningPlan({"blocks": 3}, {"blocks": (0, 2)}), [LayerStack("blocks", 3)]
    net, state = trained(), torch.get_rng_state()
    loader = DataLoader(torch.cat(ROWS), batch_size=100, shuffle=True)
    gone = remove_layers(net, groups, plan, batches=loader)
    assert len(gone) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert int(net.blocks[0].norm.num_batches_tracked) == 8


def test_units_that_go_in_one_call_too():
    ends = [([f"blocks.{i}.up"], [f"blocks.{i}.down"]) for i in range(3)]
    graph = PruningGraph.of(
        linear_group(Net(), f"blocks.{i}.ffn", kind="ffn", producers=one, consumers=two)
        for i, (one, two) in enumerate(ends)
    )
    loss = lambda net, x: net(x).square().mean()  # noqa: E731
    found = []
    for batch_norm in (False, True):
        net = trained()
        before = statistics(net)
        prune(net, ROWS, 0.7, loss=loss, batch_norm=batch_norm, graph=graph)
        same = all(torch.equal(v, before[n]) for n, v in statistics(net).items())
        assert same != batch_norm
        found.append(gap(net))
    assert found[1] < 0.5 * found[0]
