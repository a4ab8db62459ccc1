"""The methods of this package that are compared, as data: variants, and settings for ablations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal

from benchmarks.subjects import EVERY_UNIT, POSITIONS, STEPS, STORED, UNITS
from lightning_mi_prune.allocation.budget import Budget
from lightning_mi_prune.core.options import Importance, Reconstruction
from lightning_mi_prune.importance.criteria import (
    ActivationNorm,
    Criterion,
    Magnitude,
    MutualInformation,
    Random,
    Taylor,
)
from lightning_mi_prune.pipeline import PipelineOptions

__all__ = [
    "DEFAULT",
    "DESCRIBED",
    "OURS",
    "SETTINGS",
    "VARIANTS",
    "Name",
    "Setting",
    "Variant",
    "Widths",
]

Name = tuple[str, str, str]
"""Method, widths and weights: together they identify a way to prune."""

Widths = Literal["global", "uniform", "config"]
Weights = Literal["none", "compensation", "reconstruction"]
RIDGE = MutualInformation().ridge


def reconstruction_of(weights: Weights) -> Reconstruction:
    """The option of the package, with as many positions as are stored here."""
    return Reconstruction("layerwise" if weights == "reconstruction" else weights, STORED)


@dataclass(frozen=True)
class Variant:
    """One way to prune: how units are scored, widths are found and the other weights adapt.

    Args:
        method: Name of the method.
        widths: Whether groups compete for the budget, all keep the same share, or those that share
            a field of the config have one width.
        weights: Left alone, compensated by least squares, or also reconstructed layer by layer.
        units: Kinds of unit that may be removed.
        compared: Whether it is among the methods that are compared by default.
    """

    method: str
    widths: Widths
    weights: Weights
    units: tuple[str, ...] = UNITS
    compared: bool = True

    @property
    def name(self) -> Name:
        """What distinguishes it from all others."""
        return self.method, self.widths, self.weights

    def options(self, sparsity: float, seed: int) -> PipelineOptions:
        """The options of the package for one budget: a share of what its units hold."""
        return PipelineOptions(
            Budget(sparsity=sparsity),
            self.widths,
            Importance(relevance=None if self.method == "mi-topk" else "gradient"),
            reconstruction=reconstruction_of(self.weights),
            criterion=CRITERIA[self.method](seed),
        )


CRITERIA: dict[str, Callable[[int], Criterion]] = {
    "relevance-mi": lambda seed: MutualInformation(),
    "relevance-mi-head-dim": lambda seed: MutualInformation(),
    "mi-topk": lambda seed: MutualInformation(selection="topk"),
    "taylor": lambda seed: Taylor(),
    "activation-norm": lambda seed: ActivationNorm(),
    "magnitude": lambda seed: Magnitude(),
    "random": lambda seed: Random(seed),
}
OURS = Variant("relevance-mi", "global", "reconstruction")
VARIANTS: tuple[Variant, ...] = (
    OURS,
    Variant("relevance-mi-head-dim", "global", "reconstruction", units=EVERY_UNIT),
    Variant("relevance-mi", "global", "compensation", compared=False),
    Variant("relevance-mi", "uniform", "reconstruction", compared=False),
    Variant("relevance-mi", "uniform", "compensation", compared=False),
    Variant("mi-topk", "uniform", "none"),
    Variant("mi-topk", "uniform", "reconstruction", compared=False),
    # Other scores as they are, and with our widths and our reconstruction.
    *(
        variant
        for method in ("taylor", "activation-norm", "magnitude", "random")
        for variant in (
            Variant(method, "uniform", "none"),
            Variant(method, "uniform", "compensation", compared=False),
            Variant(method, "uniform", "reconstruction", compared=False),
            Variant(method, "global", "reconstruction"),
        )
    ),
)

# Widths that a config can describe, so that plain transformers opens the folder. Heads of BERT are
# then tied to the hidden size; as many parameters go, of all of these together.
DESCRIBED = (
    Variant(
        "relevance-mi",
        "config",
        "reconstruction",
        units=(*UNITS, "hidden", "pooler"),
        compared=False,
    ),
)


@dataclass(frozen=True)
class Setting:
    """The method with one option changed, or several where they explain one.

    Args:
        name: Its name.
        selection: Rule by which units are put in order.
        ridge: Noise on the layer above, as a share of its mean variance.
        relevance: Which part of the layer above matters.
        widths: Whether groups compete for the budget or all keep the same share.
        weights: As for `Variant`.
        counted: What the budget counts; as many MACs stay as with the default.
        also: Kinds of unit that may be removed beside neurons and heads.
        positions: Samples of each group.
        stored: Positions whose inputs are stored for the reconstruction.
        steps: Batches whose gradients are taken.
    """

    name: str
    selection: Literal["conditional", "topk"] = "conditional"
    ridge: float = RIDGE
    relevance: Literal["gradient", "weights"] | None = "gradient"
    widths: Widths = "global"
    weights: Weights = "reconstruction"
    counted: Literal["parameters", "MACs"] = "parameters"
    also: tuple[str, ...] = ()
    positions: int = POSITIONS
    stored: int = STORED
    steps: int = STEPS

    @property
    def changes(self) -> set[str]:
        """Names of what is not as in the default."""
        names = {field.name for field in fields(self)} - {"name"}
        return {name for name in names if getattr(self, name) != getattr(DEFAULT, name)}

    def options(self, amount: float, seed: int) -> PipelineOptions:
        """The options of the package for one budget: a sparsity, or the MACs of one example."""
        macs = self.counted == "MACs"
        return PipelineOptions(
            Budget(target_macs=int(amount)) if macs else Budget(sparsity=amount),
            self.widths,
            Importance(relevance=self.relevance),
            reconstruction=reconstruction_of(self.weights),
            criterion=MutualInformation(selection=self.selection, ridge=self.ridge),
        )


DEFAULT = Setting("default")
SETTINGS = (
    DEFAULT,
    Setting("weights unchanged", weights="none"),
    Setting("compensation alone", weights="compensation"),
    Setting("top-k", selection="topk"),
    Setting("top-k, compensation alone", selection="topk", weights="compensation"),
    *(Setting(f"ridge {ridge:g}", ridge=ridge) for ridge in (0.01, 0.1, 10.0, 1000.0)),
    Setting("no relevance", relevance=None),
    Setting("no relevance, uniform", relevance=None, widths="uniform"),
    Setting("relevance from weights", relevance="weights"),
    Setting("8 batches of gradients", steps=8),
    Setting("uniform", widths="uniform"),
    Setting("literal reading", "topk", relevance=None, widths="uniform", weights="none"),
    *(Setting(f"{number:,} positions", positions=number) for number in (4096, 1024)),
    *(Setting(f"{number:,} stored", stored=number) for number in (4096, 2048)),
    Setting("hidden size", also=("hidden",)),
    Setting("hidden size, same MACs", counted="MACs", also=("hidden",)),
    Setting("head dimensions", also=("head_dim",)),
    Setting("MACs", counted="MACs"),
)
