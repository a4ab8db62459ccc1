"""Prune a Hugging Face encoder in one call, without a Trainer; save it and open it again.

python examples/one_shot.py
"""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_mi_prune import from_pretrained, prune

Batch = dict[str, Tensor]


def example_model() -> BertForSequenceClassification:
    """A tiny BERT with random weights; use your own fine-tuned model here."""
    config = BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def example_batches(count: int = 8) -> list[Batch]:
    """Random texts with labels; use a DataLoader of your validation data here."""
    return [
        {"input_ids": torch.randint(500, (32, 24)), "labels": torch.randint(3, (32,))}
        for _ in range(count)
    ]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss; its gradients show which part of every layer matters."""
    value: Tensor = model(**batch).loss
    return value


def main() -> None:
    """Remove 75 % of the neurons and attention heads, counted in parameters."""
    torch.manual_seed(0)
    model, batches = example_model(), example_batches()

    result = prune(model, batches, sparsity=0.75, loss=loss)

    before, after = result.parameters
    print(f"{before:,} parameters before, {after:,} after; {result.sparsity:.0%} of the prunable")
    for name, information in result.information.items():
        width, size = result.plan.width(name), result.plan.sizes[name]
        print(f"{name}: {width} of {size} units keep {information.fraction:.0%} of the information")

    with TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        opened = from_pretrained(BertForSequenceClassification, folder).eval()
        same = torch.equal(opened(**batches[0]).logits, model(**batches[0]).logits)
    print(f"The saved model gives the same outputs: {same}")


if __name__ == "__main__":
    main()
