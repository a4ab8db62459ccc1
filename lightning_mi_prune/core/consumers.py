"""Consumers of units: one view of linear layers and convolutions, for statistics and least squares.

A consumer reads units and maps them linearly. Whatever its class, its input becomes samples x
entries, its output samples x outputs, and its weight outputs x entries x kernel positions.

A consumer is named by the path of its layer or, where a module multiplies with a parameter of its
own (:mod:`functional`), by that of the parameter. The matrices of the experts of a mixture are one
parameter: they map the same entries, and are to its weight what kernel positions are to a filter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = [
    "channels_first",
    "channels_last",
    "consumer_input",
    "fold_positions",
    "has_kernel",
    "input_dim",
    "input_gradient",
    "is_pointwise",
    "matrix_dims",
    "output_dim",
    "stacked_weight",
    "stored_weight",
    "why_not_consumer",
    "why_not_functional",
]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def why_not_consumer(module: nn.Module) -> str:
    """Why the input of a module cannot be calibrated and its weight compensated; "" if they can.

    Example:
        >>> why_not_consumer(nn.Linear(4, 2)), why_not_consumer(nn.Conv2d(4, 2, 3))
        ('', '')
        >>> why_not_consumer(nn.Conv2d(4, 4, 3, groups=2))
        'Conv2d has groups=2; expected groups=1, where every output reads every channel.'
    """
    kind = type(module).__name__
    weight = getattr(module, "weight", None)
    if parametrize.is_parametrized(module):
        return f"{kind} is parametrized (torch.nn.utils.parametrize); remove the parametrizations."
    computed = sorted({"weight_g", "weight_orig"} & set(module._parameters))
    if computed:
        return f"{kind} computes its weight from {computed[0]!r} in each call; remove that first."
    if weight is not None and not isinstance(weight, nn.Parameter):
        return f"{kind} has no plain weight; quantize and shard after the cut."
    if isinstance(module, _TRANSPOSED):
        return f"{kind} is transposed; expected a linear layer or an ordinary convolution."
    if not isinstance(module, (nn.Linear, *_CONVOLUTIONS)) and not _is_conv1d(module):
        return (
            f"{kind} is neither a linear layer (nn.Linear, Conv1D of transformers) nor nn.Conv1d, "
            "nn.Conv2d or nn.Conv3d."
        )
    if weight is not None and weight.is_complex():
        return f"{kind} has a complex weight ({weight.dtype}); moments are of real numbers."
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        held = "nothing" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
        return f"{kind} holds {held} as its weight; quantize and shard after the cut."
    if isinstance(module, _CONVOLUTIONS) and module.groups != 1:
        return (
            f"{kind} has groups={module.groups}; expected groups=1, where every output reads "
            "every channel."
        )
    return ""


def why_not_functional(weight: Tensor, read: int | None) -> str:
    """Why the input of products with a parameter cannot be calibrated; "" if it can.

    Args:
        weight: The parameter, which a module multiplies with its inputs.
        read: Dimension that is summed over; None if the parameter was reshaped before.

    Example:
        >>> why_not_functional(nn.Parameter(torch.zeros(3, 4)), 0)
        ''
        >>> why_not_functional(nn.Parameter(torch.zeros(2, 3, 4, 5)), 3)
        'it has 4 dimensions; expected a matrix, or one for each expert.'
    """
    if weight.is_complex():
        return f"it is complex ({weight.dtype}); moments are of real numbers."
    if type(weight) is not nn.Parameter or not weight.is_floating_point():
        return (
            f"it is a {type(weight).__name__} of {weight.dtype}; quantize and shard after the cut."
        )
    if weight.ndim not in (2, 3):
        return f"it has {weight.ndim} dimensions; expected a matrix, or one for each expert."
    if read is None:
        return "it is reshaped before it is multiplied, so its input is not known."
    return ""


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers, a linear layer with weight (in, out)."""
    kinds = ((kind.__name__, kind.__module__) for kind in type(module).__mro__)
    return ("Conv1D", "transformers.pytorch_utils") in kinds


def input_dim(module: nn.Module) -> int:
    """The dimension of a consumer's weight that counts the entries it reads.

    Example:
        >>> input_dim(nn.Linear(4, 2))
        1
    """
    return 0 if _is_conv1d(module) else 1


def output_dim(read: int) -> int:
    """The dimension of the weight that counts the outputs, if ``read`` counts the entries."""
    return 1 - read


def matrix_dims(read: int) -> tuple[int, int]:
    """The dimensions of several matrices in one parameter that count these, and their outputs.

    Args:
        read: Dimension that counts the entries they read.

    Example:
        >>> matrix_dims(2), matrix_dims(1), matrix_dims(0)
        ((0, 1), (0, 2), (1, 2))
    """
    matrices = 0 if read else 1
    return matrices, 3 - read - matrices


def has_kernel(module: nn.Module) -> bool:
    """Whether a consumer is a convolution: channels come before the positions."""
    return isinstance(module, _CONVOLUTIONS)


def is_pointwise(module: nn.Module) -> bool:
    """Whether every output position of a consumer depends on the same position of its input only.

    Example:
        >>> is_pointwise(nn.Conv2d(4, 2, 1)), is_pointwise(nn.Conv2d(4, 2, 1, stride=2))
        (True, False)
    """
    if not isinstance(module, _CONVOLUTIONS):
        return True
    padded = module.padding != "valid" and (
        isinstance(module.padding, tuple) and any(module.padding)
    )
    plain = set(module.kernel_size) == set(module.stride) == {1} and module.groups == 1
    return plain and not padded


