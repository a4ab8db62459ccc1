"""Cut units: apply_plan(model, groups, plan) replaces parameters by smaller dense ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.empty_linear import (
    KEPT_UNITS,
    linear_at,
    module_at,
    parameters_of,
    place_linears,
)
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import CONFIG_FIELD, GRAPH_FIELD, PruningPlan
from lightning_mi_prune.core.running import clear_caches
from lightning_mi_prune.core.spilling import spilled
from lightning_mi_prune.graph.containers import stack_at
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup, full_plan, is_within
from lightning_mi_prune.surgery.attention import fit_attentions
from lightning_mi_prune.surgery.configs import config_numbers, set_config_value
from lightning_mi_prune.surgery.empty_modules import (
    is_cut_forward,
    set_forward_without_units,
    unit_argument_forward,
)
from lightning_mi_prune.surgery.parameters import (
    ParameterCut,
    RotationMaps,
    check_attributes,
    check_empty,
    parameter_cuts,
    set_attributes,
    shapes_at,
)
from lightning_mi_prune.surgery.tensors import (
    keep_whole,
    replace_tensors,
    tensor_of,
    tensors_of,
    unsaved_at,
)

__all__ = [
    "Rewrite",
    "apply_plan",
    "check_cuttable",
    "own_config",
    "reshape_tensors",
    "restore_plan",
    "revert_rewrites",
]


def own_config(model: nn.Module, path: str) -> Any:
    """Replace the configs of a network by copies, so that a config of the user never changes.

    This includes those of all modules inside it and around it; shared configs stay shared.

    Args:
        model: Module from which the network is named.
        path: Path of the network.

    Returns:
        The copied config of the network, or None if it has none.
    """
    memo: dict[int, Any] = {}
    for part in _holders(model, path):
        config = getattr(part, "config", None)
        if hasattr(config, "to_dict"):
            setattr(part, "config", copy.deepcopy(config, memo))  # noqa: B010  # typed by torch
    config = getattr(model.get_submodule(path), "config", None)
    return config if hasattr(config, "to_dict") else None


def _holders(model: nn.Module, path: str) -> Iterator[nn.Module]:
    """The modules around a network and all inside it."""
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        yield model.get_submodule(".".join(parts[:depth]))
    yield from model.get_submodule(path).modules()


class Rewrite(NamedTuple):
    """One tensor before and after a cut, with what its optimizer state needs to follow.

    Args:
        old: The parameter or buffer that was replaced.
        new: Its replacement, everywhere it was used.
        kept: Kept positions of every dimension that was cut.
        rotated: Maps ``(heads, size, size)`` to new coordinates, by dimension; they apply first.
    """

    old: Tensor
    new: Tensor
    kept: Mapping[int, Tensor]
    rotated: Mapping[int, Tensor] = MappingProxyType({})


def apply_plan(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    *,
    current: PruningPlan | None = None,
    compensated: Mapping[str, Tensor] | None = None,
    rotated: RotationMaps | None = None,
) -> list[Rewrite]:
    """Cut a model down to a plan: smaller dense parameters, buffers, sizes and configs that match.

    A plan that is refused leaves the model unchanged. New parameters keep device, dtype and
    ``requires_grad``; shared parameters stay shared; gradients are dropped.

    Args:
        model: Module from which the groups are named.
        groups: Groups of the plan.
        plan: Units that stay, as numbered when built.
        current: Plan of the model now; default: as built.
        compensated: New values of parameters in their final shape, by tensor name
            (:attr:`Decision.compensated`).
        rotated: New coordinates of heads in which those values are (:attr:`Decision.rotated`).

    Returns:
        A record of each replaced tensor, for :func:`optimizers.update_optimizers`.

    Raises:
        PruningError: If the plan does not fit the model.

    Example:
        >>> from lightning_mi_prune.graph.describe import linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> rewrites = apply_plan(net, [group], PruningPlan({"hidden": 4}, {"hidden": (0, 2)}))
        >>> net
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    now = full_plan(groups) if current is None else current
    plan = plan.only(n for n in plan.sizes if n in now.sizes or not _is_whole_stack(model, n, plan))
    kept = plan.positions_in(now)
    target = now.then(plan)
    check_empty(model, groups, target)
    rewrites = [
        _rewrite(i) for i in parameter_cuts(model, groups, now, kept, compensated or {}, rotated)
    ]
    check_attributes(model, [group for group in groups if group.name in kept])
    keep_whole(model, groups)
    _replace(model, rewrites)
    try:
        _update_sizes(
            model, groups, target, _affected(model, groups, target, [r.new for r in rewrites])
        )
    except BaseException:
        revert_rewrites(model, groups, now, rewrites)
        raise
    return rewrites


