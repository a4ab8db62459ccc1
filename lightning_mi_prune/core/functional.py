"""Weights that a module uses as functions: the inputs of products with a parameter.

``functional.linear(x, self.w)``, ``x @ self.w`` and the experts of a mixture multiply an input with
a parameter, so no layer is called whose input a hook could take. A torch function mode sees these
operators instead, and knows a weight by its identity: the parameter itself, a view of it such as
the matrix of one expert, or a copy in another type or of some of its matrices.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

__all__ = [
    "calling_modules",
    "intercept_gradients",
    "intercept_inputs",
    "intercept_products",
    "summed_dim",
]

# Positions of the two factors among the arguments, and their names.
_PRODUCTS: Mapping[str, tuple[tuple[int, str], tuple[int, str]]] = {
    "linear": ((0, "input"), (1, "weight")),
    "matmul": ((0, "input"), (1, "other")),
    "__matmul__": ((0, "input"), (1, "other")),
    "mm": ((0, "input"), (1, "mat2")),
    "bmm": ((0, "input"), (1, "mat2")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "grouped_mm": ((0, "mat_a"), (1, "mat_b")),
    "_grouped_mm": ((0, "self"), (1, "mat2")),
    "grouped_mm_fallback": ((0, "input"), (1, "weight")),
}
_WEIGHT_SECOND = frozenset(("linear", "grouped_mm", "_grouped_mm", "grouped_mm_fallback"))

# What keeps a weight that weight: views, types, and some of its matrices.
_SAME_WEIGHT = frozenset(
    (
        *("__getitem__", "__get__", "select", "unbind", "index_select", "split", "chunk"),
        *("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "adjoint"),
        *("unsqueeze", "squeeze", "expand", "expand_as", "contiguous", "clone", "detach"),
        *("to", "type", "type_as", "float", "double", "half", "bfloat16"),
    )
)

Observer = Callable[[str, Tensor, int], Tensor | None]


def calling_modules(name: str) -> tuple[str, ...]:
    """Paths of the modules in whose calls the products with a parameter are intercepted.

    Args:
        name: Name of the parameter.

    Returns:
        The module that holds it, and the one around that, which may use weights of its children.

    Example:
        >>> calling_modules("mlp.experts.down_proj"), calling_modules("weight")
        (('mlp.experts', 'mlp'), ('',))
    """
    owner = name.rpartition(".")[0]
    return (owner, owner.rpartition(".")[0]) if owner else (owner,)


def summed_dim(equation: str, place: int) -> int | None:
    """The dimension of a factor that ``einsum`` sums over with the other one, if it is one.

    Args:
        equation: What to sum.
        place: Which of the two factors.

    Example:
        >>> summed_dim("...d,dhk->...hk", 0), summed_dim("hkd,bshk->bsd", 1)
        (-1, None)
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or len(terms) != 2:
        return None
    own, other = terms[place], terms[1 - place]
    summed = [a for a in own if a.isalpha() and a in other and a not in output]
    if len(summed) != 1:
        return None
    before, ellipsis, after = own.partition("...")
    if ellipsis and summed[0] in after:
        return after.index(summed[0]) - len(after)
    return before.index(summed[0])


def intercept_products(
    model: nn.Module,
    names: Iterable[str],
    observe: Observer,
    done: Callable[[], None] | None = None,
) -> Iterator[RemovableHandle]:
    """Hooks that observe every product of an input with one of some parameters.

    Args:
        model: Module from which the parameters are named.
        names: Names of the parameters.
        observe: Receives the name, the input and the dimension of it that is summed over, before
            the product is computed; may return another input to multiply instead.
        done: Called when the outermost module that uses such parameters has returned.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.w = nn.Parameter(torch.ones(4, 2))
        ...     def forward(self, x):
        ...         return x @ self.w
        >>> net, seen = Net(), []
        >>> handles = [*intercept_products(net, ["w"], lambda *given: seen.append(given))]
        >>> _ = net(torch.zeros(3, 4))
        >>> [(name, tuple(x.shape), dim) for name, x, dim in seen]
        [('w', (3, 4), -1)]
    """
    inside: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for path in calling_modules(name):
            inside[path].append(name)
    mode = _Products(model, observe, done)
    for path, mine in inside.items():
        module = model.get_submodule(path)
        yield module.register_forward_pre_hook(mode.starting(mine))
        yield module.register_forward_hook(mode.ending, always_call=True)


