"""Pictures of what was cut: the CKA matrix of a stack, and what every layer kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_mi_prune.core.errors import counted, require
from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.reporting.summary import GroupWidths

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "heatmap",
    "kept_units",
    "save_heatmap",
]

_DARK = 0.55  # below this share of the scale, black numbers cannot be read


def heatmap(cut: StackCut) -> Figure:
    """The CKA matrix of a stack, bottom layer first; clusters are framed, removed layers crossed.

    Args:
        cut: What was decided about the stack.

    Returns:
        A matplotlib figure that belongs to no window.

    Raises:
        PruningError: If matplotlib is not installed.

    Example:
        >>> alike = ((1.0, 0.99), (0.99, 1.0))
        >>> cut = StackCut("layers", (0, 1), (0,), alike, ((0, 1),), "cka", 0.98)
        >>> [text.get_text() for text in heatmap(cut).axes[0].texts]
        ['1.00', '0.99', '0.99', '1.00']
    """
    count = len(cut.before)
    side = max(3.6, 0.55 * count + 1.6)
    figure: Figure = require("matplotlib.figure", "plots").Figure(
        figsize=(side + 1.0, side), layout="constrained"
    )
    axes = figure.add_subplot()
    lowest = min(min(row) for row in cut.similarity)
    image = axes.imshow(cut.similarity, cmap="viridis", vmin=min(0.0, lowest), vmax=1.0)
    figure.colorbar(image, ax=axes, label="CKA", shrink=0.85)
    if count <= 16:
        for i, row in enumerate(cut.similarity):
            for j, value in enumerate(row):
                color = "black" if value > _DARK else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=color, fontsize=8)
    rectangle = require("matplotlib.patches", "plots").Rectangle
    for cluster in cut.clusters:
        start, size = cut.before.index(cluster[0]) - 0.5, len(cluster)
        frame = rectangle((start, start), size, size, fill=False, edgecolor="red", linewidth=2.5)
        axes.add_patch(frame)
        frame.set_clip_on(False)
    names = [f"{layer} ✕" if layer in cut.removed else str(layer) for layer in cut.before]
    axes.set_xticks(range(count), names)
    axes.set_yticks(range(count), names)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        if label.get_text().endswith("✕"):
            label.set_color("red")
    axes.set_xlabel("layer, as built (✕ removed)")
    decided = f"CKA ≥ {cut.threshold:.4f}" if cut.criterion == "cka" else cut.criterion
    title = f"{cut.name}\n{count} → {counted(len(cut.after), 'layer')}, {decided}"
    axes.set_title(title, fontsize=10)
    return figure


def kept_units(groups: Sequence[GroupWidths]) -> Figure:
    """The share of units that every group keeps, bottom layer at the left, a panel for each kind.

    Args:
        groups: Units of every group before and after, from the bottom of the network up.

    Returns:
        A matplotlib figure that belongs to no window.

    Raises:
        PruningError: If matplotlib is not installed.

    Example:
        >>> from lightning_mi_prune.reporting.report import GroupCut
        >>> groups = [GroupCut(f"net.{i}.ffn", "ffn", 8, 4 - i, 1.0, 1.0) for i in range(2)]
        >>> [bar.get_height() for bar in kept_units(groups).axes[0].patches]
        [0.5, 0.375]
    """
    kinds = [*dict.fromkeys(group.kind for group in groups)]
    figure: Figure = require("matplotlib.figure", "plots").Figure(
        figsize=(7.0, 1.2 + 1.4 * len(kinds)), layout="constrained"
    )
    for panel, kind in zip(figure.subplots(len(kinds), 1, squeeze=False)[:, 0], kinds, strict=True):
        some = [group for group in groups if group.kind == kind]
        panel.bar(range(len(some)), [group.after / max(1, group.before) for group in some])
        panel.set_ylim(0, 1)
        panel.yaxis.set_major_formatter(
            require("matplotlib.ticker", "plots").PercentFormatter(1.0, decimals=0)
        )
        if len(some) <= 12:
            texts = [f"{group.after}" for group in some]
            panel.bar_label(panel.containers[0], texts, fontsize=8)
        step = -(-len(some) // 12)
        panel.set_xticks(range(0, len(some), step))
        panel.set_ylabel(f"{kind} kept")
    panel.set_xlabel("group, from the bottom of the network up")
    return figure


def save_heatmap(cut: StackCut, path: str | Path) -> None:
    """Write the picture; the ending of the path decides on the format.

    Args:
        cut: What was decided about the stack.
        path: ``.png``, ``.svg`` or ``.pdf``; missing folders are made.

    Raises:
        PruningError: If matplotlib is not installed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    heatmap(cut).savefig(target, dpi=120)
