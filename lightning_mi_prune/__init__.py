"""Neural networks that get smaller and faster while they train.

The method, one step a file::

    axes        WHAT     a model can lose: neurons, heads
    families    WHOSE    axes they are
    listener    LISTEN   to activations in validation
    moments     SUM      what was heard, alike on every rank
    information MEASURE  what units say about the layer above
    elimination ORDER    what to give up next, exactly
    criteria    JUDGE    in which order they go
    budget      ALLOT    a width to every axis
    selection   CHOOSE   the survivors, top-down
    plan        RECORD   the choice
    incisions   PREPARE  a cut, before anything changes
    surgery     CUT      the model
    optimizers  CARRY    their state across
    checkpoints KEEP     the plan with the weights
    pretrained  OPEN     checkpoints and folders of pruned models
    strategies  AGREE    on one plan across ranks, and wrap again
    report      TELL     what happened
    callbacks   WHEN     all of it, inside Trainer.fit
"""

from lightning_mi_prune.axes import Count, Slice, WidthAxis
from lightning_mi_prune.callbacks import MutualInformationPruning
from lightning_mi_prune.criteria import MutualInformation
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.families import find_axes, linear_axis, register_family
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.optimizers import rebind
from lightning_mi_prune.plan import Plan
from lightning_mi_prune.pretrained import from_pretrained, load_pruned
from lightning_mi_prune.report import PruningReport
from lightning_mi_prune.selection import select
from lightning_mi_prune.surgery import apply

__version__ = "0.1.0"

__all__ = [
    "Count",
    "Listener",
    "MutualInformation",
    "MutualInformationPruning",
    "Plan",
    "PruningError",
    "PruningReport",
    "PruningWarning",
    "Slice",
    "WidthAxis",
    "apply",
    "find_axes",
    "from_pretrained",
    "linear_axis",
    "load_pruned",
    "rebind",
    "register_family",
    "select",
]
