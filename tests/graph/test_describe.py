"""Groups that are described by hand."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.graph.describe import linear_group


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"producers": ["gone"], "consumers": ["1"]}, "'gone', which Sequential does not have"),
        ({"producers": ["0"], "consumers": ["2"]}, "expected one common width"),
        ({"producers": ["0"], "consumers": ["1"], "entries": 3}, "a multiple of 3"),
    ],
)
def test_layers_that_do_not_fit_together(options, message):
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(6, 2))
    with pytest.raises(PruningError, match=message):
        linear_group(net, "x", kind="ffn", **options)


def test_only_plain_linear_layers_can_be_described():
    class LoraLinear(nn.Linear):
        pass

    net = nn.Sequential(LoraLinear(2, 4), nn.Linear(4, 2))
    with pytest.raises(PruningError, match="LoraLinear; expected a plain"):
        linear_group(net, "x", kind="ffn", producers=["0"], consumers=["1"])
