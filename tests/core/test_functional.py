"""Products with parameters are intercepted, however they are written, and nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_mi_prune.core.functional import (
    intercept_gradients,
    intercept_inputs,
    intercept_products,
)

OFFSETS = torch.tensor([2, 2, 6], dtype=torch.int32)
CHOSEN = torch.tensor([0, 0, 2, 2, 2, 2])


class Uses(nn.Module):
    """Multiplies its input, of six rows, with ``w`` in one of many ways."""

    def __init__(self, shape, use, dtype=torch.float32):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape, dtype=dtype))
        self.inner = nn.Linear(8, 8)
        self.use = use

    def forward(self, x):
        return self.use(self.inner(x), self.w)


def each_expert(x, w):
    parts = [x[0:2], x[2:6]]
    return torch.cat([functional.linear(parts[0], w[0]), functional.linear(parts[1], w[2])])


def grouped(x, w):
    return torch.ops.transformers.grouped_mm_fallback(x, w.transpose(-2, -1), offs=OFFSETS)


# Shape of the weight, the use of it, and the entries last or not.
USES = {
    "linear": ((4, 8), functional.linear),
    "linear by name": ((4, 8), lambda x, w: functional.linear(input=x, weight=w)),
    "of another type": ((4, 8), lambda x, w: functional.linear(x.double(), w.double())),
    "matmul": ((8, 4), lambda x, w: x @ w),
    "transposed": ((4, 8), lambda x, w: x @ w.T),
    "mm": ((8, 4), torch.mm),
    "addmm": ((8, 4), lambda x, w: torch.addmm(x.new_zeros(4), x, w)),
    "from the left": ((4, 8), lambda x, w: (w @ x.mT).mT),
    "in a batch": ((4, 8), lambda x, w: (x[None] @ w.mT)[0]),
    "each expert": ((3, 4, 8), each_expert),
    "each expert, transposed": ((3, 8, 4), lambda x, w: each_expert(x, w.mT)),
    "einsum": ((8, 4), lambda x, w: torch.einsum("bd,dm->bm", x, w)),
    "einsum from the left": ((4, 8), lambda x, w: torch.einsum("m...d,b...d->b...m", w, x)),
    "gathered": ((3, 4, 8), lambda x, w: torch.bmm(w[CHOSEN], x[:, :, None])[..., 0]),
    "gathered, transposed": ((3, 8, 4), lambda x, w: torch.bmm(x[:, None], w[CHOSEN])[:, 0]),
    "grouped": ((3, 4, 8), grouped),
}
MODES = {
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(autouse=True)
def operators():
    pytest.importorskip("transformers.integrations.moe")
    torch.manual_seed(0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", USES)
def test_the_input_of_every_way_to_multiply_is_seen_once_a_call(name, mode):
    if (name, mode) == ("grouped", "autocast"):
        pytest.skip("the operator takes no mixed types")
    net, x, seen = Uses(*USES[name]), torch.randn(6, 8), []
    with MODES[mode]():
        want = net(x)
        handles = [*intercept_inputs(net, {"w": [seen.append]})]
        assert torch.equal(net(x), want)
        for handle in handles:
            handle.remove()
        net(x)
        (rows,) = seen
        torch.testing.assert_close(
            rows.reshape(6, 8).float(), net.inner(x).float(), rtol=1e-6, atol=1e-6
        )
    assert not torch.overrides._get_current_function_mode_stack()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", USES)
def test_gradients_at_the_input_are_those_of_autograd(name, again):
    net, x = Uses(*USES[name]), torch.randn(6, 8)
    found = []
    hooks = {"w": [lambda values, grad: found.append((values, grad))]}
    handles = [*intercept_gradients(net, hooks, torch.is_grad_enabled)]

    def outputs():
        return checkpoint(net, x, use_reentrant=False) if again else net(x)

    hidden = []
    keep = net.inner.register_forward_hook(lambda m, a, y: hidden.append(y.retain_grad() or y))
    outputs().square().sum().backward()
    keep.remove()
    want = [y.grad for y in hidden if y.grad is not None][-1]
    rows = torch.cat([grad.reshape(-1, 8) for _, grad in found]).float()
    order = rows.sum(1).argsort(), want.sum(1).argsort()  # gradients of later products come first
    torch.testing.assert_close(rows[order[0]], want[order[1]], rtol=1e-5, atol=1e-6)
    weights = net.w.grad.clone()
    for handle in handles:
        handle.remove()
    net.zero_grad()
    outputs().square().sum().backward()
    assert torch.equal(net.w.grad, weights)
    assert not torch.overrides._get_current_function_mode_stack()


def test_only_the_gradient_through_the_product_counts():
    net = Uses((8, 8), lambda x, w: x @ w + 3 * x)
    found = []
    list(intercept_gradients(net, {"w": [lambda _, grad: found.append(grad)]}, lambda: True))
    net(torch.randn(6, 8)).sum().backward()
    torch.testing.assert_close(found[0], net.w.detach().sum(1).expand(6, 8))


def test_gradients_are_found_where_all_below_is_frozen():
    net = Uses((8, 4), torch.mm)
    net.inner.requires_grad_(False)
    found = []
    list(intercept_gradients(net, {"w": [lambda _, grad: found.append(grad)]}, lambda: True))
    net(torch.randn(6, 8)).sum().backward()
    torch.testing.assert_close(found[0], net.w.detach().sum(1).expand(6, 8))


OTHERS = {
    "another matrix": lambda x, w: x @ torch.ones(8, 4),
    "a changed weight": lambda x, w: x @ (2 * w),
    "entry by entry": lambda x, w: (x[:, :, None] * w).sum(1),
    "with itself": lambda x, w: w.mT @ w,
}


@pytest.mark.parametrize("name", OTHERS)
def test_nothing_else_is_taken_for_a_product_of_an_input(name):
    net, seen = Uses((8, 4), OTHERS[name]), []
    list(intercept_products(net, ["w"], lambda *given: seen.append(given)))
    net(torch.randn(6, 8))
    assert seen == []


def fails(x, w):
    if x.isnan().any():
        raise ValueError("no number")
    return x @ w


def test_a_call_that_fails_leaves_no_mode_behind():
    net, seen = Uses((8, 4), fails), []
    list(intercept_inputs(net, {"w": [seen.append]}))
    with pytest.raises(ValueError, match="no number"):
        net(torch.full((6, 8), torch.nan))
    assert not torch.overrides._get_current_function_mode_stack()
    assert seen == []
    net(torch.zeros(6, 8))
    assert len(seen) == 1


class Tied(nn.Module):
    """Uses the weight of a child that it does not call."""

    def __init__(self):
        super().__init__()
        self.child = nn.Linear(8, 4)

    def forward(self, x):
        return functional.linear(x, self.child.weight) + functional.linear(2 * x, self.child.weight)


def test_weights_of_children_are_seen_and_all_products_of_a_call_are_one_input():
    net, seen = nn.Sequential(Tied()), []
    list(intercept_inputs(net, {"0.child.weight": [seen.append]}))
    x = torch.randn(6, 8)
    net(x)
    (rows,) = seen
    assert torch.equal(rows, torch.cat([x, 2 * x]))
