"""The methods that are compared, by name, and their variants."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from lightning_mi_prune import MutualInformation
from lightning_mi_prune.budget import Budget
from lightning_mi_prune.criteria import ActivationNorm, Criterion, Magnitude, Random, Taylor
from lightning_mi_prune.method import Method

RIDGE = MutualInformation().ridge
UNITS = ("ffn", "heads")
EVERY = (*UNITS, "dims")

Widths = Literal["global", "uniform"]
Relevance = Literal["gradient", "readers"] | None
FoldIn = Literal["none", "fold_in", "refit"]


class Named(Protocol):
    """What tells one way to prune from all others."""

    @property
    def method(self) -> str: ...
    @property
    def widths(self) -> Widths: ...
    @property
    def fold_in(self) -> FoldIn: ...
    @property
    def cuts(self) -> int: ...


class Way(Protocol):
    """Anything that can be done to a model."""

    @property
    def cuts(self) -> int: ...
    def at(self, sparsity: float, seed: int, positions: int) -> Method: ...


@dataclass(frozen=True)
class Variant:
    """One way to prune: who ranks, how widths are found, what happens to the weights that stay.

    Args:
        method: Name of the method, a key of `METHODS`.
        widths: Whether axes compete for the budget or all keep the same share.
        fold_in: "none", "fold_in" (least squares) or "refit" (that, and solved again bottom-up).
        relevance: What tells which part of the layer above matters.
        cuts: Cuts on the way to the budget, each from fresh evidence of what is left.
        units: Kinds of unit that may go.
    """

    method: str
    widths: Widths
    fold_in: FoldIn
    relevance: Relevance
    cuts: int = 1
    units: tuple[str, ...] = UNITS

    def at(self, sparsity: float, seed: int, positions: int) -> Method:
        """The package's method for one budget."""
        return Method(
            Budget(sparsity=sparsity),
            criterion=CRITERIA[self.method](seed),
            widths=self.widths,
            relevance=self.relevance,
            fold_in=self.fold_in != "none",
            refit=self.fold_in == "refit",
            refit_positions=positions,
        )


CRITERIA: dict[str, Callable[[int], Criterion]] = {
    "relevance-mi": lambda seed: MutualInformation(ridge=RIDGE),
    "relevance-mi-dims": lambda seed: MutualInformation(ridge=RIDGE),
    "relevance-mi-readers": lambda seed: MutualInformation(ridge=RIDGE),
    "mi": lambda seed: MutualInformation(ridge=RIDGE),
    "mi-topk": lambda seed: MutualInformation(selection="topk", ridge=RIDGE),
    "taylor": lambda seed: Taylor(),
    "activation-norm": lambda seed: ActivationNorm(),
    "magnitude": lambda seed: Magnitude(),
    "random": lambda seed: Random(seed),
}
RIVALS = ("taylor", "activation-norm", "magnitude", "random")
FOLD_INS: tuple[FoldIn, ...] = ("none", "fold_in", "refit")

# Global widths of the rivals: our loss curve over their order, our refit.
METHODS: dict[str, tuple[Variant, ...]] = {
    "relevance-mi": (
        Variant("relevance-mi", "global", "refit", "gradient"),
        Variant("relevance-mi", "global", "refit", "gradient", cuts=3),
        Variant("relevance-mi", "global", "fold_in", "gradient"),
        Variant("relevance-mi", "uniform", "refit", "gradient"),
        Variant("relevance-mi", "uniform", "fold_in", "gradient"),
    ),
    "relevance-mi-dims": (
        Variant("relevance-mi-dims", "global", "refit", "gradient", units=EVERY),
    ),
    "relevance-mi-readers": (Variant("relevance-mi-readers", "global", "refit", "readers"),),
    "mi": (Variant("mi", "uniform", "refit", None),),
    "mi-topk": tuple(Variant("mi-topk", "uniform", fold_in, None) for fold_in in FOLD_INS),
    **{
        rival: (
            *(Variant(rival, "uniform", fold_in, "gradient") for fold_in in FOLD_INS),
            Variant(rival, "global", "refit", "gradient"),
        )
        for rival in RIVALS
    },
}
OURS = METHODS["relevance-mi"][0]
