"""Runs that are ended in the middle of a step, and resumed; forked from one process.

:func:`write_results` goes through all cases and writes ``results.json``; so does
``python -m tests.support.crashing FOLDER``, where names of cases after the folder choose some.
Importing takes seconds, so a fork stands for a fresh process: the parent imports and never trains.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec.implementations.local as local
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.strategies import Strategy
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from lightning_mi_prune.calibration import activations as recorder
from lightning_mi_prune.calibration import gradients
from lightning_mi_prune.callbacks import base
from lightning_mi_prune.callbacks import engine as steps
from lightning_mi_prune.callbacks import units as widths
from lightning_mi_prune.importance import ranking
from lightning_mi_prune.reconstruction import least_squares as reconstruct
from lightning_mi_prune.surgery import layers, optimizers, units
from tests.support.models import build
from tests.support.runs import Watch, fit, sha
from tests.support.stacks import Deep

FORK = multiprocessing.get_context("fork")
PRUNING = ("MutualInformationPruning", "CKALayerPruning")
LIMIT = 60.0  # seconds until a run counts as hanging
Blow = Callable[..., None]
Arm = Callable[[Blow], None]


class BoomError(Exception):
    """What a run that "raises" raises."""


def before(owner: Any, name: str) -> Arm:
    """The blow comes as a function is called, before it does anything."""

    def arm(blow: Blow) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **options: Any) -> Any:
            blow()
            return original(*args, **options)

        setattr(owner, name, wrapper)

    return arm


def half_written(blow: Blow) -> None:
    """The blow comes when half of the bytes of a checkpoint are in its temporary file."""
    original = local.LocalFileOpener.write

    def write(self: Any, data: bytes) -> int:
        def half() -> None:
            original(self, data[: len(data) // 2])
            self.f.flush()

        blow(half)
        return int(original(self, data))

    local.LocalFileOpener.write = write


def half_copied(blow: Blow) -> None:
    """The temporary file is on another disk, and half of it is copied to its place."""

    def move(source: str, target: str) -> None:
        def half() -> None:
            data = Path(source).read_bytes()
            Path(target).write_bytes(data[: len(data) // 2])

        blow(half)
        shutil.copyfile(source, target)
        os.remove(source)

    local.shutil.move = move


@dataclass(frozen=True)
class Case:
    """A run that ends early: where, in which epoch, at which call there, how, and on which rank."""

    arm: Arm
    epoch: int
    call: int = 1
    saves: str = "steps"
    deed: str = "kill"
    world: int = 1
    rank: int | None = 0
    launcher: str = "fork"
    method: dict[str, Any] = field(default_factory=dict)


HEAR = before(recorder.Moments, "update")
BATCH = before(base.PruningCallback, "on_validation_batch_start")
FEEL = before(gradients.GradientRecorder, "_add_gradient")
JUDGE = before(ranking, "unit_statistics")
REFIT = before(reconstruct, "_solve_wave")
CUT = before(steps.RunEngine, "_cut")
SWAP = before(torch.nn.Module, "register_parameter")
STEP = before(pl.Callback, "on_before_optimizer_step")
REMOVE = before(layers, "_numbers")
TELL = before(steps, "update_optimizers")
GONE = {"layers": {}}
MISSED = {"layers": {"max_drop": 1e-9, "monitor": "val_falling", "cuts": 1}}
WRONG = {"max_drop": 1e-9, "monitor": "val_falling", "cuts": 3}  # every cut is taken back
ON_ERROR = {"saves": "exceptions"}

CASES: dict[str, Case] = {
    "killed calibration, before the first cut": Case(HEAR, 0, 5),
    "killed calibration, between two cuts": Case(HEAR, 1, 5),
    "killed feeling, between two cuts": Case(FEEL, 1, 10),
    "killed selecting": Case(JUDGE, 1, 2),
    "killed refitting": Case(REFIT, 1, 3),
    "killed with the first cut decided": Case(CUT, 1, saves="epochs"),
    "killed with the second cut decided": Case(CUT, 2, saves="epochs"),
    "killed with a cut decided, saved in validation": Case(CUT, 2, saves="validations"),
    "killed in surgery, some parameters made": Case(before(units, "_rewrite"), 2, 4),
    "killed in surgery, some parameters in place": Case(SWAP, 2, 4),
    "killed in surgery, decision saved": Case(SWAP, 2, 4, saves="epochs"),
    "killed in surgery, sizes not yet true": Case(before(units, "_update_sizes"), 2),
    "killed carrying the optimizer across": Case(before(optimizers, "cut_state"), 2, 7),
    "killed before wrapping again": Case(before(steps, "rewrap_ddp"), 2),
    "killed before the report": Case(before(widths.UnitStrategy, "record"), 2),
    "killed taking layers out": Case(REMOVE, 1, saves="epochs", method=GONE),
    "killed with layers out, optimizer not told": Case(TELL, 1, saves="epochs", method=GONE),
    "killed putting layers back": Case(REMOVE, 3, saves="epochs", method=MISSED),
    "killed taking a cut back": Case(SWAP, 2, 4, method=WRONG),
    "killed taking a cut back, optimizer half undone": Case(
        before(optimizers, "_restored_state"), 2, 7, saves="epochs", method=WRONG
    ),
    "killed writing, half of the bytes": Case(half_written, 2, 1),
    "killed writing, half of the last.ckpt": Case(half_written, 2, 2),
    "killed writing, half of a decided cut": Case(half_written, 1, 2, saves="epochs"),
    "killed writing, not yet in place": Case(before(local.LocalFileOpener, "commit"), 2),
    "killed writing, old one still there": Case(before(Strategy, "remove_checkpoint"), 2),
    "killed writing, TMPDIR on another disk": Case(half_copied, 2, 1),
    "killed writing, TMPDIR on another disk, last.ckpt": Case(half_copied, 2, 2),
    "SIGTERM in validation": Case(BATCH, 1, 2, deed="term", **ON_ERROR),
    "SIGTERM in training": Case(STEP, 2, 2, deed="term", **ON_ERROR),
    "SIGTERM in surgery": Case(SWAP, 2, 4, deed="term", **ON_ERROR),
    "Ctrl-C in validation": Case(BATCH, 1, 2, deed="interrupt", **ON_ERROR),
    "exception calibration": Case(HEAR, 0, 5, deed="raise", **ON_ERROR),
    "exception in validation": Case(BATCH, 1, 3, deed="raise", **ON_ERROR),
    "exception in validation, its own callback": Case(BATCH, 1, 2, "exception", "raise"),
    "exception selecting": Case(JUDGE, 1, 2, deed="raise", **ON_ERROR),
    "rank 1 killed calibration, under torchrun": Case(
        HEAR, 1, 5, world=2, rank=1, launcher="torchrun"
    ),
    "rank 0 killed selecting": Case(JUDGE, 1, 2, world=2),
    "rank 1 killed in surgery": Case(SWAP, 2, 4, saves="epochs", world=2, rank=1),
    "rank 0 killed writing": Case(half_written, 2, 1, world=2),
    "SIGTERM to both ranks in validation": Case(
        BATCH, 1, 2, deed="term", world=2, rank=None, **ON_ERROR
    ),
}
# An exception inside a cut, and a checkpoint of what it left.
HALF_CUT: dict[str, Case] = {
    "exception taking layers out": Case(TELL, 1, 1, "both", "raise", method=GONE),
    "exception in surgery": Case(SWAP, 2, 4, "both", "raise"),
    "exception carrying the optimizer across": Case(
        before(optimizers, "cut_state"), 2, 7, "both", "raise"
    ),
    "exception after a cut": Case(before(steps, "restart_comparison"), 2, 1, "both", "raise"),
}
EVERY = {**CASES, **HALF_CUT}


class Scene(pl.Callback):
    """Ends the run where a case says so, and notes where it started."""

    def __init__(self, case: Case | None, folder: Path) -> None:
        self.case, self.folder, self.calls, self.start = case, folder, 0, -1
        self.trainer: pl.Trainer | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.trainer, self.start = trainer, trainer.global_step
        if self.case is not None:
            self.case.arm(self.blow)

    def blow(self, first: Callable[[], None] | None = None) -> None:
        """End the process, if this is the place."""
        trainer, case = self.trainer, self.case
        if trainer is None or case is None or trainer.current_epoch != case.epoch:
            return
        if case.rank not in (None, trainer.global_rank):
            return
        self.calls += 1
        if self.calls != case.call:
            return
        if first is not None:
            first()
        place = {"epoch": trainer.current_epoch, "step": trainer.global_step, "at": time.time()}
        draft = self.folder / f"ended-{os.getpid()}.json"
        draft.write_text(json.dumps(place))
        draft.replace(self.folder / "ended.json")  # both ranks may end
        if case.deed == "raise":
            raise BoomError
        if case.deed == "interrupt":
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM if case.deed == "term" else signal.SIGKILL)


class Falling(pl.Callback):
    """Logs a metric that falls with every epoch, so that no cut is good enough."""

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.log("val_falling", -float(trainer.current_epoch), sync_dist=False)


def savers(kind: str, folder: Path) -> list[pl.Callback]:
    """What writes checkpoints."""
    own = [OnExceptionCheckpoint(folder)] if kind in ("exception", "both") else []
    if kind == "exception":
        return own
    options: dict[str, Any] = {
        "steps": {"every_n_train_steps": 1},
        "epochs": {},
        "both": {},
        "validations": {"save_on_train_epoch_end": False},
        "exceptions": {"save_on_exception": True},
    }[kind]
    return [ModelCheckpoint(folder, save_last=True, **options), *own]


def run(folder: Path, case: Case | None, world: int, resume: Any, out: str, **options: Any) -> None:
    """One run on this rank; what it ended with goes to ``out``."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    temporary = folder / "temporary"
    temporary.mkdir(parents=True, exist_ok=True)
    tempfile.tempdir = str(temporary)
    saves, method = options.pop("saves", None), options.pop("method", {})
    callbacks: list[pl.Callback] = [Falling()] if method else []
    callbacks += savers(saves, folder / "kept") if saves else []
    scene = Scene(case, folder)
    settings: dict[str, Any] = {"strategy": "ddp", "devices": world} if world > 1 else {}
    if "layers" in method:
        settings |= {"layers": method["layers"], "module": Deep}
    trainer, _, watch = fit(
        folder,
        resume=resume,
        pruning=None if "layers" in method else method,
        callbacks=[scene, *callbacks],
        enable_checkpointing=saves is not None,
        default_root_dir=folder,
        max_epochs=6 if method else 4,
        **settings,
    )
    (folder / f"{out}-{trainer.global_rank}.json").write_text(json.dumps(ended(watch, scene)))


