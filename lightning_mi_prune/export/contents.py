"""What a folder, a checkpoint or a plan holds, read without building or running anything of it."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_mi_prune.checkpoint.delta import read_delta
from lightning_mi_prune.checkpoint.loading import read_checkpoint
from lightning_mi_prune.checkpoint.recorded import digest_of
from lightning_mi_prune.checkpoint.validation import is_plan, plan_in_state
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import CONFIG_FIELD, GRAPH_FIELD, MODEL_TYPE, PruningPlan
from lightning_mi_prune.core.untrusted import read_object
from lightning_mi_prune.export.batches import BATCHES_FILE
from lightning_mi_prune.export.code import CODE_FILE
from lightning_mi_prune.export.saving import PLAN_FILE
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import count_parameters

__all__ = ["Contents", "Width", "contents_of"]

_CONFIG = "config.json"
_LARGEST_TEXT = 256 * 2**20  # bytes: a plan and a graph, as text in a config
_STATISTICS = ("running_mean", "running_var")  # buffers of BatchNorm


@dataclass(frozen=True)
class Width:
    """How many units of a group, or layers of a stack, are left.

    Args:
        name: The group or stack.
        kind: Kind of unit; ``"layers"`` of a stack, empty where no graph names it.
        now: How many are left.
        built: How many there were.
    """

    name: str
    kind: str
    now: int
    built: int


@dataclass(frozen=True)
class Contents:
    """What a folder or a file holds.

    Args:
        path: Where it is.
        what: What it is, in a few words.
        class_name: Class of the model, where it is named.
        parameters: Parameters now; None without weights.
        parameters_built: Parameters before pruning; None where they are not recorded.
        weight_bytes: Bytes of the weights.
        widths: Groups and stacks of the plan.
        plan_digest: Digest of the plan; None without one.
        rankings: Groups whose complete order is there, so that smaller budgets need no calibration.
        plain: Whether transformers open it without this package; None where that is not known.
        opening: How to open it, in a sentence.
    """

    path: str
    what: str
    class_name: str | None
    parameters: int | None
    parameters_built: int | None
    weight_bytes: int | None
    widths: tuple[Width, ...]
    plan_digest: str | None
    rankings: int
    plain: bool | None
    opening: str

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return {**vars(self), "widths": [dict(vars(width)) for width in self.widths]}


def contents_of(path: str | Path) -> Contents:
    """What a Hugging Face folder, a checkpoint or a plan holds.

    Args:
        path: The folder; a file of a Trainer, of ``torch.save`` or of safetensors; or the JSON of
            a plan. It may come from anywhere: nothing in it is run.

    Raises:
        PruningError: If it is none of these, or damaged.

    Example:
        >>> import tempfile
        >>> plan = PruningPlan({"ffn": 4}, {"ffn": (0, 2, 3)})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "plan.json")
        ...     size = file.write_text(plan.to_json())
        ...     found = contents_of(file)
        >>> found.what, found.widths
        ('plan', (Width(name='ffn', kind='', now=3, built=4),))
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if not place.exists():
        raise PruningError(
            f"There is no {str(path)!r}; expected a Hugging Face folder, a checkpoint or a plan."
        )
    if place.suffix == ".json":
        plan = PruningPlan.from_json(_text(place))
        return _contents(place, "plan", plan, None, opening="Apply it with apply_plan.")
    return _checkpoint(place)


@dataclass(frozen=True)
class _Weights:
    """Sizes of the tensors in files: parameters (as far as names show), and bytes of all."""

    parameters: int
    size: int


def _folder(folder: Path) -> Contents:
    config = folder / _CONFIG
    if not config.is_file():
        raise PruningError(
            f"{folder} has no {_CONFIG}; expected a folder of save_pretrained, or one file."
        )
    fields = read_object(_text(config), str(config), constants=True)
    stored = folder / PLAN_FILE
    text = _text(stored) if stored.is_file() else fields.get(CONFIG_FIELD)
    plan = None if text is None else PruningPlan.from_json(text)
    graph = fields.get(GRAPH_FIELD)
    found = None if graph is None else PruningGraph.from_json(graph)
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    plain: bool | None = fields.get("model_type") != MODEL_TYPE
    if plain and plan is not None and not plan.is_full and not stored.is_file():
        plain = None  # of transformers' own save_pretrained, which checks nothing
    opening = f"{name or 'AutoModel'}.from_pretrained({str(folder)!r}) of transformers opens it."
    if not plain:
        also = "" if plain is False else " Transformers alone open it if the config describes it."
        if (folder / CODE_FILE).is_file():
            also = " Transformers alone open it with trust_remote_code=True."
        opening = f"lightning_mi_prune.from_pretrained({name}, {str(folder)!r}) opens it.{also}"
    delta = read_delta(folder)
    what = "Hugging Face folder"
    return _contents(
        folder,
        what if delta is None else f"{what} of changes to {delta.base[:200]!r}",
        plan,
        found,
        class_name=None if name is None else name[:200],
        weights=None if delta is not None else _weights_in(folder),
        plain=plain,
        opening=opening,
    )


