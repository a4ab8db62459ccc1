"""What a cut sends between ranks, on paper: ``python -m benchmarks.communication``.

Bytes follow from the shapes alone. Times assume a ring all-reduce, which sends ``2 (R - 1) / R`` of
a buffer from every rank in ``2 (R - 1)`` steps.
"""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel

from lightning_mi_prune import WidthAxis, find_axes

__all__ = ["reduced_bytes", "ring_seconds", "sums_bytes", "table"]

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


def reduced_bytes(axes: list[WidthAxis]) -> int:
    """Bytes of the one all-reduce of a cut: count, sums and a triangle of products, float64."""
    widths = [axis.size * axis.entries for axis in axes]
    return sum(8 * (1 + d + d * (d + 1) // 2) for d in widths)


def sums_bytes(axes: list[WidthAxis]) -> int:
    """Bytes of the sums that a rank holds while it listens."""
    widths = [axis.size * axis.entries for axis in axes]
    return sum(8 * (1 + d + d * d) for d in widths)


def ring_seconds(size: int, ranks: int) -> float:
    """Time of one all-reduce over a ring."""
    return 2 * (ranks - 1) * (size / ranks / _BANDWIDTH + _LATENCY)


def table() -> list[str]:
    """Rows of the table in docs/distributed.md."""
    rows = [
        "| shapes | sums a rank, MB | all-reduce a cut, MB | gradients a step, MB | "
        + " | ".join(f"{ranks:,} ranks, s" for ranks in _RANKS)
        + " |",
        "|---" + "|---:" * (3 + len(_RANKS)) + "|",
    ]
    for name, shape in _SHAPES.items():
        with torch.device("meta"):
            network = BertModel(BertConfig(**shape), add_pooling_layer=False)
        axes = [axis for axis in find_axes(network) if axis.kind in ("ffn", "heads")]
        size = reduced_bytes(axes)
        gradients = 4 * sum(p.numel() for p in network.parameters())
        times = " | ".join(f"{ring_seconds(size, ranks):.2f}" for ranks in _RANKS)
        rows.append(
            f"| {name} | {sums_bytes(axes) / 1e6:,.0f} | {size / 1e6:,.0f} | "
            f"{gradients / 1e6:,.0f} | {times} |"
        )
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