def ended(watch: Watch, scene: Scene) -> dict[str, Any]:
    """Everything a run ended with."""
    prune: Any = watch.pruning
    return {
        "start": scene.start,
        "epochs": watch.digests,
        "cuts": [cut.epoch for cut in prune.report.cuts],
        "undone": [cut.epoch for cut in prune.report.undone],
        "widths": [len(kept) for kept in prune.plan.kept.values()],
        "report": sha(_untimed(prune.report.state_dict())),
    }


def _untimed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _untimed(v) for k, v in value.items() if k != "seconds"}
    return [_untimed(v) for v in value] if isinstance(value, (list, tuple)) else value


def guarded(function: Callable[..., None], *args: Any, **options: Any) -> None:
    """A fork of its own session; the way it ends shows in its exit code."""
    os.setsid()
    try:
        function(*args, **options)
    except BoomError:
        os._exit(3)
    except SystemExit as error:
        os._exit(4 if type(error).__name__ == "SIGTERMException" else 5)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def forked(function: Callable[..., None], *args: Any, **options: Any) -> int | str:
    """Run in a fork; its exit code, or that it was still there after the limit."""
    process = FORK.Process(target=guarded, args=(function, *args), kwargs=options)
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return "hangs"
    return process.exitcode


def launched(folder: Path, world: int, *args: Any, **options: Any) -> None:
    """Run on several ranks, as torchrun does, but forked; notes how each rank failed."""

    def on_rank(*values: Any) -> None:
        run(folder, *values, **options)

    os.environ["OMP_NUM_THREADS"] = "1"
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    try:
        elastic_launch(config, on_rank)(*args)
    except ChildFailedError as error:
        found = {rank: failure.exitcode for rank, failure in error.failures.items()}
        (folder / "failures.json").write_text(json.dumps(found))
        os._exit(6)


