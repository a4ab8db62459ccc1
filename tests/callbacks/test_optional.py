"""Taking over is a help: where it cannot be had, layers go all the same."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import BaseModelOutput

from lightning_mi_prune import PruningError
from lightning_mi_prune.calibration.calls import RecordedCall, StoredCalls
from lightning_mi_prune.calibration.data import CalibrationData
from lightning_mi_prune.core.running import move_tensors
from lightning_mi_prune.graph.graph import PruningGraph
from lightning_mi_prune.reconstruction import removed_layers as takeover
from lightning_mi_prune.reconstruction.compensation import Decision
from lightning_mi_prune.reconstruction.targets import ReconstructedLayer, Targets
from tests.callbacks.test_stages import OPTIONS, Any, t5, tokens
from tests.support.boring import trainer
from tests.support.graphs import stacks_of
from tests.support.models import batch, build
from tests.support.pruning import pruning_layers
from tests.support.runs import Point, fit
from tests.support.stacks import STACK, Deep, Scored, deep_bert

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 4, "intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return Any(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), tokens())


@pytest.mark.filterwarnings("ignore:MACs could not be counted")  # of calls that bring a cache
@pytest.mark.parametrize("made", [t5, llama])
@pytest.mark.parametrize("loss", [True, False], ids=["loss too", "texts only"])
def test_validation_may_write_texts(made, loss):
    class Writing(Any):
        def validation_step(self, batch, index):
            if loss:
                super().validation_step(batch, index)
            self.model.generate(batch["input_ids"], max_new_tokens=4, do_sample=False)

    module = Writing(made().model, tokens())
    callback = pruning_layers(target_layers=2, **OPTIONS)
    trainer(callback, max_epochs=3).fit(module)
    assert all(len(stack.after) == 2 for cut in callback.report.cuts for stack in cut.stacks)


def hooked(layer):
    layer.output.dense.weight.register_hook(lambda g: g)


def normed(layer):
    spectral_norm(layer.output.dense)


def frozen(layer):
    layer.output.dense.weight.requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [(hooked, "has gradient hooks"), (normed, "is parametrized"), (frozen, "frozen")],
)
def test_layers_go_where_values_may_not_be_replaced(tmp_path, change, said):
    class Special(Deep):
        def __init__(self, **options):
            super().__init__(**options)
            change(self.model.bert.encoder.layer[5])

    with pytest.warns(UserWarning, match=rf"No layer makes up.*layer\.5\..*({said})"):
        _, module, _ = fit(tmp_path, layers={}, module=Special, max_epochs=2)
    assert len(module.model.bert.encoder.layer) == 4


@pytest.mark.parametrize(
    ("layers", "kept"),
    [({}, False), ({"max_drop": 0.5, "monitor": "score", "cuts": 1}, True)],
    ids=["no gate", "gate"],
)
def test_inputs_leave_the_checkpoints_with_the_last_use_for_them(tmp_path, layers, kept):
    points = {str(e): Point("on_train_epoch_end", e) for e in (1, 5)}
    fit(tmp_path, points=points, layers=layers, module=Scored, max_epochs=7)

    def calls(place):
        states = torch.load(tmp_path / f"{place}.ckpt", weights_only=True)["callbacks"]
        (state,) = (s for name, s in states.items() if name.startswith("CKALayerPruning"))
        return [call for rank in state["comparison"]["ranks"] for call in rank]

    assert bool(calls(0)) == kept
    assert not calls(1)


class Marked(torch.Tensor):
    """As MONAI and others make them."""


def test_only_calls_of_plain_values_are_stored():
    kept = StoredCalls(100, None, seed=0)
    ids = torch.ones(4, 6, dtype=torch.long)
    kept.keep("net", RecordedCall((), {"x": ids, "past": object()}), real=4, each=6)
    states = BaseModelOutput(last_hidden_state=torch.zeros(4, 6, 2))
    kept.keep("net", RecordedCall((), {"encoder_outputs": states, "x": ids}), real=4, each=6)
    assert not kept.stored
    kept.keep("net", RecordedCall((torch.ones(4, 3).as_subclass(Marked),), {}), real=4, each=1)
    (call,) = kept.stored["net"]
    assert type(call.args[0]) is torch.Tensor


def test_calls_follow_to_a_device():
    found = move_tensors({"net": [RecordedCall((torch.ones(2),), {})]}, torch.device("meta"))
    assert found["net"][0].args[0].is_meta


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.student, self.teacher = deep_bert(), deep_bert().requires_grad_(requires_grad=False)


def test_only_networks_that_lose_layers_are_copied(monkeypatch):
    module = Pair()
    graph = PruningGraph(stacks=tuple(stacks_of(module)))
    name = f"student.{STACK.removeprefix('model.')}"
    plan = graph.keep_layers(graph.full, {name: (0, 1, 4, 5)})
    seen = []

    def copied(root, networks):
        seen.extend(networks)
        return copy.deepcopy(root)

    monkeypatch.setattr(takeover, "copy_networks", copied)
    inputs = batch(64)
    heard = CalibrationData(
        ranks=[{"student": [RecordedCall((), inputs, inputs["attention_mask"])]}]
    )
    selection = Decision(plan, {}, {})
    options = {"positions": 1000}
    found = takeover.compensate_removed_layers(
        module, graph, graph.full, selection, heard, **options
    )
    assert seen == ["student"]
    assert found.compensated


def test_nothing_above_the_last_layer_is_run():
    model, ran = build("bert", "masked-lm"), []
    model.cls.register_forward_hook(lambda *_: ran.append(1))
    inputs = batch(8)
    call = RecordedCall((), inputs, inputs["attention_mask"])
    reading = ReconstructedLayer("bert.encoder.layer.1.output.dense", None, None)
    targets = Targets(model, [reading], "", call)
    ran.clear()  # a few examples have shown in which order layers run
    (wanted,) = targets.take(reading.layer).values()
    assert wanted.shape == (int(inputs["attention_mask"].sum()), 24)
    assert not ran


def adapted():
    module = Deep()
    module.model = peft.get_peft_model(module.model, peft.LoraConfig(target_modules=["query"]))
    return module


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_paths_through_a_wrapper_are_refused_at_the_start():
    run = trainer(pruning_layers(target_layers=4, stacks=[STACK], **OPTIONS), max_epochs=3)
    with pytest.raises(PruningError, match=r"through a wrapper.*merge_and_unload"):
        run.fit(adapted())
    assert run.global_step == 0


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_layers_in_a_wrapper_are_removed():
    module, callback = adapted(), pruning_layers(target_layers=4, **OPTIONS)
    with pytest.warns(UserWarning, match="No layer makes up.*is frozen"):
        trainer(callback, max_epochs=3).fit(module)
    assert len(module.get_submodule(f"model.base_model.{STACK}")) == 4
    merged = copy.deepcopy(module.model).merge_and_unload()
    torch.testing.assert_close(merged(**batch()).logits, module.model(**batch()).logits)
