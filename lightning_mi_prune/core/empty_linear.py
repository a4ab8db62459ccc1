"""EmptyLinear: the replacement of a linear layer without inputs or without outputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import Self

__all__ = [
    "KEPT_UNITS",
    "EmptyLinear",
    "empty_linears",
    "linear_at",
    "module_at",
    "modules_of",
    "parameters_of",
    "place_linears",
    "show_linears",
]

KEPT_UNITS = "kept_units"

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class EmptyLinear(nn.Module):
    """Replacement of a linear layer that lost all its inputs or outputs: its bias, or nothing.

    Quantizers, exporters and optimizers fail on linear layers of zero width, so this module takes
    its place in the module tree, without its empty parameters. A layer without inputs still has
    its bias. The linear layer itself is kept outside the tree and returns when units do.

    Args:
        linear: The layer, its weight without entries.

    Example:
        >>> import torch
        >>> linear = nn.Linear(4, 3)
        >>> linear.weight = nn.Parameter(linear.weight[:, :0])
        >>> empty = EmptyLinear(linear)
        >>> [name for name, _ in empty.named_parameters()], empty(torch.ones(2, 0)).shape
        (['bias'], torch.Size([2, 3]))
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.__dict__["_linear"] = linear  # not registered: outside the tree
        for name in _HOOKS:  # shared, so that their handles work
            self.__dict__[name] = getattr(linear, name)
        if linear.weight.shape[0] and linear.bias is not None:
            self._parameters["bias"] = linear.bias
        self.train(linear.training)

    @property
    def linear(self) -> nn.Linear:
        """The layer, with the bias that is in the tree, which loading may have replaced."""
        linear: nn.Linear = self.__dict__["_linear"]
        if "bias" in self._parameters:
            linear._parameters["bias"] = self._parameters["bias"]
        return linear

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            linear = self.__dict__.get("_linear")
            if linear is None or name not in ("weight", "bias", "in_features", "out_features"):
                raise
            return getattr(linear, name)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name nn.Linear has
        """The bias at every position, or a tensor without entries if there are no outputs."""
        outputs = self.weight.shape[0]
        if not outputs:
            return input[..., :0]
        zeros = input.sum(-1, keepdim=True)  # sums without entries, which pass gradients
        bias: Tensor = input.new_zeros(outputs) if self.bias is None else self.bias
        return zeros + bias

    def extra_repr(self) -> str:
        """As for a linear layer."""
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        linear = self.linear
        linear._apply(fn)  # type: ignore[no-untyped-call]
        if "bias" in self._parameters:
            self._parameters["bias"] = linear.bias
        return self


def linear_at(module: nn.Module) -> nn.Module:
    """The module itself, or the linear layer that an :class:`EmptyLinear` replaces."""
    return module.linear if isinstance(module, EmptyLinear) else module


def module_at(network: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, or None; a linear layer instead of its empty replacement.

    Example:
        >>> module_at(nn.Sequential(nn.ReLU()), "0"), module_at(nn.ReLU(), "0")
        (ReLU(), None)
    """
    try:
        return linear_at(network.get_submodule(path))
    except AttributeError:
        return None


def modules_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by path, as ``named_modules``, and the linear layers outside the tree."""
    for path, module in model.named_modules():
        yield path, module
        if isinstance(module, EmptyLinear):
            yield path, module.linear


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, also those without entries, by every name they have."""
    found = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, EmptyLinear):
            dot = f"{path}." if path else ""
            found |= {f"{dot}{name}": p for name, p in module.linear.named_parameters()}
    return found


def place_linears(model: nn.Module, paths: Iterable[str]) -> None:
    """Replace linear layers without entries by :class:`EmptyLinear`, and put the others back.

    Args:
        model: Module from which the paths are named.
        paths: Paths of linear layers or their replacements.
    """
    changes: dict[int, nn.Module] = {}
    for path in paths:
        module = model.get_submodule(path)
        linear = linear_at(module)
        if not isinstance(linear, nn.Linear) or (linear.weight.numel() > 0) == (module is linear):
            continue
        changes[id(module)] = EmptyLinear(linear) if module is linear else linear
        linear.train(module.training)
    _replace_modules(model, changes)


def empty_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers outside the tree, by path."""
    return {path: m.linear for path, m in model.named_modules() if isinstance(m, EmptyLinear)}


def show_linears(
    model: nn.Module, linears: Mapping[str, nn.Linear], paths: Collection[str]
) -> None:
    """Put linear layers without entries back into the tree until :func:`place_linears` is called.

    Args:
        model: Module from which the paths are named.
        linears: What :func:`empty_linears` returned.
        paths: Paths of those to put back.
    """
    shown = {path: linear for path, linear in linears.items() if path in paths}
    _replace_modules(model, {id(model.get_submodule(path)): part for path, part in shown.items()})


def _replace_modules(model: nn.Module, changes: Mapping[int, nn.Module]) -> None:
    """Replace modules, given by ``id``, in every module that holds them."""
    for parent in list(model.modules()) if changes else ():
        for name, child in parent._modules.items():
            if id(child) in changes:
                parent._modules[name] = changes[id(child)]
