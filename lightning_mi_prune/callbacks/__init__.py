"""WHEN     the only files that hold a Trainer."""

from lightning_mi_prune.callbacks.base import PruningCallback
from lightning_mi_prune.callbacks.cka import CKALayerPruning
from lightning_mi_prune.callbacks.mutual_information import MutualInformationPruning

__all__ = ["CKALayerPruning", "MutualInformationPruning", "PruningCallback"]
