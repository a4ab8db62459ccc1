"""CARRY    rebind(optimizers, rewrites): sliced state; the only file that changes an optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.surgery import Rewrite

__all__ = ["check_optimizers", "rebind"]

_REFUSED: dict[type[Optimizer], str] = {
    torch.optim.LBFGS: "a history over all parameters flattened together",
    torch.optim.Adafactor: "sums over rows and columns of each parameter",
}


def rebind(optimizers: Iterable[Optimizer], rewrites: Sequence[Rewrite]) -> None:
    """Point optimizers at the cut parameters and keep the state of what survived.

    The optimizer objects, their groups, their order and their hyperparameters stay, so learning
    rate schedules and gradient scalers that hold them go on. State tensors of the parameter's old
    shape (Adam's moments, SGD's momentum) are index-selected; scalars (the step) are kept.

    Args:
        optimizers: All optimizers of the run.
        rewrites: What :func:`surgery.apply` returned.

    Raises:
        PruningError: If an optimizer keeps state that cannot be cut; nothing is changed then.

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> from lightning_mi_prune.plan import Plan
        >>> from lightning_mi_prune.surgery import apply
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> adam = torch.optim.Adam(net.parameters())
        >>> net(torch.ones(1, 3)).sum().backward(); adam.step()
        >>> axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        >>> rebind([adam], apply(net, [axis], Plan({"hidden": 4}, {"hidden": (0, 2)})))
        >>> adam.state[net[0].weight]["exp_avg"].shape
        torch.Size([2, 3])
    """
    all_optimizers = list(optimizers)
    check_optimizers(all_optimizers, (rewrite.old for rewrite in rewrites))
    by_old = {id(rewrite.old): rewrite for rewrite in rewrites}
    for optimizer in all_optimizers:
        for group in optimizer.param_groups:
            parameters = group["params"]
            for place, parameter in enumerate(parameters):
                rewrite = by_old.get(id(parameter))
                if rewrite is None:
                    continue
                parameters[place] = rewrite.new
                if parameter in optimizer.state:
                    state = optimizer.state.pop(parameter)
                    optimizer.state[rewrite.new] = {
                        key: _carry(value, rewrite) for key, value in state.items()
                    }


def check_optimizers(optimizers: Iterable[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Refuse optimizers whose state cannot follow a cut of these parameters.

    Raises:
        PruningError: With the optimizer's name, the state it keeps, and what works instead.
    """
    cut = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        name = type(optimizer).__name__
        for kind, keeps in _REFUSED.items():
            if isinstance(optimizer, kind):
                raise PruningError(
                    f"{name} keeps {keeps}, which cannot be cut. Use AdamW or SGD, or prune "
                    "before training with it."
                )
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in cut:
                    _check_state(name, parameter, optimizer.state.get(parameter, {}))


def _check_state(name: str, parameter: nn.Parameter, state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        known = value is None or isinstance(value, (bool, int, float))
        if isinstance(value, Tensor):
            plain = type(value) in (Tensor, nn.Parameter)
            known = plain and (value.shape == parameter.shape or value.numel() == 1)
        if not known:
            what = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:60]
            raise PruningError(
                f"{name} keeps state {key!r} ({type(value).__name__}, {what}) for a parameter of "
                f"shape {tuple(parameter.shape)}; expected tensors of that shape or scalars. Use "
                "AdamW, Adam, SGD or RMSprop."
            )


def _carry(value: Any, rewrite: Rewrite) -> Any:
    if not isinstance(value, Tensor) or value.shape != rewrite.old.shape:
        return value
    for dim, index in rewrite.kept.items():
        value = value.index_select(dim, index.to(value.device))
    return value.clone() if not rewrite.kept else value
