"""Expressions: what the dimensions of the tensors of one recorded call consist of.

Every dimension is an *atom* of some size; a *product* of expressions, from ``view``; or a *sum*,
from ``cat``, ``split`` and slices. Operators make expressions equal. An atom that must keep its
size has a reason; what is left without a reason can be cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

__all__ = [
    "Atom",
    "Expression",
    "Product",
    "Sum",
    "atoms_of",
    "factors_of",
    "fix",
    "make_equal",
    "mark",
    "part_of",
    "product_of",
    "reshaped",
    "resolve",
    "sum_of",
    "terms_of",
]


class Atom:
    """A dimension that was not split so far.

    Args:
        size: Number of its entries.
        reason: Why it must keep this size; "" if nothing is known against a cut.

    Attributes:
        reasons: Operators that need this size.
        marks: What operators do with it, such as ``"normed"``.
        equal: The expression that replaced it, if one did.
    """

    __slots__ = ("equal", "marks", "reasons", "size")

    def __init__(self, size: int, reason: str = "") -> None:
        self.size: int = size
        self.reasons: dict[str, None] = {reason: None} if reason else {}
        self.marks: set[str] = set()
        self.equal: Expression | None = None


class Product:
    """A product of expressions, the outermost first."""

    __slots__ = ("factors", "size")

    def __init__(self, factors: Sequence[Expression]) -> None:
        self.factors = tuple(factors)
        self.size: int = math.prod(factor.size for factor in factors)


class Sum:
    """Expressions one after another."""

    __slots__ = ("size", "terms")

    def __init__(self, terms: Sequence[Expression]) -> None:
        self.terms = tuple(terms)
        self.size: int = sum(term.size for term in terms)


Expression: TypeAlias = "Atom | Product | Sum"


def resolve(expression: Expression) -> Expression:
    """What an expression is by now, at its outermost level."""
    while isinstance(expression, Atom) and expression.equal is not None:
        expression = expression.equal
    return expression


def factors_of(expression: Expression) -> list[Expression]:
    """Factors that are no products, without those of size 1."""
    now = resolve(expression)
    if isinstance(now, Product):
        return [factor for each in now.factors for factor in factors_of(each)]
    return [] if now.size == 1 else [now]


def terms_of(expression: Expression) -> list[Expression]:
    """Terms that are no sums."""
    now = resolve(expression)
    if isinstance(now, Sum):
        return [term for each in now.terms for term in terms_of(each)]
    return [now]


def atoms_of(expression: Expression) -> Iterator[Atom]:
    """Every atom of an expression; one that occurs twice comes twice."""
    now = resolve(expression)
    if isinstance(now, Atom):
        yield now
    else:
        for part in now.factors if isinstance(now, Product) else now.terms:
            yield from atoms_of(part)


def fix(expression: Expression, reason: str) -> None:
    """Keep the size of everything in an expression."""
    for atom in atoms_of(expression):
        atom.reasons[reason] = None


def mark(expression: Expression, name: str) -> None:
    """Note what an operator does with everything in an expression."""
    for atom in atoms_of(expression):
        atom.marks.add(name)


def product_of(expressions: Iterable[Expression]) -> Expression:
    """The product of expressions, as simple as it can be.

    Example:
        >>> product_of([Atom(2), Atom(1), Atom(3)]).size
        6
    """
    factors = [factor for each in expressions for factor in factors_of(each)]
    if not factors:
        return Atom(1)
    return factors[0] if len(factors) == 1 else Product(factors)


def sum_of(expressions: Iterable[Expression]) -> Expression:
    """Expressions one after another, as simple as it can be."""
    terms = [term for each in expressions for term in terms_of(each) if term.size]
    if not terms:
        return Atom(0)
    return terms[0] if len(terms) == 1 else Sum(terms)


def make_equal(a: Expression, b: Expression, reason: str) -> bool:
    """Make two expressions of equal size one; what cannot be aligned is fixed on both sides.

    Args:
        a: An expression.
        b: Another one.
        reason: Operator that needs them to be equal, for what cannot be aligned.

    Returns:
        Whether they could be aligned completely.

    Example:
        >>> hidden, heads, size = Atom(12), Atom(3), Atom(4)
        >>> make_equal(hidden, Product([heads, size]), "view")
        True
        >>> [atom is heads for atom in atoms_of(hidden)]
        [True, False]
    """
    a, b = resolve(a), resolve(b)
    if a is b:
        return True
    if a.size == b.size:
        if isinstance(a, Atom):
            return _become(a, b)
        if isinstance(b, Atom):
            return _become(b, a)
        if isinstance(a, Product) and isinstance(b, Product):
            return _align_factors(a, b, reason)
        if isinstance(a, Sum) and isinstance(b, Sum):
            return _align_terms(a, b, reason)
        if isinstance(a, Product) and isinstance(b, Sum) and _distribute(a, b, reason):
            return True
        if isinstance(a, Sum) and isinstance(b, Product) and _distribute(b, a, reason):
            return True
    return _refuse((a, b), reason)


def _refuse(expressions: Iterable[Expression], reason: str) -> bool:
    for expression in expressions:
        fix(expression, reason)
    return False


def _become(atom: Atom, other: Expression) -> bool:
    """Replace an atom; what is known of it holds for everything in its replacement."""
    inside = {id(each): each for each in atoms_of(other)}
    if id(atom) in inside:  # it would contain itself
        return _refuse((other,), "a dimension that contains itself")
    for each in inside.values():
        each.reasons.update(atom.reasons)
        each.marks |= atom.marks
    atom.equal = other
    return True


def _split_factor(atom: Atom, inner: int) -> tuple[Expression, Expression]:
    """Make an atom a product whose inner factor has a size."""
    parts = Atom(atom.size // inner), Atom(inner)
    _become(atom, Product(parts))
    return parts


def _align_factors(a: Product, b: Product, reason: str) -> bool:
    """Make two products equal, from the innermost factors outwards."""
    left, right, fine = factors_of(a), factors_of(b), True
    while left and right:
        x, y = resolve(left.pop()), resolve(right.pop())
        if x.size == y.size:
            fine = make_equal(x, y, reason) and fine
            continue
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        if isinstance(x, Product):  # split since the factors were listed
            left += factors_of(x)
            right.append(y)
        elif isinstance(x, Atom) and x.size % y.size == 0:
            outer, inner = _split_factor(x, y.size)
            fine = make_equal(inner, y, reason) and fine
            left.append(outer)
        elif (common := math.gcd(x.size, y.size)) > 1 and (
            isinstance(x, Atom) and isinstance(y, Atom)
        ):
            (x_outer, x_inner), (y_outer, y_inner) = (_split_factor(e, common) for e in (x, y))
            fine = make_equal(x_inner, y_inner, reason) and fine
            left.append(x_outer)
            right.append(y_outer)
        else:
            return _refuse((*left, *right, x, y), reason)
    return fine


def _align_terms(a: Sum, b: Sum, reason: str) -> bool:
    """Make two sums equal, from their start."""
    left, right, fine = terms_of(a), terms_of(b), True
    while left and right:
        x, y = resolve(left.pop(0)), resolve(right.pop(0))
        if x.size == y.size:
            fine = make_equal(x, y, reason) and fine
            continue
        if x.size < y.size:
            x, y, left, right = y, x, right, left
        first = part_of(x, 0, y.size, reason)
        rest = part_of(x, y.size, x.size, reason)
        fine = make_equal(first, y, reason) and fine
        left[:0] = terms_of(rest)
    return fine


def _distribute(product: Product, total: Sum, reason: str) -> bool:
    """Make a product equal to a sum whose terms all have the inner factors of the product."""
    factors, terms = factors_of(product), terms_of(total)
    outer, inner = resolve(factors[0]), product_of(factors[1:])
    if not isinstance(outer, Atom) or any(term.size % inner.size for term in terms):
        return False
    parts = [Atom(term.size // inner.size) for term in terms]
    fine = True
    for term, part in zip(terms, parts, strict=True):
        fine = make_equal(term, product_of([part, inner]), reason) and fine
    return _become(outer, sum_of(parts)) and fine


def part_of(expression: Expression, start: int, stop: int, reason: str) -> Expression:
    """The entries from ``start`` to ``stop``; an atom becomes a sum for them.

    Args:
        expression: The whole.
        start: First entry.
        stop: Entry behind the last one.
        reason: Operator, for a part that splits a unit.

    Example:
        >>> fused = Atom(12)
        >>> part_of(fused, 4, 8, "slice").size, [term.size for term in terms_of(fused)]
        (4, [4, 4, 4])
    """
    now = resolve(expression)
    if (start, stop) == (0, now.size):
        return now
    if isinstance(now, Atom):
        if now.reasons:  # it stays whole
            part = Atom(stop - start)
            part.reasons.update(now.reasons)
            return part
        sizes = [start, stop - start, now.size - stop]
        terms = [Atom(size) for size in sizes]
        _become(now, sum_of(terms))
        return terms[1]
    if isinstance(now, Product):
        outer, *rest = factors_of(now)
        inner = product_of(rest)
        if start % inner.size == 0 and stop % inner.size == 0:
            part_ = part_of(outer, start // inner.size, stop // inner.size, reason)
            return product_of([part_, inner])
        fix(now, reason)
        return Atom(stop - start, reason)
    found, end = [], 0
    for term in terms_of(now):
        begin, end = end, end + term.size
        low, high = max(start, begin), min(stop, end)
        if low < high:
            found.append(part_of(term, low - begin, high - begin, reason))
    return sum_of(found)


def reshaped(dims: Sequence[Expression], sizes: Sequence[int], reason: str) -> list[Expression]:
    """The dimensions of a tensor after ``view``: factors are regrouped, from the innermost one.

    Args:
        dims: Dimensions before.
        sizes: Sizes after.
        reason: Operator, for what cannot be regrouped.

    Example:
        >>> hidden = Atom(12)
        >>> heads, size = reshaped([hidden], [3, 4], "view")
        >>> (joined,) = reshaped([heads, size], [12], "view")
        >>> [atom is part for atom, part in zip(atoms_of(joined), atoms_of(hidden))]
        [True, True]
    """
    left = [factor for dim in dims for factor in factors_of(dim)]
    found: list[Expression] = []
    for size in reversed(sizes):
        taken = _take(left, size)
        if taken is None:
            for dim in dims:
                fix(dim, reason)
            return [Atom(n, reason if n > 1 else "") for n in sizes]
        found.append(product_of(taken))
    return found[::-1]


def _take(left: list[Expression], size: int) -> list[Expression] | None:
    """Remove inner factors of one size in all from a list; None if they do not divide."""
    taken: list[Expression] = []
    while size > 1:
        if not left:
            return None
        last = resolve(left.pop())
        if isinstance(last, Product):
            left += factors_of(last)
        elif size % last.size == 0:
            taken.insert(0, last)
            size //= last.size
        else:
            parts = _split(last, size)
            if parts is None:
                return None
            left.append(parts[0])
            taken.insert(0, parts[1])
            size = 1
    return taken


def _split(expression: Expression, inner: int) -> tuple[Expression, Expression] | None:
    """An expression as a product with an inner factor of a size; None if that is not possible."""
    if expression.size % inner:
        return None
    if isinstance(expression, Atom):
        return _split_factor(expression, inner)
    if not isinstance(expression, Sum):
        return None
    terms = terms_of(expression)
    if any(term.size % inner for term in terms):
        return None
    outer, common = [], Atom(inner)
    for term in terms:
        first, last = reshaped([term], [term.size // inner, inner], "view of a sum")
        make_equal(last, common, "view of a sum")
        outer.append(first)
    return sum_of(outer), resolve(common)
