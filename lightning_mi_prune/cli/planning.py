"""The subcommand ``plan``: what ``prune`` would leave, as a file that can be edited.

lightning-mi-prune plan run.yaml --checkpoint best.ckpt --output plan.yaml
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lightning_mi_prune.allocation.budget import Budget, budget_of
from lightning_mi_prune.allocation.plan_file import write_plan
from lightning_mi_prune.allocation.width_plan import WidthPlan
from lightning_mi_prune.checkpoint.loading import load_pruned
from lightning_mi_prune.cli.building import build
from lightning_mi_prune.cli.config import Request
from lightning_mi_prune.cli.options import JSON, Command, Entry, grouped, options_of
from lightning_mi_prune.cli.printing import Shown, print_progress
from lightning_mi_prune.cli.pruning import (
    NAMES,
    OBJECTS_OF_PRUNE,
    PATHS,
    batches_to_calibrate,
    source_of,
)
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.files import check_writable
from lightning_mi_prune.planning.plan import BUDGETS, plan, side_by_side
from lightning_mi_prune.pruner import prune
from lightning_mi_prune.reporting.tables import Table

__all__ = [
    "PLAN",
    "plan_module",
]

_BUDGETS = tuple(signature(budget_of).parameters)


def plan_module(
    model: pl.LightningModule,
    data: Any,
    trainer: pl.Trainer,
    *,
    checkpoint: str | None = None,
    output: str = "plan.yaml",
    budgets: Sequence[float] = BUDGETS,
    **options: Any,
) -> WidthPlan:
    """Write what pruning a module would leave of it; the module stays as it is.

    Args:
        model: The module.
        data: Its data, as for ``prune_module``.
        trainer: Moves the module to its device.
        checkpoint: Weights to start from, pruned or not.
        output: The file to write.
        budgets: Shares to remove, side by side; a budget that prune takes is put before them.
        options: Options of ``prune``, but those that are objects.

    Raises:
        PruningError: If the module, the data, the options or the files do not allow it; no file is
            written.
    """
    asked = {name: options.pop(name, None) for name in _BUDGETS}
    columns: list[float | Budget] = list(budgets)
    if any(value is not None for value in asked.values()):
        columns = [budget_of(**asked), *columns]
    side_by_side(columns)
    if options.pop("plan", None) is not None:
        raise PruningError("plan= is what prune carries out; leave it out to plan anew.")
    for name in ("batch_norm", "optimizers"):  # of the cut itself
        options.pop(name, None)
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise PruningError(f"checkpoint={str(checkpoint)!r}; expected a file that exists.")
    check_writable(output, "The plan")
    data = source_of(model, data, options)
    if checkpoint is not None:
        load_pruned(model, checkpoint)
    validation, training = batches_to_calibrate(model, data, trainer, options)
    print_progress("planning: calibration, ranking")
    several = len(validation.loaders.flattened) > 1
    found = plan(
        model,
        validation,
        columns,
        forward=validation.forward if several else None,
        training=training,
        **options,
    )
    print_progress("")
    write_plan(found, output)
    return found


OPTIONS = (
    *options_of(plan_module, {"model", "data", "trainer", "options"}),
    *options_of(prune, (*OBJECTS_OF_PRUNE, "plan", "batch_norm")),
)


def _plan(request: Request, values: Mapping[str, Any]) -> Shown:
    names = (*NAMES, *dict.fromkeys(option.name.partition(".")[0] for option in OPTIONS))
    built = build(request, names, values["checkpoint"])
    found = plan_module(built.model, built.data, built.trainer, **values)
    tables = [
        Table(f"{found.model}: what a cut would leave", *found.totals(), ("",)),
        Table("units of every group", *found.rows(), ("group", "kind", "note")),
    ]
    lines = [f"{label} is left out: {reason}" for label, reason in found.left_out.items()]
    lines.append(f"The plan is {values['output']}; edit it, then: prune ... --plan FILE.")
    return Shown({"plan": values["output"], **found.to_dict()}, tables, lines)


PLAN = Command(
    name="plan",
    usage="CONFIG ... [options]",
    description="Write what prune would leave, for several budgets side by side; nothing is cut.",
    example="run.yaml --checkpoint best.ckpt --budgets 0.5 0.75 0.9 --output plan.yaml",
    options=OPTIONS,
    entries=(
        Entry("what to plan", "CONFIG", "", "YAML of a LightningCLI (or --config FILE)."),
        *(Entry("what to plan", f"--{n}", "CLASS", text) for n, text in PATHS.items()),
        Entry.of("what to plan", JSON),
        *grouped(OPTIONS, ("checkpoint", "output", "batch_size", "budgets"), "what to plan"),
    ),
    epilog=(
        "Files, arguments of classes and values are those of prune, see: prune --help. The plan "
        "can be edited, and is carried out by: prune ... --plan plan.yaml."
    ),
    run=_plan,
    builds=True,
    file_places=True,
    from_files=True,
)
