"""Options of every step, each written, checked and documented once.

The callbacks, ``prune()``, YAML files and the command line all take these. An option that is set
every day (``sparsity``, ``kinds``, ``max_drop`` ...) is a plain argument beside them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "MOST_POSITIONS",
    "Calibration",
    "Constraints",
    "Importance",
    "Latency",
    "Monitoring",
    "Reconstruction",
    "Schedule",
    "Similarity",
    "Widths",
    "check_choice",
    "check_count",
    "check_number",
]


Widths: TypeAlias = Literal["global", "uniform", "config"]
"""How widths are chosen, :class:`pipeline.PipelineOptions`."""

MOST_POSITIONS = 16_384  # that are calibrated with unless the user asks for more


@dataclass(frozen=True)
class Calibration:
    """How much is collected before a cut.

    Args:
        positions: Samples of every group, over all ranks. They are of one validation run. Default:
            16,384; for a callback 5 for each entry of the widest input, from 8,192 to 16,384.
        gradient_steps: Training steps to take gradients from, over all ranks; only where
            ``Importance.relevance`` is ``"gradient"``.
        memory: ``"low"`` uses temporary files, ``"auto"`` where memory is short. ``"ordinary"``
            holds the sums of all groups in memory, ``8 d^2`` bytes for a group of ``d`` entries;
            ``"low"`` those of one group at a time, and all else in files (in the folder that
            ``TMPDIR`` names). The plan is the same. ``"auto"`` takes it where the ordinary way
            would need more than half of the memory that is free; the log says so.
        stability: Whether two halves of the batches also rank the units, each apart. The report
            then shows how many of the kept units both agree on, against chance. Off by default:
            ranking takes three times as long, and the sums half as much memory again.

    Raises:
        PruningError: If a number is no whole number, or too small, or memory none of the choices.

    Example:
        >>> Calibration(positions=4096).gradient_steps
        64
    """

    positions: int | None = None
    gradient_steps: int = 64
    memory: Literal["auto", "ordinary", "low"] = "auto"
    stability: bool = False

    def __post_init__(self) -> None:
        check_choice("memory", self.memory, ("auto", "ordinary", "low"))
        check_choice("stability", self.stability, (True, False))
        if self.positions is not None:
            check_count("positions", self.positions, least=2)
        check_count("gradient_steps", self.gradient_steps, least=1)

    @property
    def samples(self) -> int:
        """Positions that are collected, where nothing says how many are needed."""
        return self.positions or MOST_POSITIONS


@dataclass(frozen=True)
class Importance:
    """What decides which units of a group go first.

    Args:
        criterion: ``"mutual_information"``, or one to compare with: ``"taylor"``,
            ``"activation_norm"``, ``"magnitude"``, ``"random"``.
        relevance: Which part of the layer above matters: ``"gradient"`` (what the loss depends on,
            from ordinary training steps), ``"weights"`` (what the weights kept above use; needs no
            gradients) or None (all of it alike).
        selection: ``"conditional"`` is exact backward elimination on the joint information,
            ``"topk"`` scores every unit alone: the paper's abstract read literally.

    Raises:
        PruningError: If a value is none of the choices.
    """

    criterion: Literal["mutual_information", "taylor", "activation_norm", "magnitude", "random"] = (
        "mutual_information"
    )
    relevance: Literal["gradient", "weights"] | None = "gradient"
    selection: Literal["conditional", "topk"] = "conditional"

    def __post_init__(self) -> None:
        known = ("mutual_information", "taylor", "activation_norm", "magnitude", "random")
        check_choice("criterion", self.criterion, known)
        check_choice("relevance", self.relevance, ("gradient", "weights", None))
        check_choice("selection", self.selection, ("conditional", "topk"))
        if self.criterion == "taylor" and self.relevance != "gradient":
            raise PruningError(
                f"criterion='taylor' needs gradients, but relevance={self.relevance!r}; expected "
                "relevance='gradient'."
            )


@dataclass(frozen=True)
class Constraints:
    """Fewest and most units of groups, by regular expressions searched in their names.

    A whole number counts units; a ``float`` from 0.0 to 1.0 is a share of the group as built. Where
    several expressions find a group, the highest floor and the lowest cap hold.

    Args:
        floors: Units that must stay; rounded up to whole steps.
        caps: Units that may stay at most; rounded down to whole steps.
        pins: Units that must stay exactly; not rounded, and stronger than ``floor``.
        floor: Smallest share of every group that stays. A group that may be empty can lose all its
            units where this is 0; the others always keep one step.
        multiple: Widths of neurons and of the hidden size are multiples of this.

    Raises:
        PruningError: If a value is neither a number of units nor a share, or a key is no regular
            expression.

    Example:
        >>> Constraints(floors={"ffn$": 0.25}, multiple=16).pins
        {}
    """

    floors: Mapping[str, int | float] = field(default_factory=dict)
    caps: Mapping[str, int | float] = field(default_factory=dict)
    pins: Mapping[str, int | float] = field(default_factory=dict)
    floor: float = 0.0
    multiple: int = 8

    def __post_init__(self) -> None:
        if not _is_number(self.floor) or not 0 <= self.floor < 1:
            raise PruningError(f"floor={self.floor!r}; expected a share from 0 and below 1.")
        check_count("multiple", self.multiple, least=1)
        for option in ("floors", "caps", "pins"):
            values = getattr(self, option)
            if not isinstance(values, Mapping):
                raise PruningError(
                    f"{option}={values!r:.60}; expected a mapping such as {{'ffn$': 0.25}}."
                )
            for expression, value in values.items():
                _check_expression(option, expression)
                _check_amount(option, expression, value)


@dataclass(frozen=True)
class Latency:
    """How milliseconds are measured for ``target_latency_ms``.

    Args:
        table: JSON file of measured latencies; measured and written if it is not there. A path that
            cannot be written to is refused before anything is measured.
        batch: Examples in the call that is timed.

    Raises:
        PruningError: If a value is of another type.
    """

    table: str | None = None
    batch: int = 1

    def __post_init__(self) -> None:
        if self.table is not None and not isinstance(self.table, str):
            raise PruningError(f"table={self.table!r}; expected the path of a JSON file, or None.")
        check_count("batch", self.batch, least=1)


@dataclass(frozen=True)
class Reconstruction:
    """How weights that stay make up for what was removed.

    Args:
        method: ``"layerwise"`` solves the layers of the cut model again, bottom-up, on the inputs
            they now receive; ``"compensation"`` only adds the removed units' linear part to the
            weights that stay; ``"none"`` leaves the weights as they are. Removed layers know
            ``"layerwise"`` and ``"none"``.
        positions: Inputs stored for ``"layerwise"``, in positions. They are of validation, over all
            ranks; more are better. Default: 16,384; for a callback half of those that are
            calibrated with by default, since training goes on from there.

    Raises:
        PruningError: If a value is none of the choices, or too small.
    """

    method: Literal["layerwise", "compensation", "none"] = "layerwise"
    positions: int | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, ("layerwise", "compensation", "none"))
        if self.positions is not None:
            check_count("positions", self.positions, least=2)

    @property
    def stored_positions(self) -> int:
        """Positions of inputs to store; 0 where nothing is solved again."""
        return (self.positions or MOST_POSITIONS) if self.method == "layerwise" else 0


@dataclass(frozen=True)
class Schedule:
    """When a run cuts, and how much each time.

    Epochs are Lightning's (``trainer.current_epoch``, which counts from 0); the first that can
    start with a cut is 1, because a validation comes before it.

    Args:
        cuts: Number of cuts. Default: 1; with ``max_drop``, which can undo each by itself, what
            fits, at most 4.
        first_epoch: Epoch that starts with the first cut.
        last_epoch: Epoch that starts with the last cut; default: half-way through the run.
        ramp: ``"cubic"`` removes much early and little late (Zhu and Gupta 2017), ``"linear"`` the
            same each time, ``"one_shot"`` everything at once. Default: ``"cubic"`` for units;
            whole layers are always removed at a linear rate.

    Raises:
        PruningError: If the numbers contradict each other.

    Example:
        >>> Schedule(cuts=2, first_epoch=1, last_epoch=3).cuts
        2
    """

    cuts: int | None = None
    first_epoch: int | None = None
    last_epoch: int | None = None
    ramp: Literal["cubic", "linear", "one_shot"] | None = None

    def __post_init__(self) -> None:
        check_choice("ramp", self.ramp, ("cubic", "linear", "one_shot", None))
        if self.cuts is not None:
            check_count("cuts", self.cuts, least=1)
        for name in ("first_epoch", "last_epoch"):
            value = getattr(self, name)
            if value is not None:
                why = ": epochs count from 0, as trainer.current_epoch does, and validation comes "
                check_count(name, value, least=1, why=why + "before a cut")
        first, last, cuts = self.first_epoch, self.last_epoch, self.cuts
        if self.ramp == "one_shot" and cuts not in (None, 1):
            raise PruningError(
                f"ramp='one_shot' makes one cut, but cuts={cuts}; drop cuts or choose another ramp."
            )
        if first is None or last is None:
            return
        if first > last:
            raise PruningError(
                f"first_epoch={first} comes after last_epoch={last}; swap or drop one of them."
            )
        if cuts is not None and cuts > last - first + 1:
            raise PruningError(
                f"cuts={cuts} do not fit into epochs {first} to {last}; expected at most "
                f"{last - first + 1}."
            )


@dataclass(frozen=True)
class Monitoring:
    """How metrics are compared while the model changes its size.

    Args:
        mode: Whether more (``"max"``) or less (``"min"``) of ``monitor`` is better.
        on_drop: After a cut was rolled back, ``"halve"`` the step or ``"stop"`` cutting.
        best_of: Which models ``ModelCheckpoint(monitor=...)``, ``EarlyStopping`` and
            ``ReduceLROnPlateau`` may compare. ``"final_size"``: those of the present size;
            checkpoints of other sizes are the first to be replaced. ``"each_size"``: the same, but
            the best of every size stays on disk. ``"any_size"``: all, as if nothing was pruned.
            Unless it is ``"any_size"``, early stopping waits for the last cut.

    Raises:
        PruningError: If a value is none of the choices.
    """

    mode: Literal["max", "min"] = "max"
    on_drop: Literal["halve", "stop"] = "halve"
    best_of: Literal["final_size", "each_size", "any_size"] = "final_size"

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, ("max", "min"))
        check_choice("on_drop", self.on_drop, ("halve", "stop"))
        check_choice("best_of", self.best_of, ("final_size", "each_size", "any_size"))


@dataclass(frozen=True)
class Similarity:
    """How the layers of a stack are compared (centered kernel alignment, CKA).

    Args:
        positions: Positions to compare in a batch of validation, at least 4.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: Width of the latter as a share of the median distance.
        loss_steps: Training steps whose loss is measured without layers, over all ranks; only for
            ``criterion="measured_loss"``.

    Raises:
        PruningError: If a value is out of range.
    """

    positions: int = 256
    kernel: Literal["linear", "rbf"] = "linear"
    bandwidth: float = 1.0
    loss_steps: int = 4

    def __post_init__(self) -> None:
        check_count("positions", self.positions, least=4)
        check_choice("kernel", self.kernel, ("linear", "rbf"))
        check_number("bandwidth", self.bandwidth, above=0, below=100)
        check_count("loss_steps", self.loss_steps, least=1)


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        PruningError: Naming the option, its value and the choices.
    """
    if value not in choices:
        raise PruningError(f"{name}={value!r}; expected one of {choices}.")


