"""KEEP     the plan travels in the state dict and is replayed before weights load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes
from lightning_mi_prune.plan import Plan, recorded_plan
from lightning_mi_prune.surgery import reshape

__all__ = ["PLAN_KEY", "PlanKeeper", "from_pretrained"]

PLAN_KEY = "lightning_mi_prune.plan"


class PlanKeeper:
    """Writes the plan of a module into its state dict, and replays it before weights load.

    The plan is one uint8 tensor of JSON under one reserved key, so it survives
    ``save_weights_only=True`` and loads with ``weights_only=True``.

    Args:
        module: Root of the state dict (the LightningModule).
        find: Finds the axes of the module; called when they are first needed.

    Example:
        >>> from lightning_mi_prune.families import linear_axis
        >>> def build():
        ...     net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        ...     axis = linear_axis(net, "hidden", kind="ffn", producers=["0"], readers=["2"])
        ...     return net, PlanKeeper(net, lambda module: [axis])
        >>> net, keeper = build()
        >>> reshape(net, keeper.axes, Plan({"hidden": 4}, {"hidden": (1, 2)}))
        >>> keeper.plan = Plan({"hidden": 4}, {"hidden": (1, 2)})
        >>> fresh, _ = build()
        >>> fresh.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> fresh[0].out_features
        2
    """

    def __init__(
        self, module: nn.Module, find: Callable[[nn.Module], Sequence[WidthAxis]] = find_axes
    ) -> None:
        self.module, self._find = module, find
        self._axes: list[WidthAxis] | None = None
        self.plan: Plan | None = None
        # torch marks these hooks with an attribute, which bound methods do not take.
        self._handles = [
            module.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
                partial(PlanKeeper._write, self)
            ),
            module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                partial(PlanKeeper._replay, self)
            ),
        ]

    @property
    def axes(self) -> list[WidthAxis]:
        """All axes of the module, as built."""
        if self._axes is None:
            self._axes = list(self._find(self.module))
        return self._axes

    def close(self) -> None:
        """Take both hooks down; the module is an ordinary module again."""
        for handle in self._handles:
            handle.remove()

    def _write(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self.plan is not None and not self.plan.is_full:
            text = self.plan.to_json().encode()
            state[prefix + PLAN_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _replay(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        stored = state.pop(prefix + PLAN_KEY, None)
        if stored is None and self.plan is None:
            return
        plan = Plan.full({a.name: a.size for a in self.axes}) if stored is None else _read(stored)
        reshape(module, self.axes, plan)
        self.plan = plan


def _read(stored: Any) -> Plan:
    if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.ndim != 1:
        raise PruningError(
            f"The entry {PLAN_KEY!r} of the checkpoint is not a plan; is it damaged?"
        )
    try:
        text = bytes(stored.cpu().tolist()).decode()
    except UnicodeDecodeError as error:
        raise PruningError(f"The entry {PLAN_KEY!r} of the checkpoint is damaged.") from error
    return Plan.from_json(text)


def from_pretrained(cls: Any, name_or_path: str | Path, **kwargs: Any) -> Any:
    """``cls.from_pretrained`` that also opens folders saved from a pruned model.

    A pruned Hugging Face model is saved with its own ``save_pretrained``; its config carries the
    plan. Models that were never cut go straight to ``cls.from_pretrained``.

    Args:
        cls: A model class or Auto class of transformers.
        name_or_path: Folder or hub name.
        kwargs: Passed on; for a pruned model they may only change the config.

    Raises:
        PruningError: If the weights do not fit the recorded plan.
    """
    from safetensors.torch import load_model
    from transformers import AutoConfig
    from transformers.utils import cached_file

    config, unused = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
    holder = nn.Module()
    holder.config = config
    plan = recorded_plan(holder)
    if plan is None:
        return cls.from_pretrained(name_or_path, **kwargs)
    if unused:
        raise PruningError(
            f"{sorted(unused)} cannot be passed when a pruned model is loaded; expected options "
            "of its config only."
        )
    build = getattr(cls, "from_config", None) or cls._from_config
    network: nn.Module = build(config)
    try:
        reshape(network, find_axes(network), plan)
        load_model(network, str(cached_file(str(name_or_path), "model.safetensors")))
    except RuntimeError as error:
        saved = getattr(config, "architectures", None)
        raise PruningError(
            f"{name_or_path} cannot be opened as {type(network).__name__}: it was saved from "
            f"{saved} and the weights do not fit. Open it with that class, and leave num_labels "
            f"as saved. ({error})"
        ) from error
    return network.eval()
