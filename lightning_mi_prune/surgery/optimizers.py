"""Update optimizers after a cut: the same objects, with smaller state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.untrusted import described
from lightning_mi_prune.surgery.optimizer_state import (
    NAMES,
    as_given,
    check_kind,
    check_optimizers,
    cut_state,
    is_state_known,
    is_state_list,
    parameters_in,
    plain_state,
    renumbered,
    state_fits,
)
from lightning_mi_prune.surgery.units import Rewrite

__all__ = [
    "parameter_names",
    "restore_state",
    "snapshot_state",
    "update_optimizers",
]


def update_optimizers(
    optimizers: Iterable[Optimizer],
    rewrites: Sequence[Rewrite],
    removed: Iterable[nn.Parameter] = (),
    names: Mapping[int, str] | None = None,
) -> None:
    """Replace cut parameters in optimizers and keep the state of what stays.

    Optimizer objects, parameter groups and hyperparameters stay, so learning rate schedules and
    gradient scalers keep working. State tensors of the parameter's old shape (moments of Adam,
    momentum of SGD) and their row and column means (Adafactor) are cut, those of rotated heads
    also rotated (:func:`optimizer_state.cut_state`); scalars such as the step are kept. Parameters
    of removed layers and parameters without entries, on which many optimizers fail, are removed
    from their groups, which may be empty afterwards.

    Args:
        optimizers: All optimizers of the run.
        rewrites: What :func:`units.apply_plan` returned.
        removed: Parameters of removed layers.
        names: Qualified name of each remaining parameter by its ``id``; ``param_names`` of groups
            are updated to it.

    Raises:
        PruningError: If an optimizer has state that cannot be cut; nothing is changed then.

    Example:
        >>> from lightning_mi_prune import PruningPlan, apply_plan, linear_group
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> import torch
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 3)).sum().backward(); adam.step()
        >>> group = linear_group(net, "hidden", kind="ffn", producers=["0"], consumers=["2"])
        >>> plan = PruningPlan({"hidden": 4}, {"hidden": (0, 2)})
        >>> update_optimizers([adam], apply_plan(net, [group], plan))
        >>> adam.state[net[0].weight]["exp_avg"].shape
        torch.Size([2, 3])
    """
    all_optimizers = list(optimizers)
    check_optimizers(all_optimizers, (rewrite.old for rewrite in rewrites))
    dropped = {id(parameter) for parameter in removed}
    dropped |= {id(rewrite.new) for rewrite in rewrites if not rewrite.new.numel()}
    by_old = {id(rewrite.old): rewrite for rewrite in rewrites}
    moves = []  # everything that can fail comes before the first change
    for optimizer in all_optimizers:
        for group, index, parameter in parameters_in(optimizer):
            if (rewrite := by_old.get(id(parameter))) is not None:
                state = optimizer.state.get(parameter)
                state = state and cut_state(state, rewrite.old.shape, rewrite.kept, rewrite.rotated)
                moves.append((optimizer, group["params"], index, rewrite, state))
    for optimizer, parameters, index, rewrite, state in moves:
        parameters[index] = rewrite.new
        if optimizer.state.pop(rewrite.old, None) is not None:
            optimizer.state[rewrite.new] = state
    for optimizer in all_optimizers if dropped else ():
        for group in optimizer.param_groups:
            for parameter in (p for p in group["params"] if id(p) in dropped):
                optimizer.state.pop(parameter, None)
            stay = [id(p) not in dropped for p in group["params"]]
            group["params"][:] = compress(group["params"], stay)
            if NAMES in group:
                group[NAMES] = list(compress(group[NAMES], stay))
    _rename(all_optimizers, names or {})


def parameter_names(
    optimizers: Iterable[Optimizer], names: Mapping[int, str]
) -> list[list[list[str]]]:
    """Parameter names in each group of each optimizer, in order; "" for unknown ones."""
    return [
        [[names.get(id(p), "") for p in group["params"]] for group in optimizer.param_groups]
        for optimizer in optimizers
    ]


def snapshot_state(
    optimizers: Iterable[Optimizer], names: Mapping[int, str]
) -> list[dict[str, dict[str, Any]]]:
    """Copy the state of every named parameter to the CPU, to undo a cut later.

    Args:
        optimizers: All optimizers of the run.
        names: Qualified name of each parameter by its ``id``; other parameters are skipped.

    Returns:
        State by parameter name for each optimizer, empty before the first step, as tensors and
        plain numbers, for ``torch.load(weights_only=True)``.

    Raises:
        PruningError: As :func:`optimizer_state.check_optimizers` does.

    Example:
        >>> import torch
        >>> net = nn.Linear(3, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(torch.ones(1, 3)).sum().backward(); sgd.step()
        >>> snapshot_state([sgd], {id(p): name for name, p in net.named_parameters()})[0]["bias"]
        {'momentum_buffer': tensor([1., 1.])}
    """
    all_optimizers = list(optimizers)
    named = [[p for _, _, p in parameters_in(o) if id(p) in names] for o in all_optimizers]
    check_optimizers(all_optimizers, (p for parameters in named for p in parameters))
    return [
        {
            names[id(p)]: {k: plain_state(v) for k, v in optimizer.state.get(p, {}).items()}
            for p in parameters
        }
        for optimizer, parameters in zip(all_optimizers, named, strict=True)
    ]


def restore_state(
    optimizers: Iterable[Optimizer],
    replaced: Mapping[int, Tensor],
    names: Mapping[int, str],
    states: Sequence[Mapping[str, Mapping[str, Any]]],
    groups: Sequence[Sequence[Sequence[str]]] = (),
    returned: Mapping[str, nn.Parameter] | None = None,
) -> None:
    """Replace parameters in optimizers after a rollback, with the state of a snapshot.

    Hyperparameters stay as they are now. A parameter that is not in the snapshot keeps its present
    state; if it was replaced and the state does not fit, it has none.

    Args:
        optimizers: All optimizers of the run, in the order of the snapshot.
        replaced: New parameters by the ``id`` of the old ones.
        names: Qualified name of each new parameter by its ``id``.
        states: What :func:`snapshot_state` returned; it is not trusted.
        groups: What :func:`parameter_names` returned at the snapshot, if layers were put back.
        returned: Parameters of layers that were put back, by name.

    Raises:
        PruningError: If the snapshot does not fit; nothing is changed then.

    Example:
        >>> import torch
        >>> small, large = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
        >>> sgd = torch.optim.SGD([small], lr=0.1, momentum=0.9)
        >>> states = [{"weight": {"momentum_buffer": torch.tensor([3.0, 4.0])}}]
        >>> restore_state([sgd], {id(small): large}, {id(large): "weight"}, states)
        >>> sgd.state[sgd.param_groups[0]["params"][0]]
        {'momentum_buffer': tensor([3., 4.])}
    """
    all_optimizers = list(optimizers)
    count = len(states) if is_state_list(states) else 0
    if count != len(all_optimizers):
        raise PruningError(
            f"The snapshot holds {count} readable optimizer states; expected "
            f"{len(all_optimizers)}. Configure the optimizers the run had when it was taken."
        )
    returning = dict(returned or {})
    _check_groups(all_optimizers, groups if returning else None)
    # All state is built before the first parameter moves: a failure changes nothing.
    planned, joining = [], []
    for number, (optimizer, saved) in enumerate(zip(all_optimizers, states, strict=True)):
        check_kind(optimizer)
        if returning:
            joining += _joining(optimizer, groups[number], saved, returning)
        for group, index, old in parameters_in(optimizer):
            new = replaced.get(id(old), old)
            name, present = names.get(id(new)), optimizer.state.get(old, {})
            if name is not None and name in saved:
                what = f"{type(optimizer).__name__} and {name!r}"
                state = _restored_state(what, saved[name], group, present, old, new)
            else:
                stays = new is old or all(
                    is_state_known(k, v, new.shape) for k, v in present.items()
                )
                state = dict(present) if stays else {}
            planned.append((optimizer, group, index, old, new, state))
    for optimizer, group, index, old, new, state in planned:
        group["params"][index] = new
        optimizer.state.pop(old, None)
        if state:
            optimizer.state[new] = state
    known_as = dict(names) | {id(parameter): name for name, parameter in returning.items()}
    _rename(all_optimizers, known_as)
    for optimizer, group, below, new, state in joining:
        present_names = [known_as.get(id(p)) for p in group["params"]]
        index = present_names.index(below) + 1 if below in present_names else 0
        if NAMES in group:
            name = as_given(optimizer, known_as[id(new)], known_as)
            group[NAMES] = [*group[NAMES][:index], name, *group[NAMES][index:]]
        group["params"].insert(index, new)
        if state:
            optimizer.state[new] = state


def _joining(
    optimizer: Optimizer,
    groups: Sequence[Sequence[str]],
    saved: Mapping[str, Mapping[str, Any]],
    returning: Mapping[str, nn.Parameter],
) -> list[tuple[Optimizer, dict[str, Any], str | None, nn.Parameter, dict[str, Any]]]:
    """Parameters to put back: ``(optimizer, group, name before it, parameter, state)``."""
    found = []
    for group, wanted in zip(optimizer.param_groups, groups, strict=True):
        below: str | None = None
        for name in wanted:
            if name in returning:
                what = f"{type(optimizer).__name__} and {name!r}"
                state = _restored_state(
                    what, saved.get(name, {}), group, {}, returning[name], returning[name]
                )
                found.append((optimizer, group, below, returning[name], state))
            below = name or below
    return found


def _rename(optimizers: Iterable[Optimizer], names: Mapping[int, str]) -> None:
    """Update the parameter names in optimizers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups if names else ():
            if NAMES in group:
                pairs = zip(group["params"], group[NAMES], strict=False)
                group[NAMES] = [renumbered(own, names.get(id(p), own)) for p, own in pairs]


def _check_groups(
    optimizers: Sequence[Optimizer], groups: Sequence[Sequence[Sequence[str]]] | None
) -> None:
    """Refuse a snapshot of other parameter groups, if layers are put back."""
    held_now = [len(optimizer.param_groups) for optimizer in optimizers]
    then = held_now if groups is None else [len(found) for found in groups]
    if held_now != then:
        raise PruningError(
            f"The optimizers have {held_now} groups of parameters; the snapshot was taken with "
            f"{then}. Configure the groups the run had when it was taken."
        )


def _restored_state(
    what: str,
    saved: Mapping[str, Any],
    group: Mapping[str, Any],
    present: Mapping[str, Any],
    old: Tensor,
    new: Tensor,
) -> dict[str, Any]:
    """Checked copy of saved state, on the device that the optimizer expects."""
    state = {}
    for key, value in saved.items():
        before = present.get(key)
        if not state_fits(key, value, new, present, old):
            raise PruningError(
                f"The snapshot of {what} has {key!r} ({described(value)}), which does not fit "
                f"a parameter of shape {tuple(new.shape)}. Take one of this model and optimizer."
            )
        if isinstance(value, Tensor):
            # As in load_state_dict of torch, unless present state shows the device of scalars.
            on_cpu = key == "step" and not (group.get("fused") or group.get("capturable"))
            on_cpu = before.device.type == "cpu" if isinstance(before, Tensor) else on_cpu
            home = "cpu" if on_cpu and value.ndim == 0 else new.device
            # A run may resume in another precision.
            kind = before.dtype if isinstance(before, Tensor) else value.dtype
            value = value.detach().to(home, kind, copy=True)
        state[key] = value
    return state
