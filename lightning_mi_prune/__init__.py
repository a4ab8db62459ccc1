"""Neural networks that get smaller and faster while they train.

The method, one step a file::

    axes         WHAT     a model can lose: neurons, heads, the width of the stream
    depth        STACK    layers that may go, one by one
    anatomy      BODY     both, as built, and where they stand once layers are gone
    families     WHOSE    axes they are
    choosing     NARROW   them to those that may shrink
    hooks        HOOK     onto modules, and off again
    listener     LISTEN   to activations in validation
    moments      SUM      what was heard, alike on every rank
    sample       STORE    some of the inputs, to run a cut model on
    calls        KEEP     them, spread over the batches
    containers   HOLD     layers, one after another
    stack        COMPARE  the layers of a stack while it runs
    stacks       GATHER   what several stacks say
    alignment    ALIGN    layers: CKA of every pair, alike on every rank
    angles       TURN     how far they turn what they are given
    redundancy   SPARE    those that others make up for
    rivals       RIVALS   other ways to say which layers go
    sparing      THIN     a stack, by one of them
    gradients    FEEL     what the loss of training steps asks for
    relevance    WEIGH    the layer above by it
    evidence     GATHER   all that is known of an axis
    information  MEASURE  what units say about the layer above
    elimination  ORDER    what to give up next, exactly
    criteria     JUDGE    in which order they go
    turning      TURN     heads into the directions that say most
    ranking      RANK     every axis to its last unit, and what is lost on the way
    budget       ALLOT    a width to every axis
    limits       BOUND    floors, caps and pins
    costs        COUNT    parameters and multiply-accumulates of widths
    latency      TIME     what axes save, as a table
    clock        CLOCK    the table, on this device
    milliseconds PACE     what widths cost by it
    competition  COMPETE  all axes for one budget
    selection    CHOOSE   the survivors, top-down
    readings     READ     what the dense model says where the cut one is solved again
    refit        REFIT    what is left to what it really hears
    takeover     HAND ON  what removed layers said, to those that stay
    method       DECIDE   all of that, as one decision
    plan         RECORD   the choice
    incisions    PREPARE  a cut, before anything changes
    surgery      CUT      the model: units off layers, layers out of stacks
    standins     STAND IN for modules that cannot run without units
    states       STATES   of optimizers that can follow
    optimizers   CARRY    them across
    arrivals     ARRIVE   weights and their plan, checked
    checkpoints  KEEP     the plan with the weights
    pretrained   OPEN     checkpoints and folders of pruned models
    strategies   AGREE    on one plan across ranks, and wrap again
    measure      GAUGE    multiply-accumulates and milliseconds
    heatmap      DRAW     how alike layers are
    report       TELL     what happened
    still        HOLD     a module as it is while something runs it
    batch_norm   AVERAGE  statistics of BatchNorm anew, after a cut without training
    wording      WORD     numbers and names in messages
    oneshot      PRUNE    a trained module in one call
    callbacks    WHEN     all of it, inside Trainer.fit
    cli_config   READ     files of a LightningCLI, and the command line
    cli          COMMAND  the same from a shell
"""

from lightning_mi_prune.axes import Count, Silence, Slice, WidthAxis
from lightning_mi_prune.budget import Budget
from lightning_mi_prune.callbacks import CKALayerPruning, MutualInformationPruning
from lightning_mi_prune.criteria import (
    ActivationNorm,
    Magnitude,
    MutualInformation,
    Random,
    Taylor,
)
from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError, PruningWarning
from lightning_mi_prune.families import find_axes, linear_axis, register_family
from lightning_mi_prune.families.stacks import find_stacks
from lightning_mi_prune.gradients import GradientListener
from lightning_mi_prune.heatmap import heatmap, save_heatmap
from lightning_mi_prune.limits import Limits
from lightning_mi_prune.listener import Listener
from lightning_mi_prune.loading import load_pruned
from lightning_mi_prune.method import Method
from lightning_mi_prune.oneshot import Pruned, prune
from lightning_mi_prune.optimizers import rebind
from lightning_mi_prune.plan import Plan, Ranking
from lightning_mi_prune.pretrained import from_pretrained
from lightning_mi_prune.ranking import rank_axes
from lightning_mi_prune.report import PruningReport
from lightning_mi_prune.selection import select
from lightning_mi_prune.sparing import StackCut, Thinning
from lightning_mi_prune.stack import StackListener, blocks_of
from lightning_mi_prune.surgery import apply, shorten

__version__ = "0.1.0"

__all__ = [
    "ActivationNorm",
    "Budget",
    "CKALayerPruning",
    "Count",
    "DepthAxis",
    "GradientListener",
    "Limits",
    "Listener",
    "Magnitude",
    "Method",
    "MutualInformation",
    "MutualInformationPruning",
    "Plan",
    "Pruned",
    "PruningError",
    "PruningReport",
    "PruningWarning",
    "Random",
    "Ranking",
    "Silence",
    "Slice",
    "StackCut",
    "StackListener",
    "Taylor",
    "Thinning",
    "WidthAxis",
    "apply",
    "blocks_of",
    "find_axes",
    "find_stacks",
    "from_pretrained",
    "heatmap",
    "linear_axis",
    "load_pruned",
    "prune",
    "rank_axes",
    "rebind",
    "register_family",
    "save_heatmap",
    "select",
    "shorten",
]
