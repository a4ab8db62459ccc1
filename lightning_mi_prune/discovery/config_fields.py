"""Fields of Hugging Face configs that follow widths and depths, found by value and verified.

A field is believed only if the class of the network, built on the meta device from the changed
config as it would be read from its file, has the shapes and numbers of the network after the same
cut. Then a config alone describes it, and ``AutoModel.from_pretrained`` opens it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice, product
from typing import Any, TypeAlias

import torch
from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import CONFIG_FIELD, GRAPH_FIELD, PruningPlan
from lightning_mi_prune.discovery.attributes import numbers_of, pattern_of, sub_layouts
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack, SizeAttribute, join_path
from lightning_mi_prune.graph.layouts import Layout, layout_names, layout_size
from lightning_mi_prune.surgery.configs import (
    config_fields,
    config_numbers,
    config_value,
    set_config_value,
)
from lightning_mi_prune.surgery.parameters import attribute_value, shapes_at

__all__ = [
    "Unused",
    "built_from_config",
    "check_described",
    "configs_accepting",
    "difference_from_config",
    "with_config_fields",
    "with_depth_fields",
]

Shapes = dict[str, tuple[int, ...]]
Numbers: TypeAlias = Mapping[tuple[str, str], Any]
Unused: TypeAlias = Callable[[Numbers], bool]
"""Whether the outputs of a module stay when numbers on its modules become others."""

_MOST_ALIASES = 4  # fields of one value that are tried together
_MOST_CHOICES = 8  # of fields for several numbers of heads
_MOST_BUILDS = 120  # of one network, which take a fraction of a second each
_DEEPEST = 2  # configs inside a config that are looked at
_HEAD_SIZE = "head_dim"  # a field that many classes read, whether their config has it or not


def with_config_fields(
    module: nn.Module, groups: Sequence[DependencyGroup], unused: Unused | None = None
) -> tuple[DependencyGroup, ...]:
    """Note the config fields that hold the width of groups, where one width is enough.

    Args:
        module: Module from which the groups are named; it does not change.
        groups: Groups of any networks inside it.
        unused: Whether numbers on modules matter. A network that is built from a changed
            config may differ in those that do not: they leave the attributes of groups. Default:
            all numbers in attributes of groups matter, and no others.

    Returns:
        The groups, with ``config``, ``config_aliases``, ``config_sizes`` and ``tie`` where they are
        known.

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
        builder = _builder(module, path, unused)
        if builder is not None:
            _find(builder, [g for g in groups if g.network == path], found)
    return tuple(found.values())


@dataclass(frozen=True)
class _Fields:
    """Fields that hold the width of some groups.

    Args:
        names: Fields that hold the width.
        sizes: Further fields, and what they count, for a class of groups: by name of each.
        decorative: Numbers that were taken to follow the groups, and need not.
    """

    names: tuple[str, ...]
    sizes: Mapping[str, tuple[tuple[str, Layout], ...]]
    decorative: frozenset[tuple[str, str]] = frozenset()


