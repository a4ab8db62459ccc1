"""One plan on all ranks, and DDP wrapped again after a cut."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.xla import XLAStrategy
from torch.utils.data import DistributedSampler

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.surgery.verification import compiled_part

__all__ = [
    "agree",
    "broadcast_decision",
    "differences",
    "gather_ranks",
    "on_all_ranks",
    "padded_rows",
    "refuse_compiled",
    "refuse_unsupported",
    "rewrap_ddp",
    "sum_over_ranks",
    "sum_tensor",
    "world_size",
]

T = TypeVar("T")


_FAILED = "the error"
_NAMED, _SHOWN, _BEFORE = 5, 200, 20  # differences in a message, characters of each
_CALLBACKS: dict[type[pl.Callback], str] = {
    StochasticWeightAveraging: "it averages copies of the uncut weights",
    WeightAveraging: "it averages copies of the uncut weights",
    ModelPruning: "it holds masks of the uncut shape",
}


_BESIDE_LAYERS: dict[type[pl.Callback], str] = {
    BaseFinetuning: "it adds groups of parameters and finds them again by names, which change when "
    "layers go",
}


_STRATEGIES: dict[type[Strategy], str] = {
    DeepSpeedStrategy: "keeps its own flat copies of the parameters",
    XLAStrategy: "compiles the model for its uncut shape",
    FSDPStrategy: "shards parameters that a cut would have to gather",
    ModelParallelStrategy: "shards parameters that a cut would have to gather",
}


def world_size(strategy: Strategy) -> int:
    """Processes that train together."""
    return int(getattr(strategy, "world_size", 1))


def agree(strategy: Strategy, subject: str, statement: str | Mapping[str, object]) -> None:
    """Make sure that every rank has the same; 32 bytes a rank are gathered.

    Only where they differ are the values themselves gathered, to name what differs.

    Args:
        strategy: Strategy of the run.
        subject: What is compared, for the error.
        statement: What this rank has: a text, or values by name.

    Raises:
        PruningError: On every rank, naming those that differ from rank 0 and the values that do, so
            that none waits for another.
    """
    if world_size(strategy) == 1:
        return
    mine = _entries(subject, statement)
    digest = bytearray(hashlib.sha256(repr(sorted(mine.items())).encode()).digest())
    sent = torch.frombuffer(digest, dtype=torch.uint8).to(strategy.root_device)
    stated = strategy.all_gather(sent)
    # Every rank compares the same digests, so all of them gather what follows, or none.
    odd = [rank for rank, other in enumerate(stated) if not torch.equal(other, stated[0])]
    if odd:
        raise PruningError(
            f"Ranks {odd} and rank 0 disagree on {subject}; expected the same on all "
            f"{world_size(strategy)}: {differences(gather_ranks(strategy, mine))}. Build the same "
            "model with the same options and seed on every rank."
        )


def differences(entries: Sequence[Mapping[str, str]]) -> str:
    """What differs between the entries of ranks, in words: at most five of them.

    Where a rank failed, only its error counts.

    Args:
        entries: Values by name, for every rank.

    Example:
        >>> differences([{"seed": "0", "multiple": "8"}, {"seed": "0", "multiple": "4"}])
        'multiple is 8 on rank 0 and 4 on rank 1'
    """
    names = sorted({name for stated in entries for name in stated})
    if _FAILED in names:
        names = [_FAILED]
    found = []
    for name in names:
        values = [stated.get(name, "absent") for stated in entries]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            first, second = _apart(values[0], values[other])
            found.append(f"{name} is {first} on rank 0 and {second} on rank {other}")
    rest = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return "; ".join(found[:_NAMED]) + rest


def _apart(one: str, other: str) -> tuple[str, str]:
    """Two texts, each cut to a few words from where they begin to differ."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    start = max(0, (min(len(one), len(other)) if same is None else same) - _BEFORE)
    shown = []
    for text in (one, other):
        part = text[start : start + _SHOWN]
        end = "..." if start + _SHOWN < len(text) else ""
        shown.append(f"{'...' if start else ''}{part}{end}")
    return shown[0], shown[1]