def check_count(name: str, value: object, *, least: int, why: str = "") -> None:
    """Refuse anything but a whole number that is large enough.

    Raises:
        PruningError: Naming the option and its value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise PruningError(f"{name}={value!r}; expected a whole number of at least {least}{why}.")


def check_number(name: str, value: Any, *, above: float, below: float = math.inf) -> None:
    """Refuse anything but a finite number between two others.

    Raises:
        PruningError: Naming the option and its value.
    """
    if not _is_number(value) or not above < value < below:
        limit = "" if below == math.inf else f" and below {below}"
        raise PruningError(f"{name}={value!r}; expected a number above {above}{limit}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_expression(option: str, expression: object) -> None:
    if not isinstance(expression, str):
        raise PruningError(f"{option}: {expression!r} is not text; expected a regular expression.")
    try:
        re.compile(expression)
    except re.error as error:
        raise PruningError(
            f"{option}: {expression!r} is not a regular expression ({error}); expected one "
            "such as 'ffn$'."
        ) from error


def _check_amount(option: str, expression: str, value: object) -> None:
    share = isinstance(value, float) and math.isfinite(value) and 0 <= value <= 1
    units = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not share and not units:
        raise PruningError(
            f"{option}: {expression!r} is {value!r}; expected a whole number of units, or a share "
            "from 0.0 to 1.0."
        )
