"""What a cut sends between ranks, on paper: ``python -m benchmarks.communication``.

Bytes follow from the shapes alone. Times assume a ring all-reduce, which sends ``2 (R - 1) / R`` of
a buffer from every rank in ``2 (R - 1)`` steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.cost import halved
from lightning_mi_prune import Budget, Listener, Method, WidthAxis, find_axes
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.method import pull_back
from lightning_mi_prune.sample import Heard
from lightning_mi_prune.selection import Selection

__all__ = [
    "encoder",
    "ranks",
    "reduced_bytes",
    "refit_bytes",
    "refit_reductions",
    "ring_seconds",
    "sums_bytes",
    "table",
]

_SHAPES = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
_RANKS = (8, 64, 1024)
_FEW_RANKS = (1, 2, 4)
_BANDWIDTH = 25e9 / 8  # bytes a second of a 25 Gbit/s link
_LATENCY = 20e-6  # seconds of one step of the ring


def reduced_bytes(axes: list[WidthAxis], network: nn.Module) -> int:
    """Bytes of the two all-reduces before a choice: sums of activations, sums of gradients."""
    size = 0
    for axis in axes:
        d, rows = axis.size * axis.entries, outputs_of(network, axis.readers[0])
        size += 8 * (1 + d + d * (d + 1) // 2) + 8 * (3 + axis.size + rows * (rows + 1) // 2)
    return size


def sums_bytes(axes: list[WidthAxis], network: nn.Module) -> int:
    """Bytes of the sums that a rank holds."""
    size = 0
    for axis in axes:
        d, rows = axis.size * axis.entries, outputs_of(network, axis.readers[0])
        size += 8 * (1 + d + d * d) + 8 * (3 + axis.size + rows * rows)
    return size


def refit_bytes(axes: list[WidthAxis], network: nn.Module) -> int:
    """Bytes of the normal equations of all layers that are solved again, half of each axis kept."""
    size = 0
    for axis in axes:
        kept = axis.size * axis.entries // 2 + 1
        size += 8 * kept * (kept + outputs_of(network, axis.readers[0]))
    for reader in {reader for axis in axes for reader in axis.above}:
        rows, columns = network.get_parameter(f"{reader}.weight").shape
        size += 8 * (columns + 1) * (columns + 1 + rows // 2)
    return size


def outputs_of(network: nn.Module, reader: str) -> int:
    """Outputs of a linear layer."""
    return network.get_parameter(f"{reader}.weight").shape[0]


def ring_seconds(size: int, ranks: int) -> float:
    """Time of one all-reduce over a ring."""
    return 2 * (ranks - 1) * (size / ranks / _BANDWIDTH + _LATENCY)


def ranks(shape: str) -> list[dict[str, Any]]:
    """All-reduces of a cut, and what each rank sends in them (a ring), for few ranks."""
    with torch.device("meta"):
        network = encoder(**_SHAPES[shape])
    axes = choose_axes(find_axes(network))
    size = reduced_bytes(axes, network) + refit_bytes(axes, network)
    # Counted on a narrow model of this depth: sums of activations, sums of gradients, and one for
    # each linear layer that is solved again.
    narrow = encoder(**{**_SHAPES[shape], "hidden_size": 24, "intermediate_size": 96})
    calls = 2 + len(refit_reductions(narrow))
    return [
        {
            "shape": shape,
            "ranks": count,
            "all_reduces": calls if count > 1 else 0,
            "sent_mb": round(2 * (count - 1) / count * size / 1e6, 1),
        }
        for count in _FEW_RANKS
    ]


def encoder(**shape: int) -> nn.Module:
    """A random BERT encoder without pooler, with twelve heads."""
    model: nn.Module = BertModel(BertConfig(**shape), add_pooling_layer=False)
    return model.eval()


def refit_reductions(network: nn.Module) -> list[int]:
    """Bytes of each of the sums that a refit adds up over ranks, half of every axis kept."""
    axes = choose_axes(find_axes(network))
    with Listener(network, axes, positions=512, batches=1, calls=512) as heard:
        network(torch.randint(5, 1000, (16, 32)))
    sizes: list[int] = []

    def add(sums: Tensor) -> Tensor:
        sizes.append(sums.nbytes)
        return sums

    selection = Selection(halved(axes), {}, {})
    method = Method(Budget(sparsity=0.5), refit_positions=512)
    found = Heard(heard.moments, ranks=[heard.stored])
    pull_back(network, axes, full_plan(axes), selection, method, found, add)
    return sizes


def table() -> list[str]:
    """Rows of the table in docs/distributed.md."""
    rows = [
        "| shapes | sums a rank, MB | before the choice, MB | refit, MB | gradients a step, MB | "
        + " | ".join(f"{ranks:,} ranks, s" for ranks in _RANKS)
        + " |",
        "|---" + "|---:" * (4 + len(_RANKS)) + "|",
    ]
    for name, shape in _SHAPES.items():
        with torch.device("meta"):
            network = encoder(**shape)
        axes = [axis for axis in find_axes(network) if axis.kind in ("ffn", "heads")]
        before, solving = reduced_bytes(axes, network), refit_bytes(axes, network)
        gradients = 4 * sum(p.numel() for p in network.parameters())
        seconds = [ring_seconds(before, r) + ring_seconds(solving, r) for r in _RANKS]
        times = " | ".join(f"{s:.2f}" for s in seconds)
        rows.append(
            f"| {name} | {sums_bytes(axes, network) / 1e6:,.0f} | {before / 1e6:,.0f} | "
            f"{solving / 1e6:,.0f} | {gradients / 1e6:,.0f} | {times} |"
        )
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
