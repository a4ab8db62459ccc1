"""Which metrics validation logs: as far as the code tells before the first step, and then truly."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from types import FunctionType

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

__all__ = ["check_monitor", "logged_in_code", "logged_in_validation"]

_OURS = ("lightning", "lightning_mi_prune", "pytorch_lightning", "torch")
_OTHER_LOOPS = re.compile("(on_)?(train|test|predict)|optimizer_|configure_")
_HARMLESS = {"isinstance", "super", "type"}  # what may be given the module without logging with it


def check_monitor(trainer: pl.Trainer, module: pl.LightningModule, monitor: str) -> None:
    """Refuse a metric that no line of the module logs, before anything runs.

    Raises:
        MisconfigurationException: If the code names all metrics, and this one is not among them.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    names = logged_in_code([module, *callbacks])
    stem = monitor.partition("/dataloader_idx_")[0]
    if names is None or {stem, stem.removesuffix("_epoch"), stem.removesuffix("_step")} & names:
        return
    raise MisconfigurationException(
        f"max_drop watches monitor={monitor!r}, which {type(module).__name__} never logs; expected "
        f"one of {sorted(names)}. Log it in validation_step, or change monitor."
    )


def logged_in_code(objects: Iterable[object]) -> set[str] | None:
    """Names that validation logs under, by the code of some classes; None if it does not tell all.

    Names that are put together as the code runs, and a module that is handed on to others, who may
    log with it, leave it open.

    Args:
        objects: The module and the callbacks of a run; those of libraries log nothing here.
    """
    names: set[str] = set()
    for given in objects:
        owner = "self" if isinstance(given, pl.LightningModule) else None
        try:
            trees = {
                name: [ast.parse(textwrap.dedent(inspect.getsource(f))) for f in functions]
                for name, functions in _functions(given).items()
            }
        except (OSError, TypeError, SyntaxError):
            return None
        for name in _reached(trees):
            for tree in trees[name]:
                found = _names_in(tree, owner)
                if found is None:
                    return None
                names |= found
    return names


def _functions(given: object) -> dict[str, list[FunctionType]]:
    """Functions in the classes of an object that are no library's, by name."""
    found: dict[str, list[FunctionType]] = {}
    for kind in type(given).__mro__:
        if kind.__module__.partition(".")[0] in (*_OURS, "builtins"):
            continue
        for name, value in vars(kind).items():
            inner = getattr(value, "__func__", getattr(value, "fget", value))
            if isinstance(inner, FunctionType):
                found.setdefault(name, []).append(inner)
    return found


def _reached(trees: Mapping[str, Sequence[ast.AST]]) -> set[str]:
    """What validation may call: all but the steps of other loops, unless it names them."""
    reached = {name for name in trees if not _OTHER_LOOPS.match(name)}
    while True:
        nodes = [n for name in reached for tree in trees[name] for n in ast.walk(tree)]
        called = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        if not (called & set(trees)) - reached:
            return reached
        reached |= called & set(trees)


def _names_in(tree: ast.AST, owner: str | None) -> set[str] | None:
    """String literals that are logged in a function; None if something else may be."""
    names: set[str] = set()
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("log", "log_dict"):
            holder = node.value.id if isinstance(node.value, ast.Name) else ""
            if holder in ("torch", "math", "np", "numpy"):
                continue
            call = called.get(id(node))
            found = None if call is None else _literals(call, whole=node.attr == "log_dict")
            if found is None:
                return None
            names |= found
        elif isinstance(node, ast.Call) and owner is not None:
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            by = node.func.id if isinstance(node.func, ast.Name) else ""
            if any(isinstance(a, ast.Name) and a.id == owner for a in given) and (
                by not in _HARMLESS
            ):
                return None
    return names


def _literals(call: ast.Call, *, whole: bool) -> set[str] | None:
    first = call.args[0] if call.args else next((k.value for k in call.keywords), None)
    keys = first.keys if whole and isinstance(first, ast.Dict) else [first]
    found = {key.value for key in keys if isinstance(key, ast.Constant)}
    texts = {name for name in found if isinstance(name, str)}
    return texts if len(texts) == len(keys) else None


def logged_in_validation(trainer: pl.Trainer) -> list[str]:
    """Metrics of the validation that just ran; all there are, where it is not known which."""
    results = getattr(trainer, "_results", None)
    mine = results.metrics(on_step=False)["callback"] if results else {}
    return sorted(mine or trainer.callback_metrics)
