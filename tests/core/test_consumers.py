"""Consumers of every class through one view: inputs, outputs and weights agree with the module."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers.pytorch_utils import Conv1D

from lightning_mi_prune.core.consumers import (
    channels_first,
    channels_last,
    fold_positions,
    input_dim,
    input_gradient,
    is_pointwise,
    stacked_weight,
    stored_weight,
    why_not_consumer,
)

CONSUMERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 3, 6)),
    "attention": (lambda: NonDynamicallyQuantizableLinear(6, 4), (5, 6)),
    "transposed": (lambda: Conv1D(4, 6), (5, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, padding="same"), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 4, (3, 2), stride=2, padding=1), (2, 6, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(6, 4, 2, dilation=2), (2, 6, 5, 4, 4)),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), (2, 6, 5, 5)),
    "no rows": (lambda: nn.Conv2d(6, 4, 3), (6, 7, 7)),
}


def whole_numbers():
    linear = nn.Linear(4, 4)
    linear.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize("kind", CONSUMERS)
def test_the_weight_goes_into_the_common_form_and_back(kind):
    made, _ = CONSUMERS[kind]
    module = made()
    read, weight = input_dim(module), module.weight.detach()
    stacked = stacked_weight(weight, read)
    assert stacked.shape[:2] == (4, 6)
    assert torch.equal(stored_weight(stacked, weight, read), weight)
    assert not why_not_consumer(module)


@pytest.mark.parametrize("kind", CONSUMERS)
def test_inputs_and_outputs_have_their_entries_last(kind):
    made, shape = CONSUMERS[kind]
    module = made()
    x = torch.randn(shape)
    y = module(x)
    assert channels_last(module, x).shape[-1] == 6
    assert channels_last(module, y).shape[-1] == 4
    assert torch.equal(channels_first(module, channels_last(module, y)), y)
    if is_pointwise(module):
        matrix = stacked_weight(module.weight, input_dim(module))[..., 0]
        assert torch.allclose(channels_last(module, x) @ matrix.mT + module.bias, y, atol=1e-6)


def test_a_pointwise_convolution_is_a_linear_map_of_its_channels():
    module, x = nn.Conv2d(6, 4, 1), torch.randn(2, 6, 3, 5)
    matrix = stacked_weight(module.weight, 1)[..., 0]
    wanted = channels_last(module, x) @ matrix.mT + module.bias
    assert torch.allclose(channels_last(module, module(x)), wanted, atol=1e-6)
    assert is_pointwise(module)
    assert not is_pointwise(nn.Conv2d(6, 4, 1, padding=1))
    assert not is_pointwise(nn.Conv2d(6, 4, 3))


@pytest.mark.parametrize("kind", CONSUMERS)
def test_the_gradient_at_the_input_is_that_of_autograd(kind):
    made, shape = CONSUMERS[kind]
    module, x = made(), torch.randn(shape, requires_grad=True)
    y = module(x)
    grad = torch.randn_like(y)
    (wanted,) = torch.autograd.grad(y, x, grad)
    assert torch.allclose(input_gradient(module, x, grad), wanted, atol=1e-5)


def test_a_flattened_map_has_its_positions_as_samples():
    maps = torch.randn(3, 5, 2, 4)
    folded = fold_positions(maps.flatten(1), 8)
    assert torch.equal(folded, maps.permute(0, 2, 3, 1).reshape(3, 8, 5))
    linear = nn.Linear(40, 7)
    stacked = stacked_weight(linear.weight, 1, 8)
    found = torch.einsum("odk,bkd->bo", stacked, folded) + linear.bias
    assert torch.allclose(found, linear(maps.flatten(1)), atol=1e-5)
    assert torch.equal(stored_weight(stacked, linear.weight, 1), linear.weight)


@pytest.mark.parametrize(
    ("module", "word"),
    [
        (nn.Conv2d(4, 4, 3, groups=4), "groups=4"),
        (nn.ConvTranspose2d(4, 4, 3), "transposed"),
        (parametrizations.orthogonal(nn.Linear(4, 4)), "parametriz"),
        (prune.identity(nn.Linear(4, 4), "weight"), "weight_orig"),
        (nn.Sequential(nn.Linear(4, 4)), "Sequential is neither"),
        (nn.Embedding(4, 4), "Embedding"),
        (whole_numbers(), "quantize"),
    ],
)
def test_what_cannot_be_a_consumer_is_refused_in_one_sentence(module, word):
    assert word in why_not_consumer(module)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_a_weight_that_a_hook_computes_is_refused():
    assert "weight_g" in why_not_consumer(weight_norm(nn.Linear(4, 4)))
