"""Tables of the zoo, from its records."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.comparison import row, with_head
from benchmarks.records import Record
from benchmarks.zoo.measuring import KINDS

__all__ = ["every_model", "shortfalls", "summary"]

Records = Sequence[Record]
GOAL = 0.9
LIBRARIES = {"torch": "torch, by hand", "transformers": "transformers"}
LIBRARIES |= {"torchvision": "torchvision", "timm": "timm"}
STEPS = {"model": "no model", "build": "no graph", "prune": "pruning fails", "run": "does not run"}


def summary(records: Records) -> list[str]:
    """A row a library: how much is covered, how often a cut is wrong, and torch-pruning beside."""
    rows = []
    for library, label in [*LIBRARIES.items(), ("", "**all**")]:
        some = [r for r in records if library in ("", r["library"])]
        if not some:
            continue
        well = [r for r in some if (r.get("covered") or 0) > GOAL]
        seconds = [r["seconds"] for r in some if r.get("seconds") is not None]
        rival = [r["rival"] for r in some]
        done = [other for other in rival if _valid(other)]
        late = [other for other in rival if _late(other)]
        cells = [label, str(len(some)), str(sum(bool(r.get("groups")) for r in some))]
        cells += [f"{len(well)} ({len(well) / len(some):.0%})"]
        cells += [str(sum(bool(r.get("wrong")) for r in some))]
        cells += [str(sum(_late({"error": r.get("error") or ""}) for r in some))]
        cells += [f"{statistics.median(seconds):.1f} / {max(seconds):.1f}" if seconds else ""]
        cells += [f"{len(done)} ({len(done) / len(some):.0%})", str(len(late))]
        rows.append(row(cells))
    head = ["models", "number", "with groups", "over 90 % covered", "cut wrongly", "over the limit"]
    head += ["s, median / most", "torch-pruning: runs after its cut", "over the limit"]
    return with_head(head, rows, len(head) - 1)


def shortfalls(records: Records) -> list[str]:
    """Models with less than the goal covered, an error or a wrong cut, the least covered first."""
    rows = []
    for r in sorted(records, key=lambda r: (r.get("covered") or 0, r["model"])):
        failed = {**(r.get("wrong") or {}), **(r.get("uncut") or {})}
        reasons = [f"{kind}: {reason}" for kind, reason in failed.items()]
        if r.get("error"):
            reasons.append(f"{r['error']} ({r.get('stage')})")
        if not reasons and (r.get("covered") or 0) > GOAL:
            continue
        reasons += [f"no rule for {name}" for name in (r.get("unknown") or [])[:2]]
        reasons += (r.get("refusals") or [])[:2]
        reasons = reasons or ["what is left has sizes of inputs or outputs"]
        text = "; ".join(reasons).replace("|", "/").replace("\n", " ")
        rows.append(row([r["model"], _share(r.get("covered")), text[:240]]))
    return with_head(["model", "covered", "why"], rows) if rows else ["None."]


def every_model(records: Records) -> list[str]:
    """A row a model: groups by kind, shares, seconds, what was refused; torch-pruning beside."""
    lines: list[str] = []
    for library, label in LIBRARIES.items():
        some = [r for r in records if r["library"] == library]
        if not some:
            continue
        rows = []
        for r in some:
            groups: Mapping[str, int] = r.get("groups") or {}
            others = sum(number for kind, number in groups.items() if kind not in KINDS)
            note = f" ({r['note']})" if r.get("note") else ""
            cells = [f"{r['model']}{note}", _millions(r.get("parameters"))]
            cells += [str(groups.get(kind, "")) for kind in KINDS]
            cells += [str(others or ""), _share(r.get("covered"))]
            cells += [_share(r.get("covered_without_hidden")), _check(r)]
            cells += [str(sum((r.get("refused") or {}).values()) or "")]
            cells += ["; ".join(r.get("unknown") or ())[:60]]
            cells += [f"{r['seconds']:.1f}" if r.get("seconds") is not None else ""]
            cells += [_share(r.get("removed")), _rival(r["rival"])]
            rows.append(row(cells))
        head = ["model", "M parameters", *KINDS, "other", "covered", "without hidden", "cut"]
        head += ["refused", "no rule", "s", "removed at half", "torch-pruning"]
        lines += [f"**{label}**", "", *with_head(head, rows, 8), ""]
    return lines[:-1]


def _share(value: Any) -> str:
    return "" if value is None else f"{value:.0%}"


def _millions(value: Any) -> str:
    return "" if value is None else f"{value / 1e6:.2f}"


def _check(r: Record) -> str:
    """How the cut model compared with the masked one."""
    if r.get("wrong"):
        return f"**wrong**: {', '.join(r['wrong'])}"
    if r.get("uncut"):
        return f"not cut: {', '.join(r['uncut'])}"
    if r.get("error"):
        return "error" if r.get("stage") != "check" else "not checked"
    verdicts = set((r.get("verdicts") or {}).values())
    names = ("exact", "exact with restricted norms", "ran")
    worst = [name for name in names if name in verdicts]
    return worst[-1].replace("exact with restricted norms", "exact, norms") if worst else ""


def _valid(rival: Mapping[str, Any]) -> bool:
    return rival.get("step") == "done" and rival.get("removed", 0) > 0.01


def _late(found: Mapping[str, Any]) -> bool:
    return any(text in found.get("error", "") for text in ("TimeLimitError", "killed after"))


def _rival(rival: Mapping[str, Any]) -> str:
    """What torch-pruning removed, or where it failed."""
    if rival.get("step") == "done":
        done = f"{rival['removed']:.0%} in {rival['seconds']:.1f} s"
        return done if _valid(rival) else f"nothing removed, {rival['seconds']:.1f} s"
    if _late(rival):
        return "over the limit"
    error = str(rival.get("error", "")).split("\n")[0].replace("|", "/")[:60]
    return f"{STEPS.get(rival.get('step', 'model'), '')}: {error}"
