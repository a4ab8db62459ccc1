"""What a cut sends between ranks, on paper: ``python -m benchmarks.communication``.

Bytes follow from the shapes alone. Times assume a ring all-reduce, which sends ``2 (R - 1) / R`` of
a buffer from every rank in ``2 (R - 1)`` steps.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import BertConfig, BertModel

from lightning_mi_prune import WidthAxis, find_axes

__all__ = ["reduced_bytes", "refit_bytes", "ring_seconds", "sums_bytes", "table"]

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
            network = BertModel(BertConfig(**shape), add_pooling_layer=False)
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
