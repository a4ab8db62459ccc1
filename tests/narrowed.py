"""Models whose heads get narrower, and what they are judged on."""

from __future__ import annotations

import torch

from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.evidence import gather
from lightning_mi_prune.families import find_axes
from lightning_mi_prune.gradients import GradientListener
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.relevance import relevance_of
from lightning_mi_prune.turning import turned
from tests.models import (
    CONFIGS,
    PICTURES,
    batch,
    build,
    inputs_of,
    pictures,
)

FAMILIES = [*sorted(set(CONFIGS) - {"albert", "deberta-v2"}), *PICTURES]
UNITS = ["ffn", "heads", "dims"]
SMALL = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}


def tiny(family="bert", **options):
    """A small model of a family, and what it can be run on."""
    head = "image" if family in PICTURES else "sequence"
    return build(family, head, **options), inputs_of(head)


def lesson(family, rows=64, count=6):
    """Batches with labels."""
    given = pictures if family in PICTURES else batch
    return [{**given(rows, seed=seed), "labels": torch.arange(rows) % 3} for seed in range(count)]


def loss(model, inputs):
    return model(**inputs).loss


def known(model, axes, family="bert"):
    """Moments and relevance of a model."""
    with torch.no_grad(), Listener(model, axes) as heard:
        for inputs in lesson(family):
            model(**inputs)
    with GradientListener(model, axes) as felt:
        for index, inputs in enumerate(lesson(family)):
            with felt.step(index):
                loss(model, inputs).backward()
            model.zero_grad(set_to_none=True)
    return heard.moments, relevance_of(felt.sums)


def turns(model, family="bert"):
    """The turn of every layer of a model, with what the values were known by."""
    axes, weights = find_axes(model), dict(model.named_parameters())
    moments, relevance = known(model, axes, family)
    plan = full_plan(axes)
    found = []
    for axis in axes:
        if axis.turn is not None:
            said = (moments, weights, plan.kept, plan, axes, relevance)
            (values,) = gather(axis, *said)
            found.append((axis, turned(axis, values, moments, weights, relevance), values))
    return found


def narrow(model, axes, rank):
    """Make the heads of a model say and hear only so much."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for axis in axes:
            if axis.turn is None:
                continue
            size = axis.size
            for path in (axis.turn.query, axis.turn.value):
                layer = model.get_submodule(path)
                for head in range(axis.entries):
                    rows = slice(head * size, head * size + size)
                    inner = torch.randn(size, rank, generator=generator)
                    onto = inner @ torch.linalg.pinv(inner)
                    layer.weight[rows] = onto @ layer.weight[rows]
                    layer.bias[rows] = onto @ layer.bias[rows]
