"""OPEN     checkpoints and Hugging Face folders of pruned models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from lightning_mi_prune.arrivals import is_plan
from lightning_mi_prune.checkpoints import PlanKeeper
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes, present_plan
from lightning_mi_prune.plan import recorded_plan
from lightning_mi_prune.surgery import reshape

__all__ = ["from_pretrained", "load_pruned"]

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
Module = TypeVar("Module", bound=nn.Module)


def from_pretrained(cls: Any, name_or_path: str | Path, **kwargs: Any) -> Any:
    """``cls.from_pretrained`` that also opens folders saved from a pruned model.

    A pruned Hugging Face model is saved with its own ``save_pretrained``; its config carries the
    plan. Models that were never cut go straight to ``cls.from_pretrained``.

    Args:
        cls: A model class or Auto class of transformers.
        name_or_path: Folder or hub name.
        kwargs: Passed on; for a pruned model they may only change the config.

    Raises:
        PruningError: If the weights do not fit the recorded plan.
    """
    from transformers import AutoConfig
    from transformers.utils import cached_file

    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    config, unused = AutoConfig.from_pretrained(name_or_path, return_unused_kwargs=True, **kwargs)
    holder = nn.Module()
    holder.config = config
    plan = recorded_plan(holder)
    if plan is None or plan.is_full:
        return cls.from_pretrained(name_or_path, **kwargs)
    strange = sorted(set(unused) - set(hub))
    if strange:
        raise PruningError(
            f"{strange} cannot be passed when a pruned model is loaded; expected options of its "
            f"config, or {list(_HUB)}."
        )
    try:
        weights = cached_file(str(name_or_path), "model.safetensors", **hub)
    except OSError as error:
        raise PruningError(
            f"{name_or_path} holds a pruned model without model.safetensors in one piece; save it "
            "with a larger max_shard_size."
        ) from error
    build = getattr(cls, "from_config", None) or cls._from_config
    network: nn.Module = build(config)
    try:
        axes = find_axes(network)
        reshape(network, axes, present_plan(network, axes))
        _load(network, str(weights))
    except RuntimeError as error:
        saved = getattr(config, "architectures", None)
        raise PruningError(
            f"{name_or_path} cannot be opened as {type(network).__name__}: it was saved from "
            f"{saved} and the weights do not fit. Open it with that class, and leave num_labels "
            f"as saved. ({error})"
        ) from error
    return network.eval()


def _load(network: nn.Module, path: str) -> None:
    """Fill a network from a file of ``save_pretrained``; a tied tensor may be in it once.

    Raises:
        RuntimeError: If a tensor is missing, unknown or of another shape.
    """
    from safetensors.torch import load_file
    from transformers.core_model_loading import revert_weight_conversion

    # Files keep the names of older versions of transformers; these are the same tensors.
    state = network.state_dict()
    own = {id(tensor): name for name, tensor in state.items()}
    saved = revert_weight_conversion(network, dict(state))
    names = {name: own[id(tensor)] for name, tensor in saved.items() if id(tensor) in own}
    stored = {name: tensor for name, tensor in load_file(path).items() if not is_plan(name)}
    arriving = {names.get(name, name): tensor for name, tensor in stored.items()}
    found = network.load_state_dict(arriving, strict=False)
    ids = {n: id(p) for n, p in network.named_parameters(remove_duplicate=False)}
    filled = {ids.get(name) for name in arriving}
    missing = [name for name in found.missing_keys if ids.get(name) not in filled]
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f"Missing key(s): {missing[:6]}. Unexpected key(s): {found.unexpected_keys[:6]}."
        )


def load_pruned(
    target: type[Module] | Module,
    path: str | Path,
    *,
    map_location: Any = None,
    strict: bool | None = None,
    **kwargs: Any,
) -> Module:
    """Open a checkpoint, pruned or not, without its callback.

    The file is opened with ``weights_only=True``. But one that LightningCLI wrote names the classes
    of its hyperparameters, and Lightning imports those when ``target`` is a class: of a file that
    you do not trust, load the weights into a module that you built yourself.

    ``load_pruned(Classifier, "last.ckpt")`` or ``load_pruned(Classifier(...), "weights.pt")``.

    Args:
        target: A LightningModule class, opened as by its ``load_from_checkpoint``; or any module
            that was built as for training, which is cut to the shape of the file and filled.
        path: A checkpoint of a Trainer; for a module also a saved ``state_dict``.
        map_location: As for ``torch.load``; a given module stays on its own devices.
        strict: As for ``load_state_dict``; default: what the module says (``strict_loading``).
        kwargs: Hyperparameters and ``hparams_file``, only with a class.

    Returns:
        The new module, or the given one.

    Raises:
        PruningError: If the file is not a checkpoint, or does not fit the module.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertModel
        >>> from lightning_mi_prune import Plan, apply
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 6}
        >>> net = BertModel(BertConfig(**sizes))
        >>> keeper, name = PlanKeeper.of(net), "encoder.layer.0.ffn"
        >>> keeper.plan = keeper.plan.then(Plan({name: 6}, {name: (0, 3)}))
        >>> rewrites = apply(net, keeper.axes, keeper.plan)
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
            raise PruningError("weights_only is always True here, so that no file can run code.")
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


