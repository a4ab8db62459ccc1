"""A check of groups that shares nothing with the package's own verification.

The package proves its groups on a copy before it offers them. Here the same groups are held
against two models made from their layouts alone. In one the removed units are zero in every
tensor: a model that was really cut must have the same outputs, and the same gradients for what is
left. Where units are normalised over, means and variances change when some go; there the masked
model normalises over the units that stay. In the other the units of a group stand in another
order in every tensor, which no network notices if the group is complete and aligned.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from benchmarks.zoo.models import Inputs
from lightning_mi_prune import PruningPlan, apply_plan
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import Layout

__all__ = ["Outcome", "check_groups", "first_output", "halved", "places"]

TOLERANCE = 1e-4  # of the largest output, in float32; what exceeds it is tried in float64
PARTS = 8  # normalisations over parts of a dimension are restricted up to so many

SHARE = 3  # one in so many units goes
Manager: TypeAlias = AbstractContextManager[Any]


@dataclass
class Outcome:
    """What was found of one set of groups.

    Args:
        verdict: ``"exact"``, ``"exact with restricted norms"``, ``"ran"`` (a normalisation in
            Python over the units, whose statistics cannot be restricted here), ``"refused"`` (by
            `apply_plan`, before it changed anything), or ``"wrong"``.
        reason: Why it is refused or wrong.
        effect: How far the masked model is from the whole one, relative to the largest output.
        gradients: Parameters whose gradients were compared with those of the masked model.
    """

    verdict: str
    reason: str = ""
    effect: float = 0.0
    gradients: int = 0


@dataclass(frozen=True)
class Geometry:
    """The layouts of all dimensions that groups cut, and the units of every group.

    Args:
        dims: Layout by tensor and dimension.
        widths: Units by name of the group.
    """

    dims: Mapping[tuple[str, int], Layout] = field(default_factory=dict)
    widths: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[DependencyGroup]) -> Geometry:
        """What the records of groups hold."""
        dims, widths = {}, dict[str, int]()
        for group in groups:
            widths |= {**dict(group.partners), group.name: group.size}
            for entry in group.tensors:
                dims[entry.tensor, entry.dim] = entry.layout
        return cls(dims, widths)

    def chosen(self, units: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], list[int]]:
        """Positions in every dimension, with some units of groups in some order."""
        return {
            place: places(layout, units, self.widths)
            for place, layout in self.dims.items()
            if any(name in units for name in _names(layout))
        }


def _names(layout: Layout) -> set[str]:
    found: set[str] = set()
    for block in layout:
        for factor in block:
            if isinstance(factor, str):
                found.add(factor)
            elif isinstance(factor, tuple):
                found |= _names(factor)
    return found


def places(
    layout: Layout, units: Mapping[str, Sequence[int]], widths: Mapping[str, int]
) -> list[int]:
    """Positions of the given units in a dimension, in the given order.

    Written apart from the package's own `kept_positions`, with which a test compares it.

    Example:
        >>> places((("heads", 2), (1,)), {"heads": (2, 0)}, {"heads": 3})
        [4, 5, 0, 1, 6]
    """
    found: list[int] = []
    start = 0
    for block in layout:
        positions, size = torch.zeros(1, dtype=torch.long), 1
        for factor in block:
            if isinstance(factor, int):
                order, whole = list(range(factor)), factor
            elif isinstance(factor, str):
                order, whole = list(units.get(factor, range(widths[factor]))), widths[factor]
            else:
                order = places(factor, units, widths)
                whole = len(places(factor, {}, widths))
            index = torch.tensor(order, dtype=torch.long)
            positions = (positions[:, None] * whole + index).flatten()
            size *= whole
        found += (positions + start).tolist()
        start += size
    return found


def first_output(found: Any) -> Tensor:
    """The first tensor of real numbers in what a model returned."""
    plain = found.to_tuple() if hasattr(found, "to_tuple") else found
    tensors = [t for t in tree_flatten(plain)[0] if isinstance(t, Tensor)]
    return next(t for t in tensors if t.is_floating_point() and t.ndim)


def _run(model: nn.Module, inputs: Inputs) -> Tensor:
    torch.manual_seed(0)
    return first_output(model(*inputs.args, **inputs.kwargs))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named: dict[str, Tensor] = dict(model.named_buffers(remove_duplicate=False))
    return named | dict(model.named_parameters(remove_duplicate=False))


def _copied(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode without what some modules keep there until they train again."""
    found = copy.deepcopy(model)
    _forget(found)
    return found


