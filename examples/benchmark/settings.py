"""The settings of the ablations: the method with one thing changed, or a few that explain one."""

from dataclasses import dataclass, fields
from typing import Literal

from examples.benchmark.hearing import CALLS, POSITIONS, STEPS
from examples.benchmark.variants import RIDGE, Relevance, Widths
from lightning_mi_prune import MutualInformation
from lightning_mi_prune.budget import Budget
from lightning_mi_prune.method import Method

Felt = Literal["true", "sampled", "readers"]


@dataclass(frozen=True)
class Hearing:
    """What one pass over the validation split gathers.

    Args:
        positions: Samples to listen to on each axis.
        calls: Positions of inputs to store for the refit.
        also: Kinds of unit that may go beside neurons and heads, and so are listened to.
    """

    positions: int = POSITIONS
    calls: int = CALLS
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feeling:
    """What tells which part of the layer above matters, where gradients are asked for.

    Args:
        labels: True labels, labels drawn from what the model predicts, or no gradients but all
            that the readers above listen to.
        steps: Batches to feel gradients on.
    """

    labels: Felt = "true"
    steps: int = STEPS


@dataclass(frozen=True)
class Setting:
    """One way to prune, and the question that it answers.

    Args:
        name: Its name.
        question: The question.
        selection: Rule by which units are put in order.
        ridge: Noise on the layer above, as a share of its mean variance.
        relevance: What tells which part of the layer above matters.
        widths: Whether axes compete for the budget or all keep the same share.
        fold_in: Whether readers absorb dropped units by least squares.
        refit: Whether layers are solved again on what the cut model hears.
        refit_ridge: Pull of the refit towards the weights there are.
        counted: What the budget counts; MACs are as many as the default leaves.
        cuts: Cuts on the way to the budget, each from fresh evidence of what is left.
        hearing: What is gathered of activations.
        feeling: What is gathered of gradients.
    """

    name: str
    question: str
    selection: Literal["conditional", "topk"] = "conditional"
    ridge: float = RIDGE
    relevance: Relevance = "gradient"
    widths: Widths = "global"
    fold_in: bool = True
    refit: bool = True
    refit_ridge: float = 1e-2
    counted: Literal["parameters", "MACs"] = "parameters"
    cuts: int = 1
    hearing: Hearing = Hearing()
    feeling: Feeling = Feeling()

    def at(self, sparsity: float, seed: int, positions: int) -> Method:
        """The package's method for one budget: a sparsity, or the MACs of one example."""
        macs = self.counted == "MACs"
        return Method(
            Budget(target_macs=int(sparsity)) if macs else Budget(sparsity=sparsity),
            criterion=MutualInformation(selection=self.selection, ridge=self.ridge),
            widths=self.widths,
            relevance=self.relevance,
            fold_in=self.fold_in,
            refit=self.refit,
            refit_positions=positions,
            refit_ridge=self.refit_ridge,
        )

    @property
    def changes(self) -> tuple[str, ...]:
        """Names of what is not as in the default."""
        return tuple(
            field.name
            for field in fields(self)
            if field.name not in ("name", "question")
            and getattr(self, field.name) != getattr(DEFAULT, field.name)
        )


DEFAULT = Setting("default", "What is everything below compared with?")

# With gradients every axis is weighed against the dense model, so top-down and bottom-up are one
# order. Only relevance="readers" looks at what was kept above: its bottom-up is the ablation.
SETTINGS = (
    DEFAULT,
    Setting(
        "no new weights",
        "What are fold-in and refit worth together?",
        fold_in=False,
        refit=False,
    ),
    Setting("fold-in alone", "What is the refit worth on top of the fold-in?", refit=False),
    Setting("refit alone", "Does the refit need the fold-in?", fold_in=False),
    Setting("top-k", "Does it matter that copies are not kept twice?", selection="topk"),
    Setting(
        "top-k, fold-in alone",
        "Does the rule matter more where the refit cannot make up for it?",
        selection="topk",
        refit=False,
    ),
    Setting("ridge 0.01", "Is log-determinant information better?", ridge=0.01),
    Setting("ridge 0.1", "Is a smaller ridge better?", ridge=0.1),
    Setting("ridge 10", "Is a larger ridge better?", ridge=10.0),
    Setting("ridge 1000", "Is least-squares reconstruction enough?", ridge=1000.0),
    Setting("no relevance", "What is relevance worth?", relevance=None),
    Setting(
        "no relevance, uniform",
        "How much of that is the competition, which counts in nats of the loss?",
        relevance=None,
        widths="uniform",
    ),
    Setting("readers", "Can the weights above stand in for gradients?", relevance="readers"),
    Setting(
        "readers, bottom-up",
        "Does it matter that the readers above were cut first?",
        feeling=Feeling("readers"),
    ),
    Setting("sampled labels", "Are true labels needed?", feeling=Feeling("sampled")),
    Setting("8 batches felt", "How many gradients does it take?", feeling=Feeling(steps=8)),
    Setting("uniform", "What is the competition worth?", widths="uniform"),
    Setting(
        "literal reading",
        "What does the abstract of Fan et al. give by itself?",
        selection="topk",
        relevance=None,
        widths="uniform",
        fold_in=False,
        refit=False,
    ),
    Setting("4,096 heard", "How many positions must be heard?", hearing=Hearing(positions=4096)),
    Setting("1,024 heard", "Do a thousand do?", hearing=Hearing(positions=1024)),
    Setting("4,096 stored", "How many must the refit have?", hearing=Hearing(calls=4096)),
    Setting("2,048 stored", "Do two thousand do?", hearing=Hearing(calls=2048)),
    Setting("residual", "May the stream become narrower?", hearing=Hearing(also=("residual",))),
    Setting(
        "residual, same MACs",
        "Also where word embeddings, which multiply nothing, do not pay for it?",
        counted="MACs",
        hearing=Hearing(also=("residual",)),
    ),
    Setting(
        "dimensions of heads",
        "May heads become narrower, too?",
        hearing=Hearing(also=("dims",)),
    ),
    Setting("MACs", "What does it cost to count MACs?", counted="MACs"),
    Setting("refit ridge 0.0001", "Does the refit need its pull?", refit_ridge=1e-4),
    Setting("refit ridge 1", "Is a stronger pull better?", refit_ridge=1.0),
    Setting("3 cuts", "Does fresh evidence between cuts help?", cuts=3),
)
NAMED = {setting.name: setting for setting in SETTINGS}
REMOVED = {"2,048 stored": ("copula",)}
"""Measured settings that can no longer be run, under the setting that the table has above them.

Their option made no difference and was removed from the package; their records stay.
"""


def rows() -> list[str]:
    """Names of all settings that were ever measured, in the order of the table."""
    return [name for above in NAMED for name in (above, *REMOVED.get(above, ()))]
