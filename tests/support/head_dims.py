"""Models whose heads get narrower, and what they are judged on."""

from __future__ import annotations

import torch

from lightning_mi_prune.calibration.activations import ActivationRecorder
from lightning_mi_prune.calibration.gradients import GradientRecorder, relevance_of
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.importance.head_rotation import head_rotation
from lightning_mi_prune.importance.statistics import unit_statistics
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, PICTURES, batch, build, entries_of, inputs_of, pictures

FAMILIES = [*sorted(set(CONFIGS) - {"albert", "deberta-v2"}), *PICTURES]
UNITS = ["ffn", "heads", "head_dim"]
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


def known(model, groups, family="bert"):
    """Moments and relevance of a model."""
    with torch.no_grad(), ActivationRecorder(model, groups) as heard:
        for inputs in lesson(family):
            model(**inputs)
    with GradientRecorder(model, groups) as felt:
        for index, inputs in enumerate(lesson(family)):
            with felt.step(index):
                loss(model, inputs).backward()
            model.zero_grad(set_to_none=True)
    return heard.moments, relevance_of(felt.sums)


def rotations(model, family="bert"):
    """The rotation of every layer of a model, with the statistics of the values."""
    groups, weights = groups_of(model), dict(model.named_parameters())
    moments, relevance = known(model, groups, family)
    plan = full_plan(groups)
    found = []
    for group in groups:
        if group.rotation is not None:
            said = (moments, weights, plan.kept, plan, groups, relevance)
            (values,) = unit_statistics(group, *said)
            found.append((group, head_rotation(group, values, moments, weights, relevance), values))
    return found


def narrow(model, groups, rank):
    """Make the heads of a model say and hear only so much."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for group in groups:
            if group.rotation is None:
                continue
            size = group.size
            for path in (group.rotation.query, group.rotation.value):
                layer = model.get_submodule(path)
                for head in range(entries_of(group)):
                    rows = slice(head * size, head * size + size)
                    inner = torch.randn(size, rank, generator=generator)
                    onto = inner @ torch.linalg.pinv(inner)
                    layer.weight[rows] = onto @ layer.weight[rows]
                    layer.bias[rows] = onto @ layer.bias[rows]
