"""CUT      units off layers and layers out of stacks; the only place that changes a model."""

from lightning_mi_prune.surgery.layers import Spare, arrange, hollow, shorten
from lightning_mi_prune.surgery.operation import Operation, cancel, operate, recover, remodel
from lightning_mi_prune.surgery.units import Rewrite, apply, check, reshape, revert, undo

__all__ = [
    "Operation",
    "Rewrite",
    "Spare",
    "apply",
    "arrange",
    "cancel",
    "check",
    "hollow",
    "operate",
    "recover",
    "remodel",
    "reshape",
    "revert",
    "shorten",
    "undo",
]
