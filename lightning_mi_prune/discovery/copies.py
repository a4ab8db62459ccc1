"""Copies of a module that share its parameters, changed and put back; their outputs compared."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.running import clear_caches, evaluating, fixed_random_state
from lightning_mi_prune.surgery.attention import slow_path
from lightning_mi_prune.surgery.verification import copy_module

__all__ = [
    "Run",
    "changed_within",
    "failing_module",
    "first_line",
    "put_tensors",
    "relative_difference",
    "results_of",
    "run_once",
    "structural_copy",
    "tensor_at",
    "tensor_outputs",
]

Run: TypeAlias = Callable[[nn.Module], Any]


def structural_copy(module: nn.Module, *, buffers: bool = False) -> nn.Module:
    """A copy in evaluation mode that shares the parameters, and its buffers unless they are copied.

    Args:
        module: The module; it is only read.
        buffers: Whether the copy has buffers of its own.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> copied = structural_copy(net)
        >>> copied is net, copied.weight is net.weight
        (False, True)
    """
    shared: list[Tensor] = [*module.parameters(), *([] if buffers else module.buffers())]
    copied = copy_module(module, {id(tensor): tensor for tensor in shared}).eval()
    clear_caches(copied.modules())
    return copied


def run_once(module: nn.Module, run: Run, *modes: Any) -> Any:
    """Run a module in evaluation mode, without gradients, from a fixed random state.

    The fast path of ``nn.TransformerEncoder``, one opaque operator, is off meanwhile.

    Args:
        module: The module.
        run: Calls it.
        modes: Context managers that are active meanwhile.
    """
    with ExitStack() as stack:
        for manager in (slow_path(), fixed_random_state(module), evaluating(module), _exact()):
            stack.enter_context(manager)
        torch.manual_seed(0)
        for mode in modes:
            stack.enter_context(mode)
        return run(module)


# Outputs that a caller only asks for to look at, or to give them back to the model.
_INNER = re.compile(r"hidden_states|_last_hidden_state|attention|past|cache|feature_map|states$")


def results_of(output: Any) -> Any:
    """What a call is made for: of a mapping, the entries that are no inner states, if any.

    Example:
        >>> list(results_of({"logits": 1, "past_key_values": 2, "loss": None}))
        ['logits']
        >>> list(results_of({"last_hidden_state": 1, "encoder_last_hidden_state": 2}))
        ['last_hidden_state']
    """
    if not isinstance(output, Mapping):
        return output
    named = {name: value for name, value in output.items() if value is not None}
    return {n: value for n, value in named.items() if not _INNER.search(str(n))} or named


def tensor_outputs(value: Any) -> list[Tensor]:
    """The tensors in an output that are compared: of floating point, or all if there is none.

    Example:
        >>> len(tensor_outputs({"logits": torch.ones(2), "past_key_values": torch.ones(3)}))
        1
    """
    found = [torch.view_as_real(t) if t.is_complex() else t for t in _tensors(results_of(value))]
    return [t for t in found if t.is_floating_point()] or found


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def relative_difference(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """The largest difference of two lists of tensors, each relative to its largest entry.

    Returns:
        The difference; infinite if the shapes differ, or entries that are not finite.

    Example:
        >>> relative_difference([torch.tensor([1.0, 4.0])], [torch.tensor([1.0, 5.0])])
        0.2
    """
    if [t.shape for t in got] != [t.shape for t in want]:
        return float("inf")
    worst = 0.0
    for mine, other in zip(got, want, strict=True):
        if not other.numel():
            continue
        a, b = mine.detach().double(), other.detach().double()
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite) or not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        a, b = a[finite], b[finite]
        if a.numel():
            scale = max(float(b.abs().max()), 1e-12)
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


_CONTAINERS = (dict, list, set, OrderedDict)


@contextmanager
def changed_within(module: nn.Module) -> Iterator[None]:
    """Put tensors, numbers and containers of a copy back to what they were before.

    Whatever a call stores on the modules, such as masks for a width, is gone too.
    """
    before = [(part, _shallow(vars(part))) for part in module.modules()]
    try:
        yield
    finally:
        for part, held in before:
            vars(part).clear()
            vars(part).update(held)


def _shallow(held: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a module, with containers of their own."""
    return {
        name: value.copy() if type(value) in _CONTAINERS else value for name, value in held.items()
    }


@contextmanager
def _exact() -> Iterator[None]:
    """Products of single precision are not rounded to fewer bits, which GPUs do by default."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions


def tensor_at(module: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of a name, if there is one."""
    path, _, last = name.rpartition(".")
    try:
        found = getattr(module.get_submodule(path), last)
    except AttributeError:
        return None
    return found if isinstance(found, Tensor) else None


def put_tensors(module: nn.Module, replaced: Mapping[int, Tensor]) -> None:
    """Replace parameters and buffers of a copy in every module that holds them, by their ``id``."""
    new: dict[int, Tensor] = {}
    changed: dict[nn.Module, None] = {}
    for part in module.modules():
        held = (*part.named_parameters(recurse=False, remove_duplicate=False),)
        held += (*part.named_buffers(recurse=False, remove_duplicate=False),)  # type: ignore[arg-type]
        for name, old in held:
            if id(old) in replaced:
                value = replaced[id(old)]
                if isinstance(old, nn.Parameter):
                    value = new.setdefault(id(old), nn.Parameter(value, old.requires_grad))
                setattr(part, name, value)
                changed[part] = None
    clear_caches(changed)


def first_line(error: BaseException) -> str:
    """Class and first line of an exception."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0].rstrip('.')}"[:200]


def failing_module(error: BaseException, module: nn.Module) -> str:
    """Path of the innermost module that was running when an error was raised."""
    paths = {id(part): path for path, part in module.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        holder = id(trace.tb_frame.f_locals.get("self"))
        found = paths.get(holder, found)
        trace = trace.tb_next
    return found
