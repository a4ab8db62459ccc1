"""Several calls of one network, each waiting for the others at every layer."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lightning_mi_prune.calibration import calls as joining
from lightning_mi_prune.calibration.calls import RecordedCall, split_call
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.reconstruction.layerwise import run_layerwise
from tests.conftest import count_hooks
from tests.support.models import batch, build

LAYERS = ("bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense")


@dataclass(frozen=True)
class Layer:
    layer: str
    residual: str | None = None


def call_of(rows, length=8, seed=0):
    inputs = batch(rows, length, seed=seed)
    return RecordedCall((), inputs, inputs["attention_mask"])


def test_each_layer_gets_all_calls_and_its_new_outputs_go_on():
    """Calls of different lengths; an output of zeros changes the input of the next layer."""
    model, calls = build(), [call_of(3, 6), call_of(2, 9, seed=1), call_of(1, 4, seed=2)]
    inputs_seen = []

    def process(layer, parts):
        inputs_seen.append((layer.layer, [p.x.shape[:2] for p in parts], [p.call for p in parts]))
        return [torch.zeros_like(p.output) if layer.layer == LAYERS[0] else p.output for p in parts]

    outputs = {}

    def last(layer, parts):
        outputs[len(parts)] = outputs.get(len(parts), []) + [
            p.valid(p.output) for p in parts if layer.layer == LAYERS[1]
        ]
        return process(layer, parts)

    layers = [Layer(layer) for layer in LAYERS]
    run_layerwise(model, layers, "", calls, last)
    assert [layer for layer, *_ in inputs_seen] == list(LAYERS)
    for _, shapes, whose in inputs_seen:
        assert [tuple(shape) for shape in shapes] == [(3, 6), (2, 9), (1, 4)]
        assert all(mine is call for mine, call in zip(whose, calls, strict=True))
    for call in calls:
        run_layerwise(model, layers, "", [call], last)
    for one, other in zip(outputs[3], outputs[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("once", [True, False])
def test_a_run_leaves_no_hooks_and_the_mode_as_it_was(once):
    model = build().train()
    hooks, ran = count_hooks(model), []
    model.classifier.register_forward_hook(lambda *_: ran.append(1))

    def process(layer, parts):
        assert not torch.is_grad_enabled()
        assert not model.training
        return [p.output for p in parts]

    run_layerwise(model, [Layer(LAYERS[1])], "", [call_of(2), call_of(3)], process, once=once)
    assert len(ran) == (0 if once else 2)
    assert model.training
    assert torch.is_grad_enabled()
    assert count_hooks(model) == hooks + 1


def test_an_error_at_a_layer_ends_all_calls():
    model = build().train()
    hooks = count_hooks(model)

    def process(layer, parts):
        raise PruningError("enough")

    with pytest.raises(PruningError, match="enough"):
        run_layerwise(model, [Layer(LAYERS[0])], "", [call_of(2), call_of(3)], process)
    assert model.training
    assert torch.is_grad_enabled()
    assert count_hooks(model) == hooks


def test_an_error_inside_a_call_is_that_of_the_network():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            x = self.first(x)
            if len(x) == 3:
                raise ValueError("three")
            return self.second(x)

    calls = [RecordedCall((torch.ones(rows, 2),), {}) for rows in (2, 3, 4)]
    layers = [Layer("first"), Layer("second")]
    with pytest.raises(ValueError, match="three"):
        run_layerwise(Picky(), layers, "", calls, lambda layer, parts: [p.output for p in parts])


def test_a_layer_that_some_calls_skip_gets_the_others():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.second(self.first(x) if len(x) > 2 else x)

    seen = []

    def process(layer, parts):
        seen.append((layer.layer, [len(p.x) for p in parts]))
        return [p.output for p in parts]

    calls = [RecordedCall((torch.ones(rows, 2),), {}) for rows in (3, 2, 4)]
    run_layerwise(Skipping(), [Layer("first"), Layer("second")], "", calls, process)
    assert seen == [("first", [3, 4]), ("second", [3, 2, 4])]


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
