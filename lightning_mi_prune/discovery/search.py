"""Search for the numbers and ties with which the groups of a model can be cut, by verification."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from lightning_mi_prune.discovery.attributes import (
    Candidate,
    Number,
    candidates_of,
    describing_attributes,
    pattern_of,
)
from lightning_mi_prune.discovery.heads import rotatable_projections
from lightning_mi_prune.discovery.verification import LATE, Outcome, OutOfTime, Verifier
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    Refusal,
    SizeAttribute,
    count_parameters,
)
from lightning_mi_prune.graph.layouts import Factor, Layout, layout_names, map_layout

__all__ = [
    "Solution",
    "solve",
    "with_attributes",
    "without_groups",
]

Claims = Mapping[tuple[str, str], SizeAttribute]

_MOST = {1: 8, 2: 5, 3: 4}  # numbers of which sets of each size are tried
_RESERVE = 0.3  # of the time that is left, to verify what passed all at once
_MOST_TIME = 0.2  # of what is left, for the numbers of one class of groups
_LOCAL = 0.6  # nearness from which a number that is not seen is taken to describe a group
_DESCRIBES = re.compile(
    "head|hidden|dim|size|width|channel|feature|embed|inner|intermediate|ffn|d_|n_|num_"
)


@dataclass(frozen=True)
class Solution:
    """Groups that passed verification, with their attributes, and those that did not.

    Args:
        groups: Groups that can be cut, all at once.
        refused: The others.
    """

    groups: tuple[DependencyGroup, ...]
    refused: tuple[Refusal, ...]


def with_attributes(
    groups: Iterable[DependencyGroup], claims: Iterable[SizeAttribute], sizes: Mapping[str, int]
) -> list[DependencyGroup]:
    """The groups with the numbers that count them, and all groups these layouts name as partners.

    Example:
        >>> group = DependencyGroup("heads", "heads", 4, (), ())
        >>> number = SizeAttribute("attention", "width", (("heads", "size"),))
        >>> with_attributes([group], [number], {"size": 8})[0].partners
        (('size', 8),)
    """
    by_name: dict[str, list[SizeAttribute]] = {}
    for claim in claims:
        for name in layout_names(claim.layout):
            by_name.setdefault(name, []).append(claim)
    found = []
    for group in groups:
        mine = by_name.get(group.name, [])
        layouts = [s.layout for s in group.tensors] + [claim.layout for claim in mine]
        named = dict.fromkeys(name for layout in layouts for name in layout_names(layout))
        partners = dict(group.partners) | {n: sizes[n] for n in named if n in sizes}
        partners.pop(group.name, None)
        found.append(
            replace(
                group,
                attributes=tuple(mine),
                partners=tuple((n, size) for n, size in partners.items() if n in named),
            )
        )
    return found


def without_groups(
    groups: Iterable[DependencyGroup], gone: Mapping[str, int]
) -> list[DependencyGroup]:
    """The groups without some others, which become constants in their layouts.

    Args:
        groups: The groups that stay.
        gone: Sizes of the others, by name.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> dims = (PrunableDim("q.weight", 0, (32, 8), (("heads", "size"),)),)
        >>> group = DependencyGroup("heads", "heads", 4, dims, (), partners=(("size", 8),))
        >>> [kept] = without_groups([group], {"size": 8})
        >>> kept.tensors[0].layout, kept.partners
        ((('heads', 8),), ())
    """

    def fixed(layout: Layout) -> Layout:
        return map_layout(layout, lambda name: gone.get(name, name))

    return [
        replace(
            group,
            tensors=tuple(replace(s, layout=fixed(s.layout)) for s in group.tensors),
            attributes=tuple(replace(a, layout=fixed(a.layout)) for a in group.attributes),
            config_sizes=tuple((field, fixed(layout)) for field, layout in group.config_sizes),
            partners=tuple((n, size) for n, size in group.partners if n not in gone),
        )
        for group in groups
    ]


def solve(
    verifier: Verifier,
    groups: Sequence[DependencyGroup],
    numbers: Sequence[Number],
    seen: set[tuple[str, str]],
    roles: Mapping[str, str],
) -> Solution:
    """Find which groups can be cut, and with which numbers.

    All groups at once first. If that fails, those that correspond in the layers of a stack
    together, then each by itself; groups that fail alone and pass together become one.

    Args:
        verifier: Cuts copies of the module.
        groups: Groups without attributes.
        numbers: Numbers of the modules.
        seen: Those of them that reach a size in an operator.
        roles: What projections of heads make, by their path.
    """
    search = _Search(verifier, {group.name: group for group in groups}, numbers, seen, roles)
    try:
        search.run()
    except OutOfTime:
        for name in search.groups:
            if name not in search.accepted:
                search.reasons.setdefault(name, LATE)
    return search.solution()


@dataclass
class _Search:
    """State of one search: groups, numbers they claim, what was accepted and what was refused."""

    verifier: Verifier
    groups: dict[str, DependencyGroup]
    numbers: Sequence[Number]
    seen: set[tuple[str, str]]
    roles: Mapping[str, str]
    claims: dict[tuple[str, str], SizeAttribute] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)
    guessed: set[tuple[str, str]] = field(default_factory=set)

    @property
    def sizes(self) -> dict[str, int]:
        return {name: group.size for name, group in self.groups.items()}

    def run(self) -> None:
        """Fill ``accepted``, ``claims`` and ``reasons``."""
        if not self.groups:
            return
        base = self.verifier.base
        for claim in describing_attributes(base, [*self.groups.values()]):
            self.claims[claim.module, claim.attribute] = claim
        classes = self.classes()
        guess = self.guess(classes)
        before = self.verifier, self.groups, self.claims
        tied: Claims = guess
        for first, second in self.sharing(classes, guess):
            tied = self.merge(dict(zip(second, first, strict=True)))(tied)
        if self.check([*self.groups], {**tied, **self.claims}).equal:
            self.accepted = [*self.groups]
            self.claims = {**tied, **self.claims}
        else:
            self.verifier, self.groups, self.claims = before
            plain = [names for names in classes if self.groups[names[0]].kind != "head_dim"]
            every = [name for names in plain for name in names]
            mine = _naming(guess, every)
            if (
                every
                and len(plain) < len(classes)
                and self.check(every, {**mine, **self.claims}).equal
            ):
                self.accepted, self.claims = every, {**mine, **self.claims}
                classes = [names for names in classes if names not in plain]
            self.one_by_one(classes, guess)
        self.confirm()
        self.describe()

    def confirm(self) -> None:
        """Refuse groups whose kind cannot be cut without the others, until all can."""
        kind_of = {name: group.kind for name, group in self.groups.items()}
        # Others share no dimension with another kind, and so no number.
        kinds = {
            kind_of[name]
            for name in self.accepted
            for partner, _ in self.groups[name].partners
            if kind_of.get(partner, kind_of[name]) != kind_of[name]
        }
        while kinds:
            alone = {
                kind: [n for n in self.accepted if self.groups[n].kind == kind] for kind in kinds
            }
            outcomes = {kind: self.check(names, self.claims) for kind, names in alone.items()}
            wrong = [kind for kind, outcome in outcomes.items() if not outcome.equal]
            if not wrong:
                return
            for kind in wrong:
                for name in alone[kind]:
                    self.reasons[name] = f"not without other groups: {_reason(outcomes[kind])}"
                    self.accepted.remove(name)
            kinds -= set(wrong)

    def sharing(
        self, classes: Sequence[list[str]], guess: Claims
    ) -> list[tuple[list[str], list[str]]]:
        """Classes of dimensions of heads that are counted by one number, which ties them."""
        counted: dict[tuple[str, str], list[list[str]]] = {}
        for names in classes:
            group = self.groups[names[0]]
            for candidate in self.candidates(names) if group.kind == "head_dim" else ():
                one = candidate.attributes[0]
                key = (one.module, one.attribute)
                stem = f"{one.module}." if one.module else ""
                holds = any(s.tensor.startswith(stem) for s in group.tensors)
                if holds and key in guess and one.layout == ((names[0],),):
                    counted.setdefault(key, []).append(names)
        found: list[tuple[list[str], list[str]]] = []
        gone: list[list[str]] = []
        for first, *others in counted.values():
            for names in others:
                if names not in gone and first not in gone and self.related(first, names):
                    found.append((first, names))
                    gone.append(names)
        return found

    def solution(self) -> Solution:
        kept = set(self.accepted)
        gone = {name: size for name, size in self.sizes.items() if name not in kept}
        claims = [c for c in self.claims.values() if kept & set(layout_names(c.layout))]
        groups = with_attributes((self.groups[n] for n in self.accepted), claims, self.sizes)
        refused = [
            Refusal(n, g.kind, g.size, count_parameters([g]), self.reasons.get(n, "not verified"))
            for n, g in self.groups.items()
            if n in gone
        ]
        order = {name: i for i, name in enumerate(self.groups)}
        groups = sorted(without_groups(groups, gone), key=lambda g: order[g.name])
        return Solution(tuple(groups), tuple(refused))

    # ------------------------------------------------------------------------------- one check

    def check(self, names: Sequence[str], claims: Claims) -> Outcome:
        """Cut groups at once, with the numbers they claim."""
        mine = set(names)
        wanted = [c for c in claims.values() if mine & set(layout_names(c.layout))]
        return self.verifier.check(
            with_attributes((self.groups[n] for n in names), wanted, self.sizes)
        )

    # -------------------------------------------------------------------------------- classes

    def classes(self) -> list[list[str]]:
        """Groups that correspond in the layers of a stack; those with few tensors first."""
        found: dict[tuple[str, str, int, int], list[str]] = {}
        for name, group in self.groups.items():
            key = (pattern_of(name), group.kind, group.size, len(group.tensors))
            found.setdefault(key, []).append(name)
        return sorted(found.values(), key=lambda names: len(self.groups[names[0]].tensors))

    def candidates(self, names: Sequence[str]) -> list[Candidate]:
        """Numbers that may follow the groups, apart from those that describe a tensor."""
        found = candidates_of([self.groups[n] for n in names], self.numbers, self.seen, self.groups)
        return [
            c
            for c in found
            if not any((a.module, a.attribute) in self.claims for a in c.attributes)
        ]

    def guess(self, classes: Sequence[Sequence[str]]) -> dict[tuple[str, str], SizeAttribute]:
        """For every number that reaches an operator, the layout whose tensors are nearest."""
        best: dict[tuple[str, str], tuple[float, int, SizeAttribute]] = {}
        for names in classes:
            for candidate in self.candidates(names) if self.seen else []:
                for claim in candidate.attributes if candidate.seen else ():
                    key = (claim.module, claim.attribute)
                    rank = (candidate.nearness, _named_alike(claim, self.groups), claim)
                    if key not in best or rank[:2] > best[key][:2]:
                        best[key] = rank
        return {key: claim for key, (_, _, claim) in best.items()}

    def one_by_one(self, classes: list[list[str]], guess: Claims) -> None:
        """Verify classes, search their numbers, tie what passes only together; then all at once."""
        failed: list[tuple[list[str], Outcome]] = []
        passed: list[tuple[list[str], Claims]] = []
        reserve = _RESERVE * self.verifier.left
        self.verifier.extend(-reserve)
        try:
            self.halve(classes, guess, passed, failed)
            failed, guess = self.tie(failed, passed, guess)
            for names, outcome in failed:
                self.one(names, outcome, guess, passed)
        except OutOfTime:  # what passed until then is accepted
            done = {name for names, _ in passed for name in names} | {*self.accepted}
            for name in self.groups.keys() - done:
                self.reasons.setdefault(name, LATE)
        self.verifier.extend(reserve)
        self.together(passed)

    def one(
        self,
        names: list[str],
        outcome: Outcome,
        guess: Claims,
        passed: list[tuple[list[str], Claims]],
    ) -> None:
        """Search the numbers of one class, or find those of its groups that pass."""
        found, outcome = self.search(names, outcome, self.claims)
        whole = names
        if found is None:
            whole = self.alone(names, guess) if len(names) > 1 else []
            found = _naming(guess, whole)
        if whole:
            passed.append((whole, found))
        for name in names:
            if name not in whole:
                self.reasons[name] = _reason(outcome)

    def together(self, passed: Sequence[tuple[list[str], Claims]]) -> None:
        """Accept classes that passed alone, as many of them at once as possible."""
        count = [sum(count_parameters([self.groups[n]]) for n in names) for names, _ in passed]
        order = sorted(range(len(passed)), key=lambda i: -count[i])
        if passed:
            self.grow([passed[i] for i in order])

    def grow(self, passed: Sequence[tuple[list[str], Claims]]) -> None:
        """Accept classes beside those that are accepted, all at once or halved."""
        every = [*self.accepted, *(name for names, _ in passed for name in names)]
        claims = dict(self.claims)
        for _, found in passed:
            claims = {**found, **claims}
        outcome = self.check(every, claims)
        if outcome.equal:
            self.accepted, self.claims = every, claims
        elif len(passed) > 1:
            half = len(passed) // 2
            self.grow(passed[:half])
            self.grow(passed[half:])
        else:
            [(names, _)] = passed
            found_again, outcome = self.search(names, outcome, self.claims, self.accepted)
            if found_again is not None:
                self.accepted, self.claims = every, {**self.claims, **found_again}
                return
            for name in names:
                self.reasons[name] = f"not together with other groups: {_reason(outcome)}"

    def halve(
        self,
        classes: Sequence[list[str]],
        guess: Claims,
        passed: list[tuple[list[str], Claims]],
        failed: list[tuple[list[str], Outcome]],
    ) -> None:
        """Sort classes into those that pass and those that fail, found by halving."""
        mine = _naming(guess, [name for names in classes for name in names])
        outcome = self.check([n for names in classes for n in names], {**mine, **self.claims})
        if outcome.equal:
            passed += [(names, _naming(guess, names)) for names in classes]
        elif len(classes) == 1:
            failed.append((classes[0], outcome))
        else:
            half = len(classes) // 2
            self.halve(classes[:half], guess, passed, failed)
            self.halve(classes[half:], guess, passed, failed)

    # --------------------------------------------------------------------------------- search

    def search(
        self,
        names: Sequence[str],
        outcome: Outcome,
        claims: Claims,
        context: Sequence[str] = (),
    ) -> tuple[dict[tuple[str, str], SizeAttribute] | None, Outcome]:
        """The smallest set of numbers with which groups can be cut; None if there is none.

        Args:
            names: The groups.
            outcome: What an attempt with other numbers showed.
            claims: Numbers that follow in any case.
            context: Groups that are cut too.
        """
        found = self.candidates(names)
        taken = set(claims)
        found = [c for c in found if not taken & {(a.module, a.attribute) for a in c.attributes}]
        plain = self.check([*context, *names], claims)
        if plain.equal:
            return {}, plain
        if plain.shape:
            return None, plain  # an output counts the units: no number changes that
        at = pattern_of(plain.module or outcome.module)
        found = [c for c in found if c.seen or pattern_of(c.attributes[0].module) == at]
        found.sort(key=lambda c: (pattern_of(c.attributes[0].module) != at, not c.seen))
        end = self.verifier.left * (1 - _MOST_TIME)
        for chosen in _sets(found):
            if self.verifier.left < end:
                break
            mine = {(a.module, a.attribute): a for c in chosen for a in c.attributes}
            result = self.check([*context, *names], {**claims, **mine})
            if result.equal:
                return mine, result
        return None, plain

    def alone(self, names: Sequence[str], guess: Claims) -> list[str]:
        """Those of the groups of a class that pass, if its first or its last does."""

        def passes(some: Sequence[str]) -> bool:
            return self.check(some, {**_naming(guess, some), **self.claims}).equal

        def within(some: Sequence[str]) -> list[str]:
            if passes(some):
                return [*some]
            half = len(some) // 2
            return within(some[:half]) + within(some[half:]) if half else []

        half = len(names) // 2
        if not passes(names[:1]) and not passes(names[-1:]):
            return []  # each of dozens of layers would be tried in vain
        return within(names[:half]) + within(names[half:])

    # ----------------------------------------------------------------------------------- ties

    def tie(
        self,
        failed: list[tuple[list[str], Outcome]],
        passed: list[tuple[list[str], Claims]],
        guess: Claims,
    ) -> tuple[list[tuple[list[str], Outcome]], Claims]:
        """Make one of two classes that fail alone and pass together.

        Args:
            failed: Classes that fail alone.
            passed: Classes that pass; those that were tied are added.
            guess: What numbers count, probably.

        Returns:
            The classes that still fail, and the guess for groups that are one now.
        """
        left = [names for names, _ in failed]
        for (one, _), (two, _) in combinations(failed, 2):
            if one not in left or two not in left:
                continue
            small, large = sorted((one, two), key=lambda names: self.groups[names[0]].size)
            # Rotary positions turn pairs of dimensions, one in each half of a head.
            halves = self.groups[large[0]].size == 2 * self.groups[small[0]].size
            first, second = (small, large) if halves else (one, two)
            if not self.related(first, second, halves=halves):
                continue
            before = self.verifier, self.groups, self.claims
            targets = first * len(second) if len(first) == 1 else first
            renamed = self.merge(dict(zip(second, targets, strict=True)), halves=halves)
            mine = _naming(renamed(guess), first)
            try:
                same = self.check(first, {**mine, **self.claims}).equal or self.rescaled(
                    first, mine
                )
            except OutOfTime:
                self.verifier, self.groups, self.claims = before
                raise
            if same:
                guess = renamed(guess)
                passed[:] = [*((names, renamed(claims)) for names, claims in passed), (first, mine)]
                left = [names for names in left if names not in (first, second)]
            else:
                self.verifier, self.groups, self.claims = before
        return [(names, outcome) for names, outcome in failed if names in left], guess

    def rescaled(self, names: Sequence[str], claims: Claims) -> bool:
        """Whether dimensions of heads can go if queries make up for what scores are divided by.

        Some attention divides by the root of the size that heads have, not that as built. The
        groups carry a rotation then, which says so.
        """
        before = dict(self.groups)
        for name in names:
            rotation = rotatable_projections(self.groups[name], self.roles)
            if self.groups[name].kind != "head_dim" or rotation is None:
                return False
            scaled = replace(rotation, rescaled=True)
            self.groups[name] = replace(self.groups[name], rotation=scaled)
        if self.check(names, {**claims, **self.claims}).equal:
            return True
        self.groups = before
        return False

    def related(self, first: Sequence[str], second: Sequence[str], *, halves: bool = False) -> bool:
        """Whether groups of two classes have one size, or half of it, and are near each other."""
        a, b = self.groups[first[0]], self.groups[second[0]]
        if b.size != a.size * (2 if halves else 1):
            return False
        if len(first) != len(second) and not (halves and len(first) == 1):
            return False
        homes = [{_above(s.tensor, 2) for s in group.tensors} for group in (a, b)]
        return bool(homes[0] & homes[1]) and (not halves or a.kind == b.kind == "head_dim")

    def merge(self, same: Mapping[str, str], *, halves: bool = False) -> Callable[[Claims], Claims]:
        """Make groups one with others, under the names of these.

        Args:
            same: The name that stays, by the one that goes.
            halves: Whether a group that goes consists of two halves, each like the one that stays.

        Returns:
            A function that gives claims the new names.
        """

        def factor(old: str) -> Factor:
            stays = same.get(old)
            return old if stays is None else ((stays,), (stays,)) if halves else stays

        changed = {n: _with_factors(g, factor, same, self.sizes) for n, g in self.groups.items()}
        for gone, stays in same.items():
            one, other = changed[stays], changed.pop(gone)
            changed[stays] = replace(
                one,
                tensors=tuple({(s.tensor, s.dim): s for s in one.tensors + other.tensors}.values()),
                consumers=tuple(dict.fromkeys(one.consumers + other.consumers)),
                consumers_by_input=one.consumers_by_input + other.consumers_by_input,
                norms=tuple(dict.fromkeys(one.norms + other.norms)),
                multiple=math.lcm(one.multiple, other.multiple),
                partners=tuple(dict(one.partners + other.partners).items()),
            )
        self.groups = {
            n: replace(g, partners=tuple((p, size) for p, size in g.partners if p != n))
            for n, g in changed.items()
        }
        self.verifier = self.verifier.with_factors(factor, same)

        def renamed_claims(given: Claims) -> Claims:
            return {k: replace(c, layout=map_layout(c.layout, factor)) for k, c in given.items()}

        self.claims = dict(renamed_claims(self.claims))
        return renamed_claims

    # ---------------------------------------------------------------------------- description

    def describe(self) -> None:
        """Let numbers that describe accepted groups follow too, where nothing changes by it."""
        found: dict[tuple[str, str], tuple[float, int, SizeAttribute]] = {}
        gone = {n for n in self.groups if n not in self.accepted}
        for names in self.classes():
            if names[0] in gone:
                continue
            for candidate in self.candidates(names):
                for claim in candidate.attributes:
                    key = (claim.module, claim.attribute)
                    words = claim.attribute.rpartition(".")[2] if "." not in claim.attribute else ""
                    if key in self.claims or candidate.nearness < _LOCAL:
                        continue
                    if not _DESCRIBES.search(words) or gone & set(layout_names(claim.layout)):
                        continue
                    rank = (candidate.nearness, _named_alike(claim, self.groups), claim)
                    if key not in found or rank[:2] > found[key][:2]:
                        found[key] = rank
        more = {key: claim for key, (_, _, claim) in found.items()}
        if more and self.check(self.accepted, {**self.claims, **more}).equal:
            self.claims |= more


def _sets(found: Sequence[Candidate]) -> Iterator[tuple[Candidate, ...]]:
    """Sets of candidates, small ones first; none gives one number two meanings."""
    for count, most in _MOST.items():
        for chosen in combinations(found[:most], count):
            keys = [(a.module, a.attribute) for c in chosen for a in c.attributes]
            if len(set(keys)) == len(keys):
                yield chosen


def _naming(claims: Claims, names: Sequence[str]) -> dict[tuple[str, str], SizeAttribute]:
    """The claims whose layouts hold one of some groups."""
    mine = set(names)
    return {key: c for key, c in claims.items() if mine & set(layout_names(c.layout))}


def _named_alike(claim: SizeAttribute, groups: Mapping[str, DependencyGroup]) -> int:
    """How well the name of a number fits the kinds of the groups it may count."""
    kinds = {groups[name].kind for name in layout_names(claim.layout) if name in groups}
    last = claim.attribute.rpartition(".")[2]
    size = re.search("dim|size|width", last) is not None
    if "head" in last and not size:
        return int(kinds == {"heads"} or kinds == {"heads", "query_heads"})
    if "head" in last:
        return int("head_dim" in kinds)
    return int("hidden" in kinds) if re.search("hidden|embed|d_model", last) else 0


def _with_factors(
    group: DependencyGroup,
    factor: Callable[[str], Factor],
    same: Mapping[str, str],
    sizes: Mapping[str, int],
) -> DependencyGroup:
    """A group with some names in its layouts replaced by others, or by layouts of them."""
    partners = dict.fromkeys(same.get(name, name) for name, _ in group.partners)
    known = dict(group.partners) | dict(sizes)
    return replace(
        group,
        tensors=tuple(replace(s, layout=map_layout(s.layout, factor)) for s in group.tensors),
        partners=tuple((name, known[name]) for name in partners),
    )


def _above(tensor: str, levels: int) -> str:
    return ".".join(tensor.split(".")[:-levels])


def _reason(outcome: Outcome) -> str:
    where = f" in {outcome.module}" if outcome.module else ""
    return f"{outcome.reason}{where}"
