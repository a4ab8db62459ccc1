"""The unchanged callback on one model of each kind: nothing is described, asked or registered."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from lightning_mi_prune import (
    CKALayerPruning,
    MutualInformationPruning,
    PruningError,
    load_pruned,
)
from tests.conftest import count_hooks
from tests.support.boring import trainer
from tests.support.runs import sha
from tests.support.zoo import ZOO, Learner, batches, learner

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


class Saves(pl.Callback):
    """Writes a checkpoint before the cut and one after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


def weights(module: torch.nn.Module) -> str:
    return sha(*(x for item in module.state_dict().items() for x in item))


def run(module: Learner, *callbacks: pl.Callback, **options: Any) -> MutualInformationPruning:
    pruning = MutualInformationPruning(sparsity=0.5, verbose=False)
    fitting = trainer(pruning, *callbacks, max_epochs=2, num_sanity_val_steps=1)
    fitting.fit(module, **options)
    return pruning


@dataclass(frozen=True)
class Run:
    module: Learner
    pruning: MutualInformationPruning
    folder: Path


@cache
def fitted(name: str) -> Run:
    folder, module = Path(mkdtemp()), learner(name)
    return Run(module, run(module, Saves(folder)), folder)


def moved(module: Learner) -> set[str]:
    """Parameters that a step of training changes."""
    module = copy.deepcopy(module).train()  # running statistics of others' model stay
    module.zero_grad()
    module.loss(batches(module.kind.data, 1, seed=2)[0]).backward()
    return {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}


@torch.no_grad()
def outputs(module: Learner) -> Tensor:
    batch = batches(module.kind.data, 1, seed=2)[0]
    module.eval()
    return module.loss(batch)


@pytest.mark.parametrize("name", ZOO)
def test_half_goes_in_fit(name: str) -> None:
    done = fitted(name)
    (cut,) = done.pruning.report.cuts
    assert cut.sparsity >= 0.5
    assert cut.parameters == sum(p.numel() for p in done.module.parameters())
    assert cut.macs < done.pruning.report.macs
    assert count_hooks(done.module) == 0


@pytest.mark.parametrize("name", ZOO)
def test_every_kind_of_unit_is_found_and_verified(name: str) -> None:
    graph = fitted(name).pruning.graph
    assert graph is not None
    assert set(ZOO[name].kinds) <= {group.kind for group in graph.groups}
    assert [part for part in graph.refused if part.kind in ZOO[name].kinds] == []
    assert graph.unknown == ()


@pytest.mark.parametrize("name", ZOO)
def test_a_step_moves_every_live_parameter(name: str) -> None:
    assert moved(fitted(name).module) == moved(learner(name))


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_run_equals_a_straight_one(name: str, epoch: int) -> None:
    done, module = fitted(name), learner(name)
    pruning = run(module, ckpt_path=done.folder / f"{epoch}.ckpt", weights_only=True)
    assert pruning.plan.digest() == done.pruning.plan.digest()
    assert weights(module) == weights(done.module)


@pytest.mark.parametrize("name", ZOO)
def test_what_is_saved_opens_again(name: str, tmp_path: Path) -> None:
    done, fresh = fitted(name), learner(name)
    torch.save({"state_dict": done.module.state_dict()}, tmp_path / "small.pt")
    load_pruned(fresh, tmp_path / "small.pt")
    assert weights(fresh) == weights(done.module)
    assert torch.equal(outputs(fresh), outputs(done.module))


@pytest.mark.parametrize("name", [name for name, kind in ZOO.items() if kind.generates])
def test_text_is_generated_as_without_a_cache(name: str) -> None:
    network = fitted(name).module.network.eval()
    ids = batches("tokens", 1, seed=3)[0]["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6}
    cached, plain = (network.generate(ids, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.filterwarnings("ignore:No layer makes up for the removed ones")  # 3 x 3 kernels
@pytest.mark.parametrize("name", ["gpt2", "convnext", "resnet", "torch-encoder"])
def test_layers_of_any_stack_go(name: str) -> None:
    module, pruning = learner(name), CKALayerPruning(None, target_layers=1, verbose=False)
    before = sum(p.numel() for p in module.parameters())
    trainer(pruning, max_epochs=3, num_sanity_val_steps=0).fit(module)
    assert pruning.graph is not None
    for stack in pruning.graph.stacks:
        assert len(module.network.get_submodule(stack.name.removeprefix("network."))) == 1
    (cut,) = pruning.report.cuts
    assert [choice.removed for choice in cut.stacks] == [(1,)] * len(pruning.graph.stacks)
    assert cut.parameters == sum(p.numel() for p in module.parameters()) < before
    assert count_hooks(module) == 0


def test_layers_and_then_units_share_what_the_first_batch_shows() -> None:
    module = learner("gpt2")
    layers = CKALayerPruning(None, target_layers=1, verbose=False)
    units = MutualInformationPruning(sparsity=0.8, verbose=False)
    trainer(layers, units, max_epochs=6).fit(module)
    assert layers.graph == units.graph
    assert layers.report is units.report
    first, second = units.report.cuts
    assert first.stacks
    assert second.sparsity >= 0.8
    assert second.parameters < first.parameters


def test_a_network_without_a_stack_is_refused() -> None:
    with pytest.raises(PruningError, match="No stack of layers was found in Learner"):
        trainer(CKALayerPruning(), max_epochs=3).fit(learner("depthwise"))
