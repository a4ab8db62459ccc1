"""from_pretrained: open Hugging Face folders of pruned models."""

from __future__ import annotations

import copy
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from json import JSONDecodeError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from lightning_mi_prune.checkpoint.delta import Delta, apply_delta, read_delta
from lightning_mi_prune.checkpoint.fitting import fitted_graph, with_found
from lightning_mi_prune.checkpoint.folder import building_within, check_folder
from lightning_mi_prune.checkpoint.loading import substitute_class
from lightning_mi_prune.checkpoint.plain import set_parts
from lightning_mi_prune.checkpoint.recorded import (
    config_of,
    named_plan,
    present_plan,
    pruned_type,
    recorded_graph,
)
from lightning_mi_prune.checkpoint.stored_graph import check_stored
from lightning_mi_prune.core.empty_linear import KEPT_UNITS
from lightning_mi_prune.core.errors import PruningError, PruningWarning, require
from lightning_mi_prune.core.plan import (
    CONFIG_FIELD,
    GRAPH_FIELD,
    MODEL_TYPE,
    OPENING_FIELD,
    TYPE_FIELD,
    PruningPlan,
    recorded_plan,
)
from lightning_mi_prune.core.running import fixed_random_state
from lightning_mi_prune.core.untrusted import reading
from lightning_mi_prune.discovery.discover import discover_run
from lightning_mi_prune.discovery.example_inputs import example_inputs
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import layout_size
from lightning_mi_prune.surgery.configs import (
    config_fields,
    config_numbers,
    config_value,
    set_config_value,
)
from lightning_mi_prune.surgery.empty_modules import fill_empty
from lightning_mi_prune.surgery.parameters import shapes_at
from lightning_mi_prune.surgery.tensors import replace_tensors, tensor_of, tensors_of
from lightning_mi_prune.surgery.units import reshape_tensors

__all__ = [
    "from_pretrained",
]

_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)

# Arguments of transformers that are no fields of a config, though some configs have such fields.
_NOT_FIELDS = (*_HUB, "dtype", "torch_dtype", "quantization_config", "trust_remote_code")

# While it opens a folder, transformers replaces methods of its classes; two threads at once would
# leave them replaced, and no model of the process would have tied weights any more.
_ONE_AT_A_TIME = threading.RLock()

_OF_ATTENTION = ("heads", "query_heads", "head_dim")  # no other part reads their units


