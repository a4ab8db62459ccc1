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
class Spot:
    layer: str
    residual: str | None = None


def call_of(rows, length=8, seed=0):
    inputs = batch(rows, length, seed=seed)
    return RecordedCall((), inputs, inputs["attention_mask"])


def test_each_layer_hears_all_calls_and_what_it_says_goes_on():
    """Calls of different lengths; a layer that is silenced changes what the next one hears."""
    model, calls = build(), [call_of(3, 6), call_of(2, 9, seed=1), call_of(1, 4, seed=2)]
    heard = []

    def act(spot, parts):
        heard.append((spot.layer, [p.x.shape[:2] for p in parts], [p.call for p in parts]))
        return [torch.zeros_like(p.output) if spot.layer == LAYERS[0] else p.output for p in parts]

    outputs = {}

    def last(spot, parts):
        outputs[len(parts)] = outputs.get(len(parts), []) + [
            p.valid(p.output) for p in parts if spot.layer == LAYERS[1]
        ]
        return act(spot, parts)

    spots = [Spot(layer) for layer in LAYERS]
    run_layerwise(model, spots, "", calls, last)
    assert [layer for layer, *_ in heard] == list(LAYERS)
    for _, shapes, whose in heard:
        assert [tuple(shape) for shape in shapes] == [(3, 6), (2, 9), (1, 4)]
        assert all(mine is call for mine, call in zip(whose, calls, strict=True))
    for call in calls:
        run_layerwise(model, spots, "", [call], last)
    for one, other in zip(outputs[3], outputs[1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("once", [True, False])
def test_a_run_leaves_nothing_behind(once):
    model = build().train()
    hooks, ran = count_hooks(model), []
    model.classifier.register_forward_hook(lambda *_: ran.append(1))

    def act(spot, parts):
        assert not torch.is_grad_enabled()
        assert not model.training
        return [p.output for p in parts]

    run_layerwise(model, [Spot(LAYERS[1])], "", [call_of(2), call_of(3)], act, once=once)
    assert len(ran) == (0 if once else 2)
    assert model.training
    assert torch.is_grad_enabled()
    assert count_hooks(model) == hooks + 1


def test_an_error_at_a_layer_ends_all_calls():
    model = build().train()
    hooks = count_hooks(model)

    def act(spot, parts):
        raise PruningError("enough")

    with pytest.raises(PruningError, match="enough"):
        run_layerwise(model, [Spot(LAYERS[0])], "", [call_of(2), call_of(3)], act)
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
    spots = [Spot("first"), Spot("second")]
    with pytest.raises(ValueError, match="three"):
        run_layerwise(Picky(), spots, "", calls, lambda spot, parts: [p.output for p in parts])


def test_a_layer_that_some_calls_skip_is_asked_for_those_that_come():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            return self.second(self.first(x) if len(x) > 2 else x)

    seen = []

    def act(spot, parts):
        seen.append((spot.layer, [len(p.x) for p in parts]))
        return [p.output for p in parts]

    calls = [RecordedCall((torch.ones(rows, 2),), {}) for rows in (3, 2, 4)]
    run_layerwise(Skipping(), [Spot("first"), Spot("second")], "", calls, act)
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