def intercept_inputs(
    model: nn.Module, hooks: Mapping[str, Sequence[Callable[[Tensor], None]]]
) -> Iterator[RemovableHandle]:
    """Hooks that pass on the inputs of products with parameters, once a call.

    All products with a parameter in one call of the module that uses it are one input: the samples
    of all experts of a mixture.

    Args:
        model: Module from which the parameters are named.
        hooks: Receive the inputs ``(..., entries)``, by name of the parameter.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)

    def observe(name: str, x: Tensor, dim: int) -> None:
        # A copy, as the module goes on and may change it in place.
        found[name].append(x.detach().movedim(dim, -1).clone())

    def done() -> None:
        for name, parts in found.items():
            rows = [part.reshape(-1, part.shape[-1]) for part in parts]
            x = parts[0] if len(parts) == 1 else torch.cat(rows)
            for hook in hooks[name]:
                hook(x)
        found.clear()

    yield from intercept_products(model, hooks, observe, done)


def intercept_gradients(
    model: nn.Module,
    hooks: Mapping[str, Sequence[Callable[[Tensor, Tensor], None]]],
    wanted: Callable[[], bool],
) -> Iterator[RemovableHandle]:
    """Hooks that pass on the gradients at the inputs of products with parameters.

    Only what flows back through the product counts, whatever else reads the same tensor.

    Args:
        model: Module from which the parameters are named.
        hooks: Receive an input ``(..., entries)`` and its gradient, by name of the parameter.
        wanted: Whether the gradients of a product that runs now are needed.
    """

    def observe(name: str, x: Tensor, dim: int) -> Tensor | None:
        if not wanted() or not x.is_floating_point():
            return None
        # Where all below is frozen the gradient is wanted all the same.
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_().clone()
        values = x.detach().movedim(dim, -1)

        def add(grad: Tensor) -> None:
            for hook in hooks[name]:
                hook(values, grad.detach().movedim(dim, -1))

        own.register_hook(add)  # type: ignore[no-untyped-call]
        return own

    yield from intercept_products(model, hooks, observe)


class _Products(TorchFunctionMode):
    """The mode that is active while modules run that use some parameters as functions."""

    def __init__(
        self, model: nn.Module, observe: Observer, done: Callable[[], None] | None
    ) -> None:
        super().__init__()
        self._model, self._observe, self._done = model, observe, done
        self._running: list[tuple[nn.Module, dict[int, str]]] = []
        self._same: dict[int, tuple[weakref.ref[Tensor], str]] = {}

    def starting(self, names: list[str]) -> Callable[..., None]:
        """The hook before a module that uses these parameters runs."""

        def hook(module: nn.Module, *_: Any) -> None:
            held = {id(self._model.get_parameter(name)): name for name in reversed(names)}
            if not self._running:
                self.__enter__()  # type: ignore[no-untyped-call]
            self._running.append((module, held))

        return hook

    def ending(self, module: nn.Module, *_: Any) -> None:
        """The hook after it, also where it failed."""
        if not self._running or self._running[-1][0] is not module:
            return  # a hook before this one's failed
        self._running.pop()
        if not self._running:
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._same.clear()
            if self._done is not None:
                self._done()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = dict(kwargs or {})
        called = getattr(func, "__name__", "").partition(".")[0]
        if called in _PRODUCTS:
            args = self._observed(called, args, named)
            return func(*args, **named)
        if called == "einsum":
            return func(*self._summed(args), **named)
        output = func(*args, **named)
        if called in _SAME_WEIGHT and args and isinstance(args[0], Tensor):
            name = self._name(args[0])
            if name is not None:
                for part in output if isinstance(output, (tuple, list)) else (output,):
                    if isinstance(part, Tensor) and part.is_floating_point():
                        self._same[id(part)] = (weakref.ref(part), name)
        return output

    def _name(self, tensor: Any) -> str | None:
        """The parameter that a tensor is."""
        if not isinstance(tensor, Tensor):
            return None
        for own in (tensor, tensor._base):
            for _, held in self._running:
                if id(own) in held:
                    return held[id(own)]
        same, name = self._same.get(id(tensor), (None, None))
        return name if same is not None and same() is tensor else None

    def _observed(
        self, called: str, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Positional arguments of a product, with the input that is multiplied."""
        one, two = (self._at(place, args, named) for place in _PRODUCTS[called])
        first, second = self._name(one), self._name(two)
        if (first is None) == (second is None):
            return args
        if second is not None:
            name, x, place, dim = second, one, _PRODUCTS[called][0], -1
        elif called in _WEIGHT_SECOND:
            return args
        else:
            name, x, place = str(first), two, _PRODUCTS[called][1]
            dim = -2 if isinstance(x, Tensor) and x.ndim > 1 else -1
        if not isinstance(x, Tensor):
            return args
        other = self._observe(name, x, dim)
        if other is None:
            return args
        position, keyword = place
        if position < len(args):
            return (*args[:position], other, *args[position + 1 :])
        named[keyword] = other
        return args

    def _summed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Arguments of ``einsum``, with the input that is multiplied."""
        names = [self._name(given) for given in args[1:]]
        if len(names) != 2 or (names[0] is None) == (names[1] is None):
            return args
        place = 1 if names[0] is None else 0
        dim = summed_dim(str(args[0]), 1 - place)
        x = args[2 - place]
        if dim is None or not isinstance(x, Tensor):
            return args
        other = self._observe(str(names[place]), x, dim)
        return (
            args
            if other is None
            else (args[0], *((args[1], other) if not place else (other, args[2])))
        )

    @staticmethod
    def _at(place: tuple[int, str], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        position, keyword = place
        return args[position] if position < len(args) else named.get(keyword)
