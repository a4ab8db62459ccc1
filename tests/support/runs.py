"""Runs of the Trainer that can be stopped anywhere, resumed, and compared bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import default_collate

from tests.support.boring import Classifier, Sentences, trainer
from tests.support.pruning import pruning_layers, pruning_units


def sha(*values: Any) -> str:
    """Digest of tensors and plain values, bit by bit."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            raw = value.detach().cpu().contiguous()
            found.update(f"{raw.dtype}{tuple(raw.shape)}".encode())
            found.update(raw.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:16]


class Batches:
    """Batches of a global size, shared out over ranks; the order changes with the epoch.

    It can resume inside an epoch, as Lightning asks of a loader: ``state_dict`` and
    ``load_state_dict``.
    """

    def __init__(self, rows: int, size: int, *, seed: int, epoch: Callable[[], int] | None = None):
        self.data, self.size, self.epoch, self.served = Sentences(rows, seed=seed), size, epoch, 0

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"] % len(self)

    def __len__(self) -> int:
        return len(self.data) // self.size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        order = torch.arange(len(self.data))
        if self.epoch is not None:
            generator = torch.Generator().manual_seed(self.epoch())
            order = torch.randperm(len(self.data), generator=generator)
        ready = torch.distributed.is_initialized()
        rank, world = (
            (torch.distributed.get_rank(), torch.distributed.get_world_size()) if ready else (0, 1)
        )
        share = self.size // world
        first = self.served % len(self)
        for batch in range(first, len(self)):
            start = batch * self.size + rank * share
            self.served = batch + 1
            yield default_collate([self.data[int(i)] for i in order[start : start + share]])


