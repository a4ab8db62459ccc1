"""Cut models of every family, for what is done with them when their training is over."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_mi_prune import PruningPlan, apply_plan, discover
from lightning_mi_prune.allocation.constraints import may_be_empty
from lightning_mi_prune.graph.groups import full_plan
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, PICTURES, batch, build, pictures
from tests.support.zoo import ZOO

OTHERS = ("llama", "cnn")
FAMILIES = (*CONFIGS, *PICTURES, *OTHERS)


class Cut(NamedTuple):
    """A model as built and cut, and inputs of both."""

    dense: nn.Module
    model: nn.Module
    inputs: dict[str, Tensor]
    plan: PruningPlan


def fresh(family: str) -> nn.Module:
    """A model as built; the same weights each time."""
    if family not in OTHERS:
        return build(family, "image" if family in PICTURES else "sequence")
    torch.manual_seed(0)
    return ZOO["llama" if family == "llama" else "depthwise"].build().eval()


def inputs_for(family: str, rows: int = 4) -> dict[str, Tensor]:
    """Inputs of a family."""
    if family == "cnn":
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    found = pictures(rows) if family in PICTURES else batch(rows)
    return {"input_ids": found["input_ids"] % 41} if family == "llama" else found


@cache
def cut(family: str) -> Cut:
    """A model without the heads of one layer and the neurons of another, narrower elsewhere.

    It is shared: copy it to change it.
    """
    model, inputs = fresh(family), inputs_for(family)
    groups = list(discover(model, **inputs).groups) if family == "cnn" else groups_of(model)
    whole = full_plan(groups)
    kept = dict(whole.kept)
    for kind, empty in (("heads", 0), ("ffn", 1), ("head_dim", None), ("channels", None)):
        same = [group for group in groups if group.kind == kind]
        for place, group in enumerate(same):
            # ALBERT has one layer, which runs again and again.
            gone = place == empty and len(same) > 1 and may_be_empty(group)
            kept[group.name] = () if gone else whole.kept[group.name][: group.size // 2]
    plan = PruningPlan(whole.sizes, kept)
    apply_plan(model, groups, plan)
    return Cut(fresh(family), model, inputs, plan)


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The one output of a model that classifies or predicts."""
    found = model(**inputs)
    output: Tensor = found if isinstance(found, Tensor) else found.logits
    return output
