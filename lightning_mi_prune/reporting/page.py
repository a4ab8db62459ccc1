"""The report as one HTML page: sections, their figures and tables, made from its JSON alone."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from typing import Any

from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted, require
from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.reporting import figures
from lightning_mi_prune.reporting.plots import heatmap

__all__ = [
    "page_of",
]

_STEPS = ("discovery", "gradients", "calibration", "ranking", "reconstruction", "surgery")
_SIZES = {
    "parameters": "parameters",
    "prunable_parameters": "prunable parameters",
    "macs": "multiply-accumulates of an example",
}
_METRICS = 4  # that have a figure
_LONGEST = 120


@dataclass(frozen=True)
class Cell:
    """A number of a table, as it is shown and as the JSON has it."""

    text: str
    value: float | int


@dataclass(frozen=True)
class Data:
    """A table.

    Args:
        caption: What it lists.
        columns: Names of the columns; the first one names the rows.
        rows: Texts and numbers.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]


@dataclass(frozen=True)
class Drawing:
    """A figure with the table of its numbers.

    Args:
        caption: One line below it.
        svg: The figure; None where it cannot be drawn.
        data: Its numbers.
    """

    caption: str
    svg: Any
    data: Data


@dataclass
class Section:
    """A part of the page.

    Args:
        name: Its anchor.
        title: Its heading.
        text: Sentences below that.
        drawings: Its figures.
        tables: Tables that are always seen.
        folded: Tables that are folded, by what is read before they are opened.
    """

    name: str
    title: str
    text: str = ""
    drawings: list[Drawing] = field(default_factory=list)
    tables: list[Data] = field(default_factory=list)
    folded: list[tuple[str, Data]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether it has nothing to show."""
        return not (self.drawings or self.tables or self.folded)


class _Pen:
    """Draws the figures of one page, and numbers them."""

    def __init__(self, *, draws: bool) -> None:
        self.draws, self.count = draws, 0
        self.markup: Any = require("markupsafe", "plots").Markup

    def draw(self, make: Callable[[], Any], caption: str, data: Data) -> Drawing:
        """A figure with its caption; without matplotlib its numbers only."""
        if not self.draws:
            return Drawing(caption, None, data)
        self.count += 1
        svg = figures.svg_of(make(), f"{caption} The numbers follow in a table.", f"f{self.count}")
        return Drawing(caption, self.markup(svg), data)


def page_of(body: Mapping[str, Any]) -> str:
    """The report as one HTML page without scripts, which opens without a network.

    Args:
        body: What :meth:`PruningReport.to_dict` gives, with further entries. What it does not hold
            is not shown. Equal bodies give equal text.

    Raises:
        PruningError: If jinja2 is not installed.
    """
    jinja2 = require("jinja2", "plots")
    try:
        require("matplotlib", "plots")
        pen = _Pen(draws=True)
    except PruningError as error:
        warnings.warn(f"The report has no figures. {error}", PruningWarning, stacklevel=3)
        pen = _Pen(draws=False)
    made: list[Section] = [
        _widths(body, pen),
        _sensitivity(body, pen),
        _metrics(body, pen),
        _information(body, pen),
        _layers(body, pen),
        _stability(body, pen),
        _latency(body, pen),
        _cost(body, pen),
        _plan(body),
        _left_out(body),
        _versions(body),
    ]
    source = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return str(
        environment.from_string(source).render(
            lead=_lead(body),
            tiles=[*_tiles(body)],
            summary=_summary(body),
            sections=[section for section in made if not section.is_empty],
            is_number=lambda cell: isinstance(cell, Cell),
        )
        + "\n"
    )


# Texts


def _plain(name: Any) -> str:
    """A name as one line of bounded length; what cannot be printed becomes a sign for it."""
    text = str(name)[: _LONGEST + 1]
    text = "".join("�" if unicodedata.category(c)[0] == "C" else c for c in text)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _cell(value: Any, form: str = ",") -> str | Cell:
    """A number as text and value; nothing where there is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else _plain(value)
    return Cell(format(value, form), value)


def _labels(names: Sequence[str]) -> list[str]:
    """Short names of groups: what differs between them, or their place where that is long."""
    parts = [name.split(".") for name in names]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [part[1:] for part in parts]
    while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [part[:-1] for part in parts]
    found = [_plain(".".join(part)) for part in parts]
    if len(names) == 1:
        return [_plain(parts[0][-1])[:24]]
    return found if max(map(len, found), default=0) <= 5 else [str(i) for i in range(len(names))]


def _percent(value: float) -> str:
    return f"{value:.1%}"


# Summary


def _sides(body: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return body["before"], body["after"]


def _metric_pairs(body: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Metrics before pruning and after it, as they were measured."""
    before, after = (side.get("metrics") or {} for side in _sides(body))
    return {name: (before.get(name), after.get(name)) for name in {**before, **after}}


def _validated(body: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Metrics of the last validation before the first cut, and of the last one."""
    history, cuts = body.get("history") or [], body["cuts"]
    if not history or not cuts:
        return {}
    first = cuts[0]["epoch"]
    before: Mapping[str, Any] = next(
        (e["values"] for e in reversed(history) if e["epoch"] < first), {}
    )
    after = history[-1]["values"]
    return {name: (before.get(name), after[name]) for name in _ordered(body, after)}


def _ordered(body: Mapping[str, Any], names: Mapping[str, Any]) -> list[str]:
    monitor = body.get("monitor")
    return sorted(names, key=lambda name: (name != monitor, name))


def _lead(body: Mapping[str, Any]) -> str:
    cuts, undone = body["cuts"], body["undone"]
    if not cuts:
        return "Nothing was cut." + (f" {counted(len(undone), 'cut')} rolled back." * bool(undone))
    before, after = _sides(body)
    gone = 1 - after["parameters"] / max(1, before["parameters"])
    epochs = [cut["epoch"] for cut in cuts]
    when = f" at the start of epoch {', '.join(map(str, epochs))}" if any(epochs) else ""
    text = f"{counted(len(cuts), 'cut')}{when}; {gone:.1%} of all parameters are gone."
    if undone:
        text += f" {counted(len(undone), 'cut')} cost too much and "
        text += "was rolled back." if len(undone) == 1 else "were rolled back."
    return text


def _tiles(body: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The numbers that are read first: name, before, after, change."""
    before, after = _sides(body)
    for key, name in (("parameters", "parameters"), ("macs", "MACs of an example")):
        old, new = before.get(key), after.get(key)
        if old and new:
            yield name, _short(old), _short(new), f"{new / old - 1:+.1%}"
    pairs = _metric_pairs(body)
    known = pairs or _validated(body)
    for name in _ordered(body, known)[:2]:
        old, new = known[name]
        if isinstance(new, (int, float)):
            has = isinstance(old, (int, float))
            change = f"{new - old:+.4g}" if has else ""
            where = _plain(name)[:30]
            yield where, f"{old:.4g}" if has else "", f"{new:.4g}", change
    for row in _latency_rows(body)[:1]:
        label, old, new = row
        if old and new:
            yield f"ms, {label}", f"{old:.3g}", f"{new:.3g}", f"{old / new:.2f} times as fast"


def _short(value: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:,}"


def _summary(body: Mapping[str, Any]) -> Data:
    before, after = _sides(body)
    rows: list[list[str | Cell]] = []
    for key, name in _SIZES.items():
        old, new = before.get(key), after.get(key)
        if old or new:
            change = f"{new / old - 1:+.1%}" if old and new is not None else ""
            rows.append([name, _cell(old), _cell(new), change])
    for name, (old, new) in _metric_pairs(body).items():
        rows.append([_plain(name), _cell(old, ".6g"), _cell(new, ".6g"), _difference(old, new)])
    for name, (old, new) in _validated(body).items():
        label = f"{_plain(name)}, last validation before the first cut and in the end"
        rows.append([label, _cell(old, ".6g"), _cell(new, ".6g"), _difference(old, new)])
    for label, old, new in _latency_rows(body):
        ratio = f"{old / new:.2f} times as fast" if old and new else ""
        rows.append([f"milliseconds, {label}", _cell(old, ".4g"), _cell(new, ".4g"), ratio])
    kept = [cut.get("information_kept") for cut in body["cuts"]]
    left = next((value for value in reversed(kept) if value is not None), None)
    if left is not None:
        rows.append(["information with the layers above", Cell("100%", 1), _share(left), ""])
    return Data("Before and after", ("", "before", "after", "change"), rows)


def _difference(old: Any, new: Any) -> str:
    both = isinstance(old, (int, float)) and isinstance(new, (int, float))
    return f"{new - old:+.4g}" if both else ""


def _share(value: float | None) -> str | Cell:
    return "" if value is None else Cell(_percent(value), value)


# Sections


def _last_groups(body: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What the last cut of every group left, with its width before the first one, by kind."""
    first: dict[str, int] = {}
    last: dict[str, dict[str, Any]] = {}
    for cut in body["cuts"]:
        for group in cut["groups"]:
            first.setdefault(group["name"], group["before"])
            last[group["name"]] = group
    found: dict[str, list[dict[str, Any]]] = {}
    for name, group in last.items():
        found.setdefault(group["kind"], []).append({**group, "built": first[name]})
    return found


def _first_and_last(
    body: Mapping[str, Any],
) -> Iterator[tuple[Mapping[str, Any], str, list[dict[str, Any]]]]:
    """Groups of the first cut of units and of the last one, by kind."""
    found = [cut for cut in body["cuts"] if cut["groups"]]
    for cut in found[:1] + found[1:][-1:]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for group in cut["groups"]:
            kinds.setdefault(group["kind"], []).append(group)
        for kind, groups in kinds.items():
            yield cut, kind, groups


def _when(cut: Mapping[str, Any]) -> str:
    return f", cut of epoch {cut['epoch']}" if cut["epoch"] else ""


def _widths(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section("widths", "Widths by layer")
    for kind, groups in _last_groups(body).items():
        names = [group["name"] for group in groups]
        labels, built, after = _labels(names), [g["built"] for g in groups], _of(groups, "after")
        data = Data(
            f"Units of kind {_plain(kind)}",
            ("group", "before", "after", "stays", "information kept by its last cut"),
            [
                [
                    _plain(g["name"]),
                    _cell(g["built"]),
                    _cell(g["after"]),
                    _share(g["after"] / max(1, g["built"])),
                    _share(g["information_fraction"]),
                ]
                for g in groups
            ],
        )
        total = f"{sum(after):,} of {sum(built):,} stay"
        drawing = pen.draw(
            partial(figures.bars, labels, built, after, x="layer, bottom to top", y="units"),
            f"{_plain(kind)}: units of each layer before (outline) and after; {total}.",
            data,
        )
        section.drawings.append(drawing)
    return section


def _of(groups: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return [group[name] for group in groups]


def _sensitivity(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section(
        "sensitivity",
        "What each layer would miss",
        "Expected rise of the loss as units go in their order, one curve a layer, stronger towards "
        "the output. The dots are the widths that were chosen.",
    )
    for cut, kind, groups in _first_and_last(body):
        ranked = [g for g in groups if g.get("curve") and len(g["curve"]["widths"]) > 2]
        if not ranked:
            continue
        lines, rows = [], list[list[str | Cell]]()
        for group in ranked:
            curve, before = group["curve"], max(1, group["before"])
            widths = curve["widths"]
            chosen = widths.index(group["after"]) if group["after"] in widths else None
            lines.append(figures.Line([100 * w / before for w in widths], curve["loss"], chosen))
            for place, (width, loss, nats) in enumerate(
                zip(widths, curve["loss"], curve["nats"], strict=True)
            ):
                mark = "chosen" if place == chosen else ""
                name = _plain(group["name"])
                rows.append([name, _cell(width), _cell(loss, ".4g"), _cell(nats, ".4g"), mark])
        columns = ("group", "units left", "expected rise of the loss", "nats lost", "")
        section.drawings.append(
            pen.draw(
                partial(
                    figures.curves,
                    lines,
                    x="units that stay, % of those before the cut",
                    y="rise of the loss, nats",
                ),
                f"{_plain(kind)}{_when(cut)}: expected rise of the loss, of "
                f"{counted(len(lines), 'layer')}.",
                Data(f"Loss curves of kind {_plain(kind)}{_when(cut)}", columns, rows),
            )
        )
    return section


def _metrics(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section("metrics", "Metrics over epochs")
    history = body.get("history") or []
    cuts, undone = ([cut["epoch"] for cut in body[name]] for name in ("cuts", "undone"))
    names = _ordered(body, {name: None for each in history for name in each["values"]})
    for name in names[:_METRICS]:
        known = [(e["epoch"], e["values"][name]) for e in history if name in e["values"]]
        rows: list[list[str | Cell]] = []
        for epoch, value in known:
            mark = "cut" * (epoch in cuts) or "rolled back" * (epoch in undone)
            rows.append([str(epoch), _cell(value, ".6g"), mark])
        title = _plain(name)
        section.drawings.append(
            pen.draw(
                partial(figures.epochs, known, cuts, undone, y=title[:40]),
                f"{title} of the validation of each epoch.",
                Data(title, ("epoch", "value", "begins with"), rows),
            )
        )
    return section


def _information(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section("information", "Information kept")
    known = [(c["epoch"], c["information_kept"]) for c in body["cuts"] if _is_known(c)]
    if len(known) > 1:
        names = ["start", *(f"epoch {epoch}" for epoch, _ in known)]
        values = [1.0, *(value for _, value in known)]
        rows = [[name, _share(value)] for name, value in zip(names, values, strict=True)]
        section.drawings.append(
            pen.draw(
                partial(figures.steps, names, values, x="cut", y="kept"),
                "Information with the layers above that all cuts so far have left.",
                Data("Information kept", ("after the cut of", "kept"), rows),
            )
        )
    return section


def _is_known(cut: Mapping[str, Any]) -> bool:
    return cut.get("information_kept") is not None


def _layers(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section("layers", "Similarity of layers (CKA)")
    for cut in body["cuts"]:
        for entry in cut["stacks"]:
            known = {name: value for name, value in entry.items() if name != "picture"}
            stack = StackCut.read(known)
            layers = [str(layer) for layer in stack.before]
            rows = [
                [layer, *(_cell(value, ".3f") for value in row)]
                for layer, row in zip(layers, stack.similarity, strict=True)
            ]
            removed = ", ".join(map(str, stack.removed))
            clusters = "; ".join(" ".join(map(str, cluster)) for cluster in stack.clusters)
            section.drawings.append(
                pen.draw(
                    partial(_heatmap, stack),
                    f"{_plain(stack.name)}, epoch {cut['epoch']}: {len(stack.before)} layers, "
                    f"removed {removed}. Clusters: {clusters}.",
                    Data(f"CKA of the layers of {_plain(stack.name)}", ("layer", *layers), rows),
                )
            )
    return section


def _heatmap(stack: StackCut) -> Any:
    with figures.drawing():
        return heatmap(stack)


def _stability(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section(
        "stability",
        "Stability of the order",
        "Two halves of the calibration data ranked the units apart. Where both keep the same ones, "
        "the order is no accident of the data; at chance it is noise.",
    )
    for cut, kind, groups in _first_and_last(body):
        known = [group for group in groups if group.get("agreement")]
        if not known:
            continue
        found = _of(known, "agreement")
        rows = [
            [
                _plain(group["name"]),
                _cell(each["kept"]),
                _cell(each["both"]),
                _share(each["share"]),
                _share(each["chance"]),
                "no better than chance" if each["is_chance"] else "",
            ]
            for group, each in zip(known, found, strict=True)
        ]
        worst = sum(each["is_chance"] for each in found)
        text = f"; {counted(worst, 'group')} no better than chance" if worst else ""
        columns = ("group", "units kept", "by both halves", "share", "by chance", "")
        section.drawings.append(
            pen.draw(
                partial(
                    figures.shares,
                    _labels(_of(known, "name")),
                    _of(found, "share"),
                    _of(found, "chance"),
                    x="layer, bottom to top",
                    y="kept by both halves",
                    labels=("both halves keep", "by chance"),
                ),
                f"{_plain(kind)}{_when(cut)}: kept units that both halves agree on{text}.",
                Data(f"Agreement on units of kind {_plain(kind)}{_when(cut)}", columns, rows),
            )
        )
    return section


def _latency_rows(body: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Milliseconds before and after, by batch size and length."""
    found: dict[tuple[int, int], list[Any]] = {}
    for place, side in enumerate(_sides(body)):
        measured = side.get("latency_ms")
        for row in measured if isinstance(measured, list) else []:
            key = (row.get("batch_size") or 1, row.get("sequence_length") or 0)
            found.setdefault(key, [None, None])[place] = row.get("median")
    rows = []
    for (batch, length), (old, new) in sorted(found.items()):
        tokens = f" of {counted(length, 'token')}" if length else ""
        rows.append((f"{counted(batch, 'example')}{tokens}", old, new))
    return rows


def _latency(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section("latency", "Latency by batch size")
    rows = [row for row in _latency_rows(body) if row[2]]
    if rows:
        names = [name for name, _, _ in rows]
        parts = {"before": [old for _, old, _ in rows], "after": [new for _, _, new in rows]}
        parts = {name: values for name, values in parts.items() if all(values)}
        machine = next(
            (m for side in _sides(body) for r in side.get("latency_ms") or () if (m := _where(r))),
            "",
        )
        data = Data(
            "Milliseconds of a forward pass",
            ("", "before", "after"),
            [[name, _cell(old, ".4g"), _cell(new, ".4g")] for name, old, new in rows],
        )
        section.drawings.append(
            pen.draw(
                partial(figures.stacked, names, parts, together=False, x="milliseconds"),
                f"Medians of one forward pass{machine}.",
                data,
            )
        )
    return section


def _where(row: Mapping[str, Any]) -> str:
    machine, threads = row.get("machine"), row.get("threads")
    with_threads = f", {counted(threads, 'thread')}" if isinstance(threads, int) else ""
    return f" on {_plain(machine)}{with_threads}" if machine else ""


def _cost(body: Mapping[str, Any], pen: _Pen) -> Section:
    section = Section("cost", "What pruning took")
    cuts = body["cuts"]
    known = [step for step in _STEPS if any(cut["seconds"].get(step) for cut in cuts)]
    known += sorted({step for cut in cuts for step in cut["seconds"]} - set(_STEPS))
    if not known:
        return section
    names = [f"epoch {cut['epoch']}" if cut["epoch"] else "cut" for cut in cuts]
    parts = {step: [float(cut["seconds"].get(step, 0)) for cut in cuts] for step in known}
    total = sum(sum(values) for values in parts.values())
    rows = [
        [name, *(_cell(parts[step][place], ".2f") for step in known)]
        for place, name in enumerate(names)
    ]
    training = body["after"].get("fit_seconds")
    of = f" of {training:.0f} s of training" if isinstance(training, (int, float)) else ""
    section.drawings.append(
        pen.draw(
            partial(figures.stacked, names, parts, together=True, x="seconds"),
            f"Seconds of each step of a cut, {total:.1f} s in all{of}.",
            Data("Seconds", ("", *map(_plain, known)), rows),
        )
    )
    return section


def _plan(body: Mapping[str, Any]) -> Section:
    section = Section("plan", "Plan")
    plan = body.get("plan") or {}
    if plan:
        rows = [[_plain(name), units or "none"] for name, units in plan.items()]
        data = Data("Units that stay, as numbered when built", ("group", "units"), rows)
        section.folded.append((f"Units that stay in {counted(len(plan), 'group')}", data))
    return section


def _left_out(body: Mapping[str, Any]) -> Section:
    section = Section("left-out", "What cannot be cut")
    reasons = body.get("left_out") or []
    if reasons:
        pairs = [str(reason).partition(": ") for reason in reasons]
        rows = [[_plain(name), _plain(why)] for name, _, why in pairs]
        title = f"{counted(len(rows), 'part')} of the model"
        section.folded.append((title, Data(title, ("part", "why"), rows)))
    return section


def _versions(body: Mapping[str, Any]) -> Section:
    section = Section("versions", "Versions")
    known = body.get("versions") or {}
    if known:
        rows = [[_plain(name), _plain(value)] for name, value in known.items()]
        section.tables.append(Data("Versions", ("", "version"), rows))
    return section
