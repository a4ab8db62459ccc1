"""The hidden size: one group of all layers, cut like any other."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    BertModel,
    DeiTForImageClassificationWithTeacher,
    ElectraForPreTraining,
    ViTModel,
)

from lightning_mi_prune import discover
from lightning_mi_prune.checkpoint.loading import load_pruned
from lightning_mi_prune.checkpoint.pretrained import from_pretrained
from lightning_mi_prune.checkpoint.recorded import present_plan
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.graph.graph import choose_groups
from lightning_mi_prune.graph.groups import count_parameters, full_plan
from lightning_mi_prune.surgery.optimizers import update_optimizers
from lightning_mi_prune.surgery.units import (
    apply_plan,
    reshape_tensors,
    restore_plan,
    revert_rewrites,
)
from tests.support import models
from tests.support.graphs import groups_of, tracker_of
from tests.support.models import (
    CONFIGS,
    batch,
    build,
    entries_of,
    inputs_of,
    masked_copy,
    outputs,
    random_plan,
)

SOME = pytest.mark.parametrize(("family", "head"), models.SOME)
EVERY = pytest.mark.parametrize(("family", "head"), models.EVERY)
FEW = pytest.mark.parametrize(
    ("family", "head"),
    [(f, "sequence") for f in CONFIGS] + [("bert", "masked-lm"), ("vit", "image")],
)


class MaskedLayerNorm(nn.Module):
    """Normalises over the kept entries; the others are zero."""

    def __init__(self, norm: nn.LayerNorm, kept: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = norm
        self.kept = list(kept)

    def forward(self, x):
        x, norm = x[..., self.kept], self.norm
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        output = scaled.new_zeros(*x.shape[:-1], len(norm.weight))
        output[..., self.kept] = scaled * norm.weight[self.kept] + norm.bias[self.kept]
        return output


@torch.no_grad()
def masked_stream(model, groups, plan):
    """The uncut model with dropped hidden units zero wherever they are produced or consumed."""
    model = masked_copy(model, groups, plan)
    for group in (group for group in groups if group.kind == "hidden"):
        kept = plan.kept[group.name]
        gone = sorted(set(range(group.size)) - set(kept))
        for s in group.tensors:
            model.get_parameter(s.tensor).index_fill_(s.dim, torch.tensor(gone), 0)
        for path in group.norms:
            parent, _, name = path.rpartition(".")
            masked = MaskedLayerNorm(model.get_submodule(path), kept)
            setattr(model.get_submodule(parent), name, masked)
    return model


def stirred(family, head="sequence", **options):
    """A model whose norms differ from entry to entry too."""
    model = build(family, head, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@EVERY
def test_a_cut_hidden_size_equals_the_masked_model(family, head):
    model = stirred(family, head)
    groups = groups_of(model)
    plan = random_plan(groups, residual=True)
    masked, before = masked_stream(model, groups, plan), outputs(model, inputs_of(head))
    apply_plan(model, groups, plan)
    after = outputs(model, inputs_of(head))
    assert torch.allclose(after, outputs(masked, inputs_of(head)), atol=1e-5)
    assert not torch.allclose(after, before, atol=1e-3)
    assert groups_of(model) == groups
    assert present_plan(model, groups) == plan


@EVERY
def test_every_tensor_of_hidden_size_is_in_the_group(family, head):
    """Every dimension of hidden size that is in no other group is cut."""
    model = build(family, head)
    groups = groups_of(model)
    streams = [group for group in groups if group.kind == "hidden"]
    (group,) = (group for group in streams if group.size == 24)  # words may have one of their own
    cut = {(id(model.get_parameter(s.tensor)), s.dim) for a in groups for s in a.tensors}
    for name, parameter in model.named_parameters():
        for dim, width in enumerate(parameter.shape):
            if width == 24 and (id(parameter), dim) not in cut:
                assert name.endswith("predictions.dense.weight"), (name, dim)
    assert set(group.consumers) == {
        consumer for consumers in group.consumers_by_input for consumer in consumers
    }
    assert len(group.inputs) == len(group.consumers_by_input)
    assert group.level < min(a.level for a in groups if a.kind != "hidden")
    assert group.name not in {a.name for a in choose_groups(groups)}
    assert choose_groups(groups, kinds=["hidden"]) == streams
    for norm in group.norms:
        assert isinstance(model.get_submodule(norm), nn.LayerNorm)
    # A tied decoder is counted once.
    assert count_parameters(groups) <= sum(p.numel() for p in model.parameters())


@SOME
def test_skips_and_readers_above(family, head):
    """The residual input is added to the consumer's output, which the modules above read."""
    model = stirred(family, head)
    groups = [group for group in groups_of(model) if group.kind in ("ffn", "heads")]
    order: list[str] = []
    streams: dict[str, torch.Tensor] = {}
    written: dict[str, torch.Tensor] = {}

    def ran(module, inputs, *, name):
        order.append(name)
        for group in groups:
            if name == group.residual:
                streams.setdefault(group.name, inputs[0])

    def wrote(module, inputs, output, *, name):
        written.setdefault(name, output)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(partial(ran, name=name))
    for group in groups:
        model.get_submodule(group.consumers[0]).register_forward_hook(
            partial(wrote, name=group.name)
        )
    outputs(model, inputs_of(head))
    last = {name: index for index, name in enumerate(order)}
    streams_of_24 = (g for g in groups_of(model) if g.kind == "hidden" and g.size == 24)
    (residual,) = streams_of_24
    for group in groups:
        assert streams[group.name].shape == written[group.name].shape
        assert set(group.above) <= set(residual.consumers)
        assert all(last[path] > order.index(group.consumers[0]) for path in group.above)
        later = {r for r in residual.consumers if last[r] > last[group.consumers[0]]}
        assert later <= set(group.above)


