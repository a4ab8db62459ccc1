"""The inputs of a call, which of their dimensions are free, and the same inputs at other sizes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.running import tensors_in
from lightning_mi_prune.core.untrusted import described

__all__ = [
    "Axes",
    "Call",
    "call_of",
    "check_axes",
    "default_axes",
    "places_of",
    "resized",
    "sizes_of",
    "smaller_sizes",
]

Axes = Mapping[str, Mapping[int, str]]
"""Names of dynamic dimensions, by input and dimension."""

_BATCH, _LENGTH = "batch", "length"
_DECODER, _EMBEDDED = "decoder_", "embeds"  # as transformers name inputs


@dataclass(frozen=True)
class Call:
    """What a network is called with.

    Args:
        tensors: Its inputs, in order.
        constants: Values that are no tensors.
        order: The names of all of them, in order.
        by_position: Whether they are given by position.
    """

    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    order: tuple[str, ...]
    by_position: bool

    def run(self, network: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
        """Call a network with the constants and these tensors."""
        values = {name: tensors.get(name, self.constants.get(name)) for name in self.order}
        return network(*values.values()) if self.by_position else network(**values)


def call_of(network: nn.Module, example: Any) -> Call:
    """The call of a network that an example stands for.

    Args:
        network: The network; tensors go to its device.
        example: A mapping of arguments, a sequence of them, or the one argument.

    Raises:
        PruningError: If it is none of these, or holds tensors in containers.

    Example:
        >>> call = call_of(nn.Linear(2, 3), torch.zeros(1, 2))
        >>> list(call.tensors), call.run(nn.Linear(2, 3), call.tensors).shape
        (['input'], torch.Size([1, 3]))
    """
    by_position = not isinstance(example, Mapping)
    if isinstance(example, Tensor):
        example = (example,)
    if by_position:
        if not isinstance(example, (tuple, list)):
            raise PruningError(
                f"The example is {described(example)}; expected a mapping of arguments, a tuple "
                "of them, or one tensor."
            )
        example = dict(zip(_positions(network, len(example)), example, strict=True))
    for name, value in example.items():
        if not isinstance(name, str):
            raise PruningError(f"The example names an argument {described(name)}; expected text.")
        if not isinstance(value, Tensor) and any(True for _ in tensors_in(value)):
            raise PruningError(
                f"The argument {name!r} of the example holds tensors in a "
                f"{type(value).__name__}; expected tensors, and values that stay the same. Give a "
                "network that takes its tensors one by one."
            )
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    tensors = {n: x.detach().to(device) for n, x in example.items() if isinstance(x, Tensor)}
    if not tensors:
        raise PruningError(
            "The example holds no tensor; expected the arguments of one call of the network."
        )
    constants = {name: value for name, value in example.items() if name not in tensors}
    return Call(tensors, constants, tuple(example), by_position)


def _positions(network: nn.Module, count: int) -> list[str]:
    """Names of the first arguments of a network."""
    parameters = inspect.signature(network.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    many = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    if many is not None:
        names += [f"{many}_{i}" for i in range(count - len(names))]
    if count > len(names):
        raise PruningError(
            f"The example has {count} values, but {type(network).__name__}.forward takes "
            f"({', '.join(names)}); expected a mapping of its arguments."
        )
    return names[:count]


def default_axes(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Which dimensions of inputs are taken to be free: the batch, and the length of tokens.

    Args:
        tensors: The inputs.

    Example:
        >>> features = torch.ones(2, 5)
        >>> default_axes({"input_ids": features.long(), "features": features})
        {'input_ids': {0: 'batch', 1: 'length'}, 'features': {0: 'batch'}}
    """
    rows = next((x.shape[0] for x in tensors.values() if x.ndim), None)
    axes: dict[str, dict[int, str]] = {
        name: {0: _BATCH} if x.ndim and x.shape[0] == rows else {} for name, x in tensors.items()
    }
    lengths: dict[str, int] = {}
    for name, x in tensors.items():
        tokens = not (x.is_floating_point() or x.is_complex()) and x.ndim == 2
        if tokens or (_EMBEDDED in name and x.ndim == 3):
            length = _length_of(name)
            same = lengths.setdefault(length, x.shape[1]) == x.shape[1]
            axes[name][1] = length if same else f"{name}_{_LENGTH}"
    for name, x in tensors.items():  # such as a box of each token
        if not x.is_floating_point() and x.ndim == 3:
            length = _length_of(name)
            axes[name] |= {1: length} if lengths.get(length) == x.shape[1] else {}
    return axes


