"""Some more steps of training, the same for every method: rows, order, optimizer, seed."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

Batch = dict[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
WARMUP = 0.1  # share of the steps
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Training:
    """The budget that every method gets.

    Args:
        batches: Batches, one a step.
        epochs: The share of the training split that they are.
        learning_rate: Highest learning rate; it warms up, then falls to 0 in a straight line.
        seed: Seed of dropout.
    """

    batches: Sequence[Batch]
    epochs: float
    learning_rate: float
    seed: int

    @property
    def steps(self) -> int:
        """Steps of the optimizer."""
        return len(self.batches)


def training_of(
    loader: Any, steps: int, *, first_epoch: int, learning_rate: float, seed: int
) -> Training:
    """Draw the batches of so many steps, from where the training of the dense model ended.

    Args:
        loader: Batches of the training split, with a sampler that knows epochs.
        steps: Steps of the optimizer.
        first_epoch: Epoch whose order comes first.
        learning_rate: Highest learning rate.
        seed: Seed of dropout.
    """
    batches = list(islice(endless(loader, first_epoch), steps))
    rows = sum(len(batch["labels"]) for batch in batches)
    return Training(batches, rows / len(loader.dataset), learning_rate, seed)


def endless(loader: Any, first_epoch: int) -> Iterator[Batch]:
    """Batches of one epoch after another."""
    for epoch in count(first_epoch):
        loader.sampler.set_epoch(epoch)
        yield from loader


def of_labels(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that the model gives itself, from the labels of a batch."""
    loss: Tensor = model(**batch).loss
    return loss


def train(
    model: nn.Module,
    training: Training,
    *,
    loss: Loss = of_labels,
    before_step: Callable[[float], None] | None = None,
    scores: Iterable[nn.Parameter] = (),
    scores_rate: float = 0.0,
) -> None:
    """Train a model in place and leave it in evaluation mode. Random states stay as they were.

    Args:
        model: The network.
        training: The budget.
        loss: The loss of a batch; by default the one that the network returns as its `loss`.
        before_step: Is told before every step which share of them is done.
        scores: Parameters with a learning rate of their own, without decay.
        scores_rate: That learning rate.
    """
    if not training.batches:
        return
    own = list(scores)
    others = {id(score) for score in own}
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if id(p) not in others]}
    ]
    if own:
        groups.append({"params": own, "lr": scores_rate, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=training.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
    )
    steps, warmup = training.steps, max(1, round(WARMUP * training.steps))
    schedule = LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    with isolate_rng():
        torch.manual_seed(training.seed)
        model.train()
        for step, batch in enumerate(training.batches):
            if before_step is not None:
                before_step(step / steps)
            loss(model, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    model.eval()