def _entries(subject: str, statement: object) -> dict[str, str]:
    """A statement as texts by name that are equal where the values are."""
    if not isinstance(statement, Mapping):
        return {subject: str(statement)}
    return {str(name): repr(_ordered(value)) for name, value in statement.items()}


def _ordered(value: object) -> object:
    """A mapping in order of its keys: two that are equal may be listed in different orders."""
    if isinstance(value, Mapping):
        return dict(sorted((str(key), _ordered(part)) for key, part in value.items()))
    return value


def on_all_ranks(strategy: Strategy, subject: str, attempt: Callable[[], T]) -> T:
    """Do on every rank what may fail on some, and make sure that all of them have the same result.

    Raises:
        Exception: The error of this rank; on ranks without one, a PruningError.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = attempt()
    except Exception as error:  # ranks that succeeded must not wait for this one
        failure = error
    stated: str | Mapping[str, object] = result if isinstance(result, Mapping) else str(result)
    if failure is not None:
        stated = {_FAILED: f"{type(failure).__name__}: {failure}"}
    try:
        agree(strategy, subject, stated)
    except PruningError:
        if failure is None:
            raise
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


class Sums(Protocol):
    """Sums of a fixed shape that can be one vector."""

    @property
    def packed_size(self) -> int: ...

    def packed(self) -> torch.Tensor: ...

    def unpack(self, packed: torch.Tensor) -> Any: ...


def sum_over_ranks(strategy: Strategy, moments: Mapping[str, Sums]) -> None:
    """Add up the sums of all ranks, in place, with one all-reduce in float64.

    Every rank must call it, also one without samples; all end with the same sums. A group of
    ``d`` entries takes ``8 (1 + d + d (d + 1) / 2)`` bytes.
    """
    if world_size(strategy) == 1:
        return
    names = sorted(moments)
    sizes = [moments[name].packed_size for name in names]
    device = strategy.root_device
    # Filled group by group: for wide models this buffer is as large as the gradients.
    buffer = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    for name, part in zip(names, torch.split(buffer, sizes), strict=True):
        part.copy_(moments[name].packed())
    summed = strategy.reduce(buffer, reduce_op="sum")
    if not isinstance(summed, torch.Tensor):
        raise PruningError(f"{type(strategy).__name__} cannot add up sums over ranks; use DDP.")
    for name, part in zip(names, torch.split(summed, sizes), strict=True):
        moments[name].unpack(part.to(moments[name].packed().device))


def sum_tensor(strategy: Strategy, sums: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of one tensor; every rank must call it."""
    if world_size(strategy) == 1:
        return sums
    summed: Any = strategy.reduce(sums.to(strategy.root_device), reduce_op="sum")
    return torch.as_tensor(summed).to(sums.device)


def gather_ranks(strategy: Strategy, mine: T) -> list[T]:
    """What every rank has, in the order of ranks; plain containers and tensors on the CPU."""
    if world_size(strategy) == 1:
        return [mine]
    found: list[T | None] = [None] * world_size(strategy)
    torch.distributed.all_gather_object(found, mine)
    return found  # type: ignore[return-value]


def broadcast_decision(strategy: Strategy, decide: Callable[[], T]) -> T:
    """Let rank 0 decide for all; if deciding fails there, it fails everywhere.

    Raises:
        PruningError: With the error of rank 0, on every other rank.
    """
    if world_size(strategy) == 1:
        return decide()
    outcome: tuple[T | None, str | None] = (None, None)
    mine: Exception | None = None
    if strategy.is_global_zero:
        try:
            outcome = (decide(), None)
        except Exception as error:  # whatever it is, the other ranks must not wait for it
            mine, outcome = error, (None, f"{type(error).__name__}: {error}")
    decision, failure = strategy.broadcast(outcome)
    if mine is not None:
        raise mine
    if failure is not None:
        raise PruningError(f"Rank 0 could not decide. {failure}")
    return decision  # type: ignore[return-value]


