"""Stacks of layers of Hugging Face models, encoders and decoders apart: a table of paths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from lightning_mi_prune.axes import WidthAxis
from lightning_mi_prune.depth import DepthAxis
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.families import find_axes, is_within
from lightning_mi_prune.families.residual import module_at
from lightning_mi_prune.stack import blocks_of

__all__ = ["STACKS", "choose_stacks", "find_parts", "find_stacks", "stack_at"]

_LISTS = ("layer_types", "mlp_layer_types")

_ENCODER = {"encoder.layer": ("", "num_hidden_layers")}
_DECODER = {"layers": ("", "num_hidden_layers")}

# By model type: path of the container, seen from the base model, and the field that counts it.
STACKS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "mpnet", "deberta-v2"), _ENCODER),
    **dict.fromkeys(("vit", "deit", "llama", "mistral", "qwen2", "qwen3"), _DECODER),
    "distilbert": {"transformer.layer": ("", "n_layers")},
    "gpt2": {"h": ("", "n_layer")},
    "bart": {"encoder.layers": ("", "encoder_layers"), "decoder.layers": ("", "decoder_layers")},
    "t5": {"encoder.block": ("encoder", "num_layers"), "decoder.block": ("decoder", "num_layers")},
}
# T5 keeps a config for each half beside the one of the whole; its first blocks hold the bias of
# relative positions that all others add.
_OF_THE_WHOLE = {"t5": {"encoder.block": "num_layers", "decoder.block": "num_decoder_layers"}}
_FIXED = {"t5": 1}


def find_stacks(module: nn.Module) -> list[DepthAxis]:
    """Stacks of layers inside ``module``, named from it.

    Args:
        module: Any module that holds a network of a known family, at any depth.

    Raises:
        PruningError: If there is none, or its layers share their weights.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50)
        >>> [(axis.name, axis.size) for axis in find_stacks(BertModel(config))]
        [('encoder.layer', 3)]
    """
    found: list[DepthAxis] = []
    seen: list[str] = []
    for path, network in module.named_modules():
        kind = getattr(getattr(network, "config", None), "model_type", None)
        inside = any(top == "" or path.startswith(f"{top}.") for top in seen)
        if inside or not hasattr(network, "base_model_prefix"):
            continue
        if kind == "albert":
            raise PruningError(
                "ALBERT runs one layer many times, so none can be removed by itself. Lower "
                "num_hidden_layers in its config instead."
            )
        mine = [axis.prefixed(path) for axis in _describe(network, str(kind))]
        if mine:
            seen.append(path)
            found += mine
    if not found:
        raise PruningError(
            f"No stack of layers was found in {type(module).__name__}. Known model types: "
            f"{sorted(STACKS)}; describe another stack with DepthAxis."
        )
    return found


def choose_stacks(
    module: nn.Module, paths: Sequence[str] | None = None, within: str = ""
) -> list[DepthAxis]:
    """The stacks at the given paths, or all that a family knows below ``within``.

    Raises:
        PruningError: If there is none, or a path is no container of layers of one class.
    """
    if paths is None:
        found = [stack for stack in find_stacks(module) if is_within(stack.name, within)]
        if not found:
            names = [stack.name for stack in find_stacks(module)]
            raise PruningError(f"module={within!r} holds no stack of layers; there are {names}.")
        return found
    known: dict[str, DepthAxis] = {}
    with contextlib.suppress(PruningError):  # a model of no known family: paths will do
        known = {stack.name: stack for stack in find_stacks(module)}
    chosen = []
    for path in dict.fromkeys(paths):
        stack = known.get(path) or stack_at(module, path)
        if stack is None or stack.size > 1:  # one that was cut to one layer is still a stack
            blocks_of(module, path)
        chosen += [] if stack is None else [stack]
    return chosen


def find_parts(
    module: nn.Module, stacks: Sequence[str] | None = None, within: str = ""
) -> list[WidthAxis | DepthAxis]:
    """The chosen stacks, and the axes of all units where a family knows them.

    Raises:
        PruningError: As :func:`choose_stacks` raises it.
    """
    found: list[WidthAxis | DepthAxis] = []
    with contextlib.suppress(PruningError):  # units no family knows are simply not followed
        found += find_axes(module)
    return found + choose_stacks(module, stacks, within)


def stack_at(module: nn.Module, path: str) -> DepthAxis | None:
    """The stack whose container is at a path, or None if no container of numbered layers is."""
    container = module_at(module, path)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)) or not len(container):
        return None
    # A ModuleList is never called itself; what holds it is.
    scope = path if isinstance(container, nn.Sequential) else path.rpartition(".")[0]
    return DepthAxis(name=path, size=len(container), network=scope, scope=scope)


def _describe(network: nn.Module, kind: str) -> Iterator[DepthAxis]:
    prefix = str(getattr(network, "base_model_prefix", ""))
    inner = getattr(network, prefix, None) if prefix else None
    base, scope = (inner, prefix) if isinstance(inner, nn.Module) else (network, "")
    at = f"{scope}." if scope else ""
    config = network.config
    for path, (holder, field) in STACKS.get(kind, {}).items():
        container = module_at(base, path)
        if not isinstance(container, nn.ModuleList):
            continue
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise PruningError(
                f"{type(network).__name__} scales attention by the place of a layer, so what is "
                "above a removed one would change. Set scale_attn_by_inverse_layer_idx=False."
            )
        whole = _OF_THE_WHOLE.get(kind, {}).get(path)
        fields = [(f"{at}{holder}" if holder else scope, field)]
        fields += [("", field)] if scope and not holder else []
        fields += [("", whole)] if whole else []
        yield DepthAxis(
            name=f"{at}{path}",
            size=len(container),
            fixed=_FIXED.get(kind, 0),
            fields=tuple(dict.fromkeys(fields)),
            lists=tuple(
                (name, tuple(entries))
                for name in _LISTS
                if isinstance(entries := getattr(config, name, None), (list, tuple))
                and len(entries) == len(container)
            ),
            scope=f"{at}{holder}" if holder else scope,
        )
