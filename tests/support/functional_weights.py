"""Networks that multiply with parameters of their own, and the same ones of linear layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["ORDERS", "Layered", "Products", "experts"]

ORDERS = ("linear", "matmul")


class Products(nn.Module):
    """Neurons that a parameter reads: ``functional.linear(x, w)`` or ``x @ w``."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 24)
        self.order = order
        down = torch.randn(10, 24) / 5
        self.down = nn.Parameter(down if order == "linear" else down.T.clone())
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = self.up(x).relu()
        y = functional.linear(h, self.down) if self.order == "linear" else h @ self.down
        return self.head(y.tanh())


class Layered(nn.Module):
    """The same function, of linear layers only."""

    def __init__(self, like: Products) -> None:
        super().__init__()
        self.up, self.head = like.up, like.head
        self.down = nn.Linear(24, 10, bias=False)
        down = like.down if like.order == "linear" else like.down.mT
        self.down.weight = nn.Parameter(down.detach().clone())

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.down(self.up(x).relu()).tanh())


_SIZES: dict[str, Any] = {
    "vocab_size": 41,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "intermediate_size": 40},
    "Qwen2Moe": {**_EXPERTS, "shared_expert_intermediate_size": 56},
    "Qwen3Moe": {**_EXPERTS, "head_dim": 8},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40},
    "GptOss": {"num_local_experts": 4, "intermediate_size": 40, "head_dim": 8},
}


def experts(name: str, implementation: str = "grouped_mm") -> nn.Module:
    """A tiny mixture of experts with random weights, whose units differ in size.

    Args:
        name: Name of the model in transformers.
        implementation: How its experts are computed.
    """
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SIZES, **_MODELS[name])
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    model.config._experts_implementation = implementation
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "experts" in key and parameter.ndim == 3:
                parameter.mul_(8)
    return model