def test_the_config_says_what_fits_and_then_anyone_can_load(tmp_path):
    families = ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "vit", "deit")
    for family in families:
        head = "image" if family in models.PICTURES else "sequence"
        model, inputs = stirred(family, head), inputs_of(head)
        groups = groups_of(model)
        sizes = {group.name: group.size for group in groups}
        whole = {group.name for group in groups if group.kind == "head_dim"}
        kept = {n: tuple(range(0 if n in whole else s // 2, s)) for n, s in sizes.items()}
        apply_plan(model, groups, PruningPlan(sizes, kept))
        assert (model.config.hidden_size, model.config.num_attention_heads) == (12, 2)
        model.save_pretrained(tmp_path / family)
        for again in (
            type(model).from_pretrained(tmp_path / family),
            from_pretrained(type(model), tmp_path / family),
        ):
            assert torch.equal(outputs(again, inputs), outputs(model, inputs))
            assert present_plan(again, groups_of(again)) == present_plan(model, groups)
        encoder = getattr(model, model.base_model_prefix)
        encoder.save_pretrained(tmp_path / "encoder")
        alone = AutoModel.from_pretrained(tmp_path / "encoder")
        mine = encoder(**inputs).last_hidden_state
        assert torch.equal(alone.eval()(**inputs).last_hidden_state, mine)


def test_a_head_size_in_the_config_frees_the_heads(tmp_path):
    head = "image"
    model = stirred("vit", head, head_dim=4)
    groups = groups_of(model)
    assert {entries_of(a) for a in groups if a.kind == "heads"} == {4}
    kept = {a.name: tuple(range(2 if a.kind == "heads" else a.size)) for a in groups}
    apply_plan(model, groups, PruningPlan({a.name: a.size for a in groups}, kept))
    assert (model.config.hidden_size, model.config.num_attention_heads) == (24, 2)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again, inputs_of(head)), outputs(model, inputs_of(head)))


def test_plans_without_the_hidden_size_open(tmp_path):
    model = build()
    groups = [group for group in groups_of(model) if group.kind != "hidden"]
    apply_plan(model, groups, random_plan(groups))
    assert "hidden" not in model.config.pruning_plan
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))
    tracker = PlanTracker.of(again)
    assert not tracker.is_whole
    tracker.extend(discover(again))  # of the model as it is now: only what is new is added
    assert tracker.plan.width("bert.hidden") == 24
    plan = PruningPlan({"bert.hidden": 24}, {"bert.hidden": tuple(range(12))})
    apply_plan(again, tracker.groups, plan, current=tracker.plan)
    assert again.bert.embeddings.word_embeddings.embedding_dim == 12