def check_cuttable(
    model: nn.Module, groups: Sequence[DependencyGroup], current: PruningPlan
) -> None:
    """Refuse a model in which :func:`apply_plan` would refuse to cut these groups.

    So are adapters: their own files name the rank and the layers that they were made for.
    """
    _check_adapters(model, groups)
    parameter_cuts(model, groups, current, {group.name: () for group in groups}, {})
    check_attributes(model, groups)


def _check_adapters(model: nn.Module, groups: Sequence[DependencyGroup]) -> None:
    for name in dict.fromkeys(s.tensor for group in groups for s in group.tensors):
        parts = name.split(".")
        for end in range(1, len(parts)):
            path = ".".join(parts[:end])
            kind = type(model.get_submodule(path))
            if kind.__module__.startswith("peft.tuners") and hasattr(kind, "merge"):
                raise PruningError(
                    f"{path!r} is a {kind.__module__}.{kind.__qualname__}; expected a layer "
                    "without adapters. Merge them first "
                    "(model.merge_and_unload().requires_grad_(True) of PEFT)."
                )


def reshape_tensors(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    only: Sequence[DependencyGroup] | None = None,
) -> list[Rewrite]:
    """Give every tensor its shape at a plan, with zeros as values, before weights are loaded.

    Args:
        model: Module from which the groups are named.
        groups: Groups of the plan.
        plan: The plan.
        only: The groups that change; default: all. The rest of the model is ignored.

    Returns:
        A record of each replaced tensor.

    Raises:
        PruningError: If the plan has no entry for a group, or one of another size.
    """
    odd = sorted(group.name for group in groups if plan.sizes.get(group.name) != group.size)
    if odd:
        raise PruningError(
            f"The stored plan was made for another model: groups {odd[:6]} or their sizes differ. "
            "Build the model with the configuration it was trained with."
        )
    mine = groups if only is None else only
    check_empty(model, mine, plan)
    shapes = shapes_at(model, mine, plan)
    tensors = {name: tensor_of(model, name) for name in shapes}
    check_attributes(model, mine)
    keep_whole(model, mine)
    unsaved = unsaved_at(model, mine, plan.kept)
    changed = {
        id(t): Rewrite(t, _like(t, unsaved.get(n, t.detach().new_zeros(shapes[n]))), {})
        for n, t in tensors.items()
        if n in unsaved or list(t.shape) != shapes[n]
    }
    rewrites = list(changed.values())
    _replace(model, rewrites)
    _update_sizes(model, groups, plan, mine)
    return rewrites


