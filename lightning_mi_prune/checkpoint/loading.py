"""load_pruned: open checkpoints of pruned modules."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_mi_prune.checkpoint.archive import check_archive
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.checkpoint.validation import is_plan
from lightning_mi_prune.core.empty_linear import modules_of
from lightning_mi_prune.core.errors import PruningError

__all__ = [
    "load_pruned",
    "read_checkpoint",
    "read_tensors",
    "substitute_class",
]

_PLAIN = (AttributeError, LookupError, TypeError, ValueError)  # of Lightning, about a file
_LONGEST = 1000  # characters of an error of torch

Module = TypeVar("Module", bound=nn.Module)


def load_pruned(
    target: type[Module] | Module,
    path: str | Path,
    *,
    map_location: Any = None,
    strict: bool | None = None,
    **kwargs: Any,
) -> Module:
    """Open a checkpoint, pruned or not, without its callback.

    The file is opened with ``weights_only=True``. But a file of LightningCLI names the classes of
    its hyperparameters, which Lightning imports when ``target`` is a class. From a file that you
    do not trust, load the weights into a module that you built yourself.

    ``load_pruned(Classifier, "last.ckpt")`` or ``load_pruned(Classifier(...), "weights.pt")``.

    Args:
        target: A LightningModule class, opened as by its ``load_from_checkpoint``; or any module
            that was built as for training, which gets the shape and the weights of the file. If
            the file is refused, the module stays as it was.
        path: A checkpoint of a Trainer; for a module also a saved ``state_dict``, as a file of
            ``torch.save`` or of safetensors.
        map_location: As for ``torch.load``; a given module stays on its own devices.
        strict: As for ``load_state_dict``; default: ``strict_loading`` of the module.
        kwargs: Hyperparameters and ``hparams_file``, only with a class.

    Returns:
        The new module, or the given one.

    Raises:
        PruningError: If the file is not a checkpoint, or does not fit the module.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune import PruningPlan, apply_plan, discover
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 6}
        >>> sizes |= {"max_position_embeddings": 8}
        >>> net = BertModel(BertConfig(**sizes))
        >>> tracker, name = PlanTracker(net, discover(net)), "encoder.layer.0.ffn"
        >>> tracker.plan = tracker.plan.then(PruningPlan({name: 6}, {name: (0, 3)}))
        >>> rewrites = apply_plan(net, tracker.groups, tracker.plan)
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save(net.state_dict(), file.name)
        ...     again = load_pruned(BertModel(BertConfig(**sizes)), file.name)
        >>> again.encoder.layer[0].intermediate.dense
        Linear(in_features=8, out_features=2, bias=True)
    """
    if isinstance(target, type):
        if not issubclass(target, nn.Module) or not _is_lightning(target):
            raise PruningError(
                f"{target.__name__} is a class without load_from_checkpoint; expected a "
                "LightningModule class or a module. Build the module and pass that."
            )
        if "weights_only" in kwargs:
            raise PruningError(
                "weights_only is always True here, so that no file can run code; leave it out."
            )
        built: Module = _build(target, path, map_location=map_location, strict=strict, **kwargs)
        return built
    if not isinstance(target, nn.Module):
        raise PruningError(
            f"Weights cannot be loaded into {target!r}; expected a LightningModule class or a "
            "torch.nn.Module."
        )
    if kwargs:
        raise PruningError(
            f"{sorted(kwargs)} cannot be set on a {type(target).__name__} that is built already; "
            "build it with them, or pass its class."
        )
    _fill(target, path, map_location, strict)
    return target


def substitute_class(
    cls: type[Any], build: Callable[..., Any], signature: inspect.Signature | None = None
) -> Any:
    """A class to call the class methods of ``cls`` on, whose objects are built by a function.

    For class methods that build an object and load its weights in one call: ``build`` does what
    must happen in between. The class has no instances, and nothing global changes.

    Args:
        cls: The class.
        build: Called in place of ``cls``.
        signature: Signature that the class shows, if not that of ``cls``.

    Example:
        >>> class Net(nn.Linear):
        ...     @classmethod
        ...     def load(cls):
        ...         return cls(2, 1)
        >>> substitute_class(Net, lambda *sizes: Net(*sizes).half()).load().weight.dtype
        torch.float16
    """

    class Unregistered:
        """Keeps the class out of the lists of subclasses that some base classes keep."""

        __slots__ = ()

        def __init_subclass__(cls, **_: Any) -> None:
            pass

    def call(_: type[Any], *args: Any, **kwargs: Any) -> Any:
        return build(*args, **kwargs)

    def includes(_: type[Any], other: type[Any]) -> bool:
        return issubclass(other, cls)

    meta = type(type(cls).__name__, (type(cls),), {"__call__": call, "__subclasscheck__": includes})
    own: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    if signature is not None:

        def init(self: Any) -> None:
            """Never called."""

        init.__signature__ = signature  # type: ignore[attr-defined]
        own["__init__"] = init
    return meta(cls.__name__, (Unregistered, cls), own | {"__doc__": cls.__doc__})


def _is_lightning(cls: type[Any]) -> bool:
    # By its method: this file needs no Lightning, and the class may be of pytorch_lightning.
    return hasattr(cls, "load_from_checkpoint")


def _build(
    cls: type[Any], path: str | Path, *, map_location: Any, strict: bool | None, **kwargs: Any
) -> Any:
    """``cls.load_from_checkpoint`` with a tracker on the module before its weights load."""
    check_archive(path)
    target, signature = _named_class(cls, path, kwargs)
    options = {"map_location": map_location, "strict": strict, "weights_only": True, **kwargs}
    trackers: list[PlanTracker] = []
    theirs = False  # whether their code ran, whose errors pass through

    def build(*args: Any, **parameters: Any) -> Any:
        nonlocal theirs
        theirs = True
        module = target(*args, **parameters)
        if PlanTracker.held_by(module) is None:
            trackers.append(PlanTracker(module))
        return module

    built = None
    try:
        opener = substitute_class(target, build, signature)
        built = opener.load_from_checkpoint(path, **options)
    except PruningError:
        raise
    except Exception as error:
        if "://" in str(path):
            raise
        checkpoint = read_checkpoint(path)  # raises what is wrong with the file, if it is the file
        if "state_dict" not in checkpoint or "pytorch-lightning_version" not in checkpoint:
            raise PruningError(
                f"{path} was not saved by a Trainer, so it cannot build a {cls.__name__}; build "
                f"it and pass that: load_pruned({cls.__name__}(...), path)."
            ) from error
        if "in loading state_dict" in str(error):
            module = trackers[-1].module if trackers else None
            raise _misfit(path, target, module, checkpoint["state_dict"], error) from error
        if not theirs and isinstance(error, _PLAIN) and type(error) is not ValueError:
            reason = " ".join(str(error).split())[:_LONGEST]
            raise PruningError(
                f"{path} is not as a Trainer saves it ({type(error).__name__}: {reason}); expected "
                f"its own file. Take another, or build the {cls.__name__} and pass that."
            ) from error
        raise
    finally:
        for tracker in trackers:
            if tracker.module is not built:
                tracker.close()
    return built


def _named_class(
    cls: type[Any], path: str | Path, options: Mapping[str, Any]
) -> tuple[type[Any], inspect.Signature | None]:
    """The class that a checkpoint of LightningCLI names, where Lightning would build that.

    Lightning passes the name to a class with ``**kwargs`` (such as LightningModule itself), and
    jsonargparse then builds the named class, whatever class opens the file. So the named class
    opens it, with a signature to which the name is not passed.
    """
    parameters = inspect.signature(cls.__init__).parameters
    every = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not every or "://" in str(path) or options.get("hparams_file") is not None:
        return cls, None
    stored = read_checkpoint(path, "meta").get(getattr(cls, "CHECKPOINT_HYPER_PARAMS_KEY", ""))
    named = stored.get("_class_path") if isinstance(stored, Mapping) else None
    if not isinstance(stored, Mapping) or not isinstance(named, str):
        return cls, None
    home, _, name = named.rpartition(".")
    found = getattr(sys.modules.get(home), name, None)
    if not isinstance(found, type) or not issubclass(found, cls):
        return cls, None  # Lightning refuses it
    own = inspect.signature(found.__init__).parameters  # type: ignore[misc]
    kept = [p for p in own.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    known = {p.name for p in kept} | {"_class_path", "_instantiator"}
    more = [n for n in (*stored, *options) if n not in known and str(n).isidentifier()]
    extra = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in dict.fromkeys(more)]
    return found, inspect.Signature([*kept, *extra])


def _fill(module: nn.Module, path: str | Path, map_location: Any, strict: bool | None) -> None:
    checkpoint = read_checkpoint(path, map_location or "cpu")
    state = checkpoint.get("state_dict", checkpoint)
    before = _Snapshot(module)
    tracker = PlanTracker(module) if PlanTracker.held_by(module) is None else None
    try:
        lightning: Any = module if _is_lightning(type(module)) else None
        if lightning is not None:
            lightning.configure_model()  # as Lightning does, for layers that are made there
            if "state_dict" in checkpoint:
                lightning.on_load_checkpoint(checkpoint)
        if strict is None:
            strict = bool(getattr(module, "strict_loading", True))
        module.load_state_dict(checkpoint.get("state_dict", checkpoint), strict=strict)
    except BaseException as error:
        if tracker is not None:
            tracker.close()
        before.restore()
        if isinstance(error, Exception) and "in loading state_dict" in str(error):
            raise _misfit(path, type(module), module, state, error) from error
        raise


class _Snapshot:
    """All of a module that loading may change: parts, numbers, configs, values, its tracker."""

    def __init__(self, module: nn.Module) -> None:
        self._tables: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._sets: list[tuple[set[str], set[str]]] = []
        self._lists: list[tuple[list[Any], list[Any]]] = []
        self._values: list[tuple[Tensor, Tensor]] = []
        seen: set[int] = set()
        for _, part in modules_of(module):
            for table in self._of(part):
                if id(table) not in seen:
                    seen.add(id(table))
                    self._tables.append((table, dict(table)))
            names = part._non_persistent_buffers_set
            self._sets.append((names, set(names)))
            tracker = PlanTracker.held_by(part)
            for value in () if tracker is None else _containers(vars(tracker)):
                if isinstance(value, dict):
                    self._tables.append((value, dict(value)))
                else:
                    self._lists.append((value, list(value)))
        for tensor in (*module.parameters(), *module.buffers()):
            if not tensor.is_meta and not nn.parameter.is_lazy(tensor):
                self._values.append((tensor, tensor.detach().to("cpu", copy=True)))

    @staticmethod
    def _of(part: nn.Module) -> Iterator[dict[Any, Any]]:
        config = getattr(part, "config", None)
        own = vars(part)
        names = ("_parameters", "_buffers", "_modules", *(n for n in own if n.endswith("_hooks")))
        tables = [own, *(own.get(name) for name in names)]
        if hasattr(config, "to_dict"):
            tables.append(getattr(config, "__dict__", None))
        yield from (table for table in tables if isinstance(table, dict))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back: the same objects, with their values."""
        for table, items in self._tables:
            table.clear()
            table.update(items)
        for names, content in self._sets:
            names.clear()
            names.update(content)
        for entries, old in self._lists:
            entries[:] = old
        for tensor, value in self._values:
            if not torch.equal(tensor.cpu(), value):
                tensor.copy_(value)


