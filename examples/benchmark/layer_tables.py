"""Tables of what whole layers are worth, in markdown, from the records."""

import statistics
from typing import Any

Record = dict[str, Any]


def depth_table(records: list[Record]) -> str:
    """The table of docs/layers.md."""
    dense = {(r["task"], r["seed"]): r["accuracy"] for r in records if r["criterion"] == "none"}
    lines = [
        "| task | layers | removed by | at epoch | taken over | seeds | accuracy | minus dense "
        "| removed |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        names = ("criterion", "cuts", "refit", "early")
        key = (record["task"], -record["layers"], *(record[name] for name in names))
        groups.setdefault(key, []).append(record)
    for (task, layers, criterion, _, refit, early), found in sorted(groups.items()):
        gaps = [100 * (r["accuracy"] - dense[r["task"], r["seed"]]) for r in found]
        values = [100 * r["accuracy"] for r in found]
        cells = [task, str(-layers), "" if criterion == "none" else f"`{criterion}`"]
        cells += ["" if criterion == "none" else "1" if early else "half-way"]
        cells += ["yes" if refit else ""]
        cells += [str(len(found)), spread(values), spread(gaps) if criterion != "none" else ""]
        cells += ["; ".join(removed(r) for r in found if r["removed"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def removed(record: Record) -> str:
    """Layers that went, as built, cut by cut."""
    return " + ".join(" ".join(map(str, cut["layers"])) for cut in record["removed"])


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def takeover_table(records: list[Record]) -> str:
    """The table of docs/layers.md: accuracy minus dense in points, median and range over seeds."""
    lines = [
        "| task | layers | seeds | dense | removed | taken over |",
        "|---|---|---|---|---|---|",
    ]
    for task, layers in sorted({(r["task"], -r["layers"]) for r in records}):
        mine = [r for r in records if (r["task"], r["layers"]) == (task, -layers)]
        dense = [100 * r["dense_accuracy"] for r in mine if r["refit"]]
        cells = [task, str(-layers), str(len(dense)), f"{statistics.median(dense):.2f}"]
        for refit in (False, True):
            gaps = [
                100 * (r["accuracy"] - r["dense_accuracy"]) for r in mine if r["refit"] == refit
            ]
            cells.append(spread(gaps))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
