"""PruningReport: what was cut, when, and what it cost."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from lightning_mi_prune.core.errors import PruningError, PruningWarning, counted, require
from lightning_mi_prune.core.files import check_writable, write_whole
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
from lightning_mi_prune.reconstruction.compensation import GroupInformation
from lightning_mi_prune.reporting.plots import save_heatmap
from lightning_mi_prune.reporting.summary import summary

__all__ = [
    "Cut",
    "GroupCut",
    "PruningReport",
    "group_cuts",
    "read_report",
]

_SIZES = ("parameters", "prunable_parameters", "macs")

_MOST = 2**63


@dataclass(frozen=True)
class GroupCut:
    """One group in one cut; its information is that of this cut, not of all cuts so far.

    Args:
        name: Path of the group.
        kind: Kind of unit.
        before: Units before the cut.
        after: Units after it.
        information_nats: Information with the kept units above that is left after it, in nats.
        information_fraction: The same as a share of the information just before it.
    """

    name: str
    kind: str
    before: int
    after: int
    information_nats: float
    information_fraction: float


@dataclass(frozen=True)
class Cut:
    """One cut: sizes of the whole model after it, its groups, and the time it took.

    Args:
        epoch: Epoch that started with the smaller model (``trainer.current_epoch``, from 0).
        sparsity: Share of the prunable parameters gone, against the model as built.
        parameters: Parameters of the whole module.
        prunable_parameters: Parameters of the tensors that a cut of the groups makes smaller.
        macs: Multiply-accumulates of the network for one example of validation.
        groups: What happened to each group.
        seconds: Time spent on ``discovery`` (in the first batches, and trials of cuts),
            ``gradients``, ``calibration``, ``ranking``, ``reconstruction`` and ``surgery``.
        stacks: What happened to stacks of layers; ``sparsity`` and ``prunable_parameters`` are then
            those of their layers.
        information_kept: Share of the information with the layers above, in nats and summed over
            all groups, that this cut and all before it left of the model as built (of a run that
            begins with a cut model: of that one). What ``keep_information`` counts; it never
            rises. None where layers went.
    """

    epoch: int
    sparsity: float
    parameters: int
    prunable_parameters: int
    macs: int
    groups: tuple[GroupCut, ...]
    seconds: Mapping[str, float]
    stacks: tuple[StackCut, ...] = ()
    information_kept: float | None = None


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
    """

    parameters: int = 0
    prunable_parameters: int = 0
    macs: int = 0
    cuts: list[Cut] = field(default_factory=list)
    start: Mapping[str, int] = field(default_factory=dict)
    undone: list[Cut] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

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
            "cuts": [asdict(cut) for cut in self.cuts],
            "undone": [asdict(cut) for cut in self.undone],
            **({"left_out": list(self.left_out)} if self.left_out else {}),
        }

    @property
    def groups(self) -> tuple[GroupCut, ...]:
        """Every group that was cut, from its width before the first cut to that after the last.

        Its information is that of the last cut.
        """
        first: dict[str, GroupCut] = {}
        last: dict[str, GroupCut] = {}
        for group in (group for cut in self.cuts for group in cut.groups):
            first.setdefault(group.name, group)
            last[group.name] = group
        return tuple(replace(last[name], before=group.before) for name, group in first.items())

    @property
    def seconds(self) -> dict[str, float]:
        """Time that was spent on each step of all cuts, also of those that were undone."""
        found: dict[str, float] = {}
        for cut in (*self.cuts, *self.undone):
            for name, value in cut.seconds.items():
                found[name] = found.get(name, 0.0) + value
        return found

    def __str__(self) -> str:
        """The network before and after, by kind and by layer, on one screen."""
        both, notes = self.to_dict(), []
        names = ("parameters", "prunable parameters", "MACs of one example")
        sizes = {
            n: (both["before"][s], both["after"][s]) for n, s in zip(names, _SIZES, strict=True)
        }
        stacks: dict[str, StackCut] = {}
        for stack in (stack for cut in self.cuts for stack in cut.stacks):
            before = stacks.get(stack.name, stack).before
            stacks[stack.name] = replace(stack, before=before)
        epochs = ", ".join(str(cut.epoch) for cut in self.cuts)
        cuts = f"{counted(len(self.cuts), 'cut')} at epoch {epochs}" if epochs else "No cut"
        undone = f"{len(self.undone)} rolled back" if self.undone else ""
        kept = [cut.information_kept for cut in self.cuts if cut.information_kept is not None]
        shares = f"information kept {kept[-1]:.1%}" if kept else ""
        notes.append(" | ".join(filter(None, (cuts, undone, shares))))
        return summary(
            sizes, self.groups, stacks=[*stacks.values()], seconds=self.seconds, notes=notes
        )

    def write(self, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
        """Write the report as JSON, and beside it a picture of every stack that lost layers.

        Without matplotlib there are no pictures, but a warning.

        Args:
            path: The JSON file.
            extra: Further entries; those of ``before`` and ``after`` are merged.

        Raises:
            PruningError: If the file cannot be written.
        """
        body, target = self.to_dict(), Path(path)
        check_writable(target, "The report")  # before the pictures
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
        for key, value in (extra or {}).items():
            if isinstance(value, Mapping) and key in ("before", "after"):
                body[key] |= dict(value)
            else:
                body[key] = value
        write_whole(target, json.dumps(body, indent=2) + "\n", "The report")


def read_report(state: object) -> PruningReport:
    """As :meth:`PruningReport.from_state`, for a part of a file; raises a plain exception."""
    found = mapping(state, [f.name for f in fields(PruningReport)])
    start = {name: whole(size, _MOST) for name, size in mapping(found["start"]).items()}
    cuts, undone = (list(map(_read_cut, listed(found[n]))) for n in ("cuts", "undone"))
    out = [text(reason) for reason in listed(found["left_out"])]
    sizes = _plain(PruningReport, found)
    return PruningReport(**sizes, cuts=cuts, start=start, undone=undone, left_out=out)


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
    return GroupCut(**_plain(GroupCut, mapping(state, [f.name for f in fields(GroupCut)])))


def _plain(kind: type[Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """The texts and numbers of a record, each of the type of its field."""
    read: dict[Any, Callable[[Any], Any]]
    read = {"str": text, "int": lambda value: whole(value, _MOST), "float": number}
    return {f.name: read[f.type](found[f.name]) for f in fields(kind) if f.type in read}


def group_cuts(
    groups: Sequence[DependencyGroup],
    before: Mapping[str, int],
    after: Mapping[str, int],
    information: Mapping[str, GroupInformation],
) -> tuple[GroupCut, ...]:
    """One record for each group, from the bottom of the network up."""
    return tuple(
        GroupCut(
            name=group.name,
            kind=group.kind,
            before=before[group.name],
            after=after[group.name],
            information_nats=information[group.name].kept,
            information_fraction=information[group.name].fraction,
        )
        for group in sorted(groups, key=lambda group: group.level)
    )
