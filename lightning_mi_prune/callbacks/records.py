"""A cut that is decided, and one on probation, as records that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_mi_prune.callbacks.untrusted import number, tensors, whole
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.selection import Information, Selection

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
    """What :func:`write_trial` wrote; raises a plain exception for anything else."""
    for optimizer in state["optimizers"]:
        for values in optimizer.values():
            tensors({k: v for k, v in values.items() if isinstance(v, Tensor)})
    return Trial(
        epoch=whole(state["epoch"]),
        reached=number(state["reached"], 0, 1),
        kept=number(state["kept"], 0, 1),
        plan=Plan.from_json(state["plan"]),
        weights=tensors(state["weights"]),
        optimizers=list(state["optimizers"]),
        groups=[[list(map(str, names)) for names in groups] for groups in state["groups"]],
        failed_at=None if state["failed_at"] is None else whole(state["failed_at"]),
    )


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
        name: Information(number(i["total"]), number(i["kept"]))
        for name, i in state["information"].items()
    }
    plan = Plan.from_json(state["plan"])
    turned = {str(name): _read_maps(dims) for name, dims in state.get("turned", {}).items()}
    selection = Selection(plan, tensors(state["folded"]), information, turned)
    return Pending(whole(state["epoch"]), number(state["sparsity"], 0, 1), selection)


def _read_maps(state: Mapping[int, Tensor]) -> dict[int, Tensor]:
    found = tensors({str(whole(dim)): maps for dim, maps in state.items()})
    return {int(dim): maps for dim, maps in found.items()}
