"""A width plan as a YAML file that people edit: written, read and checked in sentences."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import yaml

from lightning_mi_prune.allocation.budget import Budget, budget_of
from lightning_mi_prune.allocation.constraints import may_be_empty, resolve_bounds, step_of
from lightning_mi_prune.allocation.width_plan import (
    PlannedBudget,
    PlannedGroup,
    PlannedSize,
    WidthPlan,
    budget_label,
)
from lightning_mi_prune.core.errors import PruningError, counted, shortened
from lightning_mi_prune.core.files import write_whole
from lightning_mi_prune.core.options import Constraints, Widths
from lightning_mi_prune.core.untrusted import check_nesting, described, number, read_text, whole
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import DependencyGroup

__all__ = [
    "budget_or_plan",
    "check_bounds",
    "check_present",
    "choose_planned",
    "plan_from_yaml",
    "plan_of",
    "plan_to_yaml",
    "planned_groups",
    "read_plan",
    "write_plan",
]

_VERSION = 1
_LARGEST = 2**20  # characters; the reader of YAML is slow
_MOST_GROUPS, _MOST_COLUMNS = 20_000, 32
_WIDEST = 2**24
_PLAIN = re.compile(r"[A-Za-z_][\w.-]*[\w]")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off"}  # no text in YAML
_HEAD = """\
# What a cut would leave: the units of every group, for several budgets side by side.
# Change a width. Or write "pin: 48" (units that stay whatever the budget) or "exclude: true"
# (left alone) into the line of a group. A group whose line is deleted is left alone, too.
# "cut" names the budget that is carried out, with plan="plan.yaml" as an option of prune() or
# MutualInformationPruning, or: lightning-mi-prune prune run.yaml --plan plan.yaml
"""
_TOP = ("version", "model", "cut", "widths", "multiple", "loss_unit", "now", "budgets", "groups")
_TOP_OPTIONAL = ("ranked_at", "left_out")
_SIZES = ("parameters", "macs", "ms")
_OF_GROUP = ("kind", "built", "now", "pin", "exclude", "parameters", "loss")


def write_plan(plan: WidthPlan, path: str | Path) -> Path:
    """Write a plan as YAML, whole or not at all.

    Args:
        plan: The plan.
        path: The file.

    Returns:
        The file.

    Raises:
        PruningError: If it cannot be written.
    """
    write_whole(path, plan_to_yaml(plan), "The plan")
    return Path(path)


def read_plan(path: str | Path) -> WidthPlan:
    """Read a plan from a file of unknown origin.

    Args:
        path: The file.

    Raises:
        PruningError: If it cannot be read, or is no plan.
    """
    text = read_text(path, "The plan", "write one with plan()", longest=_LARGEST)
    return plan_from_yaml(text, f"The plan in {str(path)[:200]!r}")


def plan_of(given: WidthPlan | str | Path) -> WidthPlan:
    """A plan, or the plan in a file.

    Raises:
        PruningError: If it is something else.
    """
    if isinstance(given, WidthPlan):
        return given
    if not isinstance(given, (str, Path)):
        raise PruningError(
            f"plan={described(given)}; expected the path of a plan.yaml, or what plan() returned."
        )
    return read_plan(given)


# ------------------------------------------------------------------------------------------ writing


def plan_to_yaml(plan: WidthPlan) -> str:
    """The text of a plan: a line for every budget and every group.

    Example:
        >>> column = PlannedBudget(Budget(0.5), {"ffn": 32}, {"ffn": 0.125})
        >>> plan = WidthPlan("Net", (PlannedGroup("ffn", "ffn", 64, 64),), (column,), cut="50%")
        >>> print("".join(plan_to_yaml(plan).splitlines(keepends=True)[5:]))
        version: 1
        model: Net
        cut: 50%
        widths: global
        multiple: 8
        loss_unit: ""
        now: {}
        budgets:
          50%: {sparsity: 0.5, loss: 0.125}
        groups:
          ffn: {kind: ffn, now: 64, 50%: 32, loss: [0.125]}
        <BLANKLINE>
        >>> plan_from_yaml(plan_to_yaml(plan)) == plan
        True
    """
    lines = [
        f"version: {_VERSION}",
        f"model: {_scalar(plan.model)}",
        f"cut: {plan.cut}",
        f"widths: {plan.widths}",
        f"multiple: {plan.multiple}",
        f"loss_unit: {_scalar(plan.loss_unit)}",
        f"now: {_flow(_size_of(plan.size))}",
        "budgets:",
    ]
    for column in plan.columns:
        body: dict[str, Any] = {column.budget.kind: column.budget.amount, **_size_of(column.size)}
        body |= {"loss": column.total_loss} if column.loss else {}
        lines.append(f"  {column.label}: {_flow(body)}")
    lines.append("groups:")
    names = [_scalar(group.name) for group in plan.groups]
    widest = min(60, max(map(len, names), default=0))
    for name, group in zip(names, plan.groups, strict=True):
        lines.append(f"  {name + ':':<{widest + 1}} {_flow(_line_of(plan, group))}")
    ranked = [column for column in plan.columns if column.ranked_at]
    if ranked:
        lines.append(
            "ranked_at: # widths for which units were put in order; leave them as they are"
        )
        lines += [f"  {c.label}: [{', '.join(map(_flow, c.ranked_at))}]" for c in ranked]
    if plan.left_out:
        lines.append("left_out: # budgets that are out of reach")
        lines += [f"  {_scalar(n)}: {_scalar(why)}" for n, why in plan.left_out.items()]
    return _HEAD + "\n".join(lines) + "\n"


def _line_of(plan: WidthPlan, group: PlannedGroup) -> dict[str, Any]:
    line: dict[str, Any] = {"kind": group.kind}
    line |= {"built": group.built} if group.built != group.now else {}
    line["now"] = group.now
    line |= {column.label: column.widths[group.name] for column in plan.columns}
    line |= {} if group.pin is None else {"pin": group.pin}
    line |= {"exclude": True} if group.exclude else {}
    line |= {} if group.parameters is None else {"parameters": group.parameters}
    losses = [column.loss.get(group.name) for column in plan.columns]
    return line if None in losses else {**line, "loss": losses}


def _size_of(size: PlannedSize) -> dict[str, Any]:
    return {name: getattr(size, name) for name in _SIZES if getattr(size, name) is not None}


def _flow(value: Any) -> str:
    """Plain containers in one line; numbers so that YAML 1.1 reads them as numbers."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(k)}: {_flow(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        text = repr(value)
        return re.sub(r"^(-?\d+)e", r"\1.0e", text)
    return _scalar(value) if isinstance(value, str) else str(value)


