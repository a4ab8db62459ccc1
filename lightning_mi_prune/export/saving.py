"""save_pretrained: write a pruned Hugging Face model as a folder that opens elsewhere."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor, nn
from torch.distributed import get_rank, is_initialized

from lightning_mi_prune.checkpoint.delta import Delta, delta_between, read_delta, write_delta
from lightning_mi_prune.checkpoint.plain import parts_of, why_not_plain, with_layer_fields
from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.checkpoint.validation import is_plan
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.files import write_whole
from lightning_mi_prune.core.plan import (
    MODEL_TYPE,
    OPENING_FIELD,
    PARTS_FIELD,
    TYPE_FIELD,
    PruningPlan,
)
from lightning_mi_prune.export.batches import BATCHES_FILE, store_batches
from lightning_mi_prune.export.card import Card, Measured, card_of
from lightning_mi_prune.export.code import CODE_FILE, code_fields, code_of
from lightning_mi_prune.graph.graph import PruningGraph

__all__ = ["PLAN_FILE", "check_target", "network_of", "rewrite_card", "save_pretrained"]

PLAN_FILE = "pruning_plan.json"
_CARD = "README.md"
_CONFIG = "config.json"


def save_pretrained(
    model: nn.Module,
    folder: str | Path,
    *,
    processor: Any = None,
    measured: Measured | None = None,
    code: bool = False,
    delta_of: nn.Module | str | Path | None = None,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a Hugging Face model, pruned or not, as a folder with safetensors and a model card.

    Where the config of the model describes it (all layers of equal width, or whole layers gone),
    plain transformers open the folder, and so does every runtime that reads configs. Other folders
    name this package as their model type: ``AutoModel...from_pretrained(folder)`` opens them once
    ``lightning_mi_prune`` is imported, and refuses them without it, by that name. With ``code`` it
    opens them without the package too, given ``trust_remote_code=True``.

    All is written beside the folder first, then renamed. Of several processes, the first writes.

    Args:
        model: The network, or a module that holds one, such as a LightningModule.
        folder: The folder; folders above it are made.
        processor: A tokenizer or processor to save with it.
        measured: What was measured of it, for the card; nothing else is stated there.
        code: Whether a small modelling file goes into the folder of a model that its config does
            not describe.
        delta_of: The dense model, or its folder or hub name: the folder then holds the plan and
            only the weights that differ from those of the dense model without the removed units,
            and names that model. It is checked when the folder is opened.
        calibration: Batches to store with the model, so that smaller ones can be made of it.
        overwrite: Whether the folder may be one of a model already, which is replaced.

    Returns:
        The folder.

    Raises:
        PruningError: If there is no such network in the module, the folder cannot be written, or
            the model is not a cut of the dense one.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> net = BertModel(BertConfig(vocab_size=9, intermediate_size=6, **sizes))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = save_pretrained(net, f"{folder}/small")
        ...     sorted(path.name for path in saved.iterdir())
        ['README.md', 'config.json', 'model.safetensors']
    """
    path, network = network_of(model)
    target = Path(folder)
    check_target(target, overwrite=overwrite)
    if code and delta_of is not None:
        raise PruningError(
            "code=True with delta_of; expected one of the two: the modelling file opens whole "
            "weights only."
        )
    if is_initialized() and get_rank() > 0:
        return target
    delta = None if delta_of is None else _delta(network, delta_of)
    plan = _ranked_plan(model, path, network)
    state = {name: t for name, t in network.state_dict().items() if not is_plan(name)}
    layers = with_layer_fields(network)
    difference = None if layers else why_not_plain(network)
    if delta is not None:
        difference = _as_changes(delta)
    with _whole_folder(target) as draft:
        network.save_pretrained(draft, state_dict=_contiguous(state))
        if delta is not None:
            for file in draft.glob("model*.safetensors*"):
                file.unlink()
            write_delta(delta, draft)
        if calibration is not None:
            store_batches(calibration, draft)
        if processor is not None:
            processor.save_pretrained(draft)
        whole = plan is not None and delta is None
        _write_config(draft / _CONFIG, network, difference, layers, plan=whole, code=code)
        if difference is not None and code:
            (draft / CODE_FILE).write_text(code_of(network), encoding="utf-8")
        if plan is not None:
            (draft / PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
        text = _card_text(network, draft, target.name, plan, measured or Measured(), difference)
        (draft / _CARD).write_text(text, encoding="utf-8")
    return target


def rewrite_card(network: Any, folder: str | Path, measured: Measured) -> Path:
    """Write the model card of a folder of :func:`save_pretrained` again.

    Args:
        network: The network in it.
        folder: The folder.
        measured: What was measured of it; what an older card stated is gone.

    Returns:
        The card.

    Raises:
        PruningError: If the folder holds no plan, or the card cannot be written.
    """
    place = Path(folder)
    if not (place / PLAN_FILE).is_file():
        raise PruningError(
            f"{place} has no {PLAN_FILE}; expected a folder that "
            "lightning_mi_prune.save_pretrained wrote of a pruned model. Save it with that."
        )
    plan = PruningPlan.from_json((place / PLAN_FILE).read_text(encoding="utf-8"))
    fields = json.loads((place / _CONFIG).read_text(encoding="utf-8"))
    plain, delta = fields.get("model_type") != MODEL_TYPE, read_delta(place)
    difference = None if plain else why_not_plain(network)
    if delta is not None:
        difference = _as_changes(delta)
    text = _card_text(network, place, place.resolve().name, plan, measured, difference)
    write_whole(place / _CARD, text, "The model card")
    return place / _CARD


def _as_changes(delta: Delta) -> str:
    return f"the weights beside it are changes to {delta.base!r}"


def _card_text(
    network: Any,
    folder: Path,
    name: str,
    plan: PruningPlan | None,
    measured: Measured,
    difference: str | None,
) -> str:
    """The card of a folder whose other files are there."""
    weights = {*folder.glob("*.safetensors")} - {folder / BATCHES_FILE}
    return card_of(
        Card(
            network=network,
            folder=name,
            plan=plan,
            graph=recorded_graph(network) or PruningGraph(),
            measured=measured,
            difference=difference,
            code=(folder / CODE_FILE).is_file(),
            file_size=sum(file.stat().st_size for file in weights),
        )
    )


def network_of(model: nn.Module) -> tuple[str, Any]:
    """The Hugging Face network in a module, with its path: the module itself, or the one inside.

    Raises:
        PruningError: If there is none, or there are several.

    Example:
        >>> network_of(nn.Linear(2, 2))
        Traceback (most recent call last):
        lightning_mi_prune.core.errors.PruningError: Linear holds no Hugging Face network; \
expected one with save_pretrained and a config. Save others with torch.save(model.state_dict(), \
path), and open them with load_pruned.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{top}.") or top == "" for top in found)
        config = getattr(module, "config", None)
        if not inside and hasattr(module, "save_pretrained") and hasattr(config, "to_dict"):
            found[path] = module
    name = type(model).__name__
    if not found:
        raise PruningError(
            f"{name} holds no Hugging Face network; expected one with save_pretrained and a "
            "config. Save others with torch.save(model.state_dict(), path), and open them with "
            "load_pruned."
        )
    if len(found) > 1:
        raise PruningError(
            f"{name} holds several networks, {sorted(found)}; expected one. Save each by itself: "
            f"save_pretrained(model.{sorted(found)[0]}, ...)."
        )
    return next(iter(found.items()))


def _delta(network: Any, dense: nn.Module | str | Path) -> Delta:
    """What a network changes of a dense one; its name is that of its folder or hub page."""
    if isinstance(dense, nn.Module):
        _, found = network_of(dense)
        name = getattr(found.config, "_name_or_path", "")
        if not name:
            raise PruningError(
                "delta_of is a model without a name; expected one that was opened from a folder or "
                "the hub, which opening the delta needs. Save it first, and give its folder."
            )
        return delta_between(network, copy.deepcopy(found), str(name))
    return delta_between(network, type(network).from_pretrained(dense), str(dense))


def _ranked_plan(model: nn.Module, path: str, network: Any) -> PruningPlan | None:
    """The plan of a network, named from it, with the orders of its units where they are known."""
    graph = recorded_graph(network)
    if graph is None:
        return None
    plan = present_plan(network, graph.groups)
    tracker = PlanTracker.held_by(model)
    if tracker is None or not tracker.is_known:
        return plan
    known = tracker.plan.under(path) if path else tracker.plan
    rankings = {
        name: ranking
        for name, ranking in known.rankings.items()
        if plan.sizes.get(name) == known.sizes[name] and plan.kept[name] == known.kept[name]
    }
    return PruningPlan(plan.sizes, plan.kept, rankings)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, each with a layout that safetensors can write."""
    return {name: t if t.is_contiguous() else t.contiguous() for name, t in state.items()}


def _write_config(
    path: Path,
    network: Any,
    difference: str | None,
    layers: Mapping[int, Mapping[str, int]] | None,
    *,
    plan: bool,
    code: bool,
) -> None:
    """Complete the config that transformers wrote."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    if layers:
        digits = len(str(max(layers)))
        fields["per_layer_config"] = {str(i).zfill(digits): dict(v) for i, v in layers.items()}
    changes = {"per_layer_config": layers} if layers else {}
    parts = parts_of(network, changes) if plan else {}
    if "digest" in parts:  # else nothing but the modelling file reads them
        fields[PARTS_FIELD] = json.dumps(parts, separators=(",", ":"))
    if difference is not None:
        fields[TYPE_FIELD] = fields["model_type"]
        fields["model_type"] = MODEL_TYPE
        fields[OPENING_FIELD] = (
            f"This model was pruned, and this config does not describe it ({difference}). Open it "
            "with lightning_mi_prune.from_pretrained, or import lightning_mi_prune before "
            "AutoModel.from_pretrained"
            + ("; or pass trust_remote_code=True, which needs no package." if code else ".")
        )
        if code:
            fields |= code_fields(network, parts)
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else, or a model that may not be replaced."""
    if not target.exists():
        return
    if not target.is_dir():
        raise PruningError(f"{target} is a file; expected the path of a folder.")
    if any(target.iterdir()):
        if not (target / _CONFIG).is_file():
            raise PruningError(
                f"{target} is a folder with other files; expected a new or empty one. Choose "
                "another path."
            )
        if not overwrite:
            raise PruningError(
                f"{target} holds a model already; expected a new folder. Choose another path, or "
                "pass overwrite=True to replace it."
            )


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write to, which takes the place of another at the end, or is removed.

    Raises:
        PruningError: If the disk refuses it.
    """
    token = uuid4().hex[:8]
    draft, old = (target.with_name(f".{target.name}.{token}.{end}") for end in ("part", "old"))
    try:
        draft.mkdir(parents=True)
        yield draft
        if target.exists():
            target.rename(old)
        draft.rename(target)
    except OSError as error:
        if old.exists() and not target.exists():
            old.rename(target)
        raise PruningError(
            f"The model cannot be written to {target} ({error.strerror or error}); expected a path "
            "in a folder that can be written to, on a disk with room."
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