def consumer_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input in a call of a consumer, whatever its name."""
    given: Tensor = args[0] if args else next(iter(kwargs.values()))
    return given


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """An input or output of a consumer, with its entries in the last dimension.

    Everything before is a sample: positions of a sequence, of an image, examples.

    Args:
        module: The consumer.
        x: ``(..., entries)``, or of a convolution ``(rows, entries, positions...)``, also without
            rows.

    Example:
        >>> channels_last(nn.Conv2d(3, 8, 1), torch.zeros(2, 3, 5, 6)).shape
        torch.Size([2, 5, 6, 3])
    """
    return x.movedim(_channels(module, x), -1) if _moves(module, x) else x


def channels_first(module: nn.Module, x: Tensor) -> Tensor:
    """The inverse of :func:`channels_last`."""
    return x.movedim(-1, _channels(module, x)) if _moves(module, x) else x


def _channels(module: nn.Module, x: Tensor) -> int:
    weight = module.get_parameter("weight")
    return x.ndim - weight.ndim + 1


def _moves(module: nn.Module, x: Tensor) -> bool:
    return has_kernel(module) and not x.is_nested and 0 <= _channels(module, x) <= 1


def stacked_weight(weight: Tensor, read: int, fold: int = 1, *, several: bool = False) -> Tensor:
    """A weight as outputs x entries x kernel positions ``(m, d, k)``.

    Args:
        weight: Weight of a consumer as it is stored.
        read: Dimension that counts the entries.
        fold: Positions of a flattened map that follow each other, for each of its channels.
        several: Whether it holds several matrices, as :func:`matrix_dims` tells; they come in place
            of positions.

    Example:
        >>> stacked_weight(torch.zeros(8, 3, 5, 5), 1).shape
        torch.Size([8, 3, 25])
        >>> stacked_weight(torch.zeros(3, 8), 0).shape
        torch.Size([8, 3, 1])
        >>> stacked_weight(torch.zeros(8, 3 * 49), 1, 49).shape
        torch.Size([8, 3, 49])
        >>> stacked_weight(torch.zeros(4, 8, 3), 2, several=True).shape
        torch.Size([8, 3, 4])
    """
    if several:
        matrices, output = matrix_dims(read)
        return weight.permute(output, read, matrices)
    if weight.ndim > 2:
        return weight.flatten(2)
    shape = (weight.shape[output_dim(read)], weight.shape[read] // fold, fold)
    return (weight if read else weight.mT).reshape(shape)


def stored_weight(stacked: Tensor, like: Tensor, read: int, *, several: bool = False) -> Tensor:
    """The inverse of :func:`stacked_weight`, in type and kernel shape of ``like``.

    Example:
        >>> stored_weight(torch.zeros(8, 2, 25), torch.zeros(8, 3, 5, 5), 1).shape
        torch.Size([8, 2, 5, 5])
    """
    if several:
        matrices, output = matrix_dims(read)
        order = sorted(range(3), key=[output, read, matrices].__getitem__)
        return stacked.permute(order).contiguous().to(like)
    if like.ndim > 2:
        return stacked.reshape(*stacked.shape[:2], *like.shape[2:]).to(like)
    matrix = stacked.flatten(1)
    return (matrix if read else matrix.mT.contiguous()).to(like)


def fold_positions(x: Tensor, fold: int) -> Tensor:
    """The positions of a flattened map ``(..., d * fold)`` as samples ``(..., fold, d)``.

    Example:
        >>> fold_positions(torch.arange(6), 3)
        tensor([[0, 3],
                [1, 4],
                [2, 5]])
    """
    return x if fold == 1 else x.reshape(*x.shape[:-1], x.shape[-1] // fold, fold).mT


def input_gradient(module: nn.Module, x: Tensor, grad: Tensor) -> Tensor:
    """Gradient at the input of a consumer, for one at its output, both in single precision.

    Args:
        module: The consumer.
        x: Its input, as it receives it; only the shape of it counts.
        grad: Gradient at its output, of the shape of that.

    Example:
        >>> conv = nn.Conv1d(2, 3, 3)
        >>> input_gradient(conv, torch.zeros(1, 2, 5), torch.ones(1, 3, 3)).shape
        torch.Size([1, 2, 5])
    """
    weight: Any = module.weight
    weight = weight.detach().float()
    if not has_kernel(module):
        rows = grad.flatten(0, -2).float() @ (weight if input_dim(module) else weight.mT)
        down: Tensor = rows.view(*grad.shape[:-1], -1)
        return down
    # The adjoint of the convolution, whatever its stride, padding and dilation.
    with torch.enable_grad():
        start = torch.zeros(x.shape, dtype=torch.float32, device=x.device, requires_grad=True)
        output = torch.func.functional_call(_plain(module), {"weight": weight}, (start,))
    (found,) = torch.autograd.grad(output, start, grad.float())
    return found


def _plain(module: nn.Module) -> nn.Module:
    """The same convolution without a bias and without hooks."""
    own: Any = module
    kind: Any = next(kind for kind in _CONVOLUTIONS if isinstance(own, kind))
    with torch.device("meta"):
        made: nn.Module = kind(
            own.weight.shape[1],
            own.weight.shape[0],
            own.kernel_size,
            stride=own.stride,
            padding=own.padding,
            dilation=own.dilation,
            bias=False,
            padding_mode=own.padding_mode,
        )
    return made