@torch.no_grad()
def restore_plan(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    values: Mapping[str, Tensor],
) -> list[Rewrite]:
    """Give a model back the shape and the values it had at an earlier plan.

    Args:
        model: Module from which the groups are named.
        groups: All groups of the model.
        plan: The earlier plan.
        values: Parameters and buffers of that time, by name.

    Returns:
        A record of each replaced tensor of another shape.

    Raises:
        PruningError: If the values do not fit this model at this plan; it is unchanged then.
    """
    check_empty(model, groups, plan)
    every, named = parameters_of(model), shapes_at(model, groups, plan)
    old = dict({id(p): (name, p) for name, p in reversed(every.items())}.values())
    shapes = {id(p): named[n] for n, p in every.items() if n in named}  # tied ones by any name
    for name, parameter in list(old.items()):
        shape = shapes.get(id(parameter), list(parameter.shape))
        if 0 in shape and name not in values:  # without entries, which are not saved
            del old[name]
        elif name not in values or list(values[name].shape) != shape:
            raise PruningError(
                f"The snapshot has no {name!r} of shape {tuple(shape)}; expected one of this model."
            )
    for name, value in values.items():
        if type(value) not in (Tensor, nn.Parameter) or value.is_meta or value.is_quantized:
            raise PruningError(
                f"The snapshot holds {name!r} as a {type(value).__name__} without plain values; "
                "expected a dense tensor. Use another checkpoint."
            )
    rewrites = [
        Rewrite(p, _like(p, values[n].to(p, copy=True)), {})
        for n, p in old.items()
        if p.shape != values[n].shape
    ]
    buffers = _restored_buffers(model, groups, plan, values, named)
    rewrites += [rewrite for rewrite in buffers if rewrite.old.shape != rewrite.new.shape]
    _replace(model, rewrites)  # everything that can fail came before
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
    _replace(model, [rewrite for rewrite in buffers if rewrite.old.shape == rewrite.new.shape])
    _update_sizes(model, groups, plan, _affected(model, groups, plan, [r.new for r in rewrites]))
    return rewrites


def _restored_buffers(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    values: Mapping[str, Tensor],
    shapes: Mapping[str, list[int]],
) -> list[Rewrite]:
    """Buffers with the values of an earlier plan; all are new tensors, also those of equal shape.

    A buffer may have changed its shape in training, and an expanded one cannot be written to.
    """
    named: dict[int, list[str]] = {}
    every = dict(model.named_buffers(remove_duplicate=False))
    for name, buffer in every.items():
        named.setdefault(id(buffer), []).append(name)
    missing = {n for same in named.values() if not values.keys() & {*same} for n in same}
    lacking = [group for group in groups if any(s.tensor in missing for s in group.tensors)]
    values_here = {**unsaved_at(model, lacking, plan.kept), **values}
    found = []
    for same in named.values():
        old = every[same[0]]
        source = next((name for name in same if name in values_here), None)
        shape = next((shapes[name] for name in same if name in shapes), None)
        if shape is not None and (source is None or list(values_here[source].shape) != shape):
            raise PruningError(
                f"The snapshot has no {same[0]!r} of shape {tuple(shape)}; expected one of this "
                "model."
            )
        if source is not None:
            found.append(Rewrite(old, values_here[source].to(old, copy=True), {}))
    return found


def _like(old: Tensor, values: Tensor) -> Tensor:
    """New values for a tensor, as a parameter if it is one."""
    return nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values


def _replace(model: nn.Module, rewrites: Sequence[Rewrite]) -> None:
    replace_tensors(model, [(rewrite.old, rewrite.new) for rewrite in rewrites])


def revert_rewrites(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    rewrites: Sequence[Rewrite],
) -> None:
    """Put the old tensors of rewrites back, with the sizes of ``plan``."""
    _replace(model, [Rewrite(r.new, r.old, {}) for r in rewrites])
    _update_sizes(model, groups, plan, _affected(model, groups, plan, [r.old for r in rewrites]))


@torch.no_grad()
def _rewrite(change: ParameterCut) -> Rewrite:
    old = change.old
    values = old.detach()
    if change.compensated is not None:
        values = change.compensated.to(old)
    else:
        for dim, index in change.kept.items():
            values = values.index_select(dim, index)
    return Rewrite(old, _like(old, spilled(values.clone())), change.kept, change.rotated)