def _containers(table: dict[Any, Any]) -> Iterator[dict[Any, Any] | list[Any]]:
    """A table and the plain dicts and lists in it."""
    yield table
    for value in table.values():
        if type(value) is dict:
            yield from _containers(value)
        elif type(value) is list:
            yield value


def _misfit(
    path: str | Path,
    cls: type[Any],
    module: nn.Module | None,
    state: Mapping[str, Any],
    error: Exception,
) -> PruningError:
    narrow = None if module is None or any(map(is_plan, state)) else _narrower(module, state)
    if narrow is not None:
        name, shape, expected = narrow
        return PruningError(
            f"The weights in {path} look pruned ({name!r} has shape {shape}; this {cls.__name__} "
            f"has {expected}), but the file holds no plan, so it is not known which units "
            "they are; expected a file with the plan. Save the module that was pruned with "
            "torch.save(module.state_dict(), path) or trainer.save_checkpoint(path), or its "
            "network with save_pretrained. Or build it with the sizes of the file."
        )
    return PruningError(
        f"The weights in {path} do not fit this {cls.__name__}. Build it with the configuration "
        f"it was trained with. ({' '.join(str(error).split())[:_LONGEST]})"
    )


def _narrower(
    module: nn.Module, state: Mapping[str, Any]
) -> tuple[str, tuple[int, ...], tuple[int, ...]] | None:
    """The first tensor with fewer entries than the module's, where the weights look pruned.

    What lost units is narrower in what makes them and in what reads them, so along first and along
    other dimensions. Fewer labels, words or features are narrower along one of these alone.
    """
    found: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []
    narrower: set[bool] = set()
    for name, old in module.named_parameters(remove_duplicate=False):
        new = state.get(name)
        if not isinstance(new, Tensor) or new.ndim != old.ndim or new.shape == old.shape:
            continue
        sizes = list(zip(new.shape, old.shape, strict=True))
        if all(a <= b for a, b in sizes):
            found.append((name, tuple(new.shape), tuple(old.shape)))
            narrower |= {dim == 0 for dim, (a, b) in enumerate(sizes) if a < b}
    return found[0] if len(narrower) == 2 else None


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PruningError: If there is no such file, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PruningError(
            f"{path} cannot be read ({reason}); expected a safetensors file. Copy or save the "
            "folder again."
        ) from error


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", *, mmap: bool = False
) -> dict[str, Any]:
    """A checkpoint, or a bare state dict; no code of the file is run.

    Args:
        path: The file.
        map_location: As for ``torch.load``.
        mmap: Whether tensors are read from the file when they are used.

    Raises:
        PruningError: If it is neither, or it is damaged, or it would run code.
    """
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file

            found: Any = load_file(path, device=str(torch.device(map_location)))
        else:
            check_archive(path)
            found = torch.load(
                path, map_location=map_location, weights_only=True, mmap=mmap or None
            )
    except FileNotFoundError as error:
        raise PruningError(f"There is no file {str(path)!r}; expected a local path.") from error
    except IsADirectoryError as error:
        raise PruningError(
            f"{path} is a folder; expected one file. Open a Hugging Face folder with "
            "from_pretrained; consolidate a sharded checkpoint first."
        ) from error
    except PruningError:
        raise
    except Exception as error:  # torch raises all kinds
        blocked = re.search(r"GLOBAL (\S+)( whose module \S+ is blocked)?", str(error))
        if blocked is None:
            raise PruningError(
                f"{path} is not a checkpoint, or it is damaged ({type(error).__name__}); expected "
                "a file of a Trainer or of torch.save(module.state_dict(), path)."
            ) from error
        if blocked[2]:
            raise PruningError(
                f"{path} would run {blocked[1]} when opened; expected weights and plain values. "
                "Do not open it; get the file from a source you trust."
            ) from error
        raise PruningError(
            f"{path} holds a {blocked[1]}, which is not opened by default: it could run code. "
            "If you trust the file, allow it before: torch.serialization.add_safe_globals("
            f"[{blocked[1]}]). Or save only module.state_dict() and pass a module to load_pruned. "
            "save_hyperparameters(ignore=...) keeps it out of checkpoints."
        ) from error
    checkpoint: dict[str, Any] = found if isinstance(found, dict) else {}
    state = checkpoint.get("state_dict", checkpoint)
    plain = state is not checkpoint or all(isinstance(v, Tensor) for v in checkpoint.values())
    if not state or not isinstance(state, Mapping) or not plain:
        raise PruningError(
            f"{path} holds no weights; expected a checkpoint with a 'state_dict', or names mapped "
            "to tensors. Save one with trainer.save_checkpoint."
        )
    return checkpoint
