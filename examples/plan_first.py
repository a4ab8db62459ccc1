"""Plan first: see what a cut would leave, edit the plan, and carry it out.

python examples/plan_first.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_mi_prune import plan, prune
from lightning_mi_prune.allocation.plan_file import write_plan
from lightning_mi_prune.planning.sensitivity import sensitivity

Batch = dict[str, Tensor]


def example_model() -> BertForSequenceClassification:
    """A tiny BERT with random weights; use your own fine-tuned model here."""
    config = BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=3,
    )
    return BertForSequenceClassification(config).eval()


def example_batches(count: int = 4) -> list[Batch]:
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
    """Plan three sizes, keep one layer wider than planned, and cut."""
    torch.manual_seed(0)
    model, batches = example_model(), example_batches()

    planned = plan(model, batches, [0.5, 0.75, 0.9], loss=loss)
    print(planned)

    curves = sensitivity(model, batches, loss=loss, measured=True, points=2, batches=2)
    print(curves)

    with TemporaryDirectory() as folder:
        curves.plot(Path(folder) / "sensitivity.png")
        path = write_plan(planned, Path(folder) / "plan.yaml")
        text = path.read_text()
        path.write_text(text.replace("now: 128,", "now: 128, pin: 120,", 1))  # or in an editor
        result = prune(model, batches, plan=str(path), loss=loss)

    layer = model.bert.encoder.layer[0].intermediate.dense
    print(f"The first layer has {layer.out_features} neurons, as the edited plan asks")
    print(f"{result.parameters[0]:,} parameters before, {result.parameters[1]:,} after")


if __name__ == "__main__":
    main()
