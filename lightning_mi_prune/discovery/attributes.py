"""Which numbers of modules follow the width of a group: ``num_heads``, ``split_size``, ``groups``.

Numbers that describe a tensor of their own module follow its dimension. Others are looked for:
those that reach a size in an operator (*seen*, found with integers that carry their origin), and
those that equal a part of a layout, in the modules around the tensors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_mi_prune.discovery.copies import changed_within, run_once, tensor_at
from lightning_mi_prune.graph.groups import DependencyGroup, SizeAttribute
from lightning_mi_prune.graph.layouts import Layout, layout_names, layout_size, map_layout

__all__ = [
    "Candidate",
    "Number",
    "candidates_of",
    "describing_attributes",
    "numbers_of",
    "pattern_of",
    "seen_numbers",
    "sub_layouts",
]

_Key: TypeAlias = tuple[str, str, Layout]  # patterns of module and layout, and the attribute

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
_NO_COUNT = re.compile(r"(^|_)(strides?|padding|dilations?|kernel_size|ratio)$")  # of no units
_LONGEST = 16  # entries of a list of numbers that is looked at
_MOST_BLOCKS = 12  # of a layout whose partial sums are looked at


def pattern_of(path: str) -> str:
    """A path without the numbers of layers: equal for what corresponds in layers of a stack.

    Example:
        >>> pattern_of("encoder.layer.11.ffn2")
        'encoder.layer.#.ffn2'
    """
    return _INDEX.sub("#", path)


@dataclass(frozen=True)
class Number:
    """A whole number that a module holds.

    Args:
        module: Path of the module.
        attribute: Where it is there: ``"num_heads"``, ``"config.n_head"``, ``"sizes.1"``.
        value: The number.
    """

    module: str
    attribute: str
    value: int


def numbers_of(module: nn.Module) -> list[Number]:
    """The numbers from 2 in attributes, lists and configs of modules; not those of ``torch.nn``.

    Nor strides and the like, by their names: a small one may equal a number of units by chance,
    and the outputs need not show it.

    Example:
        >>> net = nn.Module()
        >>> net.heads, net.sizes = 4, [3, 5]
        >>> [(number.attribute, number.value) for number in numbers_of(net)]
        [('heads', 4), ('sizes.0', 3), ('sizes.1', 5)]
    """
    found = []
    for path, part in module.named_modules():
        for name, value in _own_attributes(part).items():
            found += [Number(path, where, n) for where, n in _numbers(name, value, 1)]
    return found


def _own_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module but for those that classes of ``torch.nn`` have for their tensors."""
    bases = [
        kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.modules")
    ]
    if type(module) in bases and type(module) is not nn.Module:
        return {}
    known = {name for kind in bases for name in vars(kind).get("__constants__", ())}
    return {
        name: value
        for name, value in vars(module).items()
        if name[:1] != "_" and name != "training" and name not in known
    }


