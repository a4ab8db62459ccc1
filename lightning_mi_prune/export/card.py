"""The model card of a pruned model: what was measured, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.metadata import version
from typing import Any

import torch

from lightning_mi_prune.core.errors import PruningError, number, require
from lightning_mi_prune.core.options import check_count, check_number
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import count_parameters

__all__ = ["Card", "Latency", "Measured", "card_of"]


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one forward pass.

    Args:
        batch: Examples in it.
        length: Tokens of an example; 0 where inputs have no length.
        ms: Median of the pruned model.
        dense_ms: Median of the model before pruning, measured in turn with it.
    """

    batch: int
    length: int
    ms: float
    dense_ms: float | None = None

    def __post_init__(self) -> None:
        check_count("batch", self.batch, least=1)
        check_count("length", self.length, least=0)
        for name in ("ms", "dense_ms"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), above=0)


@dataclass(frozen=True)
class Measured:
    """What was measured of a pruned model; what is left out is not on its card.

    Args:
        data: Name of the data that metrics are of.
        seeds: Seeds of the runs.
        metrics: Values before pruning (None where not measured) and after, by name.
        macs: Multiply-accumulates of one example before pruning and after.
        latency: Milliseconds by batch size and length.
        machine: Processor or accelerator of the latencies, and threads.

    Raises:
        PruningError: If metrics are no pairs of numbers.

    Example:
        >>> Measured("TREC-6, test", (0,), {"accuracy": (0.957, 0.941)}).metrics["accuracy"][1]
        0.941
    """

    data: str = ""
    seeds: tuple[int, ...] = ()
    metrics: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)
    macs: tuple[int, int] | None = None
    latency: tuple[Latency, ...] = ()
    machine: str = ""

    def __post_init__(self) -> None:
        for name, pair in self.metrics.items():
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise PruningError(
                    f"metrics[{name!r}]={pair!r:.60}; expected a pair: the value before pruning, "
                    "or None, and the value after."
                )
            for value in pair:
                if value is not None:
                    check_number(f"metrics[{name!r}]", value, above=-math.inf)
        if self.latency and not self.machine:
            raise PruningError(
                "Latencies are given without a machine; expected machine='AMD EPYC, 1 thread', "
                "or what it was."
            )


@dataclass(frozen=True)
class Card:
    """All that a card is made from.

    Args:
        network: The network that is saved.
        folder: Name of its folder.
        plan: Units that stay; None for a network that was never cut.
        graph: What was cut, beside the plan.
        measured: What was measured.
        difference: What keeps transformers from building it from its config.
        code: Whether there is a modelling file.
        file_size: Bytes of the weights.
    """

    network: Any
    folder: str
    plan: PruningPlan | None
    graph: PruningGraph
    measured: Measured
    difference: str | None
    code: bool
    file_size: int


def card_of(card: Card) -> str:
    """The text of a model card, in Markdown with the metadata that the hub reads."""
    jinja2 = require("jinja2", "transformers")
    text = resources.files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8")
    template = jinja2.Template(text, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    measured = card.measured
    return str(
        template.render(
            metadata=_metadata(card),
            title=f"{card.folder}: {type(card.network).__name__}, pruned"
            if card.plan
            else card.folder,
            summary=_summary(card),
            opening=_opening(card),
            difference=card.difference,
            code=card.code,
            sizes=[*_sizes(card)],
            metrics=[
                (name, "" if old is None else number(old), number(new))
                for name, (old, new) in measured.metrics.items()
            ],
            data=measured.data,
            seeds=measured.seeds,
            latency=[_latency_row(row) for row in measured.latency],
            latency_about=f"Medians of one forward pass on {measured.machine}.",
            groups=[*_groups(card)],
            made=_made(card),
        )
    )


def _metadata(card: Card) -> str:
    hub = require("huggingface_hub", "transformers")
    tags = ["lightning-mi-prune", "structured-pruning"] if card.plan else []
    base = getattr(card.network.config, "_name_or_path", "") or None
    known = isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/"))
    data = hub.ModelCardData(
        library_name="transformers", tags=tags, base_model=base if known else None
    )
    return str(data.to_yaml()).strip()


def _summary(card: Card) -> str:
    if card.plan is None:
        return "A model that was not pruned."
    share = 1 - count_parameters(card.graph.groups, card.plan.widths) / max(
        1, count_parameters(card.graph.groups)
    )
    sentence = "Pruned by mutual information: units were removed, and the layers are dense"
    if card.graph.groups:
        sentence += f". Of the parameters that could go, {share:.0%} are gone"
    return sentence + "."


def _opening(card: Card) -> str:
    name = type(card.network).__name__
    load = f"model = {name}.from_pretrained({card.folder!r})"
    if card.difference is None:
        return f"from transformers import {name}\n\n{load}"
    lines = [
        f"from transformers import {name}",
        "from lightning_mi_prune import from_pretrained",
        "",
        f"model = from_pretrained({name}, {card.folder!r})",
    ]
    return "\n".join(lines)


def _sizes(card: Card) -> Iterator[tuple[str, str, str]]:
    now = sum(p.numel() for p in card.network.parameters())
    before = now
    if card.plan is not None:
        groups = card.graph.groups
        before += count_parameters(groups) - count_parameters(groups, card.plan.widths)
    yield "parameters", number(before), number(now)
    yield "file, MB", "", f"{card.file_size / 1e6:,.1f}"
    if card.measured.macs is not None:
        old, new = card.measured.macs
        yield "multiply-accumulates of an example", number(old), number(new)


def _latency_row(row: Latency) -> tuple[str, ...]:
    length = str(row.length) if row.length else ""
    if row.dense_ms is None:
        return str(row.batch), length, "", f"{row.ms:.3g}", ""
    ratio = f"{row.dense_ms / row.ms:.2f}"
    return str(row.batch), length, f"{row.dense_ms:.3g}", f"{row.ms:.3g}", ratio


def _groups(card: Card) -> Iterator[tuple[str, str, str, str]]:
    for group in card.graph.groups if card.plan is not None else ():
        width = card.plan.width(group.name) if card.plan else group.size
        yield f"`{group.name}`", group.kind, number(width), number(group.size)


def _made(card: Card) -> str:
    transformers = require("transformers", "transformers")
    versions = (
        f"lightning_mi_prune {version('lightning-mi-prune')}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    if card.plan is None:
        return f"Saved with {versions}."
    return f"{versions}. Digest of the plan: `{card.plan.digest()}`."
