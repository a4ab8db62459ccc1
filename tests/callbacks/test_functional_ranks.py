"""Weights that modules use as functions, and experts, on two ranks: one plan and equal weights."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_mi_prune import MutualInformationPruning
from tests.support.boring import trainer
from tests.support.ranks import launch
from tests.support.runs import sha
from tests.support.zoo import learner


def fitted(name: str) -> tuple[dict[str, tuple[int, ...]], str, int]:
    """What a run on this rank keeps, its weights, and its parameters."""
    module = learner(name)
    pruning = MutualInformationPruning(sparsity=0.5, verbose=False)
    options: dict[str, Any] = {"strategy": "ddp_find_unused_parameters_true", "devices": 2}
    trainer(pruning, max_epochs=2, num_sanity_val_steps=1, **options).fit(module)
    weights = sha(*(x for item in module.state_dict().items() for x in item))
    size = sum(p.numel() for p in module.parameters())
    return dict(pruning.plan.kept), weights, size


@pytest.mark.parametrize("name", ["functional", "mixtral"])
def test_ranks_cut_the_same_units(name: str) -> None:
    before = sum(p.numel() for p in learner(name).parameters())
    found = launch(2, fitted, name)
    assert found[0] == found[1]
    assert found[0][2] < before