def _forget(model: nn.Module) -> None:
    """Let modules drop what they keep in evaluation mode; ``train`` need not return the model."""
    model.train()
    model.eval()


@torch.no_grad()
def _masked(model: nn.Module, geometry: Geometry, kept: Mapping[str, Sequence[int]]) -> nn.Module:
    """A copy whose removed units are zero in every tensor but variances."""
    masked = _copied(model)
    tensors = _tensors(masked)
    for (name, dim), positions in geometry.chosen(kept).items():
        tensor = tensors[name]
        if tensor.is_floating_point() and not name.endswith("running_var"):
            gone = sorted({*range(tensor.shape[dim])} - {*positions})
            tensor.data.index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0.0)
    return masked


def _rescale(
    masked: nn.Module, groups: Sequence[DependencyGroup], kept: Mapping[str, Sequence[int]]
) -> None:
    """Enlarge queries where attention divides by the root of the size that heads have now.

    The masked model divides by that as built. In training the package makes up for it; here the
    cut model is compared as `apply_plan` leaves it.
    """
    for group in groups:
        if group.rotation is not None and group.rotation.rescaled:
            factor = (group.size / len(kept[group.name])) ** 0.5
            query = masked.get_submodule(group.rotation.query)
            query.register_forward_hook(partial(_times, factor))