def torchrun(folder: Path, name: str, world: int) -> subprocess.Popen:
    """The same with the real launcher and fresh processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={world}"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "--max-restarts=0"]
    command += ["-m", "tests.support.crashing", str(folder), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, env=environment, start_new_session=True)


def waited(process: subprocess.Popen) -> int | str:
    """Exit code of a launcher, or that it was still there after the limit."""
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return "hangs"


def go(folder: Path, case: Case | None, world: int, resume: Any, out: str, **options: Any) -> Any:
    """One run in forked processes; its exit code."""
    if world == 1:
        return forked(run, folder, case, world, resume, out, **options)
    return forked(launched, folder, world, case, world, resume, out, **options)


def kept(folder: Path) -> tuple[dict[str, Any], Path | None]:
    """What the checkpoints of a folder hold, and the newest one that is whole."""
    found: dict[str, Any] = {}
    order = []
    for path in folder.glob("*.ckpt"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            found[path.name] = f"{type(error).__name__}: {error}"[:200]
            continue
        saved = content["callbacks"]
        state = next(saved[name] for name in PRUNING if name in saved)
        found[path.name] = {
            "step": content["global_step"],
            "pending": state["pending"] is not None,
            "snapshot": state["snapshot"] is not None,
            "cuts": len(state["report"]["cuts"]),
        }
        order.append((path.stat().st_mtime_ns, path))
    return found, max(order)[1] if order else None


def finish(folder: Path, case: Case, code: Any) -> dict[str, Any]:
    """Look at what an ended run left, and resume it."""
    now, place, failures = time.time(), folder / "ended.json", folder / "failures.json"
    checkpoints, newest = kept(folder / "kept")
    found = {
        "code": code,
        "failures": json.loads(failures.read_text()) if failures.exists() else {},
        "ended": json.loads(place.read_text()) if place.exists() else None,
        "checkpoints": checkpoints,
        "newest": newest and newest.name,
    }
    if found["ended"] is not None:
        found["lingered"] = now - found["ended"]["at"]
    resume = newest if case.arm is half_copied else "last"
    options = {"saves": case.saves, "method": case.method}
    found["resumed_code"] = go(folder, None, case.world, resume, "resumed", **options)
    found["resumed"] = read(folder, "resumed", case.world)
    return found


def read(folder: Path, out: str, world: int) -> list[Any]:
    """What each rank ended with; None for one that did not."""
    paths = [folder / f"{out}-{rank}.json" for rank in range(world)]
    return [json.loads(path.read_text()) if path.exists() else None for path in paths]


def straight_name(case: Case) -> str:
    """The run that a case is compared with."""
    layers = "layers, " * ("layers" in case.method)
    back = ", cuts taken back" * ("max_drop" in str(case.method))
    return f"{layers}{case.world} ranks{back}"


def everything(folder: Path, cases: Mapping[str, Case]) -> dict[str, Any]:
    """All cases, and the runs that nothing ended."""
    build("bert")  # imports the rest
    gc.collect()
    gc.freeze()  # every cut collects garbage on several ranks, and what was imported is none
    straight: dict[str, Any] = {}
    found: dict[str, Any] = {}
    for place, (name, case) in enumerate(cases.items()):
        other = straight_name(case)
        if other not in straight:
            where = folder / f"straight-{len(straight)}"
            where.mkdir()
            go(where, None, case.world, None, "straight", method=case.method)
            straight[other] = read(where, "straight", case.world)
        where = folder / f"case-{place}"
        where.mkdir()
        if case.launcher == "torchrun":
            code = waited(torchrun(where, name, case.world))
        else:
            options = {"saves": case.saves, "method": case.method}
            code = go(where, case, case.world, None, "not-ended", **options)
        found[name] = finish(where, case, code)
    return {"straight": straight, "cases": found}


def write_results(folder: Path, names: Sequence[str] = ()) -> None:
    """All cases or those named, to a file that is there when they are over."""
    cases = {name: case for name, case in EVERY.items() if name in names or not names}
    draft = folder / "results.json.draft"
    draft.write_text(json.dumps(everything(folder, cases)))
    draft.replace(folder / "results.json")


def main() -> None:
    """``FOLDER``: everything; ``FOLDER NAME...``: these cases; as a rank, the run of one."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    if "RANK" not in os.environ:
        write_results(folder, names)
        return
    case = EVERY[names[0]]
    options = {"saves": case.saves, "method": case.method}
    run(folder, case, case.world, None, "not-ended", **options)


if __name__ == "__main__":
    main()