@pytest.mark.parametrize(
    "widths", [{"heads": 4, "hidden": 12}, {"heads": 2, "hidden": 24}, {"pooler": 10}, {}]
)
def test_the_config_stays_as_built_where_it_does_not_fit(widths, tmp_path):
    model = stirred("bert")
    groups = groups_of(model)
    whole = {} if not widths else {"head_dim": 6}
    kept = {a.name: tuple(range((widths | whole).get(a.kind, a.size // 2))) for a in groups}
    if not widths:
        kept[groups[0].name] = (1,)
    apply_plan(model, groups, PruningPlan({a.name: a.size for a in groups}, kept))
    assert (model.config.hidden_size, model.config.num_attention_heads) == (24, 4)
    assert model.config.intermediate_size == 20
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path)
    assert torch.equal(outputs(again, batch()), outputs(model, batch()))


@SOME
def test_folders_and_state_dicts(family, head, tmp_path):
    model = stirred(family, head)
    tracker = tracker_of(model)
    plan = random_plan(tracker.groups, residual=True)
    apply_plan(model, tracker.groups, plan)
    tracker.plan = plan
    expected = outputs(model, inputs_of(head))
    torch.save(model.state_dict(), tmp_path / "a.pt")
    opened = load_pruned(build(family, head), tmp_path / "a.pt")
    assert torch.equal(outputs(opened, inputs_of(head)), expected)
    tracker.close()
    model.save_pretrained(tmp_path / "folder")
    again = from_pretrained(type(model), tmp_path / "folder")
    assert torch.equal(outputs(again, inputs_of(head)), expected)


def test_a_tied_decoder_is_cut_once_under_either_name():
    model = stirred("bert", "masked-lm")
    groups = groups_of(model)
    plan = random_plan(groups, residual=True)
    decoder = model.get_output_embeddings()
    apply_plan(model, groups, plan)
    assert model.get_input_embeddings().weight is decoder.weight
    assert (decoder.in_features, decoder.weight.shape[1]) == (12, 12)
    untied = stirred("bert", "masked-lm", tie_word_embeddings=False)
    both = groups_of(untied)
    (own,) = (g for g in both if "cls.predictions.decoder" in g.consumers)
    assert not any(s.tensor.startswith("bert.embeddings") for s in own.tensors)
    plan = random_plan(both, residual=True)
    masked = masked_stream(untied, both, plan)
    rewrites = apply_plan(untied, both, plan)
    assert torch.allclose(outputs(untied, batch()), outputs(masked, batch()), atol=1e-5)
    assert len({id(r.old) for r in rewrites}) == len(rewrites)


@FEW
def test_growing_and_going_back(family, head):
    model = stirred(family, head)
    groups, inputs = groups_of(model), inputs_of(head)
    plan, before = random_plan(groups, residual=True), outputs(model, inputs)
    values = {k: v.clone() for k, v in (*model.named_parameters(), *model.named_buffers())}
    rewrites = apply_plan(model, groups, plan)
    small, after = copy.deepcopy(model.state_dict()), outputs(model, inputs)
    revert_rewrites(model, groups, full_plan(groups), rewrites)
    assert torch.equal(outputs(model, inputs), before)
    reshape_tensors(model, groups, plan)
    model.load_state_dict(small)
    assert torch.equal(outputs(model, inputs), after)
    restore_plan(model, groups, full_plan(groups), values)
    assert torch.equal(outputs(model, inputs), before)
    reshape_tensors(model, groups, plan)
    model.load_state_dict(small)
    assert torch.equal(outputs(model, inputs), after)


def test_training_goes_on():
    model = stirred("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    groups = groups_of(model)
    for plan in (random_plan(groups, residual=True), random_plan(groups, 0.25, residual=True)):
        now = present_plan(model, groups)
        smaller = {n: tuple(p for p in k if p in now.kept[n])[:6] for n, k in plan.kept.items()}
        update_optimizers(
            [optimizer], apply_plan(model, groups, PruningPlan(plan.sizes, smaller), current=now)
        )
        for _ in range(2):
            optimizer.zero_grad()
            model(**batch(), labels=torch.zeros(32, dtype=torch.long)).loss.backward()
            assert all(p.grad is not None for p in model.parameters())
            optimizer.step()
    states = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    assert [s.shape for s in states] == [p.shape for p in model.parameters()]


def test_values_in_final_shape_for_every_kind_of_parameter():
    model = stirred("bert")
    groups = groups_of(model)
    plan = random_plan(groups, residual=True)
    small = copy.deepcopy(model)
    apply_plan(small, groups, plan)
    names = [
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "bert.encoder.layer.0.output.dense.weight",  # columns by neurons, rows by the hidden size
        "bert.encoder.layer.0.output.dense.bias",
        "bert.embeddings.position_embeddings.weight",
        "classifier.bias",  # not cut at all
    ]
    compensated = {n: torch.randn_like(small.get_parameter(n)) for n in names}
    rewrites = {id(r.new): r for r in apply_plan(model, groups, plan, compensated=compensated)}
    for name, values in compensated.items():
        assert torch.equal(model.get_parameter(name), values)
        assert id(model.get_parameter(name)) in rewrites
    wrong = {names[0]: torch.zeros(24)}
    with pytest.raises(PruningError, match=r"has shape \(24,\); expected \(12,\)"):
        apply_plan(stirred("bert"), groups, plan, compensated=wrong)


def test_an_empty_hidden_size_is_refused():
    model = stirred("bert")
    groups = groups_of(model)
    before = copy.deepcopy(model.state_dict())
    empty = full_plan(groups).then(PruningPlan({"bert.hidden": 24}, {"bert.hidden": ()}))
    sentence = r"none of 24 units of group 'bert.hidden', which cannot be empty"
    for change in (apply_plan, reshape_tensors):
        with pytest.raises(PruningError, match=sentence):
            change(model, groups, empty)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"share_att_key": False}, "pos_key_proj"),
        ({"conv_kernel_size": 3, "conv_act": "tanh"}, "conv.conv"),
        ({"norm_rel_ebd": "none", "type_vocab_size": 2}, "token_type"),
        ({"embedding_size": 16}, "embed_proj"),
        ({"relative_attention": False, "pos_att_type": None}, "value_proj"),
        ({"position_biased_input": True}, "position_embeddings"),
    ],
)
@pytest.mark.parametrize("head", ["sequence", "masked-lm"])
def test_every_deberta(options, parts, head):
    model = stirred("deberta-v2", head, **options)
    groups = groups_of(model)
    assert any(parts in s.tensor for group in groups for s in group.tensors)
    plan = random_plan(groups, residual=True)
    masked = masked_stream(model, groups, plan)
    apply_plan(model, groups, plan)
    assert torch.allclose(outputs(model, batch()), outputs(masked, batch()), atol=1e-5)