def rewrap_ddp(strategy: Strategy) -> None:
    """Wrap the module in DDP again after its parameters were replaced.

    The new wrapper is made as the first one was (``static_graph``, bucket options, communication
    hooks); the old one, its reducer and its buckets are gone when this returns. Weights and buffers
    are broadcast from rank 0 on the way.
    """
    if not isinstance(strategy, DDPStrategy):
        return
    module = strategy.lightning_module
    for parameter in module.parameters() if module is not None else ():
        # A gradient that is a view of a bucket would keep the bucket of the old wrapper.
        if parameter.grad is not None and parameter.grad._is_view():
            parameter.grad = parameter.grad.clone()
    strategy.model = module
    _forget_shapes(strategy._ddp_comm_state)
    strategy._pl_static_graph_delay_done = False
    gc.collect()  # wrappers sit in reference cycles, and hold the old parameters
    strategy.configure_ddp()


def _forget_shapes(state: Any) -> None:
    """Let a stateful communication hook (PowerSGD) start anew: its buckets have new shapes."""
    for name in ("error_dict", "p_memory_dict", "q_memory_dict"):
        if isinstance(getattr(state, name, None), dict):
            getattr(state, name).clear()
            state.iter = 0


def refuse_unsupported(trainer: pl.Trainer, *, layers: bool = False) -> None:
    """Refuse strategies and callbacks that would break at the first cut.

    Args:
        trainer: The trainer.
        layers: Whether whole layers may go.

    Raises:
        MisconfigurationException: Naming what was found and what works instead.
    """
    _refuse_strategy(trainer.strategy)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        refused = {**_CALLBACKS, **(_BESIDE_LAYERS if layers else {})}
        for kind, reason in refused.items():
            if isinstance(callback, kind):
                what = "a callback that removes layers" if kind in _BESIDE_LAYERS else "pruning"
                raise MisconfigurationException(
                    f"{type(callback).__name__} cannot run beside {what}, because {reason}; "
                    "remove one of the two."
                )


def refuse_compiled(module: pl.LightningModule, cut: Iterable[str]) -> None:
    """Refuse compiled modules that hold what is cut; any other may be compiled.

    Args:
        module: The module.
        cut: Paths of the modules that a cut changes.

    Raises:
        MisconfigurationException: Naming the module.
    """
    name = compiled_part(module, cut)
    if name is not None:
        raise MisconfigurationException(
            f"{name!r} is compiled for the uncut shape; prune first, then call torch.compile on "
            "the result."
        )


def _refuse_strategy(strategy: Strategy) -> None:
    name = type(strategy).__name__
    for kind, reason in _STRATEGIES.items():
        if isinstance(strategy, kind):
            raise MisconfigurationException(
                f"{name} {reason}; prune with Trainer(strategy='ddp') or on one device."
            )
    if isinstance(strategy, DDPStrategy):
        if strategy._start_method != "popen":
            raise MisconfigurationException(
                f"{name} with start method {strategy._start_method!r} copies the weights of its "
                "processes back into an uncut model; use Trainer(strategy='ddp')."
            )
    elif not isinstance(strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"{name} is not known to survive a cut; use Trainer(strategy='ddp') or one device."
        )


def padded_rows(trainer: pl.Trainer, batch: int, loader: int) -> tuple[int | None, int]:
    """Examples of a validation batch, and how many at its end a distributed sampler repeated.

    A DistributedSampler gives the last ranks one example of another rank when the data do not
    divide evenly; it comes last.
    """
    found = trainer.val_dataloaders
    loaders = list(found.values()) if isinstance(found, dict) else found
    source = loaders[loader] if isinstance(loaders, (list, tuple)) else loaders
    samplers = (
        getattr(source, "sampler", None),
        getattr(getattr(source, "batch_sampler", None), "sampler", None),
    )
    sampler = next((s for s in samplers if isinstance(s, DistributedSampler)), None)
    size = getattr(source, "batch_size", None)
    if sampler is None or size is None:
        return None, 0
    extra = len(sampler.dataset) % sampler.num_replicas  # type: ignore[arg-type]
    rows = min(size, sampler.num_samples - batch * size)
    ends = batch * size + rows == sampler.num_samples
    repeats = ends and not sampler.drop_last and extra > 0 and sampler.rank >= extra
    return rows, int(repeats)
