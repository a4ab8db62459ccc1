"""Stacks of layers of Hugging Face models, from a table of paths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.discovery.families import NotDescribedError, find_groups, is_within
from lightning_mi_prune.discovery.families.residual import module_at
from lightning_mi_prune.discovery.families.text import TEXT
from lightning_mi_prune.discovery.families.vision import VISION
from lightning_mi_prune.graph.containers import layer_paths
from lightning_mi_prune.graph.groups import DependencyGroup, LayerStack

__all__ = [
    "STACKS",
    "StackNames",
    "check_stack_paths",
    "choose_stacks",
    "find_groups_and_stacks",
    "find_stacks",
    "stack_at",
]

_LISTS = ("layer_types", "mlp_layer_types")

_UNITS = {**TEXT, **VISION}


@dataclass(frozen=True)
class StackNames:
    """A stack of a model type, as paths from the base model.

    Args:
        path: The container.
        field: Config field that counts its layers.
        holder: Path of the encoder or decoder, if it has its own config; "" otherwise.
        whole: Field of the config of the whole model that counts them too.
        fixed: Number of layers at the bottom that must stay.
        adds: As for :class:`LayerStack`.
        closing: As for :class:`LayerStack`.
    """

    path: str
    field: str = "num_hidden_layers"
    holder: str = ""
    whole: str | None = None
    fixed: int = 0
    residual_branches: tuple[tuple[str, str], ...] = ()
    final_norm: str = ""


def _encoder(kind: str, field: str = "num_hidden_layers") -> tuple[StackNames, ...]:
    names = _UNITS[kind].layer
    pre_norm = names.residual_inputs[1] in names.norms
    return (
        StackNames(
            _UNITS[kind].stack[0],
            field,
            residual_branches=(
                (names.out, names.residual_inputs[0]),
                (names.ffn_out, names.residual_inputs[1]),
            ),
            final_norm="" if pre_norm else names.norms[-1],
        ),
    )


_DECODER = (
    StackNames(
        "layers",
        residual_branches=(
            ("self_attn.o_proj", "input_layernorm"),
            ("mlp.down_proj", "post_attention_layernorm"),
        ),
    ),
)

_BART_ENDS = (("self_attn.out_proj", "self_attn"), ("fc2", "fc1"))
_BART_CROSS = ("encoder_attn.out_proj", "encoder_attn")
_T5_SELF = ("layer.0.SelfAttention.o", "layer.0.layer_norm")
_T5_CROSS = ("layer.1.EncDecAttention.o", "layer.1.layer_norm")

# Encoder and decoder of T5 have a config each beside that of the whole; their first blocks hold
# the relative position bias of all others. Projections of GPT-2 are not linear modules.
STACKS: Mapping[str, tuple[StackNames, ...]] = {
    **{kind: _encoder(kind) for kind in ("bert", "roberta", "xlm-roberta", "electra", "mpnet")},
    **{kind: _encoder(kind) for kind in ("deberta-v2", "vit", "deit")},
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _DECODER),
    "distilbert": _encoder("distilbert", "n_layers"),
    "gpt2": (StackNames("h", "n_layer"),),
    "bart": (
        StackNames(
            "encoder.layers",
            "encoder_layers",
            residual_branches=_BART_ENDS,
            final_norm="final_layer_norm",
        ),
        StackNames(
            "decoder.layers",
            "decoder_layers",
            residual_branches=(_BART_ENDS[0], _BART_CROSS, _BART_ENDS[1]),
            final_norm="final_layer_norm",
        ),
    ),
    "t5": (
        StackNames(
            "encoder.block",
            "num_layers",
            holder="encoder",
            whole="num_layers",
            fixed=1,
            residual_branches=(_T5_SELF, ("layer.1.DenseReluDense.wo", "layer.1.layer_norm")),
        ),
        StackNames(
            "decoder.block",
            "num_layers",
            holder="decoder",
            whole="num_decoder_layers",
            fixed=1,
            residual_branches=(
                _T5_SELF,
                _T5_CROSS,
                ("layer.2.DenseReluDense.wo", "layer.2.layer_norm"),
            ),
        ),
    ),
}


def find_stacks(module: nn.Module) -> list[LayerStack]:
    """Stacks of layers inside ``module``, named from it.

    Args:
        module: Any module that holds a network of a known family, at any depth.

    Raises:
        NotDescribedError: If there is none.
        PruningError: If all layers are one (ALBERT).

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(num_hidden_layers=3, hidden_size=24, vocab_size=50)
        >>> [(group.name, group.size) for group in find_stacks(BertModel(config))]
        [('encoder.layer', 3)]
    """
    found: list[LayerStack] = []
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
        mine = [group.prefixed(path) for group in _describe(network, str(kind))]
        if mine:
            seen.append(path)
            found += mine
    if not found:
        raise NotDescribedError(
            f"No stack of layers was found in {type(module).__name__}. Known model types: "
            f"{sorted(STACKS)}; describe another stack with LayerStack."
        )
    return found


def choose_stacks(
    module: nn.Module, paths: Sequence[str] | None = None, within: str = ""
) -> list[LayerStack]:
    """The stacks at the given paths, or all that a family knows below ``within``.

    Raises:
        PruningError: If there is none, or a path is not a container of layers of one class.
    """
    if paths is None:
        found = [stack for stack in find_stacks(module) if is_within(stack.name, within)]
        if not found:
            names = [stack.name for stack in find_stacks(module)]
            raise PruningError(f"module={within!r} holds no stack of layers; there are {names}.")
        return found
    known: dict[str, LayerStack] = {}
    with contextlib.suppress(PruningError):  # of an unknown family: paths are enough
        known = {stack.name: stack for stack in find_stacks(module)}
    chosen = []
    for path in dict.fromkeys(paths):
        stack = known.get(path) or stack_at(module, path)
        if stack is None or stack.size > 1:  # a stack may have been cut to one layer
            layer_paths(module, path)
        chosen += [] if stack is None else [stack]
    return chosen


def find_groups_and_stacks(
    module: nn.Module, stacks: Sequence[str] | None = None, within: str = ""
) -> list[DependencyGroup | LayerStack]:
    """The chosen stacks, and all groups of units of known families.

    Raises:
        PruningError: As for :func:`choose_stacks`.
    """
    found: list[DependencyGroup | LayerStack] = []
    with contextlib.suppress(PruningError):  # of an unknown family
        found += find_groups(module)
    return found + choose_stacks(module, stacks, within)


def check_stack_paths(module: nn.Module, stacks: Sequence[str]) -> None:
    """Refuse stacks that are only reached through attribute access of a wrapper.

    Raises:
        PruningError: If a path is not in ``named_modules``.
    """
    unknown = sorted(set(stacks) - {name for name, _ in module.named_modules()})
    if unknown:
        raise PruningError(
            f"{unknown} are reached through a wrapper, such as that of PEFT; expected paths of "
            "modules. Merge adapters first (merge_and_unload), or add them with add_adapter."
        )


def stack_at(module: nn.Module, path: str) -> LayerStack | None:
    """The stack of the container at a path, or None if there is no container."""
    container = module_at(module, path)
    if not isinstance(container, (nn.ModuleList, nn.Sequential)) or not len(container):
        return None
    # A ModuleList is not called itself, but its parent is.
    scope = path if isinstance(container, nn.Sequential) else path.rpartition(".")[0]
    return LayerStack(name=path, size=len(container), network=scope, scope=scope)


def _describe(network: nn.Module, kind: str) -> Iterator[LayerStack]:
    prefix = str(getattr(network, "base_model_prefix", ""))
    inner = getattr(network, prefix, None) if prefix else None
    base, scope = (inner, prefix) if isinstance(inner, nn.Module) else (network, "")
    at = f"{scope}." if scope else ""
    config = network.config
    for names in STACKS.get(kind, ()):
        container = module_at(base, names.path)
        if not isinstance(container, nn.ModuleList):
            continue
        if getattr(config, "scale_attn_by_inverse_layer_idx", False):
            raise PruningError(
                f"{type(network).__name__} scales attention by the index of a layer, so layers "
                "above a removed one would change. Set scale_attn_by_inverse_layer_idx=False."
            )
        half = f"{at}{names.holder}" if names.holder else scope
        fields = [(half, names.field)]
        fields += [("", names.field)] if scope and not names.holder else []
        fields += [("", names.whole)] if names.whole else []
        yield LayerStack(
            name=f"{at}{names.path}",
            size=len(container),
            fixed=names.fixed,
            config_fields=tuple(dict.fromkeys(fields)),
            config_lists=tuple(
                (name, tuple(entries))
                for name in _LISTS
                if isinstance(entries := getattr(config, name, None), (list, tuple))
                and len(entries) == len(container)
            ),
            scope=half,
            residual_branches=names.residual_branches,
            final_norm=names.final_norm,
        )
