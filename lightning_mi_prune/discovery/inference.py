"""From one recorded call to the groups of a model: record, follow every operator, collect.

What remains without a reason to keep its size can be cut: every such atom that occurs in a
parameter is a dependency group, with the dimensions it occurs in. Nothing here was tried yet;
:mod:`verification` does that. Groups have no attributes (numbers in Python code) yet, and those
that no layer reads, such as the dimensions of queries and keys, have no consumers.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_mi_prune.core.consumers import (
    is_pointwise,
    why_not_consumer,
    why_not_functional,
)
from lightning_mi_prune.core.empty_linear import module_at
from lightning_mi_prune.core.functional import calling_modules, intercept_products
from lightning_mi_prune.core.running import clear_caches
from lightning_mi_prune.discovery.copies import results_of
from lightning_mi_prune.discovery.hints import unit_arguments
from lightning_mi_prune.discovery.labels import Candidate, kinds_of, names_of
from lightning_mi_prune.discovery.stacks import find_chains
from lightning_mi_prune.discovery.streams import Streams
from lightning_mi_prune.discovery.tracing.expressions import (
    Atom,
    Expression,
    atoms_of,
    factors_of,
    fix,
    resolve,
    terms_of,
)
from lightning_mi_prune.discovery.tracing.recording import (
    Operator,
    Recording,
    record_call,
    tensors_in,
)
from lightning_mi_prune.discovery.tracing.rules import follow
from lightning_mi_prune.discovery.tracing.trace import DATA, Trace, WeightUse
from lightning_mi_prune.graph.groups import (
    DependencyGroup,
    LayerStack,
    PrunableDim,
    Refusal,
    UnitArgument,
    is_within,
)
from lightning_mi_prune.graph.inputs import read_above
from lightning_mi_prune.graph.layouts import Block, Factor, Layout, innermost, layout_names

__all__ = [
    "Inference",
    "Reduction",
    "infer",
]


@dataclass(frozen=True)
class Reduction:
    """An operator that computes statistics over units, such as ``layer_norm``.

    Args:
        index: Running number of the operator in the recorded call.
        operator: Its name.
        dims: Position of a tensor among all tensor arguments, its dimension, and the layout of it.
    """

    index: int
    operator: str
    dims: tuple[tuple[int, int, Layout], ...]


@dataclass(frozen=True)
class Inference:
    """What one recorded call shows.

    Args:
        groups: Groups, not yet verified, without attributes.
        stacks: Stacks of layers, without config fields.
        refused: Units that cannot be cut, and why.
        reductions: Operators that compute statistics over units of the groups.
        unknown: Operators without a rule, and the modules in which they ran.
        roles: ``"query"``, ``"key"`` or ``"value"`` by the path of a projection of heads.
    """

    groups: tuple[DependencyGroup, ...]
    stacks: tuple[LayerStack, ...]
    refused: tuple[Refusal, ...]
    reductions: tuple[Reduction, ...]
    unknown: tuple[str, ...]
    roles: Mapping[str, str]


_VIEWS = frozenset(
    ("t", "transpose", "permute", "view", "_unsafe_view", "detach", "alias", "_to_copy")
)


def infer(module: nn.Module, run: Callable[[nn.Module], Any]) -> Inference:
    """Record one call of a module and collect the groups that its operators leave free.

    The module stays as it is.

    Args:
        module: The module from which groups are named.
        run: Calls it, or parts of it, on an example.

    Raises:
        PruningError: If the call cannot be recorded.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.ones(4, 3)
        >>> (group,) = infer(net, lambda net: net(x)).groups
        >>> group.name, group.kind, group.size, group.consumers
        ('0.ffn', 'ffn', 8, ('2',))
    """
    products: Counter[tuple[str, int]] = Counter()
    clear_caches(module.modules())  # or what was computed from parameters before is a constant
    recording = record_call(module, partial(_with_products, products, run))
    trace = Trace(recording.tensors)
    selected = _selected_arguments(module, recording)
    live = {operator.index for operator in _operators_behind(recording, ())}
    for operator in _operators_behind(recording, _uses_of_parameters(recording)):
        with ExitStack() as stack:
            for tensor, dim in selected.get(operator.index, ()):
                stack.enter_context(trace.apart(tensor, dim))
            uses = len(trace.uses)
            follow(trace, operator)
            if operator.index not in live:
                del trace.uses[uses:]  # nothing to calibrate: no loss depends on it
    _fix_results(trace, recording.output)
    return _Collector(module, recording, trace, products).collect()


def _with_products(
    products: Counter[tuple[str, int]], run: Callable[[nn.Module], Any], module: nn.Module
) -> Any:
    """Run a module and count the products with each parameter, and entries of their inputs."""

    def note(name: str, x: Tensor, dim: int) -> None:
        products[name, x.shape[dim]] += 1

    matrices = [name for name, p in module.named_parameters() if p.ndim > 1]
    handles: list[RemovableHandle] = []
    try:
        handles.extend(intercept_products(module, matrices, note))
        return run(module)
    finally:
        for handle in handles:
            handle.remove()


def _selected_arguments(
    module: nn.Module, recording: Recording
) -> dict[int, list[tuple[Tensor, int]]]:
    """Tensors from which modules select the entries of their units, by operators that read them."""
    found: dict[int, list[tuple[Tensor, int]]] = defaultdict(list)
    for path, argument in unit_arguments(module).items():
        for call in (call for call in recording.calls if call.path == path):
            tensor = call.arguments.get(argument.argument)
            for operator in recording.operators[call.start : call.end]:
                if tensor is not None and any(each is tensor for each in operator.inputs):
                    found[operator.index].append((tensor, argument.dim))
    return found


def _operators_behind(recording: Recording, also: Collection[int]) -> list[Operator]:
    """Operators whose results matter for the output or for some others, by their indices.

    The rest only served to read a shape.
    """
    wanted = {id(tensor) for tensor in tensors_in(recording.output)}
    found = []
    for operator in reversed(recording.operators):
        inputs = {id(tensor) for tensor in operator.inputs}
        outputs = {id(tensor) for tensor in operator.outputs}
        if not outputs or outputs & wanted or outputs & inputs or operator.index in also:
            wanted |= inputs
            found.append(operator)
    return found[::-1]


def _uses_of_parameters(recording: Recording) -> set[int]:
    """Operators that compute with a parameter, such as a pooler whose output nobody reads.

    They must run in the cut module too.
    """
    weights = {id(t) for t in recording.tensors.values() if isinstance(t, nn.Parameter)}
    found = set()
    for operator in recording.operators:
        if operator.name in _VIEWS and id(operator.inputs[0]) in weights:
            weights |= {id(tensor) for tensor in operator.outputs}
        elif any(id(tensor) in weights for tensor in operator.inputs):
            found.add(operator.index)
    return found


def _fix_results(trace: Trace, output: Any) -> None:
    """Keep every dimension of what a call is made for."""
    for tensor in tensors_in(results_of(output)):
        for dim in trace.dims(tensor):
            fix(dim, "outputs of the call")


def layout_of(expression: Expression, names: Mapping[int, str]) -> Layout:
    """An expression as plain data, with the names of groups for some atoms and sizes for others."""
    blocks: list[Block] = []
    for term in terms_of(expression):
        block: list[Factor] = []
        for factor in factors_of(term):
            found = _factor(factor, names)
            if isinstance(found, int) and block and isinstance(block[-1], int):
                block[-1] *= found
            else:
                block.append(found)
        first, rest = (block or [1])[0], tuple(block[1:])
        # A sum whose terms all have the same inner factors is a sum of products.
        for plain in (
            [(*inner, *rest) for inner in first] if isinstance(first, tuple) else [(first, *rest)]
        ):
            last = blocks[-1] if blocks else ()
            one, two = (last + plain) if len(last) == len(plain) == 1 else ("", "")
            if isinstance(one, int) and isinstance(two, int):
                blocks[-1] = (one + two,)
            else:
                blocks.append(plain)
    return tuple(blocks)


def _factor(factor: Expression, names: Mapping[int, str]) -> Factor:
    now = resolve(factor)
    if isinstance(now, Atom):
        return names.get(id(now), now.size)
    inner = layout_of(now, names)
    return inner[0][0] if len(inner) == len(inner[0]) == 1 else inner


def _entries(expression: Expression, wanted: Iterable[Atom]) -> bool:
    ids = {id(atom) for atom in wanted}
    return any(id(atom) in ids for atom in atoms_of(expression))


class _Collector:
    """Collects atoms of parameters, and what is known of each."""

    def __init__(
        self,
        module: nn.Module,
        recording: Recording,
        trace: Trace,
        products: Mapping[tuple[str, int], int],
    ) -> None:
        self.module, self.trace, self.products = module, trace, products
        self.uses = Counter(use.tensor for use in trace.uses)
        self.functional: dict[str, bool] = {}
        self.streams = Streams(module, recording, trace)
        self.arguments = unit_arguments(module)
        self.stacks = find_chains(module, recording, trace)
        self.parameters = dict(module.named_parameters())
        first: dict[int, str] = {}
        for name, tensor in recording.tensors.items():
            first.setdefault(id(tensor), name)
        self.tensors = {name: recording.tensors[name] for name in first.values()}
        self.atoms: list[Atom] = []
        self.places: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for name, tensor in self.tensors.items():
            for dim, expression in enumerate(trace.dims(tensor)):
                for atom in {id(atom): atom for atom in atoms_of(expression)}.values():
                    if id(atom) not in self.places:
                        self.atoms.append(atom)
                    self.places[id(atom)].append((name, dim))
        self._sources: dict[int, set[str]] = defaultdict(set)
        for use in trace.uses:
            self._sources[use.source].add(_owner(use.tensor))
        self.read: dict[int, list[WeightUse]] = defaultdict(list)
        self.made: dict[int, list[WeightUse]] = defaultdict(list)
        for use in trace.uses:
            for dim, expression in enumerate(trace.dims(self._tensor(use))):
                uses = self.read if dim == use.input_dim else self.made
                for atom in {id(atom): atom for atom in atoms_of(expression)}.values():
                    uses[id(atom)].append(use)

    def _tensor(self, use: WeightUse) -> Tensor:
        return self.tensors[use.tensor]

    def collect(self) -> Inference:
        """Groups, refusals, reductions and stacks."""
        free, refused = [], []
        for atom in self.atoms:
            if atom.size < 2 or not any(n in self.parameters for n, _ in self.places[id(atom)]):
                continue
            if not self.read[id(atom)] and not self.made[id(atom)]:
                continue  # of no matrix: positions, rows of tables, unused parameters
            if atom.reasons:
                refused.append(atom)
            else:
                free.append(atom)
        candidates = [self._candidate(atom, free) for atom in free]
        kinds = kinds_of(candidates, self.stacks)
        networks = [self.streams.network(self._first_index(atom)) for atom in free]
        homes = [self.streams.base(network) for network in networks]
        names = names_of(candidates, kinds, self.stacks, networks, homes)
        by_atom = {id(atom): name for atom, name in zip(free, names, strict=True)}
        groups, unread = [], []
        for atom, kind, network in zip(free, kinds, networks, strict=True):
            group, reason = self._group(atom, kind, network, by_atom)
            if group.consumers or kind == "head_dim":
                groups.append(group)
            else:
                unread.append(self._refusal(group.name, kind, atom, reason))
        ordered = sorted(groups, key=lambda group: group.level)
        levels = {g.name: rank for rank, g in enumerate(ordered)}
        groups = [replace(g, level=levels[g.name]) for g in groups]
        kept = {group.name for group in groups}
        return Inference(
            groups=tuple(groups),
            stacks=tuple(
                self._stack(path, *sizes)
                for path, sizes in self.stacks.items()
                if any(use.tensor.startswith(path) for use in self.trace.uses)
            ),
            refused=(
                *unread,
                *(
                    self._refusal(self.places[id(atom)][0][0], "", atom, _reason(atom))
                    for atom in refused
                    if _is_news(atom) and self._is_alone(atom, by_atom)
                ),
            ),
            reductions=tuple(self._reductions(by_atom, kept)),
            unknown=tuple(self.trace.unknown),
            roles=self._roles(
                [a for a, kind in zip(free, kinds, strict=True) if kind == "head_dim"]
            ),
        )

    def _roles(self, atoms: Sequence[Atom]) -> dict[str, str]:
        """What projections make: dimensions of two that nothing reads are those of products."""
        found: dict[str, str] = {}
        for atom in atoms:
            made = [*dict.fromkeys(_owner(use.tensor) for use in self.made[id(atom)])]
            read = {_owner(use.tensor) for use in self.read[id(atom)]}
            if len(made) == 2 and not read:
                found |= dict(zip(made, ("query", "key"), strict=True))
            elif len(made) == len(read) == 1:
                found[made[0]] = "value"
        return found

    # ------------------------------------------------------------------------------- candidates

    def _first_index(self, atom: Atom) -> int:
        uses = self.read[id(atom)] or self.made[id(atom)]
        return min(use.index for use in uses)

    def _candidate(self, atom: Atom, free: Sequence[Atom]) -> Candidate:
        number = {id(each): i for i, each in enumerate(free)}
        products = [
            {id(each): each for each in atoms_of(term)}
            for name, dim in self.places[id(atom)]
            for term in terms_of(self.trace.dims(self.tensors[name])[dim])
        ]
        products = [product for product in products if product.pop(id(atom), None) is not None]
        crossed = [{number[i] for i in product if i in number} for product in products]
        names = [name for name, _ in self.places[id(atom)]]
        uses = [*self.read[id(atom)], *self.made[id(atom)]]
        tensors = tuple(dict.fromkeys(names))
        return Candidate(
            size=atom.size,
            marks=frozenset(atom.marks),
            tensors=tensors,
            producers=tuple(dict.fromkeys(use.tensor for use in self.made[id(atom)])),
            consumers=tuple(dict.fromkeys(use.module for use in self.read[id(atom)])),
            inside=frozenset(set.intersection(*crossed)),
            crossed=frozenset(set.union(*crossed)),
            attended="batched" in atom.marks
            or any("batched" in each.marks for product in products for each in product.values()),
            convolution=any(
                use.operator == "convolution" and self._tensor(use).ndim > 2 for use in uses
            ),
            positions=any(use.output.ndim > 2 or self._is_flat(use) for use in uses),
        )

    def _is_flat(self, use: WeightUse) -> bool:
        """Whether rows of a product are examples times positions."""
        rows = factors_of(self.trace.dims(use.output)[0])
        return len(rows) > 1

    # ------------------------------------------------------------------------------- groups

    def _group(
        self, atom: Atom, kind: str, network: str, names: Mapping[int, str]
    ) -> tuple[DependencyGroup, str]:
        name = names[id(atom)]
        tensors = tuple(
            PrunableDim(
                tensor,
                dim,
                tuple(self.tensors[tensor].shape),
                layout_of(self.trace.dims(self.tensors[tensor])[dim], names),
                buffer=not isinstance(self.tensors[tensor], nn.Parameter),
            )
            for tensor, dim in self.places[id(atom)]
        )
        sizes = {names[id(each)]: each.size for each in self.atoms if id(each) in names}
        partners = dict.fromkeys(n for t in tensors for n in layout_names(t.layout) if n != name)
        uses, reason = self._consumers(atom)
        by_input: dict[int, dict[str, None]] = defaultdict(dict)
        for use in uses:
            by_input[use.source][self._path(use)] = None
        # Hooks are set at the first consumer of an input, which should read nothing else.
        several = Counter(path for paths in self._sources.values() for path in paths)
        inputs = tuple(
            tuple(sorted(paths, key=lambda path: several[path] > 1)) for paths in by_input.values()
        )
        consumers = tuple(dict.fromkeys(path for paths in inputs for path in paths))
        first = min((use.index for use in uses), default=self._first_index(atom))
        hidden = kind == "hidden"
        scope = self.streams.scope(first)
        group = DependencyGroup(
            name=name,
            kind=kind,
            size=atom.size,
            tensors=tensors,
            consumers=consumers,
            consumers_by_input=inputs if len(inputs) > 1 or hidden else (),
            network=network,
            scope=self.streams.home(first, network) if scope is None else scope,
            level=first,
            residual=None if hidden or not uses else self._residual(uses[0]),
            above=() if hidden else self._above(uses),
            norms=self._norms(atom),
            multiple=self._multiple(atom, name, tensors),
            partners=tuple((other, sizes[other]) for other in partners),
            unit_arguments=self._unit_arguments(kind, tensors),
        )
        return group, reason

    def _unit_arguments(
        self, kind: str, tensors: Sequence[PrunableDim]
    ) -> tuple[UnitArgument, ...]:
        """Arguments with an entry for every head of the modules that hold the projections."""
        found = self.arguments if kind == "heads" else {}
        return tuple(
            argument
            for path, argument in found.items()
            if all(is_within(s.tensor, path) for s in tensors)
        )

    def _consumers(self, atom: Atom) -> tuple[list[WeightUse], str]:
        """Uses of weights that read units and can be calibrated; why there are none."""
        found: list[WeightUse] = []
        reason = "no layer reads these units"
        first: dict[str, WeightUse] = {}
        for use in self.read[id(atom)]:
            first.setdefault(use.tensor, use)
        for use in first.values():
            if use.tensor in self.trace.embedded:
                reason = f"{use.tensor} is tied to an embedding"
                continue
            why = self._why_not(atom, use)
            if why:
                reason = f"{use.tensor}: {why}"
            else:
                found.append(use)
        return found, reason

    def _why_not(self, atom: Atom, use: WeightUse) -> str:
        """Why the input of a product with a parameter cannot be calibrated."""
        if not self._is_functional(use):
            return why_not_consumer(self.module.get_submodule(_owner(use.tensor)))
        tensor, read = self._tensor(use), use.input_dim
        dims = self.trace.dims(tensor)
        if (why := why_not_functional(tensor, read)) or read is None:
            return why
        if any(dim != read and _entries(each, [atom]) for dim, each in enumerate(dims)):
            return "it reads these units and makes them, so they cannot be told apart"
        here = {call.path for call in self.streams.calls_around(use.index)}
        if not here & set(calling_modules(use.tensor)):
            return "it is used outside the forward of the module that holds it"
        if self.products[use.tensor, dims[read].size] < self.uses[use.tensor]:
            return (
                f"it is multiplied in a way that is not intercepted ({use.operator}); expected "
                "functional.linear, matmul (@), mm, bmm, einsum or grouped_mm of it, of one of "
                "its matrices or of its transpose"
            )
        return ""

    def _is_functional(self, use: WeightUse) -> bool:
        """Whether a parameter is used by itself, and not by a call of the layer that holds it."""
        if use.tensor not in self.functional:
            self.functional[use.tensor] = self._is_used_alone(use.tensor)
        return self.functional[use.tensor]

    def _is_used_alone(self, tensor: str) -> bool:
        owner, _, last = tensor.rpartition(".")
        module = self.module.get_submodule(owner)
        parent = self.module.get_submodule(_owner(owner)) if owner else module
        if last != "weight":
            return True
        if why_not_consumer(module):
            return not type(module).__module__.startswith("torch.nn.")
        if isinstance(parent, nn.MultiheadAttention):  # runs through its projection when recorded
            return False
        uses = [use for use in self.trace.uses if use.tensor == tensor]
        return not any(
            owner in {call.path for call in self.streams.calls_around(use.index)} for use in uses
        )

    def _path(self, use: WeightUse) -> str:
        """Path of a consumer: of the layer, or of the parameter itself."""
        return use.tensor if self._is_functional(use) else _owner(use.tensor)

    def _residual(self, use: WeightUse) -> str | None:
        """Input of the residual stream, where the consumer is a layer that can be solved again."""
        return None if self._is_functional(use) else self.streams.residual(use)

    def _multiple(self, atom: Atom, name: str, tensors: Sequence[PrunableDim]) -> int:
        """What widths must be multiples of."""
        fine = "aligned" in atom.marks and any(innermost(s.layout, name) for s in tensors)
        return _ALIGNED if fine else 1

    def _above(self, uses: Sequence[WeightUse]) -> tuple[str, ...]:
        """Layers that read the output of a consumer, directly or through the residual stream."""
        found: dict[str, None] = {}
        for use in uses:
            tensor = self._tensor(use)
            for dim, expression in enumerate(self.trace.dims(tensor)):
                if dim == use.input_dim:
                    continue
                for atom in atoms_of(expression):
                    later = {each.tensor for each in self.read[id(atom)] if each.index > use.index}
                    readers = self._consumers(atom)[0]
                    found |= {
                        self._path(each): None
                        for each in readers
                        if each.tensor in later and self._is_plain(each, expression)
                    }
        return tuple(found)

    def _is_plain(self, use: WeightUse, output: Expression) -> bool:
        """Whether the dimension of a weight that reads an output follows from its size."""
        shape = tuple(self._tensor(use).shape)
        several = len(shape) == 3 and self._is_functional(use)
        return not several or read_above(shape, output.size, several=True) == use.input_dim

    def _norms(self, atom: Atom) -> tuple[str, ...]:
        found: dict[str, None] = {}
        for statistic in self.trace.statistics:
            if any(_entries(dim, [atom]) for _, _, dim in statistic.dims):
                path = self.operator_module(statistic.index)
                if any(_owner(name) == path for name, _ in self.places[id(atom)]):
                    found[path] = None
        return tuple(found)

    def operator_module(self, index: int) -> str:
        """Path of the innermost module in which an operator ran."""
        calls = self.streams.calls_around(index)
        return calls[0].path if calls else ""

    # ------------------------------------------------------------------------------- the rest

    def _is_alone(self, atom: Atom, names: Mapping[int, str]) -> bool:
        """Whether a fixed atom keeps a whole dimension from being cut: none else of it can go."""
        dims = [self.trace.dims(self.tensors[name])[dim] for name, dim in self.places[id(atom)]]
        return not all(any(id(each) in names for each in atoms_of(dim)) for dim in dims)

    def _refusal(self, name: str, kind: str, atom: Atom, reason: str) -> Refusal:
        held = {name for name, _ in self.places[id(atom)] if name in self.parameters}
        parameters = sum(self.parameters[name].numel() for name in held)
        return Refusal(name, kind, atom.size, parameters, reason)

    def _reductions(self, names: Mapping[int, str], kept: set[str]) -> Iterable[Reduction]:
        for statistic in self.trace.statistics:
            dims = tuple(
                (position, dim, layout)
                for position, dim, expression in statistic.dims
                if set(layout_names(layout := layout_of(expression, names))) & kept
            )
            if dims:
                yield Reduction(statistic.index, statistic.operator, dims)

    def _stack(self, path: str, size: int, fixed: int) -> LayerStack:
        first = self.streams.start(f"{path}.0" if path else "0")
        network = self.streams.network(first)
        scope = self.streams.scope(first)
        norms = {self.streams.last_module(f"{path}.{i}" if path else str(i)) for i in range(size)}
        last = norms.pop() if len(norms) == 1 else ""
        normed = {self.operator_module(each.index) for each in self.trace.statistics}
        top = f"{path}.0" if path else "0"
        return LayerStack(
            name=path,
            size=size,
            fixed=fixed,
            final_norm=last if last and f"{top}.{last}" in normed else "",
            residual_branches=self._branches(f"{path}." if path else "", range(fixed, size)),
            network=network,
            scope=self.streams.home(first, network) if scope is None else scope,
        )

    def _branches(self, stem: str, layers: Sequence[int]) -> tuple[tuple[str, str], ...]:
        """What every layer of a stack adds to the residual stream, in the order of the call.

        Nothing, unless that is all of it and can be solved by least squares again. A layer whose
        weight is computed from others counts: it is named to the user where it is needed.

        Args:
            stem: Path of the stack, with a dot.
            layers: Numbers of the layers that may go.
        """
        found: dict[tuple[str, str], set[int]] = defaultdict(set)
        used = set()
        for use in self.trace.uses:
            owner = _owner(use.tensor)
            used.add(owner)
            index, _, inner = owner[len(stem) :].partition(".")
            if not owner.startswith(stem) or not index.isdigit() or not inner:
                continue
            residual = self.streams.residual(use)
            if residual is not None and residual.startswith(f"{stem}{index}."):
                found[inner, residual[len(f"{stem}{index}.") :]].add(int(index))
        for (inner, _), where in found.items():
            rest = {f"{stem}{index}.{inner}" for index in layers if index not in where}
            if rest & used or any(module_at(self.module, path) is None for path in rest):
                return ()
            one = self.module.get_submodule(f"{stem}{min(where)}.{inner}")
            if why_not_consumer(one) or not is_pointwise(one):
                return ()
        return tuple(found)


# Rows of a multiple of 16 bytes, in types of 16 bits.
_ALIGNED = 8


def _owner(tensor: str) -> str:
    return tensor.rpartition(".")[0]


def _is_news(atom: Atom) -> bool:
    """Whether a refusal is more than that of inputs, outputs, tables and kernels."""
    plain = ("outputs of the call", "rows of the table", "kernel of ")
    special = [reason for reason in atom.reasons if reason != DATA]
    return bool(special) and not any(reason.startswith(plain) for reason in special)


def _reason(atom: Atom) -> str:
    return ", ".join([reason for reason in atom.reasons if reason != DATA][:2])