def _scalar(text: str) -> str:
    """A text as YAML: plain where nothing else could be meant, else in quotes."""
    label = re.fullmatch(r"[\d.]+(%|%? [a-zA-Z]+)", text)  # of a budget
    if label or (_PLAIN.fullmatch(text) and text.lower() not in _WORDS):
        return text
    quoted: str = yaml.safe_dump(text, default_style='"', allow_unicode=True, width=2**30)
    return quoted.strip()


# ------------------------------------------------------------------------------------------ reading


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
    """Plain values without references, which could repeat themselves a billion times."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(
                None, None, "it refers to another place (*name)", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[Any, Any] = {}
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{described(name)} is there twice", key.start_mark
                )
            seen[name] = key
        return super().construct_mapping(node, deep)


def _loaded(text: str, what: str) -> Any:
    try:
        body = yaml.load(text, _Loader)  # noqa: S506  # a SafeLoader
        check_nesting(body)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join((getattr(error, "problem", None) or str(error)).split())[:200]
        raise PruningError(f"{what} is no valid YAML{where} ({problem}); correct it.") from error
    except (ValueError, TypeError, RecursionError, AttributeError, LookupError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise PruningError(
            f"{what} is no valid YAML ({' '.join(reason.split())}); correct it."
        ) from error
    return body


def plan_from_yaml(text: str, what: str = "The plan") -> WidthPlan:
    """A plan from YAML of unknown origin; whether it fits a model is checked when it is used.

    Args:
        text: The text.
        what: Name of the text in error messages.

    Raises:
        PruningError: If it is no plan of this version, or contradicts itself.

    Example:
        >>> plan_from_yaml("version: 7")
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: The plan has version 7; this package reads \
version 1. Plan again.
    """
    if len(text) > _LARGEST:
        raise PruningError(f"{what} has more than {_LARGEST} characters; plan again.")
    body = _names(_loaded(text, what), what, what)
    version = body.get("version")
    if type(version) is not int or version != _VERSION:
        found = f"version {described(version)}" if "version" in body else "no version"
        raise PruningError(f"{what} has {found}; this package reads version 1. Plan again.")
    _check_keys(body, what, _TOP, (*_TOP, *_TOP_OPTIONAL))
    columns = _columns(_names(body["budgets"], what, "budgets"), what)
    lines = _names(body["groups"], what, "groups")
    if not 1 <= len(lines) <= _MOST_GROUPS:
        raise PruningError(
            f"{what} has {counted(len(lines), 'group')}; expected 1 to {_MOST_GROUPS}."
        )
    groups: list[PlannedGroup] = []
    widths: dict[str, dict[str, int]] = {label: {} for label in columns}
    losses: dict[str, dict[str, float]] = {label: {} for label in columns}
    for name, line in lines.items():
        where = f"{what}, group {described(name)}:"
        group, mine, loss = _group(name, _names(line, what, f"group {name}"), columns, where)
        groups.append(group)
        for label in columns:
            widths[label][name] = mine[label]
            losses[label] |= {name: loss[label]} if loss else {}
    ranked = _ranked_at(body.get("ranked_at"), what, columns, {g.name: g.built for g in groups})
    choices = get_args(Widths)
    if body["widths"] not in choices:
        raise PruningError(
            f"{what} has widths: {described(body['widths'])}; expected one of {choices}."
        )
    built = tuple(
        PlannedBudget(budget, widths[label], losses[label], size, ranked.get(label, ()))
        for label, (budget, size) in columns.items()
    )
    with _sentence(what):
        return WidthPlan(
            model=_text(body["model"], "model"),
            groups=tuple(groups),
            columns=built,
            cut=_text(body["cut"], "cut"),
            widths=body["widths"],
            multiple=whole(body["multiple"], _WIDEST, 1),
            size=_size(_names(body["now"], what, "now")),
            loss_unit=_text(body["loss_unit"], "loss_unit"),
            left_out={
                name: _text(why, "left_out")
                for name, why in _names(body.get("left_out") or {}, what, "left_out").items()
            },
        )


@contextmanager
def _sentence(what: str) -> Iterator[None]:
    """Turn what is wrong with a value into a sentence about the plan."""
    try:
        yield
    except PruningError as error:
        raise PruningError(f"{what}: {error}") from error
    except (ValueError, TypeError) as error:
        text = " ".join(str(error)[:300].split()).rstrip(".")
        raise PruningError(f"{what}: {text}; correct it, or plan again.") from error


def _names(value: Any, what: str, part: str) -> dict[str, Any]:
    inside = "" if part == what else f" in {part[:80]!r}"
    if not isinstance(value, dict):
        raise PruningError(
            f"{what} holds {described(value)}{inside}; expected names with values, as plan() "
            "writes them."
        )
    odd = next((key for key in value if not isinstance(key, str)), None)
    if odd is not None:
        raise PruningError(f"{what} has the key {described(odd)}{inside}; expected a name.")
    return value


def _check_keys(
    body: Mapping[str, Any], what: str, needed: Sequence[str], known: Sequence[str]
) -> None:
    for key in body:
        if key not in known:
            hint = _nearest(key, known)
            ending = f"did you mean {hint}?" if hint else f"expected {', '.join(known)}."
            raise PruningError(
                f"{what} has an entry {described(key)}, which is not known; {ending}"
            )
    missing = [key for key in needed if key not in body]
    if missing:
        raise PruningError(f"{what} has no {missing[0]!r}; plan again, or add it.")


def _nearest(name: str, known: Collection[str], most: int = 1, cutoff: float = 0.6) -> str:
    if len(name) > 300:
        return ""
    return " or ".join(map(repr, difflib.get_close_matches(name, list(known), most, cutoff)))


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str) or len(value) > 4096:
        raise ValueError(f"{key} is {described(value)}, and no text of up to 4096 characters")
    return value


def _size(body: Mapping[str, Any]) -> PlannedSize:
    odd = next((key for key in body if key not in _SIZES), None)
    if odd is not None:
        raise ValueError(f"the entry {described(odd)} is not known beside {', '.join(_SIZES)}")
    counts = {n: whole(body[n], 2**63) for n in _SIZES[:2] if n in body}
    return PlannedSize(**counts, ms=number(body["ms"], 0) if "ms" in body else None)


def _columns(body: Mapping[str, Any], what: str) -> dict[str, tuple[Budget, PlannedSize]]:
    kinds = [f.name for f in fields(Budget)]
    if not 1 <= len(body) <= _MOST_COLUMNS:
        raise PruningError(
            f"{what} has {counted(len(body), 'budget')}; expected 1 to {_MOST_COLUMNS}."
        )
    found = {}
    for label, entry in body.items():
        where = f"{what}, budget {described(label)}"
        values = _names(entry, what, f"budget {label}")
        _check_keys(values, where, (), (*kinds, *_SIZES, "loss"))
        with _sentence(where):
            budget = Budget(**{name: values[name] for name in kinds if name in values})
            size = _size({name: values[name] for name in _SIZES if name in values})
            if "loss" in values:
                number(values["loss"], 0)
        if budget_label(budget) != label:
            raise PruningError(
                f"{where} is {budget}; expected the name {budget_label(budget)!r}. Widths are not "
                "chosen again: plan again with another budget."
            )
        found[label] = budget, size
    return found


def _group(
    name: str, line: Mapping[str, Any], columns: Collection[str], where: str
) -> tuple[PlannedGroup, dict[str, int], dict[str, float]]:
    _check_keys(line, where.rstrip(":"), ("kind", "now"), (*_OF_GROUP, *columns))
    with _sentence(where.rstrip(":")):
        if not name or len(name) > 4096:
            raise ValueError("its name is empty or longer than 4096 characters")
        kind, now = _text(line["kind"], "kind"), whole(line["now"], _WIDEST)
        built = whole(line.get("built", now), _WIDEST, 1)
        exclude, pin = line.get("exclude", False), line.get("pin")
        if type(exclude) is not bool:
            raise ValueError(f"exclude is {described(exclude)}, and neither true nor false")
        parameters = whole(line["parameters"], 2**63) if "parameters" in line else None
    if now > built:
        raise PruningError(
            f"{where} it has {now} units now, above the {built} as built; correct it."
        )
    if exclude and pin is not None:
        raise PruningError(
            f"{where} pin: {described(pin)} asks for a width and exclude: true for none; leave "
            "one of them out."
        )
    for key in (*columns, "pin"):
        width = line.get(key)
        if width is None:
            if key in columns and pin is None and not exclude:
                raise PruningError(
                    f"{where} it has no width at {key}; expected one, pin: N or exclude: true. "
                    "Delete its whole line to leave the group alone."
                )
        elif type(width) is not int:
            raise PruningError(
                f"{where} {key}: {described(width)}; expected a whole number of units."
            )
        elif width < 0:
            raise PruningError(f"{where} {key}: {width} is below 0; expected 0 to {now} units.")
        elif width > now:
            raise PruningError(
                f"{where} {key}: {width} is above the {counted(now, 'unit')} that it has now; "
                f"expected 0 to {now}. Units that are gone do not come back."
            )
    losses = line.get("loss", [])
    with _sentence(where.rstrip(":")):
        if not isinstance(losses, list) or len(losses) not in (0, len(columns)):
            raise ValueError("loss is no list with a number for each budget")
        values = {label: number(x, 0) for label, x in zip(columns, losses, strict=False)}
    widths = {label: line.get(label, pin or 0) for label in columns}
    if exclude:
        widths = {label: line.get(label, now) for label in columns}
    group = PlannedGroup(name, kind, built, now, parameters, pin, exclude)
    return group, widths, values


def _ranked_at(
    body: Any, what: str, columns: Collection[str], sizes: Mapping[str, int]
) -> dict[str, tuple[dict[str, int], ...]]:
    found = {}
    for label, steps in _names(body or {}, what, "ranked_at").items():
        with _sentence(f"{what}, ranked_at"):
            if label not in columns:
                raise ValueError(f"{described(label)} is none of its budgets")
            if not isinstance(steps, list) or len(steps) > 8:
                raise ValueError(f"{described(steps)} is no list of up to 8 entries")
            each = [_names(step, what, "ranked_at") for step in steps]
            found[label] = tuple(
                {n: whole(width, sizes[n]) for n, width in step.items() if n in sizes}
                for step in each
            )
    return found


# ----------------------------------------------------------------------------------- for a model


def budget_or_plan(
    asked: Sequence[Any], plan: WidthPlan | str | Path | None
) -> tuple[Budget, WidthPlan | None]:
    """The budget that is asked for, or a plan at one of its budgets.

    Args:
        asked: The arguments of :func:`budget.budget_of`.
        plan: The plan, or its file.

    Raises:
        PruningError: If the plan cannot be read, or has no column for the budget.
    """
    if plan is None:
        return budget_of(*asked), None
    given = None if all(value is None for value in asked) else budget_of(*asked)
    found = plan_of(plan).for_budget(given)
    return found.column(found.cut).budget, found


def choose_planned(
    plan: WidthPlan,
    groups: Sequence[DependencyGroup],
    *,
    kinds: Sequence[str] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    modules: Sequence[str] = (),
) -> list[DependencyGroup]:
    """The groups that a plan cuts, where the other options leave them.

    Args:
        plan: The plan.
        groups: All groups of the model that may be cut.
        kinds: Kinds of unit that may be cut; None for all that the plan names.
        include: Only groups whose name this regular expression finds.
        exclude: No groups whose name this regular expression finds.
        modules: Paths of modules without any group.

    Raises:
        PruningError: If the plan does not fit the model, or the options.
    """
    allowed = None
    if any(option is not None for option in (kinds, include, exclude)):
        found = choose_groups(
            groups,
            kinds=kinds or sorted({one.kind for one in plan.groups}),
            include=include,
            exclude=exclude,
            modules=modules,
        )
        allowed = {group.name for group in found}
    return planned_groups(plan, groups, allowed)


def planned_groups(
    plan: WidthPlan, groups: Sequence[DependencyGroup], allowed: Collection[str] | None = None
) -> list[DependencyGroup]:
    """The groups of a model that a plan cuts.

    Args:
        plan: The plan.
        groups: All groups of the model that may be cut.
        allowed: Names of those that other options leave; None for all.

    Raises:
        PruningError: If the plan names other groups, or asks for widths that they cannot have.

    Example:
        >>> group = DependencyGroup("net.ffn", "ffn", 64, (), ("down",), may_be_empty=True)
        >>> column = PlannedBudget(Budget(0.5), {"net.fnf": 32})
        >>> plan = WidthPlan("Net", (PlannedGroup("net.fnf", "ffn", 64, 64),), (column,), "50%")
        >>> planned_groups(plan, [group])
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: The plan has a group 'net.fnf', which is none \
that can be cut here; did you mean 'net.ffn'?
    """
    known = {group.name: group for group in groups}
    strange = [group for group in plan.groups if group.name not in known]
    if strange and len(strange) == len(plan.groups):
        nearest = _nearest(strange[0].name, known, 3)
        if not nearest or len(strange) > 1:
            raise PruningError(
                f"The plan is one of a {plan.model}, with groups such as "
                f"{shortened([g.name for g in strange])}, but what can be cut here is "
                f"{shortened(known) or 'nothing'}: it belongs to another model. Plan again."
            )
    for one in plan.groups:
        group = known.get(one.name)
        if group is not None and (one.built, one.kind) != (group.size, group.kind):
            raise PruningError(
                f"The plan has {one.built} units of kind {one.kind!r} in {one.name!r} as built, "
                f"but the model {group.size} of {group.kind!r}: it belongs to another model. Plan "
                "again."
            )
    if strange:
        near = _nearest(strange[0].name, known, 3)
        hint = f"did you mean {near}?" if near else "delete its line."
        raise PruningError(
            f"The plan has a group {strange[0].name!r}, which is none that can be cut here; {hint}"
        )
    asked = plan.carried_out().widths
    if not asked:
        raise PruningError("The plan leaves every group alone; give one a width, or do not cut.")
    for one in plan.groups:
        if one.name in asked:
            _check_width(plan, one, known[one.name], asked[one.name])
    out = [name for name in asked if allowed is not None and name not in allowed]
    if out:
        raise PruningError(
            f"The plan cuts {shortened(out)}, which kinds, include, exclude or module leave out; "
            "drop these options, or write exclude: true into the plan."
        )
    return [group for group in groups if group.name in asked]


def _check_width(plan: WidthPlan, one: PlannedGroup, group: DependencyGroup, width: int) -> None:
    key = plan.cut if one.pin is None else "pin"
    free = one.pin is not None or plan.widths == "config"  # other widths may be in its place
    step = group.multiple if free else step_of(group, plan.multiple)
    if width == 0 and not may_be_empty(group):
        raise PruningError(
            f"The plan empties {one.name!r}, which cannot run without units ({key}: 0); expected "
            f"at least {step}."
        )
    if width not in (one.now, one.built) and width % step:
        near = sorted({step * (width // step), min(one.now, step * -(-width // step))})
        other = "" if key == "pin" or width % group.multiple else f", or pin: {width}"
        why = ", which its operators need" if step == group.multiple else ""
        raise PruningError(
            f"The plan has {key}: {width} for {one.name!r}; expected a multiple of {step}{why}, "
            f"such as {' or '.join(map(str, near))}{other}."
        )


def check_present(plan: WidthPlan, current: Mapping[str, int]) -> None:
    """Refuse a plan that was made for wider groups, or narrower ones, than the model has.

    Args:
        plan: The plan, of groups of this model.
        current: Present width of every group.

    Raises:
        PruningError: Naming the group.
    """
    asked = plan.carried_out().widths
    for one in plan.groups:
        if one.name not in asked or one.name not in current:
            continue
        now, width = current[one.name], asked[one.name]
        if width > now:
            raise PruningError(
                f"The plan keeps {counted(width, 'unit')} of {one.name!r}, above the {now} that it "
                "has now; units that are gone do not come back. Lower it, or plan again."
            )
        if now > one.now:
            raise PruningError(
                f"The plan was made when {one.name!r} had {counted(one.now, 'unit')}; now it has "
                f"{now}. Open the model that the plan was made for, or plan again."
            )


def check_bounds(
    plan: WidthPlan,
    constraints: Constraints,
    groups: Sequence[DependencyGroup],
    current: Mapping[str, int],
) -> None:
    """Refuse widths of a plan that contradict floors, caps or pins given beside it.

    Args:
        plan: The plan.
        constraints: The constraints; default ones contradict nothing.
        groups: The groups that the plan cuts.
        current: Their present widths.

    Raises:
        PruningError: Naming the group and both widths.
    """
    if constraints in (Constraints(), Constraints(multiple=constraints.multiple)):
        return
    asked = plan.carried_out().widths
    for name, (least, most) in resolve_bounds(constraints, groups, current).items():
        if not least <= asked[name] <= most:
            allowed = f"{least} to {most}" if least < most else f"{least}"
            raise PruningError(
                f"The plan keeps {counted(asked[name], 'unit')} of {name!r}, but constraints ask "
                f"for {allowed}; change one of them."
            )