class _Builder:
    """Builds the class of a network from changed configs, on the meta device.

    Args:
        network: The network.
        prefix: Its path, from which its tensors are named.
        unused: As for :func:`with_config_fields`.
    """

    def __init__(self, network: Any, prefix: str, unused: Unused | None = None) -> None:
        self.network, self.prefix, self.left = network, prefix, _MOST_BUILDS
        self.now = _shapes(network, prefix)
        self.unused = unused
        self._built: dict[str, nn.Module | None] = {}
        self.plain = self.built({})
        self.buffers = {} if self.plain is None else _buffers(self.plain, prefix)

    @property
    def numbers(self) -> dict[str, int]:
        """Fields of the config, and of configs inside it, that hold a number from 2."""
        return {
            name: value
            for name, value in _entries(self.network.config)
            if type(value) is int and value > 1 and not name.endswith(("token_id", "token_index"))
        }

    @property
    def unset(self) -> list[str]:
        """Fields for which the class may compute a number from others, as there is none."""
        found = [name for name, value in _entries(self.network.config) if value is None]
        tops = {"", *(name.rpartition(".")[0] for name in self.numbers)}
        extra = [join_path(top, _HEAD_SIZE) for top in sorted(tops)]
        return [*found, *(n for n in extra if config_value(self.network.config, n) is None)]

    def changed(self, changes: Mapping[str, Any]) -> Any:
        """The config with some fields changed, as it is read from the file that is written of it.

        Returns:
            The config, or None where its class refuses these numbers.
        """
        return _changed(self.network.config, changes)

    def built(self, changes: Mapping[str, Any]) -> nn.Module | None:
        """A network built with some fields changed; None if it cannot be built."""
        key = repr(sorted(changes.items()))
        if key not in self._built and self.left > 0:
            config, self._built[key] = self.changed(changes), None
            if config is None:
                return None
            self.left -= 1
            try:
                with torch.device("meta"):
                    self._built[key] = type(self.network)(config)
            except Exception:  # any class may be built, and refuse a config
                return None
        return self._built.get(key)

    def reads(self, field: str, number: int) -> bool:
        """Whether a number in a field that has none changes what is built."""
        made = self.built({field: number})
        return made is None or _shapes(made, self.prefix) != self.now

    def differs(self, made: nn.Module, wanted: Shapes, cut: Shapes) -> str:
        """What of a built network has another shape than wanted: "" if nothing.

        Args:
            made: The network.
            wanted: Shapes of all parameters, those of tied ones under any of their names.
            cut: Shapes of buffers that were cut.
        """
        built = _shapes(made, self.prefix)
        odd = sorted(built.keys() ^ wanted.keys())
        if odd:
            return f"{odd[0]!r} is in the model or in what the config builds, not in both"
        for same in _tied(self.network, self.prefix):  # a group names one of them
            shape = next((wanted[n] for n in same if wanted[n] != self.now[n]), wanted[same[0]])
            name = next((n for n in same if built[n] != shape), None)
            if name is not None:
                return f"{name!r} has shape {shape}, and {built[name]} by the config"
        expected, buffers = {**self.buffers, **cut}, _buffers(made, self.prefix)
        for name, shape in expected.items():
            if name in cut and name in _unsaved(made, self.prefix):
                return f"{name!r} is computed anew whenever a model is built"
            if name in self.buffers and buffers.get(name) != shape:
                return f"{name!r} has shape {shape}, and {buffers.get(name)} by the config"
        return ""

    def fits(
        self,
        changes: Mapping[str, Any],
        groups: Sequence[DependencyGroup],
        widths: Mapping[str, int],
    ) -> frozenset[tuple[str, str]] | None:
        """Whether changed fields give the shapes and numbers of a cut of groups to some widths.

        Returns:
            Numbers in attributes of the groups that differ and do not matter; None if it does not.
        """
        made = self.built(changes)
        if made is None or self.differs(made, *_cut_shapes(self.now, groups, widths)):
            return None
        mine = {(n.module, n.attribute): (n, g) for g in groups for n in g.attributes}
        wanted = {
            key: layout_size(number.layout, group.all_widths(widths))
            for key, (number, group) in mine.items()
        }
        held = {key: self._number(made, number) for key, (number, _) in mine.items()}
        wrong = {key: held[key] for key in wanted if held[key] != wanted[key]}
        if self.unused is None:
            return None if wrong else frozenset()
        others = {k: v for k, v in self._other_numbers(made).items() if k not in wanted}
        if any(value is None for value in wrong.values()):
            return None
        if (wrong or others) and not (
            self.unused(wrong | others) and self.unused({key: wanted[key] for key in wrong})
        ):
            return None
        return frozenset(wrong)

    def difference(
        self,
        made: nn.Module,
        groups: Sequence[DependencyGroup],
        widths: Mapping[str, int],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> str:
        """What of a built network differs from this one at some widths: "" if nothing.

        Args:
            made: The network.
            groups: All groups of this one.
            widths: The width of each.
            shapes: Shapes of the tensors that they cut, at these widths.
        """
        wanted = {name: shapes.get(name, shape) for name, shape in self.now.items()}
        cut = {s.tensor: shapes[s.tensor] for g in groups for s in g.tensors if s.buffer}
        narrower = {g.name for g in groups if widths[g.name] < g.size}
        names = {s.tensor for g in groups for s in g.tensors if g.name in narrower}
        found = self.differs(made, wanted, {n: shape for n, shape in cut.items() if n in names})
        if found:
            return found
        for group in groups:
            for number in group.attributes:
                held = self._number(made, number)
                size = layout_size(number.layout, group.all_widths(widths))
                if held != size:
                    where = f"{number.module}.{number.attribute}".lstrip(".")
                    return f"{where!r} is {size}, and {held} by the config"
        return ""

    def _number(self, made: nn.Module, number: SizeAttribute) -> Any:
        stem = f"{self.prefix}." if self.prefix else ""
        try:
            return attribute_value(made, replace(number, module=number.module.removeprefix(stem)))
        except PruningError:
            return None

    def _other_numbers(self, made: nn.Module) -> dict[tuple[str, str], Any]:
        """Numbers of modules that are not what they are without a change."""
        before = {} if self.plain is None else _numbers(self.plain)
        return {
            (join_path(self.prefix, path), name): value
            for (path, name), value in _numbers(made).items()
            if before.get((path, name), value) != value
        }


def _changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A config with some fields changed, as read from its file; None if its class refuses them."""
    try:
        config = copy.deepcopy(config)
        for name in (CONFIG_FIELD, GRAPH_FIELD):  # large, and of no class
            vars(config).pop(name, None)
        for name, value in changes.items():
            set_config_value(config, name, value)
        return type(config).from_dict(json.loads(config.to_json_string(use_diff=True)))
    except Exception:  # any class may be given, and refuse a number
        return None


def _entries(config: Any, depth: int = _DEEPEST, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Fields of a config and of the configs inside it, with their values."""
    for name, value in vars(config).items():
        if name[:1] == "_":
            continue
        if hasattr(value, "to_dict") and depth:
            yield from _entries(value, depth - 1, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _shapes(network: nn.Module, prefix: str) -> Shapes:
    named = network.named_parameters(remove_duplicate=False)
    return {join_path(prefix, name): tuple(parameter.shape) for name, parameter in named}


def _buffers(network: nn.Module, prefix: str) -> Shapes:
    named = network.named_buffers(remove_duplicate=False)
    return {join_path(prefix, name): tuple(buffer.shape) for name, buffer in named}


def _unsaved(network: nn.Module, prefix: str) -> set[str]:
    """Buffers that are no part of the state dict: a network computes them when it is built."""
    return {
        join_path(prefix, join_path(path, name))
        for path, part in network.named_modules()
        for name in part._non_persistent_buffers_set
    }


def _tied(network: nn.Module, prefix: str) -> list[list[str]]:
    """Names of parameters, those of one parameter together."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(join_path(prefix, name))
    return [*names.values()]


def _numbers(network: nn.Module) -> dict[tuple[str, str], Any]:
    """Numbers of all modules, but for those in configs and those that describe a tensor."""
    found: dict[tuple[str, str], Any] = {
        (number.module, number.attribute): number.value
        for number in numbers_of(network)
        if not hasattr(
            getattr(network.get_submodule(number.module), number.attribute.split(".")[0]), "to_dict"
        )
    }
    for path, part in network.named_modules():
        for name, value in vars(part).items():
            if type(value) is float and name[:1] != "_":
                found[path, name] = value
    return found


def _builder(module: nn.Module, path: str, unused: Unused | None = None) -> _Builder | None:
    """A builder for a Hugging Face network that its class and config describe; else None.

    Args:
        module: Module from which the network is named.
        path: Path of the network.
        unused: As for :func:`with_config_fields`.
    """
    network: Any = module.get_submodule(path)
    if not hasattr(getattr(network, "config", None), "to_dict"):
        return None
    if not hasattr(network, "base_model_prefix"):
        return None
    builder = _Builder(network, path, unused)
    made = builder.plain
    return None if made is None or builder.differs(made, builder.now, {}) else builder


def _cut_shapes(
    now: Shapes, groups: Sequence[DependencyGroup], widths: Mapping[str, int]
) -> tuple[Shapes, Shapes]:
    """The shapes after groups were cut to some widths: of parameters, and of buffers they cut."""
    found = {name: list(shape) for name, shape in now.items()}
    buffers: dict[str, list[int]] = {}
    for group in groups:
        at = group.all_widths(widths)
        for s in group.tensors:
            shape = found.get(s.tensor)
            if s.buffer:
                shape = buffers.setdefault(s.tensor, list(s.shape))
            if shape is not None:
                shape[s.dim] = layout_size(s.layout, at)
    return tuple(  # type: ignore[return-value]
        {name: tuple(shape) for name, shape in part.items()} for part in (found, buffers)
    )


# ---------------------------------------------------------------------------------- which fields


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
    # A hidden size is described alone only where the size of heads is set, which theirs may need.
    for parts in sorted(merged.values(), key=lambda parts: parts[0][0].kind == "hidden"):
        alone = [_note(builder, members, found) for members in parts]
        rest = [members for members, known in zip(parts, alone, strict=True) if not known]
        if len(rest) > 1 and _note(builder, [group for m in rest for group in m], found):
            rest = []
        left += rest
    for stream in [members[0] for members in left if members[0].kind == "hidden"]:
        if found[stream.name].config is None and found[stream.name].tie is None:
            _find_tied(builder, stream, [m for m in left if m[0] is not stream], found)


def _note(
    builder: _Builder, members: Sequence[DependencyGroup], found: dict[str, DependencyGroup]
) -> bool:
    """Note the fields of groups of one width, if there are any."""
    members = [found[group.name] for group in members]
    fields = _fields_alone(builder, members, found)
    if fields is None:
        return False
    names = fields.names
    for group in members:
        found[group.name] = replace(
            group,
            config=names[0] if names else None,
            config_aliases=names[1:],
            config_sizes=fields.sizes[group.name],
        )
    _leave(found, fields.decorative)
    return True


def _leave(found: dict[str, DependencyGroup], decorative: frozenset[tuple[str, str]]) -> None:
    """Leave out numbers that the class of the network gives another value than groups do."""
    for name, group in found.items() if decorative else ():
        kept = tuple(n for n in group.attributes if (n.module, n.attribute) not in decorative)
        found[name] = replace(group, attributes=kept)


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
    derived = [n for n in builder.unset if kind in ("ffn", "head_dim") and re.search(words, n)]
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
) -> _Fields | None:
    """Fields that change the width of some groups and nothing else; None if there are none."""
    for names, sizes in _choices(builder, groups, found):
        for width in _narrower(groups[0].size):
            widths = {group.name: width for group in groups}
            changes = _numbers_of(names, sizes, groups[0], width)
            if builder.changed(changes) is None:
                continue  # a number that the class of the config refuses; another may do
            decorative = builder.fits(changes, groups, widths)
            if decorative is not None:
                named = {g.name: _corresponding(sizes, groups[0], g) for g in groups}
                return _Fields(names, named, decorative)
            break
    return None


Sizes: TypeAlias = tuple[tuple[str, Layout], ...]


def _choices(
    builder: _Builder, groups: Sequence[DependencyGroup], found: Mapping[str, DependencyGroup]
) -> Iterator[tuple[tuple[str, ...], Sizes]]:
    """Fields that may hold a width, and others that may have to be set with it."""
    group = groups[0]
    taken = {name for g in found.values() for name in config_fields(g)}
    own = [n for n in _ordered(builder, group.size, group.kind) if n not in taken]
    if group.kind != "heads":
        known = {(n, layout) for g in found.values() for n, layout in g.config_sizes}
        fixed = tuple(sorted((n, layout) for n, layout in known if not layout_names(layout)))
        for extra in dict.fromkeys(((), fixed)):
            yield from ((names, extra) for names in _sets(own))
        return
    own = [name for name in own if "head" in name]
    counted: Sizes = tuple(
        (name, layout)
        for layout in _products(group)
        for name, value in builder.numbers.items()
        if "head" in name and value == layout_size(layout, group.all_widths({}))
        if name not in taken
    )
    size = _entries_of_a_head(group)
    derived = [name for name in builder.unset if re.search(_WORDS["head_dim"], name)]
    read = [name for name in derived if size > 1 and own and builder.reads(name, 2 * size)]
    for extra in ((), *(((name, ((size,),)),) for name in read)):
        yield from ((names, extra) for names in _sets(own))
        for one in counted[:_MOST_ALIASES]:
            yield from (((name,), (one, *extra)) for name in own if name != one[0])


def _products(group: DependencyGroup) -> list[Layout]:
    """What heads of queries may be: heads of keys and values times the queries of each."""
    parts = [p for s in group.tensors for p in sub_layouts(s.layout, group.name)]
    plain = [p for p in parts if len(p) == 1 and len(p[0]) == 2]
    return list(dict.fromkeys(p for p in plain if all(not isinstance(f, tuple) for f in p[0])))


def _entries_of_a_head(group: DependencyGroup) -> int:
    """Dimensions of one head, of one query where several share it."""
    counts = {n: 1 for n, _ in group.partners if n.rpartition(".")[2] == "query_heads"}
    at = group.all_widths({}) | counts | {group.name: 1}
    sizes = {
        layout_size(s.layout, at) for s in group.tensors if group.name in layout_names(s.layout)
    }
    return min((size for size in sizes if size > 1), default=1)


def _corresponding(sizes: Sizes, group: DependencyGroup, other: DependencyGroup) -> Sizes:
    """The same fields for a group of another layer, whose partners come in the same order."""
    names = {group.name: other.name}
    theirs = zip(group.partners, other.partners, strict=False)
    names |= {mine: there for (mine, _), (there, _) in theirs}
    made = replace(group, config_sizes=sizes).renamed(lambda name: names.get(name, name))
    return made.config_sizes


def _numbers_of(
    names: Sequence[str], sizes: Sizes, group: DependencyGroup, width: int
) -> dict[str, int]:
    at = group.all_widths({group.name: width})
    return dict.fromkeys(names, width) | {n: layout_size(layout, at) for n, layout in sizes}


def _explicit(builder: _Builder, found: Mapping[str, DependencyGroup]) -> dict[str, int]:
    """Widths of groups that are known, for fields that the class would compute from others."""
    return {
        name: group.size
        for group in found.values()
        if group.network == builder.prefix and group.config is not None
        for name in (group.config, *group.config_aliases)
        if config_value(builder.network.config, name) is None
    }


def _find_tied(
    builder: _Builder,
    stream: DependencyGroup,
    others: Sequence[Sequence[DependencyGroup]],
    found: dict[str, DependencyGroup],
) -> None:
    """The field of a hidden size from which the class derives the size of heads.

    It changes with the number of heads then, which keeps their size.
    """
    stream = found[stream.name]
    others = [[found[group.name] for group in members] for members in others]
    heads = [members for members in others if members[0].kind == "heads"]
    alike = [m[0] for m in others if m[0].size == stream.size and len(m) == 1]
    every = [group for members in heads for group in members]
    counts = [[n for n in _ordered(builder, m[0].size, "heads") if "head" in n][:2] for m in heads]
    for share in (2, 3):  # another width may be that of something else by chance
        if not heads or any(g.size % share for g in (stream, *every)):
            continue
        width = stream.size // share
        widths = {group.name: width for group in (stream, *alike)}
        widths |= {group.name: group.size // share for group in every}
        for fields in _sets(_ordered(builder, stream.size, "hidden")):
            for chosen in islice(product(*counts), _MOST_CHOICES):
                changes = _explicit(builder, found)
                changes |= {n: m[0].size // share for n, m in zip(chosen, heads, strict=True)}
                changes |= dict.fromkeys(fields, width)
                if set(chosen) & set(fields):
                    continue
                decorative = builder.fits(changes, [stream, *alike, *every], widths)
                if decorative is None:
                    continue
                noted = {stream.name: replace(stream, config=fields[0], config_aliases=fields[1:])}
                for name, members in zip(chosen, heads, strict=True):
                    noted |= {g.name: replace(g, config=name, tie=fields[0]) for g in members}
                noted |= {group.name: replace(group, tie=fields[0]) for group in alike}
                found.update(noted)
                _leave(found, decorative)
                return


# ------------------------------------------------------------------------------ widths, once chosen


def configs_accepting(
    module: nn.Module, groups: Sequence[DependencyGroup], current: Mapping[str, int]
) -> dict[str, Callable[[Mapping[str, int]], bool]]:
    """By network, whether its config takes the numbers of some widths; only those with a config.

    Classes of configs refuse some numbers: a hidden size that is no multiple of the heads.

    Args:
        module: Module from which the groups are named.
        groups: All its groups.
        current: Present widths, for groups that are not among those asked for.

    Example:
        >>> configs_accepting(nn.Linear(2, 2), [], {})
        {}
    """
    found: dict[str, Callable[[Mapping[str, int]], bool]] = {}
    for path in dict.fromkeys(group.network for group in groups):
        network = module.get_submodule(path)
        if hasattr(getattr(network, "config", None), "to_dict"):
            found[path] = _accepting(network, [g for g in groups if g.network == path], current)
    return found


def _accepting(
    network: nn.Module, groups: Sequence[DependencyGroup], current: Mapping[str, int]
) -> Callable[[Mapping[str, int]], bool]:
    config: Any = network.config
    asked: dict[str, bool] = {}

    def accepts(widths: Mapping[str, int]) -> bool:
        numbers = config_numbers(groups, {**current, **widths})
        key = repr(sorted(numbers.items()))
        if key not in asked:
            asked[key] = _changed(config, numbers) is not None
        return asked[key]

    return accepts


def difference_from_config(
    network: Any,
    groups: Sequence[DependencyGroup],
    widths: Mapping[str, int],
    shapes: Mapping[str, tuple[int, ...]],
    changes: Mapping[str, Any],
    path: str = "",
) -> str:
    """What of a network at some widths differs from what its class builds from a config.

    The class is built on the meta device, from the config as it is read from its file.

    Args:
        network: The network, at any widths; it does not change.
        groups: All its groups.
        widths: The width of each.
        shapes: Shapes of the tensors that they cut, at these widths.
        changes: Fields of the config to set before.
        path: Path of the network, from which the groups are named.

    Returns:
        The first difference, as the end of a sentence; "" where there is none.
    """
    builder = _Builder(network, path)
    made = builder.built(changes)
    if made is None:
        return f"{type(network).__name__} cannot be built from the config"
    return builder.difference(made, groups, widths, shapes)


def built_from_config(network: Any, changes: Mapping[str, Any]) -> nn.Module | None:
    """A network of the same class, built on the meta device from its config as files hold it.

    Args:
        network: The network; it does not change.
        changes: Fields of the config to set before.

    Returns:
        The network; None where it cannot be built.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> net = BertModel(BertConfig(vocab_size=9, intermediate_size=6, **sizes))
        >>> built_from_config(net, {}).encoder.layer[0].intermediate.dense.weight.shape
        torch.Size([6, 8])
    """
    return _Builder(network, "").built(changes)


def check_described(
    module: nn.Module, groups: Sequence[DependencyGroup], plan: PruningPlan
) -> None:
    """Refuse a plan at which a config does not describe its network; nothing is changed.

    The class of every network that the plan cuts, built from the config that a cut would leave,
    must have the shapes and numbers that the plan gives.

    Args:
        module: Module from which the groups are named, at any plan.
        groups: All its groups.
        plan: Units that are to stay.

    Raises:
        PruningError: Naming the tensor or the number that differs.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 6}
        >>> net = BertModel(BertConfig(num_hidden_layers=1, vocab_size=9, **sizes))
        >>> ends = {"producers": ["encoder.layer.0.intermediate.dense"]}
        >>> ends["consumers"] = ["encoder.layer.0.output.dense"]
        >>> ffn = with_config_fields(net, [linear_group(net, "ffn", kind="ffn", **ends)])
        >>> check_described(net, ffn, PruningPlan({"ffn": 6}, {"ffn": (0, 3)}))
    """
    shapes = {name: tuple(shape) for name, shape in shapes_at(module, groups, plan).items()}
    for path in dict.fromkeys(group.network for group in groups):
        inside = [group for group in groups if group.network == path]
        if all(plan.width(group.name) == group.size for group in inside):
            continue
        network: Any = module.get_submodule(path)
        if not hasattr(getattr(network, "config", None), "to_dict"):
            raise PruningError(
                f"{type(network).__name__} was cut, and has no config to describe it. Use "
                "widths='global' or 'uniform'."
            )
        numbers = config_numbers(inside, plan.widths)
        found = difference_from_config(network, inside, plan.widths, shapes, numbers, path)
        if found:
            raise PruningError(
                f"The config of {type(network).__name__} cannot describe the widths of this plan, "
                f"with {numbers}: {found}. Is a group among them that was cut before, or that is "
                "excluded? Use other constraints, or widths='global' or 'uniform'."
            )


def _narrower(size: int) -> list[int]:
    """Widths to try, of which the first that the class of the config takes is used."""
    half = size // 2 if size % 2 == 0 else max(1, size // 3 if size % 3 == 0 else size - 1)
    return list(dict.fromkeys((half, *(size // n for n in (2, 3, 4, 5, 7) if size % n == 0))))


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
