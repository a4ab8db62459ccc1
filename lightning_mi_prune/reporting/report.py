"""PruningReport: what was cut, when, why, and what it cost."""

from __future__ import annotations

import json
import platform
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_mi_prune.core.errors import PruningError, PruningWarning, require
from lightning_mi_prune.core.files import check_writable, write_whole
from lightning_mi_prune.core.plan import Ranking
from lightning_mi_prune.core.untrusted import (
    check_nesting,
    listed,
    mapping,
    number,
    reading,
    text,
    whole,
)
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.importance.layer_criteria import StackCut
from lightning_mi_prune.importance.stability import Agreement
from lightning_mi_prune.reconstruction.compensation import Decision, StandIns
from lightning_mi_prune.reporting.explain import Explanation, explain_group
from lightning_mi_prune.reporting.page import page_of
from lightning_mi_prune.reporting.plots import save_heatmap
from lightning_mi_prune.reporting.records import Cut, EpochMetrics, GroupCut

__all__ = [
    "PruningReport",
    "check_suffix",
    "group_cuts",
    "installed_versions",
    "read_report",
]

_SIZES = ("parameters", "prunable_parameters", "macs")

_MOST = 2**63
_LISTED = 4096  # units of a group that a file lists
_NUMBERS = re.compile(r"\[\n\s+((?:-?[\d.eE+-]+|null)(?:,\n\s+(?:-?[\d.eE+-]+|null))*)\n\s+\]")


