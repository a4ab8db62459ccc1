"""What can be pruned is found in the first batch; nothing else of a run changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_mi_prune import MutualInformationPruning, PruningError, load_pruned
from lightning_mi_prune.callbacks import verification
from lightning_mi_prune.callbacks.verification import discover_in_step
from lightning_mi_prune.graph.graph import PruningGraph
from tests.conftest import count_hooks
from tests.support.boring import trainer
from tests.support.pruning import pruning_units
from tests.support.ranks import launch
from tests.support.runs import Resumable, sha


class Residual(nn.Module):
    """Two blocks whose neurons can go."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + nn.functional.dropout(down(up(x).relu()), 0.1, self.training)
        return self.head(x)


class Plain(pl.LightningModule):
    """Keeps a metric, counts its own steps, draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network, self.accuracy = Residual(), MulticlassAccuracy(4)
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.seen += len(batch[0])
        return cross_entropy(self.network(batch[0] + 0.1 * torch.randn(8)), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        logits = self.network(batch[0])
        self.accuracy(logits, batch[1])
        self.log("val_accuracy", self.accuracy)
        self.log("val_loss", cross_entropy(logits, batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self) -> DataLoader:
        return loader(shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return loader()


def loader(**options: Any) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(-1)), batch_size=128, **options)


def callback(**options: Any) -> MutualInformationPruning:
    return pruning_units(**{"sparsity": 0.5, "verbose": False, **options})


def weights(module: pl.LightningModule) -> str:
    return sha(*(x for item in module.state_dict().items() for x in item))


def fitted(*callbacks: pl.Callback, **options: Any) -> tuple[pl.Trainer, Plain]:
    module, run = Plain(), trainer(*callbacks, **options)
    pl.seed_everything(1, verbose=False)
    run.fit(module)
    return run, module


@pytest.mark.parametrize("sanity", [0, 2])
def test_the_callback_prunes_a_network_that_nothing_describes(sanity: int) -> None:
    pruning = callback()
    _, module = fitted(pruning, num_sanity_val_steps=sanity)
    assert pruning.report.cuts[-1].sparsity >= 0.5
    assert pruning.report.parameters == sum(p.numel() for p in Plain().parameters())
    assert module.network.up[0].weight.shape[0] == module.network.down[0].weight.shape[1] < 24
    assert count_hooks(module) == 0


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_run_without_a_cut_ends_as_one_without_the_callback(sanity: int) -> None:
    options: dict[str, Any] = {"num_sanity_val_steps": sanity}
    _, alone = fitted(**options, max_epochs=2)
    before_the_cut: list[str] = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            if trainer.current_epoch == 1:
                before_the_cut.append(weights(pl_module))

    pruning = callback(first_epoch=2, cuts=1)
    fitted(pruning, Watch(), **options, max_epochs=4)
    assert before_the_cut == [weights(alone)]
    assert [cut.epoch for cut in pruning.report.cuts] == [2]


class Saves(pl.Callback):
    """Writes a checkpoint inside epochs."""

    def __init__(self, folder: Path, epochs: tuple[int, ...]) -> None:
        self.folder, self.epochs = folder, epochs

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.current_epoch in self.epochs and trainer.is_last_batch is False:
            trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}.ckpt")


class Seeded(Plain):
    """Draws that do not depend on what ran before a checkpoint."""

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        torch.manual_seed(1000 * self.current_epoch + index)
        return super().training_step(batch, index)

    def train_dataloader(self) -> Resumable:
        return Resumable(list(loader()))


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_a_resumed_run_equals_a_straight_one_and_waits_for_no_batch(
    epoch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_epochs": 5, "num_sanity_val_steps": 0}
    straight = Seeded()
    trainer(callback(cuts=2), Saves(tmp_path, (epoch,)), **options).fit(straight)

    def refuse(*_: object, **__: object) -> PruningGraph:
        raise AssertionError("the graph is in the checkpoint")

    monkeypatch.setattr(verification, "discover_run", refuse)
    resumed, pruning = Seeded(), callback(cuts=2)
    run = trainer(pruning, **options)
    run.fit(resumed, ckpt_path=tmp_path / f"{epoch}.ckpt", weights_only=True)
    assert pruning.report.cuts[-1].sparsity >= 0.5
    assert weights(resumed) == weights(straight)


def test_a_checkpoint_of_the_cut_model_opens_without_a_batch(tmp_path: Path) -> None:
    pruning = callback()
    run, module = fitted(pruning)
    run.save_checkpoint(tmp_path / "cut.ckpt")
    fresh = Plain()
    load_pruned(fresh, tmp_path / "cut.ckpt")
    assert weights(fresh) == weights(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ["heads"]}, "names 'heads'"),
        ({"include": "nothing"}, "include='nothing' matches no group"),
        ({"sparsity": 0.999, "floor": 0.5}, "out of reach"),
    ],
)
@pytest.mark.parametrize("sanity", [0, 2])
def test_options_are_checked_in_the_first_batch(
    options: dict[str, Any], message: str, sanity: int
) -> None:
    module = Plain()
    with pytest.raises((PruningError, MisconfigurationException), match=message):
        trainer(callback(**options), num_sanity_val_steps=sanity).fit(module)
    assert weights(module) == weights(Plain())
    assert count_hooks(module) == 0


def test_a_given_graph_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[PruningGraph] = []
    real = verification.discover_run

    def keep(*given: Any, **options: Any) -> PruningGraph:
        found.append(real(*given, **options))
        return found[-1]

    monkeypatch.setattr(verification, "discover_run", keep)
    _, first = fitted(callback())
    assert len(found) == 1
    _, second = fitted(callback(graph=found[0]))
    found[0].save(tmp_path / "graph.json")
    _, third = fitted(callback(graph=str(tmp_path / "graph.json")))
    assert len(found) == 1, "nothing was looked for again"
    assert weights(first) == weights(second) == weights(third)


def test_a_graph_of_another_model_is_refused() -> None:
    pruning = callback()
    fitted(pruning, max_epochs=2)
    graph = pruning.graph

    class Wider(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.network.up[0] = nn.Linear(8, 30)

    assert graph is not None
    with pytest.raises(PruningError, match=r"made for another model: .network\.up\.0\.weight"):
        trainer(callback(graph=graph)).fit(Wider())


class Broken(Plain):
    def validation_step(self, batch: list[Tensor], index: int) -> None:
        if not self.training and type(self.__dict__.get("log")) is not type(None):
            raise ValueError("runs only once")
        super().validation_step(batch, index)


def test_a_step_that_fails_on_a_copy_is_refused() -> None:
    with pytest.raises(PruningError, match=r"validation_step fails on a copy .*runs only once"):
        trainer(callback()).fit(Broken())


def _on_two_ranks(fails: bool) -> tuple[str, str]:
    class Rank(Plain):
        def validation_step(self, batch: list[Tensor], index: int) -> None:
            copied = "all_gather" in self.__dict__
            if fails and copied:
                raise ValueError("fails on rank 0 only")
            self.all_gather(batch[0].sum())
            super().validation_step(batch, index)

    module, pruning = Rank(), callback()
    run = trainer(pruning, strategy="ddp", devices=2, max_epochs=3)
    try:
        run.fit(module)
    except PruningError as error:
        return "refused", str(error)
    graph = pruning.graph
    return weights(module), "" if graph is None else graph.to_json()


def test_all_ranks_get_the_graph_of_rank_0() -> None:
    found = launch(2, _on_two_ranks, False)
    assert found[0] == found[1]
    assert found[0][0] != "refused"


def test_an_error_of_rank_0_is_raised_on_all() -> None:
    found = launch(2, _on_two_ranks, True)
    assert [outcome for outcome, _ in found.values()] == ["refused", "refused"]
    assert all("fails on rank 0 only" in text for _, text in found.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_the_same_is_found_in_every_precision(precision: str) -> None:
    module, pruning = Plain(), callback()
    if precision == "64-true":
        module.double()
    trainer(pruning, precision=precision, max_epochs=2).fit(module)
    assert pruning.report.cuts[-1].sparsity >= 0.5
    assert {p.dtype for p in module.parameters()} == {
        {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    }


def test_two_examples_of_the_batch_run_and_its_metric_stays() -> None:
    module, rows = Plain(), []
    module.network.register_forward_pre_hook(lambda _, given: rows.append(len(given[0])))
    run = trainer()
    run.strategy.connect(module)
    module.trainer = run
    before = weights(module)
    graph = discover_in_step(run, module, "validation_step", next(iter(loader())))
    assert set(rows) == {2}
    assert {group.kind for group in graph.groups} >= {"ffn"}
    assert weights(module) == before
    assert module.accuracy._update_count == 0