def from_pretrained(cls: Any, name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
    """``cls.from_pretrained`` that also opens folders saved from a pruned model.

    A pruned Hugging Face model is saved with its own ``save_pretrained``; its config carries the
    plan. transformers builds the model and loads the weights; in between, the model gets the shape
    of the plan. So all options of ``cls.from_pretrained`` keep their meaning: ``dtype``,
    ``device_map``, ``config``, ``num_labels``, ``output_loading_info``, arguments of the model. A
    head or pooler that is not in the folder is new, with the warning of transformers.

    Args:
        cls: A model class or Auto class of transformers.
        name_or_path: Folder or hub name.
        args: Passed on.
        kwargs: Passed on; but for ``base``, which replaces the dense model that a folder saved with
            ``delta_of`` names.

    Raises:
        PruningError: If the plan, the config and the weights do not belong together, a file is
            damaged, or transformers is not installed. Its errors about missing files or options
            pass through.

    Example:
        >>> import tempfile
        >>> from transformers import AutoModel, BertConfig, BertModel
        >>> from lightning_mi_prune import PruningPlan, apply_plan, discover
        >>> from lightning_mi_prune.graph.groups import full_plan
        >>> sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
        >>> sizes |= {"num_attention_heads": 2, "intermediate_size": 6}
        >>> sizes |= {"max_position_embeddings": 8}
        >>> net = BertModel(BertConfig(**sizes))
        >>> groups, name = discover(net).groups, "encoder.layer.0.ffn"
        >>> plan = full_plan(groups).then(PruningPlan({name: 6}, {name: (0, 3)}))
        >>> rewrites = apply_plan(net, groups, plan)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net.save_pretrained(folder)
        ...     again = from_pretrained(AutoModel, folder, dtype="auto")
        >>> again.encoder.layer[0].intermediate.dense
        Linear(in_features=8, out_features=2, bias=True)
    """
    check_folder(name_or_path, kwargs)
    base = kwargs.pop("base", None)
    stored = {} if name_or_path is None else _fields(name_or_path, kwargs)
    kwargs = _with_config(cls, kwargs, stored)
    delta = read_delta(name_or_path) if isinstance(name_or_path, (str, Path)) else None
    if delta is not None:
        return _open_delta(cls, delta, base, name_or_path, args, kwargs)
    if base is not None:
        raise PruningError(
            f"base={str(base)!r} is given, but {name_or_path} holds all weights of the model; "
            "expected a folder that was saved with delta_of. Leave base out."
        )
    plan = _plan_to_open(name_or_path, kwargs, stored)
    with _ONE_AT_A_TIME:
        if plan is None or plan.is_full:
            with building_within(name_or_path, kwargs):
                return cls.from_pretrained(name_or_path, *args, **kwargs)
        return _open(cls, name_or_path, args, kwargs)


def _open(
    cls: Any, name_or_path: str | Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    concrete = _concrete(cls, name_or_path, kwargs)
    known = _open_as_recorded(concrete, name_or_path, args, kwargs)
    if known is not None:
        return known
    load = partial(_load, concrete, name_or_path, args, kwargs)
    try:
        cut, found = load(None)
        if cut.may_cut_more(found):
            graph = cut.discovered(name_or_path)
            del cut
            cut, found = load(graph)
    except Exception as error:
        if isinstance(error, RuntimeError) and "must match the size of tensor" in str(error):
            raise PruningError(
                f"{name_or_path} lost units of a buffer that transformers computes anew whenever "
                "it opens a model, such as rotary frequencies. Save a checkpoint of the state dict "
                "as well, and open that with load_pruned."
            ) from error
        if _is_clear(error):
            raise
        raise _damage(error, cls, name_or_path) from error
    network = cut.network
    _fill_shared(network, found["missing_keys"])
    ignores = bool(kwargs.get("ignore_mismatched_sizes"))
    _check_loaded(network, cut, found, name_or_path, ignores)
    cut.fill()
    return (network, found) if kwargs.get("output_loading_info") else network


class _NotAsRecordedError(Exception):
    """A network needs more than the shapes and numbers in its config."""


def _open_as_recorded(
    concrete: Any, source: str | Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Any:
    """A network in the shapes that its config lists, with all weights from the folder.

    Plan and graph are not read here; whatever cuts the network further reads and checks them.

    Returns:
        What ``from_pretrained`` returns, or None where anything is otherwise than when it was
        saved: the ordinary way then finds what may be so, and what is wrong.
    """

    def build(config: Any, *inputs: Any, **options: Any) -> Any:
        with building_within(source, kwargs):  # not for the weights: it takes time
            network = concrete(config, *inputs, **options)
        if not set_parts(network, config):
            raise _NotAsRecordedError
        return network

    wanted = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        opener = substitute_class(concrete, build)
        network, found = opener.from_pretrained(source, *args, **wanted)
    except Exception:  # transformers raise all kinds; the ordinary way meets them again
        return None
    if any(found.get(name) for name in ("missing_keys", "mismatched_keys", "unexpected_keys")):
        return None
    fill_empty(network)
    return (network, found) if kwargs.get("output_loading_info") else network


def _open_delta(
    cls: Any,
    delta: Delta,
    base: Any,
    source: str | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """The dense model, turned into the pruned one."""
    config = kwargs.get("config")
    if config is None:
        raise PruningError(
            f"The config of {source} names no pruned model; expected the files of "
            "save_pretrained(..., delta_of=...). Copy or save the folder again."
        )
    options = {name: value for name, value in kwargs.items() if name != "config"}
    concrete = _concrete(cls, source, kwargs)
    dense = concrete.from_pretrained(base or delta.base, *args, **options)
    network = dense[0] if options.get("output_loading_info") else dense
    apply_delta(delta, network, config, source)
    return dense


def _load(
    concrete: Any,
    source: str | Path,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    found_anew: PruningGraph | None,
) -> tuple[_Cut, dict[str, Any]]:
    """A network in the shape of its plan, with the weights, and the load errors by name.

    Args:
        concrete: Its class.
        source: The folder.
        args: Of the call.
        kwargs: Of the call.
        found_anew: What a call of this class shows, where the record may not be all of it.
    """
    cuts: list[_Cut] = []

    def build(config: Any, *inputs: Any, **options: Any) -> Any:
        def from_config(config: Any) -> Any:
            with building_within(source, kwargs):
                return concrete(config, *inputs, **options)

        cuts.append(_shaped(from_config, found_anew, source, config))
        return cuts[-1].network

    # With all load errors by name, what may be ignored is decided by the caller.
    wanted = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    _, found = substitute_class(concrete, build).from_pretrained(source, *args, **wanted)
    return cuts[-1], found


def _with_config(cls: Any, kwargs: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the config of the class that was pruned, where the folder names the package.

    Args:
        cls: The class that opens it.
        kwargs: Of the call.
        stored: Fields of the config in the folder.

    Raises:
        PruningError: If the folder does not name that class.
    """
    given: Any = kwargs.get("config")
    if hasattr(given, "to_dict"):
        if getattr(type(given), "model_type", None) != MODEL_TYPE:
            return dict(kwargs)
        fields: Mapping[str, Any] = given.to_dict()
    else:
        fields = _fields(given, kwargs) if given else stored
        if fields.get("model_type") != MODEL_TYPE:
            return dict(kwargs)
    kind = pruned_type(fields)
    mapping = require("transformers", "transformers").CONFIG_MAPPING
    wanted = getattr(cls, "config_class", None) or mapping[kind]
    part = getattr(wanted, "base_config_key", "")
    whole = {n: v for n, v in fields.items() if n not in (TYPE_FIELD, OPENING_FIELD, "auto_map")}
    plain = whole[part] if part and isinstance(whole.get(part), dict) else whole
    options = {n: v for n, v in kwargs.items() if n != "config"}
    if hasattr(given, "to_dict"):
        return {**options, "config": config_of(wanted, {**plain, "model_type": kind})}
    passed = {n: options.pop(n) for n in [*options] if n in _NOT_FIELDS}
    config, rest = config_of(
        wanted, {**plain, "model_type": kind}, return_unused_kwargs=True, **options
    )
    return {**passed, **rest, "config": config}


def _is_clear(error: Exception) -> bool:
    """Whether the message of an error names the problem, as those of transformers do."""
    text = str(error)
    if isinstance(error, OSError):
        return error.errno is None and not isinstance(error, FileNotFoundError)
    if isinstance(error, TypeError):
        return "keyword argument" in text or "positional argument" in text
    if isinstance(error, (JSONDecodeError, UnicodeDecodeError)) or "StreamReader" in text:
        return False
    if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
        return _raised_in(error).startswith("transformers.")  # those of torch name no file or field
    return isinstance(error, (ValueError, RuntimeError, ImportError))


def _raised_in(error: Exception) -> str:
    """The name of the module whose code raised an error; "" where it is not known."""
    frames = [*traceback.walk_tb(error.__traceback__)]
    return str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""


def _damage(error: Exception, cls: Any, source: str | Path) -> PruningError:
    return PruningError(
        f"{source} cannot be opened as {cls.__name__} ({type(error).__name__}: "
        f"{' '.join(str(error).split())}); expected the files of save_pretrained. Is one damaged "
        "or not complete? Copy or save the folder again."
    )


def _plan_to_open(
    source: str | Path, kwargs: Mapping[str, Any], fields: Mapping[str, Any]
) -> PruningPlan | None:
    """The plan with which a folder must be opened, or None.

    Raises:
        PruningError: If a given config has another plan than the folder.
    """
    given = kwargs.get("config")
    stored = _read(fields)
    if given is None:
        return stored
    others = vars(given) if hasattr(given, "to_dict") else _fields(given, kwargs)
    same = others.get(CONFIG_FIELD) == fields.get(CONFIG_FIELD)
    plan = stored if same else _read(others)
    if stored is not None and not stored.is_full and stored != plan:
        other = "no plan" if plan is None else "another plan"
        raise PruningError(
            f"{source} holds a pruned model, but the given config has {other}; expected "
            "the plan of the folder. Make the config from the folder, "
            f"AutoConfig.from_pretrained({str(source)!r}, ...), or leave it out."
        )
    return plan


def _fields(source: Any, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields of the config file of a folder; none if there is no file."""
    transformers = require("transformers", "transformers")
    hub = {name: kwargs[name] for name in _HUB if name in kwargs}
    try:
        with reading(f"The config.json of {source}", "copy or save the folder again"):
            fields, _ = transformers.PreTrainedConfig.get_config_dict(source, **hub)
    except OSError:
        return {}  # an adapter, or no model: transformers opens it or reports what is missing
    if not isinstance(fields, Mapping):
        raise PruningError(
            f"The config.json of {source} is a {type(fields).__name__}; expected an object with "
            "fields. Copy or save the folder again."
        )
    return fields


def _read(fields: Mapping[str, Any]) -> PruningPlan | None:
    record = {CONFIG_FIELD: fields.get(CONFIG_FIELD)}
    return recorded_plan(SimpleNamespace(config=SimpleNamespace(**record)))


def _concrete(cls: Any, source: str | Path, kwargs: Mapping[str, Any]) -> Any:
    """The model class that opens the folder; of an Auto class, the class that it chooses.

    Raises:
        PruningError: If the folder holds another type of model than the class is for.
    """
    given: Any = kwargs.get("config")
    if hasattr(cls, "from_config"):
        trust = {n: kwargs[n] for n in ("trust_remote_code", "code_revision") if n in kwargs}
        hub = {name: kwargs[name] for name in _HUB if name in kwargs}
        try:
            config = copy.deepcopy(given)
            if not hasattr(given, "to_dict"):
                opener = require("transformers", "transformers").AutoConfig
                config = opener.from_pretrained(given or source, **hub, **trust)
            listed = (getattr(cls, "_model_mapping", None) or {}).get(type(config), None)
            if isinstance(listed, type):  # else the class that the config names, of several
                return listed
            with building_within(source, kwargs), torch.device("meta"):
                return type(cls.from_config(config, **trust))
        except Exception as error:
            if _is_clear(error):
                raise
            raise _damage(error, cls, source) from error
    fields = given.to_dict() if hasattr(given, "to_dict") else _fields(given or source, kwargs)
    held, wanted = fields.get("model_type"), getattr(cls, "config_class", None)
    if wanted is not None and held and wanted.model_type and held != wanted.model_type:
        raise PruningError(
            f"{source} holds a model of type {held!r}, saved from {fields.get('architectures')}; "
            f"{cls.__name__} is for the type {wanted.model_type!r}. Open it with that class, or "
            "an Auto class."
        )
    return cls


def _recorded_text(config: Any, source: str | Path) -> str:
    text = getattr(config, GRAPH_FIELD, None)
    if not isinstance(text, str):
        raise PruningError(
            f"The config of {source} holds a plan, but no graph of what it cuts; expected both, as "
            "save_pretrained writes them. Copy or save the folder again."
        )
    return text


def _shaped(
    build: Callable[..., Any], found_anew: PruningGraph | None, source: str | Path, config: Any
) -> _Cut:
    """Build a network in the shape of the plan in its config; no weights are loaded yet.

    Args:
        build: Builds the network from a config.
        found_anew: What a call of it shows, where the record may not be all of it.
        source: The folder, for messages.
        config: A config of which no other object holds a reference.
    """
    recorded = PruningGraph.from_json(_recorded_text(config, source)).groups
    built = {group.name: group.size for group in recorded}
    plan = _read(vars(config)) or PruningPlan({}, {})
    for name in sorted(set(plan.sizes) - set(built)):
        raise PruningError(
            f"The plan of {source} cuts {name!r}, which the graph beside it does not name; "
            f"expected one of {sorted(built)[:6]}. Was config.json edited? Copy or save the "
            "folder again."
        )
    widths = built | plan.widths
    # A part that is not in the folder is cut like the others if it is built like them.
    for name, number in _check_numbers(config, recorded, widths, source).items():
        set_config_value(config, name, number)
    as_built = copy.deepcopy(config)
    network = build(config)
    _tie(network)
    saved = getattr(config, "architectures", None) or ()
    own = any(base.__name__ in saved for base in type(network).__mro__)
    # In another class a head of the same name may read other units.
    graph = recorded_graph(network) or PruningGraph()
    graph = fitted_graph(graph, network, "" if own else _base(network).rstrip("."))
    if found_anew is not None:
        graph = fitted_graph(with_found(graph, found_anew), network)
    now = present_plan(network, graph.groups)
    _check_built(network, graph.groups, now, source)
    check_stored(network, graph, graph.full)
    reshape_tensors(network, graph.groups, now)
    # The state dict of a module with a tracker contains the plan, which is expected here.
    known = getattr(network, "_keys_to_ignore_on_load_unexpected", None)
    network._keys_to_ignore_on_load_unexpected = {*(known or ()), r"lightning_mi_prune\.plan"}
    narrowed = [group for group in recorded if widths[group.name] < group.size]
    sizes = {group.size for group in narrowed if group.kind not in _OF_ATTENTION}
    return _Cut(network, graph.groups, now, partial(_rebuilt, build, as_built), sizes)


def _tie(network: Any) -> None:
    """Share the tensors that are shared once weights are loaded; a graph names them once."""
    ties = getattr(network, "all_tied_weights_keys", None) or {}
    pairs = [(network.get_parameter(a), network.get_parameter(b)) for a, b in ties.items()]
    replace_tensors(network, [(old, new) for old, new in pairs if old is not new])


def _rebuilt(build: Callable[..., Any], config: Any) -> Any:
    """The network as built, with random weights."""
    for name in (CONFIG_FIELD, GRAPH_FIELD):
        vars(config).pop(name, None)
    return build(config).eval()


def _check_built(
    network: nn.Module, groups: Sequence[DependencyGroup], plan: PruningPlan, source: str | Path
) -> None:
    """Refuse a plan that does not belong to what the class builds."""
    wanted = named_plan(network, groups) or plan
    names, kind, base = {group.name for group in groups}, type(network).__name__, _base(network)
    encoder = [name for name in wanted.sizes if name.startswith(base)]
    # Units of a head that this class does not have need no check.
    for name in encoder or wanted.sizes:
        if name not in names and wanted.width(name) < wanted.sizes[name]:
            raise PruningError(
                f"The plan of {source} cuts {name!r}, which {kind} does not have; expected one of "
                f"{sorted(names)[:6]}. Open it with the class and the number of layers it was "
                "saved from."
            )
    for group in groups:
        for s in group.tensors:
            size = layout_size(s.layout, group.all_widths({}))
            found = tensor_of(network, s.tensor).shape[s.dim]
            if found != size:
                raise PruningError(
                    f"{kind} builds {s.tensor!r} with {found} entries along dimension {s.dim}; "
                    f"expected {size}, the size in the plan of {source}. Was config.json "
                    "edited, or a size passed? Leave the sizes as saved."
                )


def _base(network: nn.Module) -> str:
    """The start of the names of the encoder's tensors."""
    prefix = str(getattr(network, "base_model_prefix", ""))
    return f"{prefix}." if isinstance(getattr(network, prefix, None), nn.Module) else ""


def _check_numbers(
    config: Any, groups: Sequence[DependencyGroup], widths: Mapping[str, int], source: str | Path
) -> dict[str, int]:
    """Refuse a config with other numbers than those a cut writes, or those of the model as built.

    Returns:
        The numbers as built.
    """
    encoder = [group for group in groups if group.kind != "pooler"]
    built = config_numbers(encoder, {group.name: group.size for group in encoder})
    right = [config_numbers(encoder, widths), config_numbers(groups, widths), built]
    found = {name: config_value(config, name) for name in built}
    ties = {group.tie for group in encoder}
    # Heads and what they are tied to are right together or wrong together.
    tied = {
        name
        for group in encoder
        if group.config is not None and (group.tie is not None or group.config in ties)
        for name in config_fields(group)
    }
    tied &= built.keys()
    several = {
        frozenset(name for name in config_fields(group) if name in built)
        for group in encoder
        if group.config_sizes
    }
    alone = built.keys() - tied - {name for part in several for name in part}
    for subset in (tied, *several, *({name} for name in alone)):
        if all(any(found[n] != (built | numbers)[n] for n in subset) for numbers in right):
            expected = built | right[0]
            wrong = {n: found[n] for n in sorted(subset) if found[n] != expected[n]}
            expected = {n: expected[n] for n in wrong}
            raise PruningError(
                f"The config of {source} has {wrong}; expected {expected} from its plan. Was "
                "config.json edited, or a size passed? Leave the sizes as saved."
            )
    return built


def _check_loaded(
    network: Any, cut: _Cut, found: Mapping[str, Any], source: str | Path, ignores: bool
) -> None:
    """Refuse weights that lack what the plan cuts, or have it in another shape.

    Raises:
        PruningError: If there are such weights, or others of another shape that may not be ignored.
    """
    missing = sorted(name for name in found["missing_keys"] if cut.needs(name, found))
    if missing:
        raise PruningError(
            f"{source} lacks {missing[:6]}, which its plan cuts; expected all weights of a "
            f"{type(network).__name__}, except its head. {_saved_from(network)}"
        )
    others = sorted(found["mismatched_keys"], key=lambda item: str(item[0]))
    bad = [item for item in others if cut.refuses(*item)]
    if bad or (others and not ignores):
        name, shape, expected = (bad or others)[0]
        reason = "its plan" if bad else f"this {type(network).__name__}"
        remedy = "" if bad else " Or initialize it: ignore_mismatched_sizes=True."
        raise PruningError(
            f"{name!r} has shape {tuple(shape)} in {source}; expected {tuple(expected)} from "
            f"{reason}. {_saved_from(network)}{remedy}"
        )


@torch.no_grad()
def _fill_shared(network: nn.Module, missing: set[str]) -> None:
    """Fill tensors that the weights hold only under the name of a tensor they were shared with.

    transformers saves a shared tensor once. But tensors that are shared in a model whose embeddings
    were resized are not always shared when it is built, and would be new.
    """
    ties = getattr(network, "_tied_weights_keys", None)
    for name, source in ties.items() if isinstance(ties, Mapping) else ():
        if name not in missing or source in missing:
            continue
        if _others(network, name) <= missing:
            continue  # the whole part is new
        target, value = network.get_parameter(name), network.get_parameter(source)
        if target.shape == value.shape and not target.is_meta and not value.is_meta:
            target.copy_(value)
            missing.discard(name)


def _others(network: nn.Module, name: str) -> set[str]:
    """The other tensors of the module that holds a tensor."""
    owner = name.rpartition(".")[0]
    inside = (n for n, _ in network.get_submodule(owner).named_parameters())
    return {f"{owner}.{n}" if owner else n for n in inside} - {name}


def _saved_from(network: Any) -> str:
    saved = getattr(network.config, "architectures", None)
    return f"Open it with the class it was saved from, {saved}, and its sizes; or save it again."


class _Cut:
    """Tensors of a network that a plan cuts, and which of them must be in the weights."""

    def __init__(
        self,
        network: nn.Module,
        groups: Sequence[DependencyGroup],
        plan: PruningPlan,
        rebuild: Callable[[], nn.Module],
        sizes: Collection[int],
    ) -> None:
        self.network, self.groups, self.plan = network, groups, plan
        self._rebuild, self._sizes = rebuild, sizes
        narrowed = [group for group in groups if plan.width(group.name) < group.size]
        self.shapes = shapes_at(network, groups, plan)
        self.dims: dict[str, set[int]] = {}
        self.kinds: dict[str, set[str]] = {}
        for group in narrowed:
            for s in group.tensors:
                self.dims.setdefault(s.tensor, set()).add(s.dim)
                self.kinds.setdefault(s.tensor, set()).add(group.kind)
        self.base = _base(network)

    def may_cut_more(self, found: Mapping[str, Any]) -> bool:
        """Whether a part that the record does not name, such as a new head, may read what is cut.

        Args:
            found: The load errors.
        """
        names = {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}
        tensors = tensors_of(self.network)
        lengths = {n for name in names - self.dims.keys() for n in tensors[name].shape}
        return any(length % size == 0 for length in lengths for size in self._sizes)

    def discovered(self, source: str | Path) -> PruningGraph:
        """What a call of the network shows that it can lose, found as built with random weights.

        Raises:
            PruningError: If nothing is found.
        """
        network = self._rebuild()
        inputs = example_inputs(network)

        def run(called: nn.Module) -> Any:
            output = called(**inputs)
            if not isinstance(output, Mapping):
                return output
            # The record may cut the hidden size, which makes these narrower.
            return {n: v for n, v in output.items() if n != "last_hidden_state"} or output

        with warnings.catch_warnings(), fixed_random_state(network):
            warnings.simplefilter("ignore", PruningWarning)
            try:
                return discover_run(network, run)
            except PruningError as error:
                raise PruningError(
                    f"{source} has no weights for a part of {type(network).__name__}, and which of "
                    f"it must be cut was not found ({error}); expected the class it was saved "
                    f"from. {_saved_from(network)}"
                ) from error

    def needs(self, name: str, found: Mapping[str, Any]) -> bool:
        """Whether a missing tensor must be in the weights.

        After the layers a model has parts that others lack: a pooler, a head. Such a part is cut
        with the hidden size; it is new if all of its tensors are missing.
        """
        if name not in self.dims or 0 in self.shapes[name]:
            return False
        if self.kinds[name] != {"hidden"}:
            return True
        if name.startswith(self.base) and "pooler" not in name.split("."):
            return True
        return not _others(self.network, name) <= set(found["missing_keys"])

    def refuses(self, name: str, shape: Sequence[int], expected: Sequence[int]) -> bool:
        """Whether a tensor differs in shape along a dimension that the plan cuts."""
        if name not in self.dims:
            return False
        if self.kinds[name] - {"hidden", "pooler"} or len(shape) != len(expected):
            return True
        return any(shape[dim] != expected[dim] for dim in self.dims[name])

    def fill(self) -> None:
        """Give storage and values to tensors that a cut adds and that no file holds."""
        for group in self.groups:
            kept = self.plan.kept[group.name]
            for selects in group.unit_arguments if len(kept) < group.size else ():
                buffers = self.network.get_submodule(selects.module)._buffers
                old = buffers.get(KEPT_UNITS)
                if old is not None:
                    buffers[KEPT_UNITS] = torch.tensor(kept, dtype=old.dtype, device=old.device)
        fill_empty(self.network)
