"""Rules of operators: what is kept of an output is the output for what is kept of the input."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_mi_prune.discovery.inference import layout_of
from lightning_mi_prune.discovery.tracing.expressions import atoms_of
from lightning_mi_prune.discovery.tracing.recording import record_call
from lightning_mi_prune.discovery.tracing.rules import RULES, follow
from lightning_mi_prune.discovery.tracing.trace import Trace
from lightning_mi_prune.graph.layouts import kept_positions, layout_size

UNITS, KEPT = 6, (0, 2, 3)


class Holder(nn.Module):
    """A parameter of units, and a function of it that takes sizes from the number of units."""

    def __init__(self, value, function):
        super().__init__()
        self.x, self.function = nn.Parameter(value), function

    def forward(self, units):
        return self.function(self.x, units)


def heads(x, n):
    return x.view(n, 2, -1)


# Each gets x (units * 2, 5) and the number of units.
EXACT = {
    "view": lambda x, n: heads(x, n),
    "view and back": lambda x, n: heads(x, n).reshape(n * 2, 5),
    "merge with what follows": lambda x, n: x.reshape(n * 10),
    "transpose": lambda x, n: heads(x, n).transpose(0, 2),
    "permute": lambda x, n: heads(x, n).permute(2, 1, 0),
    "t": lambda x, n: x.t(),
    "swapaxes": lambda x, n: heads(x, n).swapaxes(-1, -2),
    "unsqueeze": lambda x, n: x.unsqueeze(1).unsqueeze(-1),
    "squeeze": lambda x, n: x.unsqueeze(1).squeeze(1).squeeze(),
    "expand": lambda x, n: x[:, None].expand(-1, 3, -1),
    "repeat outside": lambda x, n: x.repeat(3, 1),
    "repeat each": lambda x, n: heads(x, n).repeat_interleave(3, 0),
    "cat": lambda x, n: torch.cat([x, x * 2, torch.ones(4, 5)], 0),
    "chunk across": lambda x, n: heads(x, n).chunk(2, 1)[1],
    "slice across": lambda x, n: heads(x, n)[:, 1:],
    "every second": lambda x, n: x[::2] * x[1::2],
    "narrow across": lambda x, n: x.narrow(1, 1, 3),
    "select across": lambda x, n: heads(x, n)[:, 1],
    "unbind across": lambda x, n: heads(x, n).unbind(1)[0],
    "stack": lambda x, n: torch.stack([x, x.exp()], 1),
    "broadcast": lambda x, n: heads(x, n) * heads(x, n)[:, :1] + torch.ones(5),
    "where": lambda x, n: torch.where(x > 0, x, -x),
    "masked_fill": lambda x, n: x.masked_fill(x < 0, 0.0),
    "clone and cast": lambda x, n: x.clone().double().detach(),
    "activations": lambda x, n: functional.hardswish(functional.mish(functional.softplus(x))),
    "activations in place": lambda x, n: functional.hardswish(x.clone(), inplace=True).abs_(),
    "in place": lambda x, n: x.clone().mul_(2).add_(1).relu_(),
    "copy_": lambda x, n: torch.zeros_like(x).copy_(x),
    "zeros of the size": lambda x, n: torch.zeros(n * 2, 5) + x,
    "pad across": lambda x, n: functional.pad(x, (1, 2)),
    "roll across": lambda x, n: x.roll(2, 1),
    "flip across": lambda x, n: x.flip(1),
    "cumsum across": lambda x, n: x.cumsum(1),
    "softmax across": lambda x, n: x.softmax(1),
    "sort across": lambda x, n: x.sort(1).values,
    "topk across": lambda x, n: x.topk(2, 1).values,
    "index across": lambda x, n: x[:, torch.tensor([0, 3])],
    "gather across": lambda x, n: x.gather(1, torch.zeros(n * 2, 2, dtype=torch.long)),
    "index_select across": lambda x, n: x.index_select(1, torch.tensor([4, 0])),
    "glu across": lambda x, n: functional.glu(x[:, :4], 1),
    "sum across": lambda x, n: x.sum(1),
    "mean across": lambda x, n: heads(x, n).mean((1, 2)),
    "amax across": lambda x, n: x.amax(1, keepdim=True),
    "norm across": lambda x, n: x.norm(dim=1),
    "layer_norm across": lambda x, n: functional.layer_norm(x, (5,)),
    "matmul": lambda x, n: x @ torch.ones(5, 3),
    "bmm": lambda x, n: heads(x, n) @ heads(x, n).mT,
    "linear": lambda x, n: functional.linear(x, torch.ones(3, 5), torch.ones(3)),
    "einsum": lambda x, n: torch.einsum("hij,hkj->hik", heads(x, n), heads(x, n)),
    "attention": lambda x, n: functional.scaled_dot_product_attention(
        *[heads(x, n)[None]] * 3,
    ),
    "grouped attention": lambda x, n: functional.scaled_dot_product_attention(
        heads(x, n).repeat_interleave(2, 0)[None], *[heads(x, n)[None]] * 2, enable_gqa=True
    ),
    "convolution across": lambda x, n: functional.conv1d(x[:, None], torch.ones(3, 1, 2)),
    "depthwise": lambda x, n: functional.conv1d(x[None], x[:, None, :3], groups=n * 2),
    "pool": lambda x, n: functional.avg_pool1d(x[None], 2),
    "upsample": lambda x, n: functional.interpolate(x[None], scale_factor=2.0),
    "batch_norm": lambda x, n: functional.batch_norm(
        x.t(), torch.zeros(n * 2), torch.ones(n * 2), training=False
    ),
    "embedding": lambda x, n: functional.embedding(torch.tensor([1, 2]), x.t()),
    "complex": lambda x, n: torch.view_as_real(torch.complex(x, x.exp()) * torch.polar(x.abs(), x)),
    "real": lambda x, n: torch.view_as_complex(torch.stack([x, x.exp()], -1)).abs(),
}
# Operators that mix the units themselves: they must keep their number.
FIXED = {
    "softmax": lambda x, n: x.softmax(0),
    "sum": lambda x, n: x.sum(0),
    "select": lambda x, n: heads(x, n)[1],
    "index": lambda x, n: x[torch.tensor([0, 3])],
    "flip": lambda x, n: x.flip(0),
    "roll": lambda x, n: x.roll(1, 0),
    "cumsum": lambda x, n: x.cumsum(0),
    "sort": lambda x, n: x.sort(0).values,
    "stride": lambda x, n: x[2::2],
    "pad": lambda x, n: functional.pad(x, (0, 0, 1, 1)),
    "arange": lambda x, n: x + torch.arange(n * 2)[:, None],
    "eye": lambda x, n: torch.eye(n * 2) @ x,
    "triu": lambda x, n: (x @ x.t()).triu(),
    "positions of a convolution": lambda x, n: functional.conv1d(
        x.t()[:, None], torch.ones(1, 1, 3), padding=1
    ),
    "fft": lambda x, n: torch.fft.fft(x, dim=0).real,
    "rows of a table": lambda x, n: functional.embedding(torch.tensor([1, 2]), x),
    "nonzero": lambda x, n: x[x[:, 0] > -9],
    "another order of factors": lambda x, n: x.t().reshape(n * 2, 5),
}


def traced(function):
    torch.manual_seed(0)
    holder = Holder(torch.randn(UNITS * 2, 5), function).eval()
    recording = record_call(holder, lambda holder: holder(UNITS))
    trace = Trace(recording.tensors)
    for operator in recording.operators:
        follow(trace, operator)
    return holder, recording, trace


@pytest.mark.parametrize("name", EXACT)
def test_an_output_keeps_what_its_layout_names(name):
    holder, recording, trace = traced(EXACT[name])
    assert not trace.unknown, trace.unknown
    (rows, _), output = trace.dims(holder.x), recording.output
    free = [atom for atom in atoms_of(rows) if atom.size > 1 and not atom.reasons]
    units = free[0]  # the outermost factor
    names, widths = {id(units): "units"}, {"units": units.size}
    kept = {"units": tuple(range(0, units.size, 2))}
    layout = layout_of(rows, names)
    assert layout_size(layout, widths) == UNITS * 2
    with torch.no_grad():
        index = kept_positions(layout, kept, widths)
        holder.x = nn.Parameter(holder.x[index])
        got = holder(UNITS * len(index) // (UNITS * 2))
        want = output
        for dim, expression in enumerate(trace.dims(output)):
            now = layout_of(expression, names)
            where = torch.tensor(kept_positions(now, kept, widths))
            want = want.index_select(dim, where)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", FIXED)
def test_units_that_are_mixed_keep_their_number(name):
    holder, _, trace = traced(FIXED[name])
    atoms = [atom for atom in atoms_of(trace.dims(holder.x)[0]) if atom.size > 1]
    # At least the outermost factor of the units, which every function here mixes, is fixed.
    assert atoms
    assert atoms[0].reasons


def test_every_rule_has_a_real_operator():
    others = {"grouped_mm_fallback"}  # of transformers
    assert {name for name in RULES if not hasattr(torch.ops.aten, name)} == others