def _update_sizes(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    only: Sequence[DependencyGroup] | None = None,
) -> None:
    """Set the sizes on modules and in configs, and record the plan in the configs."""
    mine = groups if only is None else only
    place_linears(
        model, dict.fromkeys(s.tensor.rpartition(".")[0] for a in mine for s in a.tensors)
    )
    set_attributes(model, mine, plan.widths)
    for group in mine:
        _set_forward(model, group, plan.kept[group.name])
    fit_attentions(model, (s.tensor for group in mine for s in group.tensors))
    clear_caches(_changed_modules(model, mine))
    for path in sorted({group.network for group in mine}):
        config = own_config(model, path)
        if config is None:
            continue
        # A network and the encoder in it may share it: the record of the whole network is in it.
        sharing = [
            p
            for p in sorted({group.network for group in groups})
            if getattr(module_at(model, p), "config", None) is config
        ]
        path = next((p for p in sharing if is_within(path, p)), path)
        inside = [
            replace(group, network=path)
            for group in groups
            if group.network == path
            or (group.network in sharing and is_within(group.network, path))
        ]
        for name, number in config_numbers(inside, plan.widths).items():
            set_config_value(config, name, number)
        record = _record(inside, plan).under(path)
        vars(config).pop(GRAPH_FIELD, None)
        if record.is_full:
            vars(config).pop(CONFIG_FIELD, None)
            continue
        setattr(config, CONFIG_FIELD, record.to_json())
        setattr(config, GRAPH_FIELD, _graph_record(inside, path).to_json())


def _is_whole_stack(model: nn.Module, name: str, plan: PruningPlan) -> bool:
    """Whether a plan of layers and units keeps all layers of a stack, which no group names."""
    return plan.width(name) == plan.sizes[name] and stack_at(model, name) is not None


def _changed_modules(model: nn.Module, groups: Sequence[DependencyGroup]) -> list[nn.Module]:
    """The modules that hold a tensor or a number of groups, each once."""
    paths = [s.tensor.rpartition(".")[0] for group in groups for s in group.tensors]
    paths += [number.module for group in groups for number in group.attributes]
    return list(dict.fromkeys(linear_at(model.get_submodule(path)) for path in paths))


def _affected(
    model: nn.Module,
    groups: Sequence[DependencyGroup],
    plan: PruningPlan,
    changed: Sequence[Tensor],
) -> list[DependencyGroup]:
    """Groups that are cut at a plan, or hold one of the changed tensors."""
    ids = set(map(id, changed))
    mine = {name for name, tensor in tensors_of(model).items() if id(tensor) in ids}
    return [
        group
        for group in groups
        if plan.width(group.name) < group.size or any(s.tensor in mine for s in group.tensors)
    ]


def _record(groups: Sequence[DependencyGroup], plan: PruningPlan) -> PruningPlan:
    """The plan for a config: groups are named as in a model without the removed layers."""
    names = {group.current_name or group.name: group.name for group in groups}
    kept = {here: plan.kept[name] for here, name in names.items()}
    return PruningPlan({here: plan.sizes[name] for here, name in names.items()}, kept)


def _graph_record(groups: Sequence[DependencyGroup], path: str) -> PruningGraph:
    """The graph for a config, named as the plan beside it."""
    names = {group.name: group.current_name or group.name for group in groups}
    here = [
        replace(group.renamed(lambda name: names.get(name, name)), current_name="")
        for group in groups
    ]
    graph = PruningGraph(tuple(here))
    return graph.under(path) if path else graph


def _set_forward(model: nn.Module, group: DependencyGroup, kept: Sequence[int]) -> None:
    """Set or remove the replaced ``forward`` of modules of a group."""
    for path in {s.module for s in group.empty_forward} | {s.module for s in group.unit_arguments}:
        module = model.get_submodule(path)
        if is_cut_forward(module.__dict__.get("forward")):
            del module.__dict__["forward"]
        module._buffers.pop(KEPT_UNITS, None)
    for argument in group.unit_arguments if len(kept) < group.size else ():
        module = model.get_submodule(argument.module)
        index = torch.tensor(kept, dtype=torch.long, device=_device(module))
        module.register_buffer(KEPT_UNITS, index, persistent=False)
        module.__dict__["forward"] = partial(unit_argument_forward, module, argument)
    for empty_forward in group.empty_forward if not kept else ():
        set_forward_without_units(model, empty_forward)


def _device(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)
