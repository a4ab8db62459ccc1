"""Fields of Hugging Face configs that follow widths and depths, found by value and verified.

A field is believed only if the class of the network, built from the changed config on the meta
device, has the shapes and numbers of the network after the same cut. Then a config alone
describes it, and ``AutoModel.from_pretrained`` opens it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations, islice, product
from typing import Any

import torch
from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.attributes import pattern_of
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack, SizeAttribute
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.surgery.parameters import attribute_value

__all__ = [
    "with_config_fields",
    "with_depth_fields",
]

Shapes = dict[str, tuple[int, ...]]

_MOST_ALIASES = 4  # fields of one value that are tried together
_MOST_CHOICES = 8  # of fields for several numbers of heads
_MOST_BUILDS = 60  # of one network, which take a fraction of a second each


def with_config_fields(
    module: nn.Module, groups: Sequence[DependencyGroup]
) -> tuple[DependencyGroup, ...]:
    """Note the config fields that hold the width of groups, where one width is enough.

    Args:
        module: Module from which the groups are named; it does not change.
        groups: Groups of any networks inside it.

    Returns:
        The groups, with ``config``, ``config_aliases`` and ``tie`` where they are known.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
        >>> net = BertModel(BertConfig(num_hidden_layers=2, vocab_size=50, **sizes))
        >>> ends = {"producers": ["intermediate.dense"], "consumers": ["output.dense"]}
        >>> groups = [
        ...     linear_group(
        ...         net,
        ...         f"ffn{i}",
        ...         kind="ffn",
        ...         **{role: [f"encoder.layer.{i}.{name}"] for role, [name] in ends.items()},
        ...     )
        ...     for i in (0, 1)
        ... ]
        >>> [group.config for group in with_config_fields(net, groups)]
        ['intermediate_size', 'intermediate_size']
    """
    found = {group.name: group for group in groups}
    for path in dict.fromkeys(group.network for group in groups):
        builder = _builder(module, path)
        if builder is not None:
            _find(builder, [g for g in groups if g.network == path], found)
    return tuple(found.values())


class _Builder:
    """Builds the class of a network from changed configs, on the meta device."""

    def __init__(self, network: Any, prefix: str) -> None:
        self.network, self.prefix, self.left = network, prefix, _MOST_BUILDS
        self.now = _shapes(network, prefix)

    @property
    def numbers(self) -> dict[str, int]:
        """Fields of the config that hold a number from 2."""
        fields = vars(self.network.config)
        return {
            n: v
            for n, v in fields.items()
            if n[:1] != "_"
            and type(v) is int
            and v > 1
            and not n.endswith(("token_id", "token_index"))
        }

    def built(self, changes: Mapping[str, Any]) -> nn.Module | None:
        """A network built with some fields changed; None if it cannot be built."""
        if self.left <= 0:
            return None
        self.left -= 1
        try:
            config = copy.deepcopy(self.network.config)
            for name, value in changes.items():
                setattr(config, name, value)
            with torch.device("meta"):
                made: nn.Module = type(self.network)(config)
        except Exception:  # any class may be built, and refuse a config
            return None
        return made

    def gives(
        self,
        changes: Mapping[str, Any],
        groups: Sequence[DependencyGroup],
        widths: Mapping[str, int],
    ) -> bool:
        """Whether changed fields give the shapes and numbers of a cut of groups to some widths."""
        made = self.built(changes)
        wanted = _cut_shapes(self.now, groups, widths)
        if made is None or not _same(self, _shapes(made, self.prefix), wanted):
            return False
        return all(
            self._number(made, number) == layout_size(number.layout, group.all_widths(widths))
            for group in groups
            for number in group.attributes
        )

    def _number(self, made: nn.Module, number: SizeAttribute) -> Any:
        stem = f"{self.prefix}." if self.prefix else ""
        try:
            return attribute_value(made, replace(number, module=number.module.removeprefix(stem)))
        except PruningError:
            return None


def _shapes(network: nn.Module, prefix: str) -> Shapes:
    stem = f"{prefix}." if prefix else ""
    named = network.named_parameters(remove_duplicate=False)
    return {stem + name: tuple(parameter.shape) for name, parameter in named}


def _builder(module: nn.Module, path: str) -> _Builder | None:
    """A builder for a Hugging Face network that its class and config describe; else None."""
    network: Any = module.get_submodule(path)
    if not hasattr(getattr(network, "config", None), "to_dict"):
        return None
    if not hasattr(network, "base_model_prefix"):
        return None
    builder = _Builder(network, path)
    return builder if builder.gives({}, (), {}) else None


def _cut_shapes(
    now: Shapes, groups: Sequence[DependencyGroup], widths: Mapping[str, int]
) -> Shapes:
    """The shapes after groups were cut to some widths."""
    found = {name: list(shape) for name, shape in now.items()}
    for group in groups:
        at = group.all_widths(widths)
        for s in group.tensors:
            if s.tensor in found:
                found[s.tensor][s.dim] = layout_size(s.layout, at)
    return {name: tuple(shape) for name, shape in found.items()}


def _same(builder: _Builder, built: Shapes, wanted: Shapes) -> bool:
    """Whether shapes are equal, those of tied parameters under any of their names."""
    if built.keys() != wanted.keys():
        return False
    names: dict[int, list[str]] = {}
    stem = f"{builder.prefix}." if builder.prefix else ""
    for name, parameter in builder.network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(stem + name)
    for same in names.values():  # a group names one of them
        cut = next((wanted[n] for n in same if wanted[n] != builder.now[n]), None)
        if any(built[n] != (cut or wanted[n]) for n in same):
            return False
    return True


def _find(
    builder: _Builder, groups: Sequence[DependencyGroup], found: dict[str, DependencyGroup]
) -> None:
    classes: dict[tuple[str, int, str], list[DependencyGroup]] = {}
    for group in groups:
        stem = pattern_of(group.name) if group.kind != "hidden" else group.name
        classes.setdefault((group.kind, group.size, stem), []).append(group)
    merged: dict[tuple[str, int], list[list[DependencyGroup]]] = {}
    for (kind, size, _), members in classes.items():
        merged.setdefault((kind, size), []).append(members)
    left: list[list[DependencyGroup]] = []
    for parts in merged.values():
        alone = [_note(builder, members, found) for members in parts]
        rest = [members for members, known in zip(parts, alone, strict=True) if not known]
        if len(rest) > 1 and _note(builder, [group for m in rest for group in m], found):
            rest = []
        left += rest
    hidden = [c[0] for c in left if c[0].kind == "hidden"]
    for stream in hidden:
        _find_tied(builder, stream, [c for c in left if c[0].kind != "hidden"], found)


def _note(
    builder: _Builder, members: Sequence[DependencyGroup], found: dict[str, DependencyGroup]
) -> bool:
    """Note the fields of groups of one width, if there are any."""
    fields = _fields_alone(builder, members, found)
    for group in members if fields else ():
        found[group.name] = replace(group, config=fields[0], config_aliases=fields[1:])
    return bool(fields)


_WORDS = {
    "ffn": "intermediate|ffn|inner|d_ff|mlp",
    "head_dim": "head_dim|d_kv|head_size",
    "heads": "head",
    "hidden": "hidden|d_model|n_embd|embed|dim",
}


def _ordered(builder: _Builder, value: int, kind: str) -> list[str]:
    """Fields with a value, those first whose name fits the kind; then fields that give none."""
    words = _WORDS.get(kind, kind)
    names = [name for name, number in builder.numbers.items() if number == value]
    unset = [n for n, v in vars(builder.network.config).items() if v is None]
    derived = [name for name in unset if kind in ("ffn", "head_dim") and re.search(words, name)]
    order = words.split("|")

    def rank(name: str) -> int:
        return next((i for i, word in enumerate(order) if word in name), len(order))

    return [*sorted(names, key=rank), *derived]


def _sets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Single fields, then all of one value together, then pairs."""
    few = names[:_MOST_ALIASES]
    yield from ((name,) for name in few)
    if len(few) > 1:
        yield tuple(few)
    if len(few) > 2:
        yield from combinations(few, 2)