def _length_of(name: str) -> str:
    return _DECODER + _LENGTH if name.startswith(_DECODER) else _LENGTH


def check_axes(axes: Axes, tensors: Mapping[str, Tensor]) -> dict[str, dict[int, str]]:
    """Dynamic dimensions that were given, of all inputs.

    Args:
        axes: What was given.
        tensors: The inputs.

    Raises:
        PruningError: If they name an input or a dimension that is not there, or give different
            sizes one name.

    Example:
        >>> check_axes({"x": {0: "rows"}}, {"x": torch.ones(2, 3), "y": torch.ones(2)})
        {'x': {0: 'rows'}, 'y': {}}
    """
    if not isinstance(axes, Mapping) or not all(isinstance(a, Mapping) for a in axes.values()):
        raise PruningError(
            f"dynamic_shapes is {described(axes)}; expected names of dimensions by input, such as "
            '{"input_ids": {0: "batch", 1: "length"}}.'
        )
    for name, named in axes.items():
        if name not in tensors:
            raise PruningError(
                f"dynamic_shapes names the input {described(name)}; expected one of "
                f"{', '.join(tensors)}."
            )
        for dim, word in named.items():
            if type(dim) is not int or not 0 <= dim < tensors[name].ndim:
                raise PruningError(
                    f"dynamic_shapes names dimension {described(dim)} of {name!r}; expected 0 to "
                    f"{tensors[name].ndim - 1}."
                )
            if not isinstance(word, str) or not word.isidentifier():
                raise PruningError(
                    f"dynamic_shapes calls dimension {dim} of {name!r} {described(word)}; expected "
                    "a name of letters, digits and underscores."
                )
    found = {name: dict(axes.get(name, {})) for name in tensors}
    sizes_of(tensors, found)
    return found


def sizes_of(tensors: Mapping[str, Tensor], axes: Axes) -> dict[str, int]:
    """Sizes of the dynamic dimensions.

    Raises:
        PruningError: If dimensions of one name have different sizes.

    Example:
        >>> sizes_of({"x": torch.ones(2, 3)}, {"x": {0: "batch"}})
        {'batch': 2}
    """
    sizes: dict[str, int] = {}
    for name, named in axes.items():
        for dim, word in named.items():
            size = tensors[name].shape[dim]
            if sizes.setdefault(word, size) != size:
                raise PruningError(
                    f"The dynamic dimension {word!r} has size {size} in dimension {dim} of "
                    f"{name!r}, and {sizes[word]} elsewhere; expected one size. Give them "
                    "different names."
                )
    return sizes


def places_of(word: str, axes: Axes) -> str:
    """Where a dynamic dimension is, in words.

    Example:
        >>> places_of("batch", {"x": {0: "batch"}, "y": {0: "batch"}})
        "dimension 0 of 'x', dimension 0 of 'y'"
    """
    named = ((d, name) for name, dims in axes.items() for d, found in dims.items() if found == word)
    return ", ".join(f"dimension {dim} of {name!r}" for dim, name in named)


def smaller_sizes(size: int, least: int) -> list[int]:
    """Smaller sizes of a dimension to try, the likeliest first; a larger one where none is.

    Example:
        >>> smaller_sizes(12, 2), smaller_sizes(3, 1), smaller_sizes(1, 2)
        ([8, 6], [2, 1], [2])
    """
    wanted = [each for each in (size - size // 3, size // 2) if least <= each < size]
    return wanted or [max(least, size)]


def resized(
    tensors: Mapping[str, Tensor], axes: Axes, sizes: Mapping[str, int], *, last: bool = False
) -> dict[str, Tensor]:
    """Inputs of other sizes: their first or last entries, which repeat where they are too few.

    Args:
        tensors: The inputs.
        axes: The dynamic dimensions.
        sizes: Their new sizes.
        last: Whether to keep the last entries, but the first rows.

    Example:
        >>> x = torch.arange(6).view(2, 3)
        >>> resized({"x": x}, {"x": {0: "batch", 1: "length"}}, {"batch": 3, "length": 2})["x"]
        tensor([[0, 1],
                [3, 4],
                [0, 1]])
    """
    return {n: _resized(x, axes.get(n, {}).items(), sizes, last) for n, x in tensors.items()}


def _resized(
    x: Tensor, named: Iterable[tuple[int, str]], sizes: Mapping[str, int], last: bool
) -> Tensor:
    for dim, word in named:
        old, new = x.shape[dim], sizes.get(word, x.shape[dim])
        start = max(0, old - new) if last and word != _BATCH else 0
        x = x.index_select(dim, ((torch.arange(new) + start) % old).to(x.device))
    return x
