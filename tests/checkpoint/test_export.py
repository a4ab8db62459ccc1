"""What a cut leaves is an ordinary network: it exports, with sublayers that vanished too."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_mi_prune import PruningPlan, apply_plan
from lightning_mi_prune.graph.groups import full_plan
from tests.support.graphs import groups_of
from tests.support.models import CONFIGS, PICTURES, batch, build, pictures


class Logits(nn.Module):
    """A network with its inputs by position."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.network(**dict(zip(self.names, inputs, strict=True))).logits


def cut(family: str) -> tuple[Logits, tuple[torch.Tensor, ...]]:
    """A model without the heads of one layer and the neurons of another, narrower elsewhere."""
    model = build(family, "image" if family in PICTURES else "sequence")
    groups = groups_of(model)
    whole = full_plan(groups)
    kept = dict(whole.kept)
    for kind, empty in (("heads", 0), ("ffn", 1), ("head_dim", None)):
        same = [group for group in groups if group.kind == kind]
        for place, group in enumerate(same):
            # ALBERT has one layer, which runs again and again.
            gone = place == empty and len(same) > 1
            kept[group.name] = () if gone else whole.kept[group.name][: group.size // 2]
    apply_plan(model, groups, PruningPlan(whole.sizes, kept))
    inputs = (pictures if family in PICTURES else batch)(4)
    inputs.pop("labels", None)
    return Logits(model, [*inputs]).eval(), tuple(inputs.values())


@pytest.mark.parametrize("family", [*CONFIGS, *PICTURES])
def test_a_cut_model_exports(family: str) -> None:
    network, inputs = cut(family)
    program = torch.export.export(network, inputs)
    with torch.no_grad():
        assert torch.equal(program.module()(*inputs), network(*inputs))
    shapes = {tuple(p.shape) for p in network.parameters()}
    assert {tuple(t.shape) for t in program.state_dict.values()} >= shapes


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_cut_model_compiles_without_a_break(family: str) -> None:
    network, inputs = cut(family)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), network(*inputs))


@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # constants that it folds
@pytest.mark.parametrize("family", [*CONFIGS, *PICTURES])
def test_a_cut_model_runs_as_onnx(family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    network, inputs = cut(family)
    path = tmp_path / "cut.onnx"
    torch.onnx.export(network, inputs, path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    given = {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)}
    (found,) = session.run(None, given)
    with torch.no_grad():
        assert torch.allclose(torch.from_numpy(found), network(*inputs), atol=1e-5)