class Resumable:
    """Batches in one order, that can resume inside an epoch likewise."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.served = batches, 0

    def state_dict(self) -> dict[str, int]:
        return {"served": self.served}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.served = state["served"] % len(self)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for place in range(self.served % len(self), len(self)):
            self.served = place + 1
            yield self.batches[place]


class Module(Classifier):
    """The ordinary module on batches that do not depend on the number of ranks."""

    def __init__(self, *, optimizer: str = "adamw", automatic: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.kind, self.automatic_optimization = optimizer, automatic and optimizer != "two-manual"

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor | None:
        if self.automatic_optimization:
            return super().training_step(batch, index)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in optimizers:
            optimizer.step()
        return None

    def validation_step(self, batch: dict[str, Tensor], index: int) -> None:
        output = self.model(**batch)
        hits = (output.logits.argmax(-1) == batch["labels"]).double().mean()
        self.log("val_loss", output.loss, sync_dist=True, batch_size=1)
        self.log("val_acc", hits, sync_dist=True, batch_size=1)

    def configure_optimizers(self) -> Any:
        found = OPTIMIZERS[self.kind](list(self.parameters()))
        if isinstance(found, list):
            return found
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(found, T_max=100)
        return {"optimizer": found, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def train_dataloader(self) -> Batches:
        return Batches(64, 16, seed=0, epoch=lambda: self.current_epoch)

    def val_dataloader(self) -> Batches:
        return Batches(128, 32, seed=1)

    test_dataloader = val_dataloader


def _two(parameters: list[nn.Parameter]) -> list[torch.optim.Optimizer]:
    half = len(parameters) // 2
    return [
        torch.optim.AdamW(parameters[:half], lr=1e-3),
        torch.optim.SGD(parameters[half:], lr=1e-2, momentum=0.9),
    ]


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adam-groups": lambda p: torch.optim.Adam(
        [{"params": p[:20]}, {"params": p[20:], "lr": 3e-3, "amsgrad": True}], lr=1e-3
    ),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "two-manual": _two,
}
PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "32-true": lambda: {"precision": "32-true"},
    "64-true": lambda: {"precision": "64-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "16-mixed": lambda: {
        "plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))]
    },
}


NOTHING = sha()  # Lightning keeps no metric across a resumption, with or without pruning


@dataclass(frozen=True)
class Point:
    """Where a run is stopped: a hook, an epoch, and a batch for the hooks that have one."""

    hook: str
    epoch: int
    batch: int | None = None


POINTS: dict[str, Point] = {
    "inside an epoch": Point("on_train_batch_end", 1, 1),
    "after its last batch": Point("on_train_batch_end", 1, 3),
    "validation begins": Point("on_validation_start", 1),
    "inside a validation": Point("on_validation_batch_end", 1, 1),
    "cut pending, validation over": Point("on_validation_end", 1),
    "cut pending, epoch over": Point("on_train_epoch_end", 1),
    "after the last cut": Point("on_train_batch_end", 2, 2),
}


class Watch(pl.Callback):
    """Writes checkpoints at points, and a digest of everything after every epoch."""

    def __init__(self, folder: Path, points: dict[str, Point], pruning: pl.Callback) -> None:
        self.folder, self.points, self.pruning = folder, points, pruning
        self.digests: dict[int, dict[str, str]] = {}

    def _at(self, hook: str, trainer: pl.Trainer, batch: int | None = None) -> None:
        if trainer.sanity_checking:
            return
        for place, point in enumerate(self.points.values()):
            if point == Point(hook, trainer.current_epoch, batch):
                trainer.save_checkpoint(self.folder / f"{place}.ckpt")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._at("on_train_batch_end", trainer, batch_idx)

    def on_validation_start(self, trainer, pl_module):
        self._at("on_validation_start", trainer)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._at("on_validation_batch_end", trainer, batch_idx)

    def on_validation_end(self, trainer, pl_module):
        self._at("on_validation_end", trainer)

    def on_train_epoch_end(self, trainer, pl_module):
        self._at("on_train_epoch_end", trainer)
        self.digests[trainer.current_epoch] = digest(trainer, pl_module, self.pruning)


def digest(trainer: pl.Trainer, module: pl.LightningModule, pruning: Any) -> dict[str, str]:
    """One line for everything that training goes on from."""
    names = {id(p): name for name, p in module.named_parameters()}
    state = [
        (names[id(p)], key, value)
        for optimizer in trainer.optimizers
        for p, values in optimizer.state.items()
        for key, value in values.items()
    ]
    metrics = {k: v for k, v in sorted(trainer.callback_metrics.items()) if k.startswith("val")}
    return {
        "weights": sha(*(x for item in module.state_dict().items() for x in item)),
        "optimizers": sha(*(x for item in sorted(state, key=lambda s: s[:2]) for x in item)),
        "lr": sha([g["lr"] for o in trainer.optimizers for g in o.param_groups]),
        "plan": pruning.plan.digest()[:16],
        "metrics": sha(*(x for item in metrics.items() for x in item)),
        "cuts": sha(
            [(c.epoch, c.sparsity, c.macs, c.groups, c.stacks) for c in pruning.report.cuts]
        ),
    }


def fit(
    folder: Path,
    *,
    optimizer: str = "adamw",
    precision: str = "32-true",
    points: dict[str, Point] | None = None,
    resume: Path | None = None,
    module: type[Module] = Module,
    pruning: dict[str, Any] | None = None,
    callbacks: list[pl.Callback] | None = None,
    layers: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Module, Watch]:
    """One run of five epochs with cuts at the start of two of them.

    With ``layers``, layers are cut; with ``pruning`` too, units after them.
    """
    settings = {"sparsity": 0.5, "multiple": 2, "ramp": "linear", "verbose": False}
    settings["cuts"] = 2 if layers is None and options.get("max_epochs", 5) > 3 else 1
    prune: pl.Callback = pruning_units(**{**settings, **(pruning or {})})
    if layers is not None:
        depth = pruning_layers(**{"verbose": False, "first_epoch": 1, **layers})
        callbacks = [*([prune] if pruning is not None else []), *(callbacks or [])]
        prune = depth
    watch = Watch(folder, points or {}, prune)
    target = module(optimizer=optimizer)
    if precision == "64-true":
        target.double()  # Lightning loads a checkpoint before it converts a module
    settings = {"num_sanity_val_steps": 0, **PRECISIONS[precision](), **options}
    run = trainer(prune, watch, *(callbacks or []), **settings)
    run.fit(target, ckpt_path=resume, weights_only=True if resume else None)
    return run, target, watch


def resumed_equals_straight(
    folder: Path, points: dict[str, Point] | None = None, **options: Any
) -> dict[str, str]:
    """Run straight, then from every point; says for each point what differs ("" if nothing)."""
    wanted = POINTS if points is None else points
    _, _, straight = fit(folder, points=wanted, **options)
    found = {}
    for place, name in enumerate(wanted):
        path = folder / f"{place}.ckpt"
        if not path.exists():
            found[name] = "the point was never reached"
            continue
        _, _, resumed = fit(folder, resume=path, **options)
        epochs = set(straight.digests)
        late = {e for e in epochs if e > wanted[name].epoch}
        differs = [
            f"epoch {epoch}: {what}"
            for epoch in sorted(late | set(resumed.digests))
            for what, value in straight.digests[epoch].items()
            if resumed.digests.get(epoch, {}).get(what) not in (value, NOTHING)
        ]
        found[name] = ", ".join(differs)
    return found