def _fields_alone(
    builder: _Builder, groups: Sequence[DependencyGroup], found: Mapping[str, DependencyGroup]
) -> tuple[str, ...]:
    """Fields that change the width of some groups and nothing else; none if there are none."""
    size = groups[0].size
    width = _half(size)
    taken = {name for g in found.values() for name in (g.config, *g.config_aliases) if name}
    widths = {group.name: width for group in groups}
    names = [n for n in _ordered(builder, size, groups[0].kind) if n not in taken]
    for fields in _sets(names):
        if builder.gives(dict.fromkeys(fields, width), groups, widths):
            return fields
    return ()


def _find_tied(
    builder: _Builder,
    stream: DependencyGroup,
    others: Sequence[Sequence[DependencyGroup]],
    found: dict[str, DependencyGroup],
) -> None:
    """The field of a hidden size from which the class derives the size of heads.

    It changes with the number of heads then, which keeps their size.
    """
    heads = [members for members in others if members[0].kind == "heads"]
    alike = [m[0] for m in others if m[0].size == stream.size and len(m) == 1]
    every = [group for members in heads for group in members]
    counts = [_ordered(builder, members[0].size, "heads")[:2] for members in heads]
    for share in (2, 3):  # another width may be that of something else by chance
        if not heads or any(g.size % share for g in (stream, *every)):
            continue
        width = stream.size // share
        widths = {group.name: width for group in (stream, *alike)}
        widths |= {group.name: group.size // share for group in every}
        for fields in _sets(_ordered(builder, stream.size, "hidden")):
            for chosen in islice(product(*counts), _MOST_CHOICES):
                changes = {n: m[0].size // share for n, m in zip(chosen, heads, strict=True)}
                changes |= dict.fromkeys(fields, width)
                if set(chosen) & set(fields) or not builder.gives(
                    changes, [stream, *alike, *every], widths
                ):
                    continue
                found[stream.name] = replace(stream, config=fields[0], config_aliases=fields[1:])
                for name, members in zip(chosen, heads, strict=True):
                    for group in members:
                        found[group.name] = replace(group, config=name, tie=fields[0])
                for group in alike:
                    found[group.name] = replace(group, tie=fields[0])
                return


def _half(size: int) -> int:
    return size // 2 if size % 2 == 0 else max(1, size // 3 if size % 3 == 0 else size - 1)


def with_depth_fields(module: nn.Module, stacks: Sequence[LayerStack]) -> tuple[LayerStack, ...]:
    """Note the config fields that count the layers of stacks, and numbers with a layer's index.

    Args:
        module: Module from which the stacks are named; it does not change.
        stacks: The stacks.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 40}
        >>> net = BertModel(BertConfig(num_hidden_layers=3, vocab_size=50, **sizes))
        >>> [stack] = with_depth_fields(net, [LayerStack("encoder.layer", 3)])
        >>> stack.config_fields
        (('', 'num_hidden_layers'), ('encoder', 'num_hidden_layers'))
    """
    found = []
    for stack in stacks:
        indexed = replace(stack, index_attributes=_index_attributes(module, stack))
        builder = _builder(module, stack.network)
        found.append(indexed if builder is None else _with_depth(builder, indexed))
    return tuple(found)


def _with_depth(builder: _Builder, stack: LayerStack) -> LayerStack:
    top = f"{stack.name}.{stack.size - 1}."
    wanted = {name: shape for name, shape in builder.now.items() if not name.startswith(top)}
    fields = vars(builder.network.config)
    lists = {
        name: tuple(value)
        for name, value in fields.items()
        if re.search("layer|block|depth", name)
        and type(value) in (list, tuple)
        and len(value) == stack.size
        and all(isinstance(each, (str, int, float, bool)) for each in value)
    }
    shorter = {name: list(entries[:-1]) for name, entries in lists.items()}
    names = [name for name, value in fields.items() if value == stack.size and type(value) is int]
    names.sort(key=lambda name: re.search("layer|depth|block", name) is None)
    for field in names[:_MOST_ALIASES]:
        for entries in ({}, shorter) if not shorter else (shorter,):
            made = builder.built({field: stack.size - 1, **entries})
            if made is not None and _shapes(made, builder.prefix) == wanted:
                used = tuple((name, lists[name]) for name in entries)
                counted = tuple(_depth_fields(builder, stack, field))
                return replace(stack, config_fields=counted, config_lists=used)
    return stack


def _depth_fields(builder: _Builder, stack: LayerStack, field: str) -> Iterator[tuple[str, str]]:
    """The field in the config of the network, and in those of the modules around the stack."""
    yield stack.network, field
    stem = f"{builder.prefix}." if builder.prefix else ""
    parts = stack.name.removeprefix(stem).split(".")
    for end in range(1, len(parts)):
        path = ".".join(parts[:end])
        config = getattr(builder.network.get_submodule(path), "config", None)
        if config is builder.network.config:
            yield stem + path, field
        elif hasattr(config, "to_dict"):  # a config of its own, such as that of a decoder
            for name, value in vars(config).items():
                if type(value) is int and value == stack.size and re.search("layers?$", name):
                    yield stem + path, name


def _index_attributes(module: nn.Module, stack: LayerStack) -> tuple[str, ...]:
    """Attributes that hold the index of the layer in every layer of a stack."""
    common: set[tuple[str, str]] | None = None
    for index in range(stack.size):
        layer = module.get_submodule(f"{stack.name}.{index}" if stack.name else str(index))
        here = {
            (path, name)
            for path, part in layer.named_modules()
            for name, value in vars(part).items()
            if type(value) is int and value == index and name[:1] != "_"
        }
        common = here if common is None else common & here
    names = {name for _, name in common or ()}
    return tuple(sorted({"layer_idx", *names}))
