"""A pruned model as what it changes of a dense one: its plan, and the weights that differ."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.checkpoint.loading import read_tensors
from lightning_mi_prune.checkpoint.recorded import named_plan, recorded_graph
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import CONFIG_FIELD, GRAPH_FIELD, PruningPlan, recorded_plan
from lightning_mi_prune.core.untrusted import described, read_json, reading, text
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.surgery.tensors import replace_tensors
from lightning_mi_prune.surgery.units import apply_plan

__all__ = ["Delta", "apply_delta", "delta_between", "digest_of", "read_delta", "write_delta"]

_FILE = "delta.json"
_WEIGHTS = "delta.safetensors"
_VERSION = 1
_LONGEST = 2**16


@dataclass(frozen=True)
class Delta:
    """What a pruned model changes of a dense one.

    Args:
        base: Name or folder of the dense model.
        digest: SHA-256 of its weights.
        changed: Tensors that are not those of the dense model without the removed units, by name.
    """

    base: str
    digest: str
    changed: Mapping[str, Tensor]


def digest_of(network: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of the parameters and buffers of a network.

    Example:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> digest_of(a) == digest_of(a), digest_of(a) == digest_of(b)
        (True, False)
    """
    found = hashlib.sha256()
    for name, tensor in sorted(_tensors(network).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        values = tensor.detach().cpu().contiguous().flatten()
        found.update(values.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def delta_between(network: Any, dense: Any, base: str) -> Delta:
    """What a cut network changes of the dense one.

    Args:
        network: A cut Hugging Face network; only read.
        dense: The network before it was cut; it becomes the smaller one.
        base: Its name or folder.

    Raises:
        PruningError: If the network is not a cut of the dense one.
    """
    graph, plan = recorded_graph(network), recorded_plan(network)
    if graph is None or plan is None:
        raise PruningError(
            f"{type(network).__name__} has no units removed, so there is no change to store "
            "beside its weights; expected a pruned model. Save it without delta_of."
        )
    digest = digest_of(dense)
    _cut(dense, graph, plan, base)
    mine, selected = _tensors(network), _tensors(dense)
    if mine.keys() != selected.keys() or any(mine[n].shape != t.shape for n, t in selected.items()):
        odd = sorted(
            name
            for name in {*mine, *selected}
            if name not in mine or name not in selected or mine[name].shape != selected[name].shape
        )
        raise PruningError(
            f"{base} cut to the plan differs from the pruned model in {odd[:4]}; expected the "
            "dense model that it was pruned from. Whole layers that are gone have no delta: save "
            "the model without delta_of."
        )
    changed = {n: t for n, t in mine.items() if not torch.equal(t.cpu(), selected[n].cpu())}
    return Delta(base, digest, changed)


def write_delta(delta: Delta, folder: Path) -> None:
    """Write the files of a delta into a folder that has the config already."""
    from safetensors.torch import save_file

    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in delta.changed.items()}
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})
    body = {"version": _VERSION, "base": delta.base, "sha256": delta.digest}
    (folder / _FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


def read_delta(folder: str | Path) -> Delta | None:
    """The delta in a folder; None where there is none.

    Raises:
        PruningError: If its files are damaged.
    """
    path = Path(folder) / _FILE
    if not path.is_file():
        return None
    with reading(f"{path}", "copy or save the folder again"):
        body = read_json(
            path.read_text(encoding="utf-8"), f"{path}", version=_VERSION, longest=_LONGEST
        )
        base, digest = text(body.get("base")), text(body.get("sha256"))
    return Delta(base, digest, read_tensors(path.with_name(_WEIGHTS)))


@torch.no_grad()
def apply_delta(delta: Delta, dense: Any, config: Any, source: str | Path) -> None:
    """Turn the dense model into the pruned one.

    Args:
        delta: What it changes.
        dense: The dense network.
        config: The config of the pruned one, with its plan and graph.
        source: The folder, for messages.

    Raises:
        PruningError: If the dense network is another one than the delta was made from.
    """
    saved = getattr(config, "architectures", None) or ()
    if type(dense).__name__ not in saved:
        raise PruningError(
            f"{source} changes a model of {list(saved)}; expected that class, not "
            f"{type(dense).__name__}, which has other parts. Open it with that class."
        )
    found = digest_of(dense)
    if found != delta.digest:
        raise PruningError(
            f"{source} changes {delta.base!r} with weights of SHA-256 {delta.digest[:16]}..., but "
            f"those opened have {found[:16]}...; expected the same dense model. Give its folder: "
            "from_pretrained(..., base=folder)."
        )
    plan, graph = _recorded(dense, config, source)
    _cut(dense, graph, plan, str(source))
    selected = _tensors(dense)
    for name, value in delta.changed.items():
        old = selected.get(name)
        if old is None or old.shape != value.shape or old.dtype != value.dtype:
            raise PruningError(
                f"{source} changes {name!r} to {described(value)}; expected {described(old)}. Copy "
                "or save the folder again."
            )
    pairs = []
    for name, value in delta.changed.items():
        old = selected[name]
        new = value.to(old.device)
        grad = old.requires_grad
        pairs.append((old, nn.Parameter(new, grad) if isinstance(old, nn.Parameter) else new))
    replace_tensors(dense, pairs)


def _recorded(dense: Any, config: Any, source: str | Path) -> tuple[PruningPlan, PruningGraph]:
    """The plan and the graph in the config of a pruned model, checked against the dense one."""
    fields = (CONFIG_FIELD, GRAPH_FIELD)
    own = dense.config
    dense.config = copy.deepcopy(own)
    try:
        for name in fields:
            setattr(dense.config, name, getattr(config, name, None))
        plan, graph = recorded_plan(dense), recorded_graph(dense)
    finally:
        dense.config = own
    if plan is None or graph is None:
        raise PruningError(
            f"The config of {source} has no {' and '.join(fields)}; expected both. Copy or save "
            "the folder again."
        )
    return plan, graph


def _cut(dense: Any, graph: PruningGraph, plan: PruningPlan, source: str) -> None:
    if named_plan(dense, graph.groups) is not None:
        raise PruningError(f"{source} holds a pruned model; expected the dense one.")
    apply_plan(dense, graph.groups, plan)


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Tensor] = network.state_dict()
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name in state}
