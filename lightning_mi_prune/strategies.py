"""AGREE    refuse what cannot work, in one sentence each; the only file that touches a strategy."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelPruning, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import SingleDeviceStrategy

__all__ = ["refuse_second", "refuse_unsupported"]

_CALLBACKS: dict[type[pl.Callback], str] = {
    StochasticWeightAveraging: "it averages copies of the uncut weights",
    WeightAveraging: "it averages copies of the uncut weights",
    ModelPruning: "it holds masks of the uncut shape",
}


def refuse_unsupported(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse strategies, callbacks and compiled modules that would break at the first cut.

    Raises:
        MisconfigurationException: Naming what was found and what works instead.
    """
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"This version prunes on one device; found {type(trainer.strategy).__name__} over "
            f"{trainer.world_size} processes. Set Trainer(devices=1)."
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind, reason in _CALLBACKS.items():
            if isinstance(callback, kind):
                raise MisconfigurationException(
                    f"{type(callback).__name__} cannot run beside pruning, because {reason}; "
                    "remove one of the two."
                )
    for name, part in module.named_modules():
        if hasattr(part, "_orig_mod") or getattr(part, "_compiled_call_impl", None) is not None:
            raise MisconfigurationException(
                f"{name or type(part).__name__!r} is compiled for the uncut shape; prune first, "
                "then call torch.compile on the result."
            )


def refuse_second(trainer: pl.Trainer, callback: pl.Callback, kind: type[pl.Callback]) -> None:
    """Refuse two callbacks that both own the plan of the module.

    Raises:
        MisconfigurationException: If another callback of this kind is in the trainer.
    """
    others = [c for c in trainer.callbacks if isinstance(c, kind)]  # type: ignore[attr-defined]
    if len(others) > 1:
        raise MisconfigurationException(
            f"{len(others)} pruning callbacks in one Trainer would each cut by a plan of their "
            f"own; expected one. Give one {type(callback).__name__} all units, or fit twice."
        )
