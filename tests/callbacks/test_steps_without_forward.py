"""Steps that call layers one by one, or multiply with a parameter of the LightningModule itself."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_mi_prune import MutualInformationPruning
from tests.support.boring import trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning"),
    # Layers are counted one by one, on what they received before the cut.
    pytest.mark.filterwarnings("ignore:MACs could not be counted"),
]


class Steps(pl.LightningModule):
    """Two layers and two parameters that no module's forward holds together."""

    def __init__(self, forward: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(6, 32), nn.Linear(10, 24)
        self.w = nn.Parameter(torch.randn(32, 10) / 5)
        self.head = nn.Linear(24, 3)
        self.calls_itself = forward

    def forward(self, x: Tensor) -> Tensor:
        x = (self.encoder(x).relu() @ self.w).tanh()
        return self.head(self.decoder(x).relu())

    def loss(self, batch: list[Tensor]) -> Tensor:
        run = self if self.calls_itself else self.forward
        return functional.cross_entropy(run(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=50)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("forward", [False, True])
def test_layers_that_no_forward_holds_together_are_cut(forward: bool) -> None:
    module = Steps(forward)
    pruning = MutualInformationPruning(sparsity=0.3, verbose=False)
    trainer(pruning, max_epochs=2, num_sanity_val_steps=1).fit(module)
    assert pruning.graph is not None
    consumers = {path for group in pruning.graph.groups for path in group.consumers}
    refused = {part.reason for part in pruning.graph.refused if part.size == 32}
    assert consumers == ({"w", "decoder", "head"} if forward else {"decoder", "head"})
    outside = {"w: it is used outside the forward of the module that holds it"}
    assert refused == (set() if forward else outside)
    (cut,) = pruning.report.cuts
    assert cut.sparsity >= 0.3
    assert cut.parameters == sum(p.numel() for p in module.parameters())
