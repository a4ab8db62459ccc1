"""How strongly least-squares changes are pulled: layers together, single precision, no inputs."""

import pytest
import torch

from lightning_mi_prune.reconstruction import ridge
from lightning_mi_prune.reconstruction.ridge import choose_strengths, linear_changes


def sums(noise, inputs=20, rows=60, mean=0.0, seed=0):
    """Sums of four folds: inputs of falling variance, and what three layers lack."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = mean + random(4, rows, inputs) * torch.logspace(0, -2, inputs, dtype=torch.float64)
    x = torch.nn.functional.pad(x, (1, 0), value=1.0)
    missing = [x @ random(inputs + 1, size) + noise * random(4, rows, size) for size in (3, 1, 4)]
    return x, x.mT @ x, [x.mT @ each for each in missing], missing


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("noise", [0.0, 0.3, 30.0])
def test_layers_together_choose_what_each_chooses_alone(noise, intercept):
    _, outer, crosses, _ = sums(noise)
    together = choose_strengths(outer, crosses, intercept=intercept)
    alone = [choose_strengths(outer, [cross], intercept=intercept)[0] for cross in crosses]
    assert together == alone


@pytest.mark.parametrize("mean", [0.0, 30.0])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0, 30.0])
def test_single_precision_is_enough_to_compare_strengths(noise, mean, monkeypatch):
    """What is chosen in single precision is as good on the folds as what double precision finds."""
    _, outer, crosses, _ = sums(noise, mean=mean)
    single = choose_strengths(outer, crosses, intercept=True)
    monkeypatch.setattr(ridge, "is_exact", lambda x: False)
    double = choose_strengths(outer, crosses, intercept=True)
    for one, two in zip(single, double, strict=True):
        assert (one is None) == (two is None)
        assert one is None or max(one, two) <= 4 * min(one, two)  # a step of the grid is 3.2


@pytest.mark.parametrize("noise", [1.0, 30.0, 300.0])
def test_a_change_reduces_the_error_it_was_fitted_to_or_there_is_none(noise):
    x, outer, crosses, missing = sums(noise)
    for change, wanted in zip(linear_changes(outer, crosses, intercept=True), missing, strict=True):
        if change is not None:
            left = wanted - x[..., 1:] @ change.weight.mT - change.bias
            assert left.square().sum() < wanted.square().sum()


def test_without_inputs_the_bias_is_all_there_is():
    x = torch.ones(4, 50, 1, dtype=torch.float64)
    (change,) = linear_changes(x.mT @ x, [x.mT @ (3 * x)], intercept=True)
    assert change is not None
    assert change.weight.shape == (1, 0)
    assert change.bias.tolist() == [3.0]


def test_layers_that_lack_nothing_stay():
    _, outer, crosses, _ = sums(0.0)
    assert choose_strengths(outer, [0 * cross for cross in crosses], intercept=True) == [None] * 3


def test_layers_without_outputs_stay():
    _, outer, crosses, _ = sums(0.0)
    assert choose_strengths(outer, [crosses[0][..., :0]], intercept=True) == [None]