@pytest.mark.parametrize("head", models.HEADS)
def test_embeddings_with_a_width_of_their_own_are_cut_by_themselves(head):
    model = models.HEADS[head].from_config(models.ElectraConfig(**models._BERT, embedding_size=16))
    models.randomize(model.eval())
    groups = groups_of(model)
    words, stream = sorted((g for g in groups if g.kind == "hidden"), key=lambda g: g.size)
    assert (words.size, words.consumers[:1]) == (16, ("electra.embeddings_project",))
    assert not any("word_embeddings" in s.tensor for s in stream.tensors)
    plan = random_plan([g for g in groups if g is not words], residual=True)
    masked = masked_stream(model, [g for g in groups if g is not words], plan)
    apply_plan(model, groups, plan)
    assert model.config.embedding_size == 16
    assert torch.allclose(outputs(model, batch()), outputs(masked, batch()), atol=1e-5)


@pytest.mark.parametrize(
    ("build_it", "inputs", "name"),
    [
        (
            lambda: ElectraForPreTraining(models.ElectraConfig(**models._BERT)),
            batch,
            "logits",
        ),
        (
            lambda: DeiTForImageClassificationWithTeacher(models.DeiTConfig(**models._VIT)),
            models.pictures,
            "logits",
        ),
    ],
)
def test_other_heads(build_it, inputs, name, tmp_path):
    model = build_it().eval()
    models.randomize(model)
    groups = groups_of(model)
    plan = random_plan(groups, residual=True)
    masked = masked_stream(model, groups, plan)
    apply_plan(model, groups, plan)
    assert torch.allclose(model(**inputs())[name], masked(**inputs())[name], atol=1e-5)
    model.save_pretrained(tmp_path)
    again = from_pretrained(type(model), tmp_path)
    assert torch.equal(again(**inputs())[name], model(**inputs())[name])


def test_hidden_states_that_a_model_returns_keep_their_size():
    for model in (
        BertModel(CONFIGS["bert"]()),
        ViTModel(models.ViTConfig(**models._VIT)),
        models.PICTURES["vit"](num_labels=0),
    ):
        kinds = {group.kind for group in groups_of(model)}
        assert kinds == {"ffn", "heads", "head_dim"}
        with pytest.raises(PruningError, match=r"names 'hidden'; this model has"):
            choose_groups(groups_of(model), kinds=["hidden"])


def test_classes_of_the_user_are_cut_like_those_they_derive_from():
    class Own(BertForSequenceClassification):
        pass

    class Table(nn.Embedding):
        pass

    model = Own(CONFIGS["bert"]()).eval()
    table = model.bert.embeddings.word_embeddings
    model.bert.embeddings.word_embeddings = Table(64, 24, _weight=table.weight)
    kinds = {group.kind for group in groups_of(model)}
    assert kinds == {"ffn", "heads", "head_dim", "hidden", "pooler"}


def test_two_networks_have_two_hidden_sizes():
    root = nn.ModuleDict({"a": build(), "b": build(seed=1)})
    groups = groups_of(root)
    names = [group.name for group in groups if group.kind == "hidden"]
    assert names == ["a.bert.hidden", "b.bert.hidden"]
    plan = PruningPlan({names[0]: 24}, {names[0]: tuple(range(12))})
    apply_plan(root, groups, plan)
    assert root["a"].bert.embeddings.word_embeddings.embedding_dim == 12
    assert root["b"].bert.embeddings.word_embeddings.embedding_dim == 24
