"""What a cut leaves is an ordinary network: it exports, compiles, quantizes and changes its type.

Sublayers vanished from every model. ONNX files: ``test_onnx.py``.
"""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_mi_prune import PruningPlan, load_pruned
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from tests.support.exports import FAMILIES, cut, fresh, inputs_for, logits
from tests.support.models import CONFIGS, PICTURES


class Logits(nn.Module):
    """A network with its inputs by position."""

    def __init__(self, network: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, *inputs: Tensor) -> Tensor:
        found = self.network(**dict(zip(self.names, inputs, strict=True)))
        return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_exports(family: str) -> None:
    _, model, inputs, _ = cut(family)
    network, values = Logits(model, [*inputs]).eval(), tuple(inputs.values())
    program = torch.export.export(network, values)
    with torch.no_grad():
        assert torch.equal(program.module()(*values), network(*values))
    shapes = {tuple(p.shape) for p in network.parameters()}
    assert {tuple(t.shape) for t in program.state_dict.values()} >= shapes


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_a_cut_model_compiles_without_a_break(family: str) -> None:
    _, model, inputs, _ = cut(family)
    network, values = Logits(model, [*inputs]).eval(), tuple(inputs.values())
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*values), network(*values))


def relative_error(model: nn.Module, changed: nn.Module, inputs: dict[str, Tensor]) -> float:
    """How far the outputs of a model move when its weights are rounded."""
    dtype = next((p.dtype for p in changed.parameters()), torch.float32)
    given = {n: x.to(dtype) if x.is_floating_point() else x for n, x in inputs.items()}
    before, after = logits(model, inputs), logits(changed, given)
    assert after.shape == before.shape
    return float((after.float() - before).norm() / before.norm())


def in_int8(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def in_bfloat16(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).bfloat16()


# What a layer adds by rounding is a share of its values that does not depend on its width: noise
# and signal both add up over the inputs. A cut model has no more layers than the dense one, so it
# is off by no more; twice as much leaves room for the chance in few random weights.
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rounded", [in_int8, in_bfloat16])
@pytest.mark.filterwarnings(
    # torchao, which it names instead, is slower than float32 on CPUs in eager mode.
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor:UserWarning",
)
def test_a_cut_model_is_rounded_as_well_as_the_dense_one(
    family: str, rounded: Callable[[nn.Module], nn.Module]
) -> None:
    dense, model, _, _ = cut(family)
    inputs = inputs_for(family, rows=64)
    error = relative_error(model, rounded(model), inputs)
    assert 0 < error <= 2 * relative_error(dense, rounded(dense), inputs)
    assert error < 0.1


def removed(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    return {name: kept for name, kept in plan.kept.items() if len(kept) < plan.sizes[name]}


@pytest.mark.parametrize("family", [*CONFIGS, *PICTURES, "llama"])
def test_a_cut_model_in_bfloat16_comes_back_in_bfloat16(family: str, tmp_path: Path) -> None:
    model = in_bfloat16(cut(family).model)
    inputs = {
        n: x.bfloat16() if x.is_floating_point() else x for n, x in inputs_for(family).items()
    }
    before = removed(PlanTracker.of(model).plan)  # as its config records it
    torch.save(model.state_dict(), tmp_path / "small.pt")
    again = load_pruned(fresh(family).bfloat16(), tmp_path / "small.pt").eval()
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert before
    assert removed(PlanTracker.of(again).plan) == before
    assert torch.equal(logits(again, inputs), logits(model, inputs))