def _checkpoint(path: Path) -> Contents:
    if path.suffix == ".safetensors":
        weights, state = _header(path)
        what, name = "weights (safetensors)", None
    else:
        stored = read_checkpoint(path, mmap=zipfile.is_zipfile(path))
        state = dict(stored.get("state_dict", stored))
        weights = _sum_of(_distinct(state))
        of_trainer = "pytorch-lightning_version" in stored
        what = "checkpoint of a Trainer" if of_trainer else "weights (torch.save)"
        given = stored.get("hyper_parameters")
        named = given.get("_class_path") if isinstance(given, Mapping) else None
        name = named[:200] if isinstance(named, str) else None
    plan, graph = plan_in_state(state, "")
    opening = (
        "load_pruned opens it." if plan is not None else "load_pruned opens it, and so does torch."
    )
    return _contents(path, what, plan, graph, class_name=name, weights=weights, opening=opening)


def _contents(
    path: Path,
    what: str,
    plan: PruningPlan | None,
    graph: PruningGraph | None,
    *,
    opening: str,
    class_name: str | None = None,
    weights: _Weights | None = None,
    plain: bool | None = None,
) -> Contents:
    now = None if weights is None else weights.parameters
    return Contents(
        path=str(path),
        what=what if plan is None or what == "plan" else f"{what}, pruned",
        class_name=class_name,
        parameters=now,
        parameters_built=None if now is None else _built(now, plan, graph),
        weight_bytes=None if weights is None else weights.size,
        widths=() if plan is None else tuple(_widths(plan, graph)),
        plan_digest=None if plan is None else digest_of(plan, graph),
        rankings=0 if plan is None else len(plan.rankings),
        plain=plain,
        opening=opening,
    )


def _widths(plan: PruningPlan, graph: PruningGraph | None) -> Iterator[Width]:
    """Groups in the order of the graph, then what it does not name."""
    kinds = {} if graph is None else {group.name: group.kind for group in graph.groups}
    kinds |= {} if graph is None else {stack.name: "layers" for stack in graph.stacks}
    for name in dict.fromkeys([*(n for n in kinds if n in plan.sizes), *plan.sizes]):
        yield Width(name, kinds.get(name, ""), plan.width(name), plan.sizes[name])


def _built(now: int, plan: PruningPlan | None, graph: PruningGraph | None) -> int | None:
    """Parameters before pruning; the sizes of layers that are gone are not recorded."""
    if plan is None or plan.is_full:
        return now
    stacks = () if graph is None else graph.stacks
    if graph is None or any(plan.widths.get(s.name, s.size) < s.size for s in stacks):
        return None
    widths = graph.full.joined(plan).widths
    return now + count_parameters(graph.groups) - count_parameters(graph.groups, widths)


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_TEXT:
            raise PruningError(
                f"{path} has {path.stat().st_size:,} bytes; expected at most {_LARGEST_TEXT:,}."
            )
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise PruningError(f"{path} cannot be read ({reason}); expected JSON.") from error


def _weights_in(folder: Path) -> _Weights | None:
    """Of all files of weights in a folder, without those of adapters."""
    others = ("adapter", BATCHES_FILE)
    files = [f for f in sorted(folder.glob("*.safetensors")) if not f.name.startswith(others)]
    found = [_header(file)[0] for file in files]
    if not files:
        files = sorted(folder.glob("pytorch_model*.bin"))
        found = [
            _sum_of(_distinct(read_checkpoint(file, mmap=zipfile.is_zipfile(file))))
            for file in files
        ]
    if not files:
        return None
    return _Weights(sum(f.parameters for f in found), sum(file.stat().st_size for file in files))


def _header(path: Path) -> tuple[_Weights, dict[str, Any]]:
    """Sizes of the tensors in a file of safetensors, and its plan; weights are not read."""
    from safetensors import safe_open

    shapes: dict[str, tuple[int, str]] = {}
    plans: dict[str, Any] = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                entry = file.get_slice(name)
                shapes[name] = math.prod(entry.get_shape()), entry.get_dtype()
                if is_plan(name):
                    plans[name] = file.get_tensor(name)
    except Exception as error:  # of the library, without a common class
        raise PruningError(
            f"{path} is no file of safetensors, or it is damaged ({error}); copy or save it again."
        ) from error
    count = sum(n for name, (n, kind) in shapes.items() if _is_parameter(name, "F" in kind))
    return _Weights(count, path.stat().st_size), plans


def _distinct(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict, those that share their storage once."""
    seen: dict[Any, str] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and not is_plan(name):
            place = value.untyped_storage().data_ptr(), value.storage_offset(), value.shape
            seen.setdefault(place if value.numel() else name, name)
    return {name: state[name] for name in seen.values()}


def _sum_of(tensors: Mapping[str, Tensor]) -> _Weights:
    return _Weights(
        sum(t.numel() for n, t in tensors.items() if _is_parameter(n, t.is_floating_point())),
        sum(t.numel() * t.element_size() for t in tensors.values()),
    )


def _is_parameter(name: str, floating: bool) -> bool:
    return floating and not name.endswith(_STATISTICS)
