"""What torch-pruning does with a model of the zoo: half of everything that it finds.

It is set up as its own examples for transformers and vision models are: layers that make the
outputs stay, the number of heads of each projection is given and whole heads go (head dimensions
have an order under rotary embeddings), fused gates are two groups. Afterwards the numbers of
attention modules that its examples correct by hand are corrected, for every module with such a
number. What it returns is run, and the shape of its output compared; nothing else of it is checked.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from benchmarks.baselines import torch_pruning
from benchmarks.zoo.checking import first_output
from benchmarks.zoo.models import Inputs

__all__ = ["pruned_by_rival"]

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
GROUPED = ("num_key_value_heads", "num_kv_heads")
TOTALS = ("all_head_size", "embed_dim", "inner_dim", "attn_dim", "split_size", "hidden_size")
QUERY = ("q_proj", "query", "q", "q_lin", "qkv", "query_key_value", "c_attn", "qkv_proj")
FUSED = ("qkv", "query_key_value", "c_attn")
OTHERS = ("k_proj", "v_proj", "key", "value", "k", "v", "k_lin", "v_lin", "kv")
RATIO = 0.5


def pruned_by_rival(model: nn.Module, inputs: Inputs, report: dict[str, Any]) -> None:
    """Prune a copy, and note in ``report`` how far it came: each step as it is reached."""
    package = torch_pruning()
    cut = copy.deepcopy(model)
    before = sum(p.numel() for p in cut.parameters())
    with torch.no_grad():
        want = first_output(cut(*inputs.args, **inputs.kwargs)).shape
    heads = dict(_projections(cut))
    fused = {m for n, m in cut.named_modules() if n.rpartition(".")[2] in FUSED}
    sizes = {m: _width(m) // number // (3 if m in fused else 1) for m, number in heads.items()}
    gates = {m: 2 for n, m in cut.named_modules() if n.endswith(("gate_up_proj", ".Wi"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report["step"] = "build"
        pruner = package.pruner.BasePruner(
            cut,
            inputs,
            importance=package.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=RATIO,
            num_heads=dict(heads),
            prune_num_heads=True,
            prune_head_dims=False,
            head_pruning_ratio=RATIO,
            in_channel_groups={},
            out_channel_groups=dict(gates),
            ignored_layers=_outputs(cut, inputs),
            forward_fn=lambda net, given: net(*given.args, **given.kwargs),
            output_transform=lambda out: first_output(out).sum(),
        )
        report["step"] = "prune"
        pruner.step()
    after = sum(p.numel() for p in cut.parameters())
    report["removed"] = round(1 - after / before, 4)
    report["step"] = "run"
    _correct(cut, sizes)
    with torch.no_grad():
        got = first_output(cut(*inputs.args, **inputs.kwargs))
    if got.shape != want:
        raise RuntimeError(f"outputs of {tuple(got.shape)}, not {tuple(want)}")
    report["step"] = "done"


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    own = vars(module)
    values = (own.get(name, getattr(own.get("config"), name, None)) for name in names)
    return next((v for v in values if type(v) is int and v > 1), None)


def _projections(model: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The projections of attention modules, with their number of heads."""
    for module in model.modules():
        names = {*dict(module.named_children())}
        heads = _number(module, HEADS)
        if not names & {*QUERY} or heads is None:
            continue
        grouped = _number(module, GROUPED) or heads
        for name in names & {*QUERY, *OTHERS}:
            layer = module.get_submodule(name)
            if isinstance(layer, nn.Linear):
                yield layer, grouped if name in OTHERS else heads


def _outputs(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """The layers whose output has the last dimension of the model's, run last."""
    ran: list[tuple[nn.Module, int]] = []
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d)

    def note(module: nn.Module, args: Any, out: Any) -> None:
        dim = -1 if isinstance(module, nn.Linear) else 1
        ran.append((module, out.shape[dim]))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, kinds)]
    try:
        with torch.no_grad():
            out = first_output(model(*inputs.args, **inputs.kwargs))
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {out.shape[-1], out.shape[1] if out.ndim > 1 else 0}
    return [module for module, size in ran if size in sizes][-1:]


def _correct(model: nn.Module, sizes: Mapping[nn.Module, int]) -> None:
    """Set the numbers of attention modules to what their projections now have."""
    for module in model.modules():
        children = dict(module.named_children())
        name = next((name for name in QUERY if children.get(name) in sizes), None)
        if name is None:
            continue
        query, size = children[name], sizes[children[name]]
        keys = next((children[n] for n in ("k_proj", "key", "k") if n in children), query)
        width = _width(query) // (3 if name in FUSED else 1)
        heads = max(1, width // size)
        grouped = max(1, _width(keys) // (3 if keys is query and name in FUSED else 1) // size)
        values = {
            **dict.fromkeys(HEADS, heads),
            **dict.fromkeys(GROUPED, grouped),
            **dict.fromkeys(TOTALS, width),
            "num_key_value_groups": max(1, heads // grouped),
        }
        own = vars(module)
        for number, value in values.items():
            if type(own.get(number)) is int:
                own[number] = value


def _width(module: nn.Module) -> int:
    return int(getattr(module, "out_features", 0))
