"""Networks run again and again: what is skipped changes nothing, and what is final does not run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration import calls as joining
from lightning_mi_prune.calibration.calls import RecordedCall, split_call
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.reconstruction.block_runs import BlockRuns
from tests.conftest import count_hooks
from tests.support.models import batch, build, inputs_of

LAYERS = ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense")


@dataclass(frozen=True)
class Layer:
    layer: str
    residual: str | None = None


def call_of(rows, length=8, seed=0):
    inputs = batch(rows, length, seed=seed)
    return RecordedCall((), inputs, inputs["attention_mask"])


def visited(runs, layers, **options):
    """What each visit got: number of the call, layer, and the part."""
    found = []
    runs.visit(
        layers, lambda number, layer, part: found.append((number, layer.layer, part)), **options
    )
    return found


def test_each_layer_gets_all_calls_and_new_weights_count_above():
    """Calls of different lengths; a layer of zeros changes the input of the next one."""
    model, calls = build(), [call_of(3, 6), call_of(2, 9, seed=1), call_of(1, 4, seed=2)]
    low, high = (Layer(name) for name in LAYERS)
    runs = BlockRuns(model, [high, low], "", calls)
    assert [[layer.layer for layer in wave] for wave in runs.waves] == [[name] for name in LAYERS]
    before = visited(BlockRuns(model, [high], "", calls), [high])
    first = visited(runs, [low])
    assert [number for number, *_ in first] == [0, 1, 2]
    assert [part.call for *_, part in first] == calls
    assert [tuple(part.x.shape[:2]) for *_, part in first] == [(3, 6), (2, 9), (1, 4)]
    with torch.no_grad():
        model.get_submodule(low.layer).weight.zero_()
    after = visited(runs, [high])
    whole = visited(BlockRuns(model, [high], "", calls), [high])
    for (*_, part), (*_, wanted), (*_, old) in zip(after, whole, before, strict=True):
        assert torch.equal(part.x, wanted.x)
        assert not torch.allclose(part.x, old.x)


FAMILIES = [("bert", "sequence"), ("deberta-v2", "sequence"), ("mpnet", "sequence")]


@pytest.mark.parametrize(("family", "head"), [*FAMILIES, ("vit", "image")])
def test_skipped_blocks_change_nothing(family, head):
    """Every linear layer gets bit for bit what it gets in one run of the whole network."""
    model = build(family, head)
    call = RecordedCall((), inputs_of(head), inputs_of(head).get("attention_mask"))
    names = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    layers = [Layer(name) for name in names]
    whole = BlockRuns(model, layers, "", [call])
    layers = [layer for layer in layers if whole.runs_once(layer.layer)]  # DeBERTa has others
    plain = {layer: part for _, layer, part in visited(whole, layers)}
    runs, ran = BlockRuns(model, layers, "", [call]), []
    handles = [
        model.get_submodule(name).register_forward_hook(lambda *_, n=name: ran.append(n))
        for name in runs.blocks
    ]
    for wave in runs.waves:
        for _, layer, part in visited(runs, wave):
            assert torch.equal(part.x, plain[layer].x)
            assert torch.equal(part.output, plain[layer].output)
    for handle in handles:
        handle.remove()
    assert len(runs.blocks) >= 2


def test_a_run_costs_one_block_whatever_their_number():
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(12)))
    ran = []
    for block in blocks:
        block[0].register_forward_hook(lambda *_: ran.append(1))
    layers = [Layer(f"{number}.0") for number in range(12)]
    runs = BlockRuns(blocks, layers, "", [RecordedCall((torch.ones(4, 3),), {})])
    ran.clear()
    for wave in runs.waves:
        visited(runs, wave)
    assert len(ran) == 12 + 11  # one visit each, and once to the end of each but the last


def test_what_lies_below_a_layer_runs_twice_at_most():
    """Once before it is solved and once after, whatever follows in its block."""
    model, ran = build(), Counter()
    names = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    names = [name for name in names if ".layer." in name]
    layers = [Layer(name) for name in names]
    runs = BlockRuns(model, layers, "", [call_of(4)])
    for name in names:
        part = model.get_submodule(name)
        part.forward = partial(_counted, part.forward, ran, f"{name} works")
    for wave in runs.waves:
        visited(runs, wave)
    assert {ran[f"{name} works"] for name in names[:-1]} == {2}
    assert ran[f"{names[-1]} works"] == 1


def _counted(forward, ran, name, *args, **kwargs):
    ran.update([name])
    return forward(*args, **kwargs)


def test_a_stream_inside_a_final_module_is_found():
    """The attention is final, but a layer above reads the stream where its query starts."""
    model, call = build(), call_of(4)
    stem = "bert.encoder.layer.1"
    low = Layer(f"{stem}.attention.output.dense", f"{stem}.attention.self.query")
    high = Layer(f"{stem}.output.dense", f"{stem}.attention.self.query")
    plain = {
        n: part for _, n, part in visited(BlockRuns(model, [low, high], "", [call]), [low, high])
    }
    runs = BlockRuns(model, [low, high], "", [call])
    for layer in (low, high):
        ((_, name, part),) = visited(runs, [layer])
        assert torch.equal(part.x, plain[name].x)
        assert torch.equal(part.stream, plain[name].stream)


class Skips(nn.Module):
    """Adds what its first block gave to the input of its last one."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        first = x = self.blocks[0](x)
        for block in [*self.blocks][1:3]:
            x = block(x).tanh()
        return self.blocks[3](x + first)