def _times(factor: float, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * factor


@torch.no_grad()
def _permuted(
    model: nn.Module, geometry: Geometry, order: Mapping[str, Sequence[int]]
) -> nn.Module:
    """A copy whose units stand in another order in every tensor."""
    found = _copied(model)
    tensors, done = _tensors(found), set[tuple[int, int]]()
    for (name, dim), positions in geometry.chosen(order).items():
        tensor = tensors[name]
        if (id(tensor), dim) not in done:  # a shared parameter may be named twice
            tensor.data = tensor.data.index_select(dim, torch.tensor(positions)).contiguous()
            done.add((id(tensor), dim))
    return found


class RestrictedNorms(TorchFunctionMode):
    """Normalisations over a dimension with removed units take the statistics of the others.

    Layer and root-mean-square normalisations of torch are recognised by their width, those that
    libraries write in Python by their mean over one dimension.

    Args:
        alive: For the width of a dimension, the positions that stay.
    """

    def __init__(self, alive: Sequence[tuple[int, Sequence[int]]]) -> None:
        super().__init__()
        self.alive = [(width, torch.tensor([*positions])) for width, positions in alive]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (functional.layer_norm, functional.rms_norm) and len(args) > 1:
            found = self._positions(args[0])
            if found is not None and args[0].shape[-1] == args[1][-1]:
                return self._normalised(func, found, args, kwargs)
        if func in (Tensor.mean, torch.mean) and isinstance(args[0], Tensor):
            dim = _single(args[1] if len(args) > 1 else kwargs.get("dim"))
            found = None if dim is None else self._positions(args[0], dim)
            if dim is not None and found is not None:
                return func(*args, **kwargs) * (args[0].shape[dim] / len(found))
        return func(*args, **kwargs)

    def _positions(self, tensor: Tensor, dim: int = -1) -> Tensor | None:
        """Positions that stay, of a tensor that is zero at all others."""
        for width, positions in self.alive:
            if tensor.ndim and tensor.shape[dim] == width:
                rest = tensor.detach().index_fill(dim, positions, 0)
                if not rest.any():
                    return positions
        return None

    def _normalised(self, func: Any, found: Tensor, args: Any, kwargs: Any) -> Tensor:
        names = ("weight", "bias", "eps") if func is functional.layer_norm else ("weight", "eps")
        given = dict(zip(names, args[2:], strict=False)) | dict(kwargs)
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                given[name] = given[name].index_select(0, found)
        out = func(args[0].index_select(-1, found), (len(found),), **given)
        return torch.zeros_like(args[0]).index_copy(-1, found, out)


def _single(dims: Any) -> int | None:
    """The dimension, if it is a single one."""
    if isinstance(dims, (list, tuple)) and len(dims) == 1:
        dims = dims[0]
    return dims if isinstance(dims, int) else None


def _distance(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    scale = float(other.abs().max()) or 1.0
    found = float((one - other).abs().max()) / scale
    return found if found == found else float("inf")  # not a number


def _doubled(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    def double(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    args, kwargs = tree_map(double, (inputs.args, dict(inputs.kwargs)))
    return copy.deepcopy(model).double(), Inputs(args, kwargs)


def _whole(group: DependencyGroup, width: int) -> int:
    """The next width below that the operators of a group can compute."""
    return max(group.multiple, width // group.multiple * group.multiple)


def _third(groups: Sequence[DependencyGroup], seed: int) -> dict[str, tuple[int, ...]]:
    generator = random.Random(seed)  # noqa: S311
    kept = {}
    for group in groups:
        left = group.size - max(1, group.size // SHARE) if group.size > 1 else 1
        left = _whole(group, left)
        kept[group.name] = tuple(sorted(generator.sample(range(group.size), left)))
    return kept


def _cut(
    model: nn.Module, groups: Sequence[DependencyGroup], kept: Mapping[str, tuple[int, ...]]
) -> nn.Module:
    cut = copy.deepcopy(model)
    sizes = {group.name: group.size for group in groups}
    whole = {name: tuple(range(size)) for name, size in sizes.items()}
    apply_plan(cut, groups, PruningPlan(sizes, {**whole, **kept}))
    return cut


def halved(model: nn.Module, groups: Sequence[DependencyGroup]) -> nn.Module:
    """A copy with half of the units of every group."""
    kept = {g.name: tuple(range(0, g.size, 2)) if g.size > 1 else (0,) for g in groups}
    kept = {g.name: kept[g.name][: _whole(g, len(kept[g.name]))] for g in groups}
    return _cut(model, groups, kept)


def check_groups(
    model: nn.Module,
    inputs: Inputs,
    groups: Sequence[DependencyGroup],
    seed: int = 0,
    *,
    every: bool = True,
) -> dict[str, Outcome]:
    """Cut a third of the units of one kind at a time, then of all but the hidden size, then of all.

    Args:
        model: A model in evaluation mode, which is not changed.
        inputs: Arguments for it.
        groups: Its verified groups.
        seed: Of the units that go.
        every: Whether kinds are cut one by one as well.

    Returns:
        By kind, ``"all but hidden"`` and ``"all"``, what was found.
    """
    kinds = sorted({group.kind for group in groups})
    cases = {kind: [group for group in groups if group.kind == kind] for kind in kinds}
    others = [group for group in groups if group.kind != "hidden"]
    if len(kinds) > 1 and others and len(others) < len(groups):
        cases["all but hidden"] = others
    if len(kinds) > 1:
        cases["all"] = [*groups]
        cases = {name: case for name, case in cases.items() if every or name not in kinds}
    found = {}
    for name, chosen in cases.items():
        found[name] = _case(model, inputs, groups, chosen, seed)
    return found


def _case(
    model: nn.Module,
    inputs: Inputs,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    seed: int,
) -> Outcome:
    try:
        found = _compared(model, inputs, groups, chosen, seed, TOLERANCE)
        if found.verdict == "wrong":
            try:
                doubled, given = _doubled(model, inputs)
                with torch.no_grad():
                    _run(doubled, given)
            except Exception:  # some mix in float32: the first answer stands
                return found
            found = _compared(doubled, given, groups, chosen, seed, TOLERANCE)
    except PruningError as error:
        return Outcome("refused", f"apply_plan: {error}"[:300])
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}"[:300])
    return found


def _compared(
    model: nn.Module,
    inputs: Inputs,
    groups: Sequence[DependencyGroup],
    chosen: Sequence[DependencyGroup],
    seed: int,
    tolerance: float,
) -> Outcome:
    geometry, kept = Geometry.of(groups), _third(chosen, seed)
    masked, places_kept = _masked(model, geometry, kept), geometry.chosen(kept)
    _rescale(masked, chosen, kept)
    with torch.no_grad():
        whole = _run(model, inputs)  # before the cut, as in use
        cut = _cut(model, groups, kept)
        got, want = _run(cut, inputs), _run(masked, inputs)
    effect = _distance(want, whole)
    if got.shape != want.shape:
        return Outcome("wrong", f"outputs of {tuple(got.shape)}, not {tuple(want.shape)}", effect)
    if not got.isfinite().all() and whole.isfinite().all():
        return Outcome("wrong", "outputs are not finite", effect)
    off = _distance(got, want)
    moved = _reordered(model, inputs, geometry, chosen, whole, seed)
    if moved > tolerance:
        return Outcome("wrong", f"another order of units moves outputs by {moved:.1e}", effect)
    whole_norms: Manager = nullcontext()
    if off <= tolerance:
        count, reason = _gradients(cut, masked, inputs, whole_norms, places_kept, tolerance)
        if not reason:
            return Outcome("exact", "", effect, count)
    _clear_inputs_of_norms(masked, places_kept)
    norms = RestrictedNorms(_alive(model, geometry, kept))
    with torch.no_grad(), norms:
        want = _run(masked, inputs)
    if _distance(got, want) <= tolerance:
        count, reason = _gradients(cut, masked, inputs, norms, places_kept, tolerance)
        verdict = "wrong" if reason else "exact with restricted norms"
        return Outcome(verdict, reason, effect, count)
    if all(group.kind != "hidden" for group in chosen):
        return Outcome("wrong", f"cut and masked model differ by {off:.1e}", effect)
    count, reason = _gradients(cut, masked, inputs, norms, places_kept, float("inf"))
    return Outcome("wrong" if reason else "ran", reason, effect, count)


def _alive(
    model: nn.Module, geometry: Geometry, kept: Mapping[str, Sequence[int]]
) -> list[tuple[int, list[int]]]:
    """Widths of cut dimensions, whole and in equal parts, and the positions that stay in them."""
    tensors, found = _tensors(model), []
    for (name, dim), positions in geometry.chosen(kept).items():
        width = tensors[name].shape[dim]
        for parts in range(1, PARTS + 1):
            if width % parts:
                continue
            size = width // parts
            inside = [[p % size for p in positions if p // size == i] for i in range(parts)]
            one = (size, inside[0])
            if one not in found and inside[0] and inside.count(inside[0]) == parts:
                found.append(one)
    return found


def _clear_inputs_of_norms(
    masked: nn.Module, kept: Mapping[tuple[str, int], Sequence[int]]
) -> None:
    """Zero what normalisations read of removed units.

    A query head whose query is zero still has an output, the mean of the values: its consumer
    ignores it, but a normalisation before that does not.
    """
    for (name, dim), positions in kept.items():
        path, _, parameter = name.rpartition(".")
        module = masked.get_submodule(path)
        kind = type(module).__name__.lower()
        if parameter != "weight" or dim or "norm" not in kind or hasattr(module, "running_var"):
            continue
        gone = sorted({*range(len(module.get_parameter("weight")))} - {*positions})
        module.register_forward_pre_hook(partial(_without, torch.tensor(gone)))


def _without(gone: Tensor, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    if args[0].shape[-1] != len(module.get_parameter("weight")):  # channels come first
        return args
    return (args[0].index_fill(-1, gone, 0), *args[1:])


def _reordered(
    model: nn.Module,
    inputs: Inputs,
    geometry: Geometry,
    chosen: Sequence[DependencyGroup],
    whole: Tensor,
    seed: int,
) -> float:
    """How far outputs move when units stand in another order."""
    generator, order = random.Random(seed + 1), {}  # noqa: S311
    for group in chosen:
        # Rotary halves have an order, and so have arguments with an entry for every unit as built.
        if group.kind != "head_dim" and not group.unit_arguments:
            order[group.name] = generator.sample(range(group.size), group.size)
    with torch.no_grad():
        return _distance(_run(_permuted(model, geometry, order), inputs), whole)


def _gradients(
    cut: nn.Module,
    masked: nn.Module,
    inputs: Inputs,
    norms: Manager,
    kept: Mapping[tuple[str, int], Sequence[int]],
    tolerance: float,
) -> tuple[int, str]:
    """Compare gradients of the cut model with those of the masked one at what stays.

    With an infinite tolerance they only have to be there, and finite.
    """
    for network in (cut, masked):
        _forget(network)
        network.zero_grad()
    got = _run(cut, inputs)
    with norms:
        want = _run(masked, inputs)
    torch.autograd.backward([got.square().sum(), want.square().sum()])
    mine = dict(cut.named_parameters(remove_duplicate=False))
    count = 0
    for name, parameter in masked.named_parameters():
        if parameter.grad is None:
            continue
        left = parameter.grad
        for dim in range(left.ndim):
            if (name, dim) in kept:
                left = left.index_select(dim, torch.tensor([*kept[name, dim]]))
        found = mine[name].grad
        if found is None and left.any():
            return count, f"{name} has no gradient after the cut"
        if found is None:
            continue
        if not found.isfinite().all():
            return count, f"the gradient of {name} is not finite"
        if (
            tolerance == float("inf") or left.shape != found.shape
        ):  # a shared one, cut under another name
            continue
        scale = float(left.abs().max())
        if float((found - left).abs().max()) > 100 * tolerance * scale + 1e-5:
            return count, f"the gradient of {name} differs from that of the masked model"
        count += 1
    return count, ""


Check = Callable[[nn.Module, Inputs, Sequence[DependencyGroup]], dict[str, Outcome]]
