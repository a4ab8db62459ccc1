"""Record one call of a network: its operators, their tensors, and which modules they pass.

A dispatch mode receives every ATen operator with real tensors, below all Python code: no export and
no symbolic trace, control flow as it happens. Parameters and buffers are recognised by identity.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.running import evaluating, fixed_random_state
from lightning_mi_prune.core.spilling import spill_outputs

__all__ = [
    "ModuleCall",
    "Operator",
    "Recording",
    "record_call",
    "tensors_in",
    "tensors_of",
]

_MOST_OPERATORS = 1_000_000  # of one call; a loop over a long sequence has less


@dataclass(frozen=True)
class Operator:
    """One ATen operator that ran.

    Args:
        index: Its running number in the call.
        name: Its name without namespace and overload, ``"addmm"``.
        args: Positional arguments.
        kwargs: Keyword arguments.
        output: What it returned.
        module: Path of the innermost running module.
        inputs: All tensors among the arguments, nested ones too.
        outputs: All tensors that it returned.
        pointwise: Whether each entry of its output depends on one entry of each input.
    """

    index: int
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any
    module: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    pointwise: bool

    @property
    def label(self) -> str:
        """The operator and where it ran, for messages."""
        return f"{self.name} in {self.module}" if self.module else self.name

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, whether it was given by position or by name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module.

    Args:
        path: Its path.
        start: Number of operators that ran before it.
        end: Number of operators that had run after it.
        inputs: Tensors among its arguments.
        outputs: Tensors that it returned.
        arguments: Tensors among its arguments, by the name that its ``forward`` has for them.
    """

    path: str
    start: int
    end: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    arguments: Mapping[str, Tensor]


@dataclass(frozen=True)
class Recording:
    """Everything that one call did.

    Args:
        operators: Operators in the order in which they ran.
        calls: Calls of modules, in the order in which they ended.
        tensors: Parameters and buffers by every name they have.
        output: What the call returned.
    """

    operators: tuple[Operator, ...]
    calls: tuple[ModuleCall, ...]
    tensors: Mapping[str, Tensor]
    output: Any


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors in nested containers, those of dataclasses and of other objects too.

    Example:
        >>> len(tensors_in({"a": [torch.ones(1)], "b": (torch.ones(2), 3)}))
        2
    """
    return list(_tensors(value, 4))


def _tensors(value: Any, depth: int) -> Iterator[Tensor]:
    for leaf in tree_flatten(value)[0]:
        if isinstance(leaf, Tensor):
            yield leaf
        elif depth and hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            yield from _tensors(dict(vars(leaf)), depth - 1)  # such as a cache of keys and values


def record_call(module: nn.Module, run: Callable[[nn.Module], Any]) -> Recording:
    """Run a module once, in evaluation mode and without gradients, and record what happens.

    The module, its buffers and the random state stay as they are.

    Args:
        module: The module.
        run: Calls it on an example.

    Raises:
        PruningError: If nothing was called, or a tensor is of a kind that cannot be followed.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        >>> x = torch.ones(2, 3)
        >>> recording = record_call(net, lambda net: net(x))
        >>> [operator.name for operator in recording.operators], recording.calls[-1].path
        (['t', 'addmm', 'relu'], '')
    """
    recorder = _Recorder(module)
    buffers = {name: (b._version, b.clone()) for name, b in module.named_buffers() if not b.is_meta}
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one opaque operator
    try:
        with ExitStack() as stack:
            for manager in (fixed_random_state(module), evaluating(module), recorder.hooked()):
                stack.enter_context(manager)
            torch.manual_seed(0)
            # Checkpointed blocks miss the gradients that are off here.
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
            stack.enter_context(recorder)
            output = run(module)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                version, value = buffers.get(name, (buffer._version, buffer))
                if buffer._version != version and value.shape == buffer.shape:
                    buffer.copy_(value)
    if not recorder.operators:
        raise PruningError(
            f"The call of {type(module).__name__} ran no tensor operator; expected a call that "
            "computes the outputs. Scripted and compiled modules cannot be recorded: give the "
            "module as it was written."
        )
    return Recording(tuple(recorder.operators), tuple(recorder.calls), recorder.tensors, output)


@dataclass
class _Running:
    path: str
    start: int
    inputs: tuple[Tensor, ...]
    arguments: Mapping[str, Tensor]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dispatch mode and the hooks of one recorded call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[Operator] = []
        self.calls: list[ModuleCall] = []
        self._module = module
        self._running: list[_Running] = []
        # A decoder that is tied to a table goes by the name of the table: where a model is built
        # from a file, both are one tensor only after the weights are loaded.
        tables = {
            f"{path}.weight".lstrip("."): part.weight
            for path, part in module.named_modules()
            if isinstance(part, nn.Embedding)
        }
        self.tensors: dict[str, Tensor] = {
            **tables,
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        output = func(*args, **named)
        path = self._running[-1].path if self._running else ""
        inputs = tuple(_plain(tensors_of((args, named)), func, path))
        outputs = tuple(_plain(tensors_of(output), func, path))
        spill_outputs(outputs, inputs)  # all of them are alive until the call is understood
        name = func._schema.name.partition("::")[2]
        if len(self.operators) >= _MOST_OPERATORS:
            raise PruningError(
                f"The call ran more than {_MOST_OPERATORS} operators, last {name} in {path!r}; "
                "expected one forward call. Give a shorter example."
            )
        pointwise = torch.Tag.pointwise in func.tags
        index = len(self.operators)
        self.operators.append(
            Operator(index, name, args, named, output, path, inputs, outputs, pointwise)
        )
        return output

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on all modules, while the call runs."""
        handles = []
        try:
            for path, part in self._module.named_modules():
                if isinstance(part, torch.jit.ScriptModule):
                    raise PruningError(
                        f"{path or type(part).__name__!r} is a scripted module, whose parts cannot "
                        "be replaced; expected the module as it was written. Script it after "
                        "pruning."
                    )
                handles += [
                    part.register_forward_pre_hook(self._enter(path), with_kwargs=True),
                    part.register_forward_hook(self._leave, with_kwargs=True),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = tuple(tensors_of((args, kwargs)))
            given = _named(module, args, kwargs)
            self._running.append(_Running(path, len(self.operators), inputs, given))

        return hook

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self._running.pop()
        self.calls.append(
            ModuleCall(
                call.path,
                call.start,
                len(self.operators),
                call.inputs,
                tuple(tensors_in(output)),
                call.arguments,
            )
        )


def _named(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Tensor]:
    """The tensors among the arguments of a call, by name."""
    positional = zip(inspect.signature(module.forward).parameters, args, strict=False)
    return {n: value for n, value in (*positional, *kwargs.items()) if isinstance(value, Tensor)}


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _plain(tensors: Sequence[Tensor], func: Any, path: str) -> Sequence[Tensor]:
    """The tensors, if they are dense."""
    for tensor in tensors:
        if tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "a quantized tensor" if tensor.is_quantized else "a sparse tensor"
            raise PruningError(
                f"{func._schema.name} in {path or 'the module'!r} uses {kind}; expected dense "
                "tensors, whose dimensions can be followed. Prune before quantization, or prune "
                "the other modules one by one."
            )
    return tensors