class Writes(nn.Module):
    """Writes into what its blocks return."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x += 1
        return x


@pytest.mark.parametrize("kind", [Skips, Writes])
def test_networks_that_are_no_chain_get_the_same(kind):
    torch.manual_seed(0)
    net, call = kind(), RecordedCall((torch.randn(5, 3),), {})
    layers = [Layer(f"blocks.{number}") for number in range(4)]
    plain = [part.x for *_, part in visited(BlockRuns(net, layers, "", [call]), layers)]
    runs, found = BlockRuns(net, layers, "", [call]), []
    for wave in runs.waves:
        found += [part.x for *_, part in visited(runs, wave)]
    assert len(found) == len(plain) == 4
    assert all(map(torch.equal, found, plain))
    held = {key for progress in runs._pass.calls for key in progress.outputs}
    assert (held == {"blocks."}) == (kind is Writes)  # of a chain only the last outputs


def test_layers_with_one_input_are_visited_together():
    model = build()
    stem = "bert.encoder.layer.0.attention.self"
    layers = [Layer(f"{stem}.{name}") for name in ("query", "key", "value")]
    (wave,) = BlockRuns(model, layers, "", [call_of(2)]).waves
    assert {layer.layer for layer in wave} == {layer.layer for layer in layers}


def test_a_run_leaves_no_hooks_and_the_mode_as_it_was():
    model = build().train()
    hooks, ran = count_hooks(model), []
    runs = BlockRuns(model, [Layer(LAYERS[1])], "", [call_of(2), call_of(3)])
    model.classifier.register_forward_hook(lambda *_: ran.append(1))

    def visit(number, layer, part):
        assert not torch.is_grad_enabled()
        assert not model.training

    runs.visit([Layer(LAYERS[1])], visit)
    assert not ran  # nothing above the layer is needed
    assert model.training
    assert torch.is_grad_enabled()
    assert count_hooks(model) == hooks + 1
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_error_at_a_layer_leaves_nothing_behind():
    model = build().train()
    hooks = count_hooks(model)
    runs = BlockRuns(model, [Layer(name) for name in LAYERS], "", [call_of(2), call_of(3)])

    def visit(number, layer, part):
        raise PruningError("enough")

    with pytest.raises(PruningError, match="enough"):
        runs.visit([Layer(LAYERS[1])], visit)
    assert model.training
    assert torch.is_grad_enabled()
    assert count_hooks(model) == hooks
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_an_error_inside_a_call_is_that_of_the_network():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            x = self.first(x)
            if len(x) == 5:
                raise ValueError("five")
            return self.second(x)

    calls = [RecordedCall((torch.ones(rows, 2),), {}) for rows in (2, 5, 4)]
    layers = [Layer("first"), Layer("second")]
    runs = BlockRuns(Picky(), layers, "", calls)
    with pytest.raises(ValueError, match="five"):
        runs.visit(layers, lambda *_: None)


def test_a_layer_that_some_calls_skip_gets_the_others():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.second(self.first(x) if len(x) > 2 else x)

    calls = [RecordedCall((torch.ones(rows, 2),), {}) for rows in (3, 2, 4)]
    layers = [Layer("first"), Layer("second")]
    runs = BlockRuns(Skipping(), layers, "", calls)
    assert [number for number, *_ in visited(runs, layers[:1])] == [0, 2]
    assert [number for number, *_ in visited(runs, layers[1:])] == [0, 1, 2]


def test_pieces_are_as_long_as_their_texts(monkeypatch):
    """However much padding came with them; all of it is there once, in its order."""
    monkeypatch.setattr(joining, "_PIECE", 40)
    mask = (torch.arange(64)[None] < torch.arange(1, 21)[:, None]).long()
    ids = torch.arange(20 * 64).view(20, 64) * mask
    pieces = split_call(RecordedCall((ids,), {"attention_mask": mask}, mask))
    assert len({piece.rows for piece in pieces}) > 1
    for piece in pieces:
        assert piece.mask.shape[1] == int(piece.mask.sum(1).max())
        assert piece.rows == 1 or piece.mask.numel() <= 40
    real = torch.cat([piece.args[0][piece.mask.bool()] for piece in pieces])
    assert torch.equal(real, ids[mask.bool()])
    bare = split_call(RecordedCall((torch.ones(8, 10, dtype=torch.long),), {}))
    assert [piece.rows for piece in bare] == [4, 3, 1]  # no two sizes are alike throughout
    numbers = split_call(RecordedCall((torch.ones(8, 64),), {}, mask[:8]))
    assert {piece.mask.shape[1] for piece in numbers} == {64}  # which cannot be cut off
