"""Tiny random models of every family, and ways to plant redundancy in them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    DebertaV2Config,
    DeiTConfig,
    DeiTForImageClassification,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    RobertaConfig,
    ViTConfig,
    ViTForImageClassification,
    XLMRobertaConfig,
)

from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.groups import DependencyGroup
from lightning_mi_prune.graph.layouts import kept_positions, layout_size

_BERT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
}
_DISTILBERT = {
    "vocab_size": 64,
    "dim": 24,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 40,
    "max_position_embeddings": 40,
}
_DEBERTA = _BERT | {
    "relative_attention": True,
    "max_relative_positions": 16,
    "position_buckets": 8,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "share_att_key": True,
}
# Two groups of one layer, each run twice.
_ALBERT = _BERT | {"num_hidden_layers": 4, "num_hidden_groups": 2, "embedding_size": 16}
_VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 2,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
CONFIGS: dict[str, Callable[..., object]] = {
    "bert": lambda **k: BertConfig(**_BERT, **k),
    "roberta": lambda **k: RobertaConfig(**_BERT, **k),
    "xlm-roberta": lambda **k: XLMRobertaConfig(**_BERT, **k),
    "electra": lambda **k: ElectraConfig(**_BERT, embedding_size=24, **k),
    "distilbert": lambda **k: DistilBertConfig(**_DISTILBERT, **k),
    "mpnet": lambda **k: MPNetConfig(**_BERT, **k),
    "deberta-v2": lambda **k: DebertaV2Config(**(_DEBERTA | k)),
    "albert": lambda **k: AlbertConfig(**(_ALBERT | k)),
}
PICTURES: dict[str, Callable[..., nn.Module]] = {
    "vit": lambda **k: ViTForImageClassification._from_config(ViTConfig(**(_VIT | k))),
    "deit": lambda **k: DeiTForImageClassification._from_config(DeiTConfig(**(_VIT | k))),
}
HEADS = {
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
    "masked-lm": AutoModelForMaskedLM,
}
EVERY = [(family, head) for family in CONFIGS for head in HEADS] + [(f, "image") for f in PICTURES]
# Each family and each head once, for what their combination cannot change.
SOME = [(f, h) for f, h in EVERY if h in ("sequence", "image") or f == "bert"]


def build(family: str = "bert", head: str = "sequence", *, seed: int = 0, **options: object):
    """A tiny model with random weights large enough that every unit matters."""
    torch.manual_seed(seed)
    labels = {"num_labels": 3} if head in ("sequence", "token", "image") else {}
    if head == "image":
        model = PICTURES[family](**labels, **options)
    else:
        model = HEADS[head].from_config(CONFIGS[family](**labels, **options))
    randomize(model)
    return model.eval()


def randomize(model: nn.Module) -> None:
    """Weights large enough that every unit matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name and "layer_norm" not in name:
                parameter.normal_(0, 0.2)


def pictures(rows: int = 6, *, seed: int = 0) -> dict[str, Tensor]:
    """Pixels for the image models."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(rows, 2, 8, 8, generator=generator)}


def inputs_of(head: str) -> dict[str, Tensor]:
    """Inputs for a model with that head."""
    return pictures() if head == "image" else batch()


def batch(rows: int = 32, length: int = 12, *, seed: int = 0) -> dict[str, Tensor]:
    """Token ids with padding at the end of most rows."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 64, (rows, length), generator=generator)
    lengths = torch.randint(4, length + 1, (rows, 1), generator=generator)
    mask = (torch.arange(length)[None] < lengths).long()
    return {"input_ids": ids * mask + (1 - mask), "attention_mask": mask}


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the real positions (padding is nobody's business)."""
    result = model.eval()(**inputs)
    logits = result.logits if "logits" in result else result.start_logits
    if "attention_mask" not in inputs:
        return logits
    if logits.shape[:2] == inputs["attention_mask"].shape:
        return logits[inputs["attention_mask"].bool()]
    return logits


def entries_of(group: DependencyGroup, widths: Mapping[str, int] | None = None) -> int:
    """Entries of each unit in the first tensor of a group, at the widths of its partners."""
    return layout_size(group.tensors[0].layout, group.all_widths(widths or {}) | {group.name: 1})


def partner_of(group: DependencyGroup) -> str:
    """The other group of a product: heads of their dimensions, dimensions of their heads."""
    return next((name for name, _ in group.partners), "")


def duplicate(model: nn.Module, group: DependencyGroup, source: int, target: int) -> None:
    """Make unit ``target`` an exact copy of unit ``source`` (its consumers differ)."""
    g = entries_of(group)
    with torch.no_grad():
        for s in group.tensors:
            if s.dim == 0:
                tensor = model.get_parameter(s.tensor)
                tensor[target * g : target * g + g] = tensor[source * g : source * g + g]
        if group.unit_arguments:  # heads that a table shared by all layers tells apart
            for name, table in model.named_parameters():
                if "relative_attention_bias" in name:
                    table[:, target] = table[:, source]


def make_constant(model: nn.Module, group: DependencyGroup, unit: int) -> None:
    """Make a neuron independent of its input."""
    with torch.no_grad():
        for s in group.tensors:
            if s.dim == 0 and s.tensor.endswith("weight"):
                each = entries_of(group)
                model.get_parameter(s.tensor)[unit * each : (unit + 1) * each] = 0


def masked_copy(model: nn.Module, groups: list[DependencyGroup], plan: PruningPlan) -> nn.Module:
    """The uncut model with the consumers' columns of dropped units set to zero."""
    masked = copy.deepcopy(model)
    with torch.no_grad():
        for group in groups:
            if group.kind == "hidden":
                continue  # its norms would have to know: tests/discovery/test_hidden_size.py
            gone = sorted(set(range(group.size)) - set(plan.kept[group.name]))
            found = kept_positions(
                group.tensors[0].layout, {group.name: gone}, group.all_widths({})
            )
            place = torch.tensor(found, dtype=torch.long)
            if group.rotation is None:
                for consumer in group.consumers:
                    masked.get_parameter(f"{consumer}.weight")[:, place] = 0
                continue
            for s in group.tensors:
                masked.get_parameter(s.tensor).index_fill_(s.dim, place, 0)
            if group.rotation.rescaled:  # the cut model divides by the root of what is left
                query = masked.get_submodule(group.rotation.query)
                factor = (group.size / plan.width(group.name)) ** 0.5
                query.weight.mul_(factor)
                query.bias.mul_(factor)
    return masked


def random_plan(
    groups: list[DependencyGroup],
    share: float = 0.5,
    *,
    seed: int = 0,
    residual: bool = False,
    dims: bool = False,
) -> PruningPlan:
    """Random survivors on every group; the stream and heads stay as wide unless asked for."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for group in groups:
        if (group.kind == "hidden" and not residual) or (group.kind == "head_dim" and not dims):
            kept[group.name] = tuple(range(group.size))
            continue
        order = torch.randperm(group.size, generator=generator)[: max(1, int(share * group.size))]
        kept[group.name] = tuple(sorted(order.tolist()))
    return PruningPlan({group.name: group.size for group in groups}, kept)
