"""Structured pruning by mutual information while a network trains.

core            plan, options, errors
discovery       groups of units and stacks of layers that can be pruned
surgery         apply a plan to a model and its optimizers
calibration     activations, gradients and calls, collected from data
importance      mutual information, elimination order, criteria
allocation      budget, constraints, costs: how many units every group keeps
reconstruction  compensation and least squares for the weights that stay
checkpoint      the plan in state dicts, checkpoints and folders
reporting       reports, tables, plots
export          folders and files for other programs
pipeline        rank -> allocate -> compensate -> reconstruct
pruner          calibration and the pipeline in one call: prune()
planning        what a cut would do and cost, before it does: plan(), sensitivity()
callbacks       all of it inside Trainer.fit
cli             the same from a shell
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from lightning_mi_prune.callbacks.layers import CKALayerPruning
    from lightning_mi_prune.callbacks.units import MutualInformationPruning
    from lightning_mi_prune.checkpoint.loading import load_pruned
    from lightning_mi_prune.checkpoint.pretrained import from_pretrained
    from lightning_mi_prune.core import options
    from lightning_mi_prune.core.errors import PruningError, PruningWarning
    from lightning_mi_prune.core.plan import PruningPlan
    from lightning_mi_prune.discovery.discover import discover
    from lightning_mi_prune.export.saving import save_pretrained
    from lightning_mi_prune.graph.describe import linear_group
    from lightning_mi_prune.graph.graph import PruningGraph
    from lightning_mi_prune.planning.plan import plan
    from lightning_mi_prune.pruner import PruneResult, prune
    from lightning_mi_prune.reporting.report import PruningReport
    from lightning_mi_prune.surgery.units import apply_plan

__version__ = "0.1.0"

__all__ = [
    "CKALayerPruning",
    "MutualInformationPruning",
    "PruneResult",
    "PruningError",
    "PruningGraph",
    "PruningPlan",
    "PruningReport",
    "PruningWarning",
    "apply_plan",
    "discover",
    "from_pretrained",
    "linear_group",
    "load_pruned",
    "options",
    "plan",
    "prune",
    "save_pretrained",
]

_HOME = {
    "CKALayerPruning": "callbacks.layers",
    "MutualInformationPruning": "callbacks.units",
    "PruneResult": "pruner",
    "PruningError": "core.errors",
    "PruningGraph": "graph.graph",
    "PruningPlan": "core.plan",
    "PruningReport": "reporting.report",
    "PruningWarning": "core.errors",
    "apply_plan": "surgery.units",
    "discover": "discovery.discover",
    "from_pretrained": "checkpoint.pretrained",
    "linear_group": "graph.describe",
    "load_pruned": "checkpoint.loading",
    "options": "core.options",
    "plan": "planning.plan",
    "prune": "pruner",
    "save_pretrained": "export.saving",
}

# Auto classes of transformers then open folders of pruned models; imports nothing before.
wrapt.register_post_import_hook(
    "lightning_mi_prune.checkpoint.registration:register",
    "transformers.models.auto.configuration_auto",
)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = home if name == "options" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