def _is_lightning(cls: type[Any]) -> bool:
    # Known by its method: this file needs no Trainer, and the class may be of pytorch_lightning.
    return hasattr(cls, "load_from_checkpoint")


def _build(cls: type[Any], path: str | Path, **options: Any) -> Any:
    """``cls.load_from_checkpoint`` with a keeper on the module before the weights arrive."""
    keepers: list[PlanKeeper] = []

    # Lightning builds the module and loads its weights in one call; this is the way in between.
    def attach(module: nn.Module, name: str, part: nn.Module | None) -> None:
        if isinstance(module, cls) and PlanKeeper.held_by(module) is None:
            keepers.append(PlanKeeper(module))

    built = None
    handle = register_module_module_registration_hook(attach)
    try:
        built = cls.load_from_checkpoint(path, weights_only=True, **options)
    except PruningError:
        raise
    except Exception as error:
        if "://" in str(path):
            raise
        checkpoint = _open(path)  # if it is the file, this says what is wrong with it
        if "state_dict" not in checkpoint or "pytorch-lightning_version" not in checkpoint:
            raise PruningError(
                f"{path} was not saved by a Trainer, so it cannot build a {cls.__name__}; build "
                f"it and pass that: load_pruned({cls.__name__}(...), path)."
            ) from error
        if "in loading state_dict" in str(error):
            raise _misfit(path, cls, error) from error
        raise
    finally:
        handle.remove()
        for keeper in keepers:
            if keeper.module is not built:
                keeper.close()
    return built


def _fill(module: nn.Module, path: str | Path, map_location: Any, strict: bool | None) -> None:
    checkpoint = _open(path, map_location or "cpu")
    keeper = PlanKeeper(module) if PlanKeeper.held_by(module) is None else None
    try:
        lightning: Any = module if _is_lightning(type(module)) else None
        if lightning is not None:
            lightning.configure_model()  # as Lightning does, for layers that are made there
            if "state_dict" in checkpoint:
                lightning.on_load_checkpoint(checkpoint)
        if strict is None:
            strict = bool(getattr(module, "strict_loading", True))
        module.load_state_dict(checkpoint.get("state_dict", checkpoint), strict=strict)
    except Exception as error:
        if "in loading state_dict" in str(error):  # the cut was made, and keeps its keeper
            raise _misfit(path, type(module), error) from error
        if keeper is not None:
            keeper.close()
        raise


def _misfit(path: str | Path, cls: type[Any], error: Exception) -> PruningError:
    return PruningError(
        f"The weights in {path} do not fit this {cls.__name__}. Build it with the configuration "
        f"it was trained with. ({error})"
    )


def _open(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """A checkpoint, or a bare state dict."""
    try:
        found = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError as error:
        raise PruningError(f"There is no file {str(path)!r}; expected a local path.") from error
    except IsADirectoryError as error:
        raise PruningError(
            f"{path} is a folder; expected one file. Open a Hugging Face folder with "
            "from_pretrained; consolidate a sharded checkpoint first."
        ) from error
    except Exception as error:  # torch raises all kinds
        strange = re.search(r"GLOBAL (\S+)( whose module \S+ is blocked)?", str(error))
        if strange is None:
            raise PruningError(
                f"{path} is not a checkpoint, or it is damaged ({type(error).__name__}); expected "
                "a file of a Trainer or of torch.save(module.state_dict(), path)."
            ) from error
        if strange[2]:
            raise PruningError(
                f"{path} would run {strange[1]} when opened; expected weights and plain values. "
                "Do not open it; get the file from a source you trust."
            ) from error
        raise PruningError(
            f"{path} holds a {strange[1]}, which is not opened unasked because it could run code. "
            "If you trust the file, allow it before: torch.serialization.add_safe_globals("
            f"[{strange[1]}]). Or save only module.state_dict() and pass a module to load_pruned. "
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
