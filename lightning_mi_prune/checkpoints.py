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
from lightning_mi_prune.families import find_axes, present_plan
from lightning_mi_prune.plan import Plan, recorded_plan
from lightning_mi_prune.surgery import reshape

__all__ = ["PLAN_KEY", "PlanKeeper", "from_pretrained"]

PLAN_KEY = "lightning_mi_prune.plan"
_ATTRIBUTE = "_lightning_mi_prune_keeper"
_LARGEST_ENTRY = 64 * 2**20
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")

Find = Callable[[nn.Module], Sequence[WidthAxis]]


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

    def __init__(self, module: nn.Module, find: Find = find_axes) -> None:
        self.module = module
        self._finders: list[Find] = [find]
        self._axes: dict[str, WidthAxis] = {}
        self._plan: Plan | None = None
        # torch marks these hooks with an attribute, which bound methods do not take.
        self._handles = [
            module.register_state_dict_post_hook(  # type: ignore[no-untyped-call]
                partial(PlanKeeper._write, self)
            ),
            module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
                partial(PlanKeeper._replay, self)
            ),
        ]
        module.__dict__[_ATTRIBUTE] = self

    @classmethod
    def of(cls, module: nn.Module, find: Find = find_axes) -> PlanKeeper:
        """The one keeper of a module, made if there is none; it stays with copies of the module."""
        keeper = module.__dict__.get(_ATTRIBUTE)
        if not isinstance(keeper, PlanKeeper):
            return cls(module, find)
        keeper._finders.append(find)
        return keeper

    @property
    def axes(self) -> list[WidthAxis]:
        """All axes of the module, as built."""
        while self._finders:
            found = self._finders[0](self.module)
            new = [axis for axis in found if axis.name not in self._axes]
            if self._plan is not None and new:
                present = present_plan(self.module, new)
                sizes, kept = self._plan.sizes, self._plan.kept
                self._plan = Plan({**sizes, **present.sizes}, {**kept, **present.kept})
            self._axes |= {axis.name: axis for axis in new}
            self._finders.pop(0)
        return list(self._axes.values())

    @property
    def plan(self) -> Plan:
        """The plan the module carries now."""
        axes = self.axes
        if self._plan is None:
            self._plan = present_plan(self.module, axes)
        return self._plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self._plan = plan

    def close(self) -> None:
        """Take both hooks down; the module is an ordinary module again."""
        for handle in self._handles:
            handle.remove()
        self.module.__dict__.pop(_ATTRIBUTE, None)

    def _write(self, module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        if self._plan is not None and not self._plan.is_full:
            text = self._plan.to_json().encode()
            state[prefix + PLAN_KEY] = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def _replay(
        self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any, **__: Any
    ) -> None:
        stored = state.pop(prefix + PLAN_KEY, None)
        if stored is not None:
            plan = _read(stored)
        elif self._plan is not None and self._is_uncut(state, prefix):
            plan = Plan.full({axis.name: axis.size for axis in self.axes})
        else:
            return  # weights for the present shape, or a part without the cut tensors
        reshape(module, self.axes, plan)
        self._plan = plan

    def _is_uncut(self, state: dict[str, Any], prefix: str) -> bool:
        """Whether a state dict without a plan holds every cut tensor in the shape it was built."""
        slices = [s for axis in self.axes for s in axis.slices]
        tensors = ((state.get(prefix + s.tensor), s.shape) for s in slices)
        return all(isinstance(t, Tensor) and tuple(t.shape) == shape for t, shape in tensors)


def _read(stored: Any) -> Plan:
    if not isinstance(stored, Tensor) or stored.dtype != torch.uint8 or stored.ndim != 1:
        raise PruningError(
            f"The entry {PLAN_KEY!r} of the checkpoint is not a plan; is it damaged?"
        )
    if stored.numel() > _LARGEST_ENTRY:
        raise PruningError(f"The entry {PLAN_KEY!r} holds {stored.numel()} bytes: not a plan.")
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

    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    config, unused = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
    holder = nn.Module()
    holder.config = config
    plan = recorded_plan(holder)
    if plan is None or plan.is_full:
        return cls.from_pretrained(name_or_path, **kwargs)
    strange = sorted(set(unused) - set(hub))
    if strange:
        raise PruningError(
            f"{strange} cannot be passed when a pruned model is loaded; expected options of its "
            f"config, or {list(_HUB)}."
        )
    try:
        weights = cached_file(str(name_or_path), "model.safetensors", **hub)
    except OSError as error:
        raise PruningError(
            f"{name_or_path} holds a pruned model without model.safetensors in one piece; save it "
            "with a larger max_shard_size."
        ) from error
    build = getattr(cls, "from_config", None) or cls._from_config
    network: nn.Module = build(config)
    try:
        axes = find_axes(network)
        reshape(network, axes, present_plan(network, axes))
        load_model(network, str(weights))
    except RuntimeError as error:
        saved = getattr(config, "architectures", None)
        raise PruningError(
            f"{name_or_path} cannot be opened as {type(network).__name__}: it was saved from "
            f"{saved} and the weights do not fit. Open it with that class, and leave num_labels "
            f"as saved. ({error})"
        ) from error
    return network.eval()