@dataclass
class PruningReport:
    """All cuts of a run, beside the model as it was built.

    Args:
        parameters: Parameters of the whole module as built, before any cut of any run.
        prunable_parameters: Those the groups can cut, as built.
        macs: Multiply-accumulates of the networks for one example, before the first cut of this
            run (0 before the first calibration).
        cuts: The cuts, in order.
        start: Sizes at the start of this run, where an earlier one had cut already.
        undone: Cuts that cost more than ``max_drop`` and were rolled back.
        left_out: What the first batch showed that cannot be cut, and why; a sentence each.
        history: What validation logged in each epoch.
        monitor: The metric that ``max_drop`` compares, where there is one.
        versions: Versions of what made the report, by name.
    """

    parameters: int = 0
    prunable_parameters: int = 0
    macs: int = 0
    cuts: list[Cut] = field(default_factory=list)
    start: Mapping[str, int] = field(default_factory=dict)
    undone: list[Cut] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    history: list[EpochMetrics] = field(default_factory=list)
    monitor: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def add_metrics(self, epoch: int, values: Mapping[str, float]) -> None:
        """Note what validation logged; the last validation of an epoch counts."""
        if values:
            self.history = [e for e in self.history if e.epoch < epoch]
            self.history.append(EpochMetrics(epoch, dict(values)))

    def explain(self, group: str) -> Explanation:
        """Why the units of a group stay or went: order, expected loss, and what made up for them.

        Args:
            group: Name of the group, such as ``"layers.3.heads"``; its end is enough where only
                one group has it.

        Returns:
            A record whose ``str()`` is a short text with a table.

        Raises:
            PruningError: If no cut ranked a group of that name; the nearest names are listed.
        """
        return explain_group(self.cuts, group)

    def state_dict(self) -> dict[str, Any]:
        """All fields, as plain containers for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PruningReport:
        """The report from its :meth:`state_dict`.

        Raises:
            PruningError: If ``state`` is not one.

        Example:
            >>> report = PruningReport(parameters=10, start={"parameters": 8})
            >>> PruningReport.from_state(report.state_dict()) == report
            True
        """
        with reading("The report", "take another one"):
            check_nesting(state)
            return read_report(state)

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON: ``before``, ``after`` and ``cuts``."""
        before = {name: getattr(self, name) for name in _SIZES}
        after = before | dict(self.start)
        if self.cuts:
            after = {name: getattr(self.cuts[-1], name) for name in _SIZES}
            if self.cuts[0].stacks:  # shares count what the first callback may remove
                last = [cut for cut in self.cuts if cut.stacks][-1]
                since = last.parameters - self.cuts[-1].parameters
                after["prunable_parameters"] = last.prunable_parameters - since
        return {
            "before": before,
            "after": after,
            "cuts": [cut.to_dict() for cut in self.cuts],
            "undone": [cut.to_dict() for cut in self.undone],
            **({"left_out": list(self.left_out)} if self.left_out else {}),
            **({"plan": plan} if (plan := self._kept()) else {}),
            **({"history": [asdict(each) for each in self.history]} if self.history else {}),
            **({"monitor": self.monitor} if self.monitor else {}),
            **({"versions": dict(self.versions)} if self.versions else {}),
        }

    def _kept(self) -> dict[str, str]:
        """Units that stay, as ranges, by group; of very wide groups only the plan has them."""
        found: dict[str, str] = {}
        for cut in self.cuts:
            for group in cut.groups:
                if group.ranking is not None and group.before <= _LISTED:
                    found[group.name] = _ranges(group.ranking.kept(group.after))
            found |= {stack.name: _ranges(stack.after) for stack in cut.stacks}
        return found

    def write(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the report as a page or as JSON, by the suffix of the path.

        ``.html`` is one file with all figures in it, which needs no network. ``.json`` has the same
        numbers, and beside it a picture of every stack that lost layers. Without matplotlib there
        are no pictures, but a warning.

        Args:
            path: ``report.html`` or ``report.json``; missing folders are made.
            extra: Further entries; those of ``before`` and ``after`` are merged. The page shows
                ``metrics`` (by name) and ``latency_ms`` (a list with ``batch_size``,
                ``sequence_length`` and ``median``) of both.

        Raises:
            PruningError: If the suffix is another one, or the file cannot be written.
        """
        body, target = self.to_dict(), Path(path)
        check_suffix(target)
        check_writable(target, "The report")  # before the pictures
        _merge(body, extra or {})
        if target.suffix == ".html":
            write_whole(target, page_of(body), "The report")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        stacks = [
            (cut.epoch, stack, entry)
            for name in ("cuts", "undone")
            for cut, written in zip(getattr(self, name), body[name], strict=True)
            for stack, entry in zip(cut.stacks, written["stacks"], strict=True)
        ]
        try:
            if stacks:
                require("matplotlib", "plots")
        except PruningError as error:
            warnings.warn(f"No pictures of layers. {error}", PruningWarning, stacklevel=2)
            stacks = []
        for epoch, stack, entry in stacks:
            # Names of modules may contain characters that a file name cannot.
            plain = re.sub(r"[^\w.-]", "_", stack.name)[:100]
            entry["picture"] = f"layers-{epoch}-{plain}.png"
            save_heatmap(stack, target.with_name(entry["picture"]))
        write_whole(target, _as_json(body), "The report")


def check_suffix(path: str | Path) -> None:
    """Refuse a path that no report can be written to.

    Raises:
        PruningError: If it ends neither in .html nor in .json.
    """
    if Path(path).suffix not in (".html", ".json"):
        raise PruningError(
            f"The report cannot be written to {str(path)[:400]!r}; expected a path that ends in "
            "'.html' or '.json'."
        )


def _merge(body: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Add further entries to a report; those of ``before`` and ``after`` are merged."""
    for key, value in extra.items():
        if isinstance(value, Mapping) and key in ("before", "after"):
            body[key] |= dict(value)
        else:
            body[key] = value


def _as_json(body: Mapping[str, Any]) -> str:
    """Indented JSON; lists of numbers are on one line each."""
    plain = json.dumps(body, indent=2)
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", plain) + "\n"


def _ranges(units: Sequence[int]) -> str:
    """Increasing numbers as text, such as ``0-3, 7``."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and runs[-1][1] == unit - 1:
            runs[-1][1] = unit
        else:
            runs.append([unit, unit])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def installed_versions() -> dict[str, str]:
    """Versions of Python, of this package and of what it runs on."""
    found = {
        "python": platform.python_version(),
        "lightning-mi-prune": version("lightning-mi-prune"),
    }
    for name in ("torch", "lightning", "transformers"):
        if name in sys.modules:
            found[name] = str(getattr(sys.modules[name], "__version__", "?"))
    return found


def read_report(state: object) -> PruningReport:
    """As :meth:`PruningReport.from_state`, for a part of a file; raises a plain exception."""
    found = mapping(state, [f.name for f in fields(PruningReport)])
    start = {name: whole(size, _MOST) for name, size in mapping(found["start"]).items()}
    cuts, undone = (list(map(_read_cut, listed(found[n]))) for n in ("cuts", "undone"))
    return PruningReport(
        **_plain(PruningReport, found),
        cuts=cuts,
        start=start,
        undone=undone,
        left_out=[text(reason) for reason in listed(found["left_out"])],
        history=[_read_metrics(each) for each in listed(found["history"])],
        versions={text(n): text(v) for n, v in mapping(found["versions"]).items()},
    )


def _read_metrics(state: object) -> EpochMetrics:
    found = mapping(state, ["epoch", "values"])
    values = {name: number(value) for name, value in mapping(found["values"]).items()}
    return EpochMetrics(whole(found["epoch"]), values)


def _read_cut(state: object) -> Cut:
    found = mapping(state, [f.name for f in fields(Cut)])
    kept = found["information_kept"]
    return Cut(
        **_plain(Cut, found),
        groups=tuple(map(_read_group, listed(found["groups"]))),
        seconds={name: number(value) for name, value in mapping(found["seconds"]).items()},
        stacks=tuple(map(StackCut.read, listed(found["stacks"]))),
        information_kept=None if kept is None else number(kept, 0, 1),
    )


def _read_group(state: object) -> GroupCut:
    found = mapping(state, [f.name for f in fields(GroupCut)])
    return GroupCut(
        **_plain(GroupCut, found),
        ranking=_optional(found["ranking"], _read_ranking),
        stand_ins=_optional(found["stand_ins"], _read_stand_ins),
        agreement=_optional(found["agreement"], _read_agreement),
    )


def _optional(value: Any, read: Callable[[Any], Any]) -> Any:
    return None if value is None else read(value)


def _read_ranking(state: object) -> Ranking:
    found = mapping(state, ["order", "loss", "nats"])
    return Ranking(*(tuple(listed(found[name])) for name in ("order", "loss", "nats")))


def _read_stand_ins(state: object) -> StandIns:
    found = mapping(state, ["units", "shares", "best"])
    return StandIns(
        units=tuple(map(whole, listed(found["units"]))),
        shares=tuple(map(number, listed(found["shares"]))),
        best=tuple(map(partial(_optional, read=whole), listed(found["best"]))),
    )


def _read_agreement(state: object) -> Agreement:
    found = mapping(state, ["units", "kept", "both"])
    return Agreement(**{name: whole(value) for name, value in found.items()})


def _plain(kind: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The texts and numbers of a record, each of the type of its field."""
    read: dict[Any, Callable[[Any], Any]]
    read = {"str": text, "int": lambda value: whole(value, _MOST), "float": number}
    return {f.name: read[f.type](found[f.name]) for f in fields(kind) if f.type in read}


def group_cuts(
    groups: Sequence[DependencyGroup],
    before: Mapping[str, int],
    after: Mapping[str, int],
    decision: Decision,
) -> tuple[GroupCut, ...]:
    """One record for each group, from the bottom of the network up.

    Args:
        groups: Groups that could be cut.
        before: Their widths before the cut.
        after: Their widths after it.
        decision: What was decided.
    """
    return tuple(
        GroupCut(
            name=group.name,
            kind=group.kind,
            before=before[group.name],
            after=after[group.name],
            information_nats=decision.information[group.name].kept,
            information_fraction=decision.information[group.name].fraction,
            ranking=decision.plan.rankings.get(group.name),
            stand_ins=decision.stand_ins.get(group.name),
            agreement=decision.agreement.get(group.name),
        )
        for group in sorted(groups, key=lambda group: group.level)
    )
