"""A cut that is decided, and one on probation, as records that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mi_prune.callbacks.tensors import check_finite, tensor, tensors
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.selection import Information, Selection
from lightning_mi_prune.states import known
from lightning_mi_prune.untrusted import described, listed, mapping, number, text, whole

__all__ = [
    "Pending",
    "Trial",
    "read_pending",
    "read_trial",
    "write_pending",
    "write_trial",
]


@dataclass(frozen=True)
class Pending:
    """A cut that is decided and not yet made.

    Args:
        epoch: Epoch it belongs to the start of.
        sparsity: Sparsity it reaches.
        selection: What is cut.
    """

    epoch: int
    sparsity: float
    selection: Selection


@dataclass(frozen=True)
class Trial:
    """A cut on probation, and all that is needed to take it back.

    Args:
        epoch: Epoch that started with it.
        reached: Sparsity before it.
        kept: Share of the information that was left before it.
        plan: Plan before it.
        weights: Parameters and buffers before it, by name, on the CPU.
        optimizers: State of every optimizer before it, by parameter name, on the CPU.
        groups: Names of the parameters in every group of every optimizer before it.
        failed_at: Epoch at whose end it failed and after which it is taken back, or None.
    """

    epoch: int
    reached: float
    kept: float
    plan: Plan
    weights: Mapping[str, Tensor]
    optimizers: list[dict[str, dict[str, Any]]]
    groups: list[list[list[str]]]
    failed_at: int | None = None


def read_trial(state: Mapping[str, Any]) -> Trial:
    """What :func:`write_trial` wrote; raises a plain exception for anything else.

    What an optimizer keeps must follow the parameter of that name, and be of one kind for all of
    its parameters. Parameters that were trained, and what is kept of them, hold no NaN: training
    would only spread it. Buffers and parameters that were not trained may hold anything: a mask is
    infinite, and an empty statistic may be NaN. So may squares of gradients overflow in half
    precision: they only stand still.
    """
    weights = {name: _weight(found) for name, found in mapping(mapping(state)["weights"]).items()}
    optimizers = [_read_states(states, weights) for states in listed(state["optimizers"])]
    groups = [
        [[text(name) for name in listed(names)] for names in listed(held)]
        for held in listed(state["groups"], len(optimizers))
    ]
    for states, held in zip(optimizers, groups, strict=True):
        strange = set(states) - {name for names in held for name in names}
        if strange:
            raise ValueError(f"no group of an optimizer holds {described(min(strange))}")
    return Trial(
        epoch=whole(state["epoch"]),
        reached=number(state["reached"], 0, 1),
        kept=number(state["kept"], 0, 1),
        plan=Plan.from_json(state["plan"]),
        weights=weights,
        optimizers=optimizers,
        groups=groups,
        failed_at=None if state["failed_at"] is None else whole(state["failed_at"]),
    )


def _weight(value: Any) -> Tensor:
    """A parameter or a buffer; whether it is of the right class is compared with the model."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{described(value)} is no tensor")
    return value.detach()


def _read_states(given: Any, weights: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """What one optimizer keeps, by parameter."""
    found: dict[str, dict[str, Any]] = {}
    kinds: dict[str, str] = {}
    for name, values in mapping(given).items():
        if name not in weights:
            raise ValueError(f"an optimizer keeps state of {described(name)}, which has no weight")
        found[name] = {}
        for key, value in mapping(values).items():
            what = f"the state {described(key)} of {described(name)}"
            if not known(key, value, weights[name].shape):
                shape = tuple(weights[name].shape)
                raise ValueError(f"{what} is {described(value)}; the parameter has shape {shape}")
            kind = _kind_of(value)
            if value is not None and kind != kinds.setdefault(key, kind):
                raise ValueError(f"{what} is {kind}, that of other parameters is {kinds[key]}")
            _check_trained(what, value, overflow=True)
            found[name][key] = value.detach() if isinstance(value, Tensor) else value
        if found[name]:
            _check_trained(f"the parameter {described(name)}", weights[name])
    return found


def _kind_of(value: Any) -> str:
    if not isinstance(value, Tensor):
        return "no tensor"
    return "a tensor of fractions" if value.is_floating_point() else "a tensor of other numbers"


def _check_trained(what: str, value: Any, *, overflow: bool = False) -> None:
    """Refuse NaN and infinite values; with ``overflow``, only beside values below zero."""
    found = value if isinstance(value, Tensor) else torch.tensor(float(value or 0))
    if not bool(found.isfinite().all()) and not (overflow and bool((found >= 0).all())):
        raise ValueError(f"{what} holds NaN or infinite values")


def write_trial(trial: Trial) -> dict[str, Any]:
    """Plain containers and tensors for a checkpoint."""
    return {**vars(trial), "plan": trial.plan.to_json()}


def write_pending(pending: Pending) -> dict[str, Any]:
    """Plain containers and tensors for a checkpoint."""
    selection = pending.selection
    return {
        "epoch": pending.epoch,
        "sparsity": pending.sparsity,
        "plan": selection.plan.to_json(),
        "folded": dict(selection.folded),
        "turned": {name: dict(dims) for name, dims in selection.turned.items()},
        "information": {name: vars(i) for name, i in selection.information.items()},
    }


def read_pending(state: Mapping[str, Any]) -> Pending:
    """What :func:`write_pending` wrote; raises a plain exception for anything else."""
    information = {
        name: Information(number(mapping(i)["total"]), number(i["kept"]))
        for name, i in mapping(mapping(state)["information"]).items()
    }
    plan, folded = Plan.from_json(state["plan"]), tensors(state["folded"])
    check_finite(folded)
    turned = {name: _read_maps(dims) for name, dims in mapping(state.get("turned", {})).items()}
    selection = Selection(plan, folded, information, turned)
    return Pending(whole(state["epoch"]), number(state["sparsity"], 0, 1), selection)


def _read_maps(state: Any) -> dict[int, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{described(state)} is no mapping")
    found = {whole(dim): tensor(maps) for dim, maps in state.items()}
    check_finite({f"the map of dimension {dim}": maps for dim, maps in found.items()})
    return found
