"""What a dense model says on batches with labels: activations of one pass, gradients of another."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_mi_prune import Listener, WidthAxis
from lightning_mi_prune.gradients import GradientListener
from lightning_mi_prune.relevance import GradientSums, check_gradients, relevance_of_readers
from lightning_mi_prune.sample import Heard

POSITIONS, CALLS, STEPS = 40_000, 65_536, 64

Batch = dict[str, Tensor]
Labels = Literal["true", "sampled"]


def listen(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    batches: Sequence[Batch],
    positions: int,
    calls: int,
    seed: int,
) -> Heard:
    """Moments and stored inputs of one pass, gradients of another; no weight changes."""
    heard = hear(model, axes, batches, positions, calls, seed)
    heard.gradients = feel(model, axes, batches)
    return heard


def hear(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    batches: Sequence[Batch],
    positions: int,
    calls: int,
    seed: int,
) -> Heard:
    """Moments and stored inputs of one pass.

    Args:
        model: The model, in evaluation mode.
        axes: What to listen to.
        batches: Batches of the validation split.
        positions: Samples to listen to on each axis.
        calls: Positions of inputs to store for the refit.
        seed: Seed of the draw of positions.
    """
    listener = Listener(
        model,
        axes,
        positions=positions,
        batches=len(batches),
        seed=seed,
        calls=calls,
    )
    with torch.no_grad(), listener:
        for batch in batches:
            listener.start_batch()
            model(**batch)
    listener.check()
    return Heard(
        listener.moments,
        ranks=[listener.stored],
        examples=listener.calls(axes),
    )


def feel(
    model: nn.Module,
    axes: Sequence[WidthAxis],
    batches: Sequence[Batch],
    *,
    steps: int = STEPS,
    labels: Labels = "true",
    seed: int = 0,
) -> Mapping[str, GradientSums]:
    """Gradients of a sample of batches; no weight changes.

    Args:
        model: The model, in evaluation mode.
        axes: What to feel.
        batches: Batches with labels.
        steps: Batches to feel.
        labels: Those of the batches, or others that are drawn from what the model predicts.
        seed: Seed of that draw.
    """
    generator = torch.Generator().manual_seed(seed)
    felt = GradientListener(model, axes, steps=steps, batches=len(batches), taylor=True)
    with felt:
        for index, batch in enumerate(batches):
            given = drawn(model, batch, generator) if labels == "sampled" else batch
            with felt.step(index):
                model(**given).loss.backward()
            model.zero_grad(set_to_none=True)
    check_gradients(felt.sums)
    return felt.sums


@torch.no_grad()
def drawn(model: nn.Module, batch: Batch, generator: torch.Generator) -> Batch:
    """The batch with labels drawn from what the model predicts."""
    predicted = model(**batch).logits.float().softmax(-1)
    return batch | {"labels": torch.multinomial(predicted, 1, generator=generator)[:, 0]}


def read(model: nn.Module, axes: Sequence[WidthAxis]) -> dict[str, GradientSums]:
    """What all readers above listen to, as if it had been felt: nothing above is cut yet.

    With ``relevance="readers"`` an axis is judged by the readers that were kept above it, so from
    the top down. These sums judge it by all of them, as an order from the bottom up must.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = {}
    for axis in axes:
        for key, known in relevance_of_readers(axis, weights, {}).items():
            sums = GradientSums(len(known.matrix), axis.size)
            sums.matrix += known.matrix.cpu()
            sums.counts += torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
            found[key] = sums
    return found