def _numbers(name: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if _NO_COUNT.search(name):
        return
    if type(value) is int:
        if value > 1:
            yield name, value
    elif type(value) in (tuple, list):
        for index, each in enumerate(value[:_LONGEST]):
            if type(each) is int and each > 1:
                yield f"{name}.{index}", each
    elif depth and hasattr(value, "to_dict") and not isinstance(value, nn.Module):
        for inner, each in vars(value).items():
            if inner[:1] != "_":
                yield from _numbers(f"{name}.{inner}", each, depth - 1)


# ------------------------------------------------------------------------------------- provenance


class _Tagged(int):
    """An integer that carries the numbers it was computed from."""

    origins: frozenset[tuple[str, str]]

    def __deepcopy__(self, memo: object) -> _Tagged:
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _tagged(value: int, origins: frozenset[tuple[str, str]]) -> _Tagged:
    made = _Tagged(value)
    made.origins = origins
    return made


def _operation(name: str) -> Callable[[_Tagged, Any], Any]:
    plain = getattr(int, name)

    def method(self: _Tagged, other: Any) -> Any:
        result = plain(self, other)
        if type(result) is not int:
            return result
        return _tagged(result, self.origins | getattr(other, "origins", frozenset()))

    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _prefix in ("__", "__r"):
        setattr(_Tagged, f"{_prefix}{_name}__", _operation(f"{_prefix}{_name}__"))
setattr(_Tagged, "__neg__", lambda self: _tagged(-int(self), self.origins))  # noqa: B010  # slices


# Functions whose numbers are values and not sizes.
_VALUES = frozenset(
    name
    for stem in ("add", "sub", "mul", "div", "true_divide", "floor_divide", "pow", "remainder")
    for name in (stem, f"{stem}_", f"__{stem}__", f"__r{stem}__", f"__i{stem}__")
) | {"eq", "ne", "lt", "gt", "le", "ge", "fill_", "masked_fill", "masked_fill_", "clamp"}


class _Arrivals(TorchFunctionMode):
    """Notes the origins of numbers that arrive in functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__name__", "") not in _VALUES:
            self._note(args)
            self._note(tuple((kwargs or {}).values()))
        return func(*args, **(kwargs or {}))

    def _note(self, value: Any) -> None:
        if isinstance(value, _Tagged):
            self.found |= value.origins
        elif isinstance(value, slice):
            self._note((value.start, value.stop, value.step))
        elif isinstance(value, (tuple, list)):
            for each in value:
                self._note(each)


def seen_numbers(module: nn.Module, run: Callable[[nn.Module], Any]) -> set[tuple[str, str]]:
    """Numbers of modules that reach a function of torch as a size, in one call of a copy.

    Args:
        module: A copy of a module; it is as before afterwards.
        run: Calls a module on the example.

    Returns:
        Module and attribute of each; empty if the call fails with integers of another class.

    Example:
        >>> import torch
        >>> class Net(nn.Module):
        ...     heads, unused = 2, 3
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.heads, self.unused = 2, 3
        ...     def forward(self, x):
        ...         return x.view(-1, self.heads, 4 // self.heads)
        >>> seen_numbers(Net(), lambda net: net(torch.ones(3, 4)))
        {('', 'heads')}
    """
    arrivals = _Arrivals()
    with changed_within(module):
        for path, part in module.named_modules():
            for name, value in _own_attributes(part).items():
                object.__setattr__(part, name, _with_origin(path, name, value, 1))
        try:
            run_once(module, run, arrivals)
        except Exception:  # any code may run in a module, and need not accept such integers
            return set()
    return arrivals.found


def _with_origin(path: str, name: str, value: Any, depth: int) -> Any:
    if type(value) is int:
        return _tagged(value, frozenset({(path, name)})) if value > 1 else value
    if type(value) in (tuple, list) and any(type(each) is int for each in value[:_LONGEST]):
        return type(value)(
            _with_origin(path, f"{name}.{i}", v, 0) if type(v) is int else v
            for i, v in enumerate(value)
        )
    if depth and hasattr(value, "to_dict") and not isinstance(value, nn.Module):
        mine = copy.copy(value)  # a config for each module: then its reader is known
        for inner, each in list(vars(mine).items()):
            if inner[:1] != "_":
                vars(mine)[inner] = _with_origin(path, f"{name}.{inner}", each, depth - 1)
        return mine
    return value


# -------------------------------------------------------------------- numbers that describe tensors


def describing_attributes(
    module: nn.Module, groups: Sequence[DependencyGroup]
) -> list[SizeAttribute]:
    """Numbers that describe a tensor of their own module: they follow its dimension.

    Args:
        module: Module from which the groups are named.
        groups: The groups.

    Example:
        >>> from lightning_mi_prune.graph.groups import PrunableDim
        >>> dims = (PrunableDim("0.weight", 0, (4, 3), (("ffn",),)),)
        >>> group = DependencyGroup("ffn", "ffn", 4, dims, ())
        >>> [a.attribute for a in describing_attributes(nn.Sequential(nn.Linear(3, 4)), [group])]
        ['out_features']
    """
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    dims = {
        (alias, s.dim): s.layout
        for group in groups
        for s in group.tensors
        for alias in names.get(id(tensor_at(module, s.tensor)), [s.tensor])
    }
    sizes = {name: size for group in groups for name, size in group.all_widths({}).items()}
    found: dict[tuple[str, str], SizeAttribute] = {}
    for (tensor, dim), layout in dims.items():
        path, _, name = tensor.rpartition(".")
        part = module.get_submodule(path)
        if tensor_at(module, tensor) is None:
            continue
        if isinstance(part, nn.modules.conv._ConvNd):
            both = {d: dims[tensor, d] for d in (0, 1) if (tensor, d) in dims}
            for attribute, described in _of_convolution(
                part, both if name == "weight" else {}, sizes
            ):
                found[path, attribute] = SizeAttribute(path, attribute, described)
            continue
        for attribute, described in _described(part, name, dim, layout):
            sequence = attribute == "normalized_shape"
            held = getattr(part, attribute, None)
            if sequence and (not isinstance(held, tuple) or len(held) != 1):
                attribute, sequence = f"normalized_shape.{dim}", False
            found.setdefault((path, attribute), SizeAttribute(path, attribute, described, sequence))
    for path, part in module.named_modules():
        if isinstance(part, nn.MultiheadAttention):
            for attribute, described in _of_attention(part, path, dims, sizes):
                found[path, attribute] = SizeAttribute(path, attribute, described)
    return list(found.values())


def _of_attention(
    part: nn.MultiheadAttention,
    path: str,
    dims: Mapping[tuple[str, int], Layout],
    sizes: Mapping[str, int],
) -> Iterator[tuple[str, Layout]]:
    """Numbers of an attention; its ``head_dim`` scales the products and stays as built."""
    stem = f"{path}." if path else ""
    read = dims.get((f"{stem}out_proj.weight", 1))
    heads = read and _outer_part(read, part.num_heads, sizes)
    if heads:
        yield "num_heads", heads
    fused = dims.get((f"{stem}in_proj_weight", 1))
    for attribute, letter in (("embed_dim", "q"), ("kdim", "k"), ("vdim", "v")):
        layout = fused or dims.get((f"{stem}{letter}_proj_weight", 1))
        if layout:
            yield attribute, layout


def _described(
    part: nn.Module, name: str, dim: int, layout: Layout
) -> Iterator[tuple[str, Layout]]:
    """Attributes of a module that count a dimension of its tensor, with their layouts."""
    tables: list[tuple[str, int, tuple[str, ...]]] = [
        ("weight", 0, ("out_features", "num_features", "num_channels", "normalized_shape", "nx")),
        ("weight", 1, ("in_features", "embedding_dim", "nf")),
        ("bias", 0, ("out_features", "num_features", "num_channels", "normalized_shape", "nf")),
        ("running_mean", 0, ("num_features",)),
    ]
    if isinstance(part, nn.Embedding):
        tables = [("weight", 0, ("num_embeddings",)), ("weight", 1, ("embedding_dim",))]
    held = tensor_at(part, name)
    for tensor, where, attributes in tables:
        if (tensor, where) == (name, dim) and held is not None:
            for attribute in attributes:
                value = vars(part).get(attribute)
                count = value[0] if isinstance(value, tuple) and value else value
                if count == held.shape[dim]:
                    yield attribute, layout


def _of_convolution(
    part: Any, dims: Mapping[int, Layout], sizes: Mapping[str, int]
) -> Iterator[tuple[str, Layout]]:
    """Numbers of a convolution, from the layouts of the dimensions of its weight that are cut."""
    inner, outer = (0, 1) if part.transposed else (1, 0)
    if part.groups == 1:
        if outer in dims:
            yield "out_channels", dims[outer]
        if inner in dims:
            yield "in_channels", dims[inner]
        return
    if part.transposed:
        return
    grouped: Layout = ((part.groups,),)
    if outer in dims:
        yield "out_channels", dims[outer]
        grouped = _outer_part(dims[outer], part.groups, sizes) or grouped
        yield "groups", grouped
    each = part.weight.shape[inner]
    if inner in dims or outer in dims:
        within = dims.get(inner, ((each,),))
        yield "in_channels", grouped if each == 1 else ((grouped, within),)


def _outer_part(layout: Layout, count: int, sizes: Mapping[str, int]) -> Layout | None:
    """The outermost factors of a layout whose product is a number; None if there are none."""
    if layout_size(layout, sizes) == count:
        return layout
    if len(layout) == 1:
        parts = [(layout[0][:end],) for end in range(1, len(layout[0]))]
        return next((part for part in parts if layout_size(part, sizes) == count), None)
    inner = layout_size(layout, sizes) // count
    if all(block and block[-1] == inner for block in layout):
        return tuple(block[:-1] or (1,) for block in layout)
    return None


# ------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class Candidate:
    """One number, or the corresponding ones of all layers, that may follow groups.

    Args:
        attributes: The numbers, with what they would count.
        seen: Whether it reaches a size in an operator.
        nearness: Share of the groups' tensors in the module that holds the number, about.
    """

    attributes: tuple[SizeAttribute, ...]
    seen: bool
    nearness: float


def sub_layouts(layout: Layout, name: str) -> Iterator[Layout]:
    """All products of adjacent factors and sums of adjacent blocks that hold a group.

    Example:
        >>> sorted(map(str, sub_layouts((("kv", 3, 16),), "kv")))
        ["(('kv', 3),)", "(('kv', 3, 16),)", "(('kv',),)"]
    """
    blocks = len(layout)
    for start in range(blocks):
        ends = range(start + 2, blocks + 1) if blocks <= _MOST_BLOCKS else [blocks]
        for end in ends:
            if name in layout_names(layout[start:end]):
                yield layout[start:end]
    for block in layout:
        for start in range(len(block)):
            for end in range(start + 1, len(block) + 1):
                part = block[start:end]
                if name not in layout_names((part,)):
                    continue
                if len(part) == 1 and isinstance(part[0], tuple):
                    yield from sub_layouts(part[0], name)
                else:
                    yield (part,)


def candidates_of(
    groups: Sequence[DependencyGroup],
    numbers: Sequence[Number],
    seen: set[tuple[str, str]],
    every: Mapping[str, DependencyGroup],
) -> list[Candidate]:
    """Numbers around the tensors of groups that equal a part of one of their layouts.

    Args:
        groups: Corresponding groups of the layers of a stack.
        numbers: Numbers of all modules.
        seen: Those of them that reach an operator.
        every: All groups of the model, by name.

    Returns:
        The candidates, the most likely first.
    """
    sizes = {name: group.size for name, group in every.items()}
    by_value: dict[int, list[Number]] = {}
    for number in numbers:
        by_value.setdefault(number.value, []).append(number)
    found: dict[_Key, dict[tuple[str, str], tuple[float, SizeAttribute]]] = {}
    likely: dict[_Key, tuple[bool, float]] = {}
    for group in groups:
        owners = {s.tensor.rpartition(".")[0] for s in group.tensors}
        near = _near(owners)
        parts = {p: None for s in group.tensors for p in sub_layouts(s.layout, group.name)}
        for part in parts:
            for number in by_value.get(layout_size(part, sizes), ()):
                where = (number.module, number.attribute)
                if not _is_near(number.module, near) and where not in seen:
                    continue
                share = nearness(number.module, part, every)
                if not share:
                    continue
                key = (pattern_of(number.module), number.attribute, _patterned(part))
                attribute = SizeAttribute(number.module, number.attribute, part)
                mine = found.setdefault(key, {})
                if where not in mine or mine[where][0] < share:  # of its own layer
                    mine[where] = (share, attribute)
                was = likely.get(key, (False, 0.0))
                likely[key] = (was[0] or where in seen, max(was[1], share))
    made = [Candidate(tuple(a for _, a in found[key].values()), *likely[key]) for key in found]
    return sorted(made, key=lambda c: (not c.seen, -c.nearness))


def _patterned(layout: Layout) -> Layout:
    return map_layout(layout, pattern_of)


def _near(owners: set[str]) -> tuple[set[str], set[str]]:
    """Modules around tensors: owners and three levels above, and two levels whose insides count."""
    above, tops = set(owners), set()
    for owner in owners:
        parts = owner.split(".")
        for up in (1, 2, 3):
            above.add(".".join(parts[:-up]))
        tops.add(".".join(parts[:-1]))
    return above, {top for top in tops if top}


def _is_near(path: str, near: tuple[set[str], set[str]]) -> bool:
    above, tops = near
    parts = path.split(".")
    return path in above or any(".".join(parts[:up]) in tops for up in (-1, -2))


def nearness(path: str, layout: Layout, every: Mapping[str, DependencyGroup]) -> float:
    """How many tensors of the groups of a layout are inside a module, or the ones above it.

    Returns:
        The share of the group with the fewest, less for each level above.
    """
    shares = []
    for name in layout_names(layout):
        tensors = [s.tensor for s in every[name].tensors] if name in every else []
        best, inside, top = 0.0, 1.0, path
        for _ in range(4):
            prefix = f"{top}." if top else ""
            share = sum(tensor.startswith(prefix) for tensor in tensors) / max(1, len(tensors))
            best = max(best, inside * share)
            if not top:
                break
            top, inside = top.rpartition(".")[0], inside * 0.8
        shares.append(best)
    return min(shares, default=0.0)
