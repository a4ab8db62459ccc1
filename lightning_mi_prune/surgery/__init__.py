"""CUT      units off layers and layers out of stacks; the only place that changes a model."""

from lightning_mi_prune.surgery.layers import shorten
from lightning_mi_prune.surgery.units import Rewrite, apply, check, reshape, revert, undo

__all__ = ["Rewrite", "apply", "check", "reshape", "revert", "shorten", "undo"]
