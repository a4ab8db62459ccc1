"""The method on every model of the zoo, on the groups that discovery finds."""

from __future__ import annotations

import copy

import pytest
import torch

from lightning_mi_prune.calibration.collect import collect_activations, collect_gradients
from lightning_mi_prune.calibration.gradients import relevance_of
from lightning_mi_prune.core.consumers import (
    channels_last,
    consumer_input,
    stacked_weight,
)
from lightning_mi_prune.core.functional import intercept_inputs
from lightning_mi_prune.core.options import Reconstruction
from lightning_mi_prune.discovery.discover import discover
from lightning_mi_prune.graph.groups import full_plan
from lightning_mi_prune.graph.inputs import ConsumerInput, kept_now
from lightning_mi_prune.importance.ranking import rank_groups
from lightning_mi_prune.importance.statistics import kept_rows
from lightning_mi_prune.pipeline import reconstruct
from lightning_mi_prune.reconstruction.compensation import select_units
from lightning_mi_prune.surgery.attention import open_attention
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.zoo import ZOO, batches

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning"),
]


def run(model, batch):
    return model(**batch)


def logits(model, batch):
    found = model(**batch)
    return found if isinstance(found, torch.Tensor) else found.logits


def inputs_of(model, consumers, given):
    """Inputs of all consumers over some batches, one sample a row."""
    found = {consumer: [] for consumer in consumers}
    parameters = dict(model.named_parameters())
    with open_attention(model), torch.no_grad():
        handles = [
            model.get_submodule(consumer).register_forward_pre_hook(
                lambda module, args, kwargs, rows=rows: rows.append(
                    channels_last(module, consumer_input(args, kwargs)).flatten(0, -2)
                ),
                with_kwargs=True,
            )
            for consumer, rows in found.items()
            if consumer not in parameters
        ]
        products = {name: rows for name, rows in found.items() if name in parameters}
        handles += intercept_inputs(
            model,
            {
                name: [lambda x, rows=rows: rows.append(x.flatten(0, -2))]
                for name, rows in products.items()
            },
        )
        for batch in given:
            run(model, batch)
    for handle in handles:
        handle.remove()
    return {consumer: torch.cat(rows).double() for consumer, rows in found.items()}


@pytest.mark.parametrize("name", ZOO)
def test_compensation_lowers_the_error_at_every_consumer(name):
    """At each position of the kernel, on the samples that were collected."""
    torch.manual_seed(0)
    kind = ZOO[name]
    model = kind.build().eval()
    given = [
        {key: value for key, value in batch.items() if kind.data == "tokens" or key != "labels"}
        for batch in batches(kind.data, 12, seed=0)
    ]
    groups = list(discover(model, **given[0]).groups)
    plan, weights = full_plan(groups), dict(model.named_parameters(remove_duplicate=False))
    options = {"positions": 100_000, "stored_positions": 1_000}
    data = collect_activations(model, groups, given, run, **options)
    sums = collect_gradients(
        model, groups, plan, given, lambda m, b: logits(m, b).square().mean(), steps=4
    )
    relevance = relevance_of(sums)
    rankings = rank_groups(groups, data.moments, weights, plan, relevance=relevance)
    assert {key: len(ranking.order) for key, ranking in rankings.items()} == dict(plan.sizes)
    # Dimensions of heads are compensated in other coordinates (test_head_rotation).
    share = {g.name: 1 if g.rotation else 2 for g in groups}
    widths = {g.name: max(1, g.size // share[g.name] // g.multiple * g.multiple) for g in groups}
    decision = select_units(
        groups, data.moments, weights, widths, plan, relevance=relevance, rankings=rankings
    )
    consumers = {
        consumer: (group, all_of)
        for group in groups
        for all_of in group.unit_inputs.values()
        for consumer in all_of
        if group.rotation is None
    }
    rows = inputs_of(model, consumers, given)
    for consumer, (group, all_of) in consumers.items():
        read = ConsumerInput.of(group, all_of)
        now = kept_now([*read.names], decision.plan.kept, plan)
        at = read.kept(now, plan.sizes)
        rest = sorted(set(range(rows[consumer].shape[1])) - set(at))
        own = read.weight(consumer)
        shape = (own.read, read.fold)
        weight = stacked_weight(weights[own.tensor].detach().double(), *shape, several=own.several)
        found = decision.compensated[own.tensor].double()
        found = stacked_weight(found, *shape, several=own.several)
        x = rows[consumer]
        x = x - x.mean(0) if f"{consumer}.bias" in weights else x
        outputs = torch.arange(len(weight))
        if len(found) != len(weight):  # some of its outputs were cut too
            kept = decision.plan.kept
            outputs = kept_rows(own.tensor, kept, plan, groups, own.output)
        for part, new in zip(weight[outputs].unbind(2), found.unbind(2), strict=True):
            lost = x[:, rest] @ part[:, rest].mT
            before = float(lost.square().mean())
            after = float((lost - x[:, at] @ (new - part[:, at]).mT).square().mean())
            assert after <= before * (1 + 1e-5) + 1e-12, (consumer, before, after)
    small = copy.deepcopy(model)
    apply_plan(small, groups, decision.plan, compensated=decision.compensated)
    solved = reconstruct(model, groups, plan, decision, Reconstruction(positions=1_000), data)
    for tensor, value in solved.compensated.items():
        assert small.get_parameter(tensor).shape == value.shape
        assert value.isfinite().all()
    with torch.no_grad():
        assert logits(small, given[0]).shape == logits(model, given[0]).shape
