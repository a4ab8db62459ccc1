"""Count the multiply-accumulates of every operator that runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_mi_prune.calibration.padding import padded_encoders
from lightning_mi_prune.core.running import evaluating

__all__ = [
    "MacCounter",
    "counting",
]


class MacCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the multiply-accumulates of the operators inside a ``with`` block.

    Linear maps, convolutions, recurrent layers and the two products of attention count;
    element-wise operators, norms, look-ups, sorts, Fourier transforms and compiled kernels of third
    parties do not. The formulas are those of torch's ``FlopCounterMode`` and those that it lacks;
    its module tracker is not used, because it hooks all modules and parameters of the process.

    Example:
        >>> with torch.no_grad(), MacCounter() as counter:
        ...     _ = nn.Linear(4, 3)(torch.zeros(5, 4))
        >>> counter.macs
        60

    Args:
        after: Stack to which the restoring of the random state is added, once an operator draws.
    """

    supports_higher_order_operators = True

    @classmethod
    def is_infra_mode(cls) -> bool:
        """True: under any other mode torch falls back from compiled code for good."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True: the operators that compiled code calls are counted."""
        return True

    def __init__(self, after: ExitStack | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0
        self._doubled = FlopCounterMode(display=False).flop_registry
        self._after = after

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and count it, or those that it decomposes into."""
        kwargs = kwargs or {}
        operator = getattr(func, "_overloadpacket", func)  # a higher-order operator has none
        formula, doubled = _FORMULAS.get(operator), self._doubled.get(operator)
        if formula is None and doubled is None and isinstance(func, torch._ops.OpOverload):
            if func in _LAYOUT:
                return NotImplemented
            if func is not torch.ops.prim.device.default:
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            if torch.Tag.nondeterministic_seeded in func.tags:
                self._hold_random_state(args)
        result = func(*args, **kwargs)
        macs = 0
        if formula is not None:
            macs = formula(result, *args)
        elif doubled is not None:
            macs = doubled(*args, **kwargs, out_val=result) // 2
        self.macs += macs
        self.ran(operator, args, kwargs, result, macs)
        return result

    def ran(
        self, operator: Any, args: tuple[Any, ...], kwargs: Any, result: Any, macs: int
    ) -> None:
        """Called after every operator that was not decomposed, with its multiply-accumulates."""

    def _hold_random_state(self, args: tuple[Any, ...]) -> None:
        """Have the random state restored at the end."""
        if self._after is None:
            return
        places = {x.device for x in args if isinstance(x, Tensor) and x.device.type == "cuda"}
        self._after.enter_context(torch.random.fork_rng(devices=list(places)))


C = TypeVar("C", bound=MacCounter)

# Torch keeps modes in flags of the process, which threads would restore in any order.
_ONE_BY_ONE = threading.RLock()


@contextmanager
def counting(network: nn.Module, counter: Callable[[ExitStack], C]) -> Iterator[C]:
    """A counter for calls of a network, which stays as it is.

    The network runs in evaluation mode and without gradients. Modes, buffers and the random state
    are restored, also after an error.

    Args:
        network: The network.
        counter: Makes the counter, from the stack that restores the random state.
    """
    held = [(part, dict(part._buffers)) for part in network.modules() if part._buffers]
    buffers = {id(b): b for _, named in held for b in named.values() if b is not None}
    values = {key: b.detach().clone() for key, b in buffers.items() if not b.is_meta}
    try:
        after = ExitStack()
        with (
            evaluating(network),
            padded_encoders(network),
            _ONE_BY_ONE,
            after,
            counter(after) as running,
        ):
            yield running
    finally:
        for part, named in held:
            part._buffers.update(named)
        for key, value in values.items():
            if not torch.equal(buffers[key], value):
                with torch.inference_mode(buffers[key].is_inference()), torch.no_grad():
                    buffers[key].copy_(value)


def _lengths(x: Tensor) -> list[int]:
    """Positions of each example of ``(examples, positions, entries)``, which may be nested."""
    return [len(part) for part in x.unbind()] if x.is_nested else [x.shape[1]] * x.shape[0]


def _attention(out: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    """Scores and weighted sums; several query heads may share keys and values."""
    if query.is_nested:
        parts = zip(query.unbind(), key.unbind(), value.unbind(), strict=True)
        return sum(_attention(None, *part) for part in parts)
    *heads, positions, size = query.shape
    return math.prod(heads) * positions * key.shape[-2] * (size + value.shape[-1])


def _self_attention(x: Tensor, *weights: Tensor) -> int:
    """Scores, weighted sums and linear maps, of which the first makes queries, keys and values."""
    lengths, width = _lengths(x), weights[0].shape[0] // 3
    pairs = sum(length**2 for length in lengths)
    return sum(lengths) * sum(w.numel() for w in weights) + 2 * pairs * width


def _grouped(out: Tensor, a: Tensor, b: Tensor, *_: Any) -> int:
    return a.numel() * b.shape[-1] if a.ndim == b.ndim == 2 else out.numel() * a.shape[-1]


def _trilinear(out: Tensor, *given: Any) -> int:
    """``out[n, o] = sum_ij a[n, i] w[o, i, j] b[n, j]``, counted as one product for each term."""
    shapes = []
    for x, added in zip(given[:3], given[3:6], strict=True):
        shape = list(x.shape)
        for dim in sorted(added):
            shape.insert(dim, 1)
        shapes.append(shape)
    sizes = zip(*shapes, strict=True)
    return math.prod(max(size) if min(size) else 0 for size in sizes)


def _steps(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _recurrent(out: Any, x: Tensor, weights: list[Tensor], *_: Any) -> int:
    return _steps(x) * sum(w.numel() for w in weights if w.ndim > 1)


_INT8 = ("linear", "linear_relu", "linear_dynamic", "linear_relu_dynamic")


def _int8(out: Tensor, x: Tensor, *_: Any) -> int:
    return out.numel() * x.shape[-1]


def _by_name() -> Mapping[Any, Callable[..., int]]:
    """Formulas that torch's own counter lacks, by operator, for operators of this version."""
    aten = torch.ops.aten
    attention = [
        "flash_attention",
        "flash_attention_for_cpu",
        "efficient_attention",
        "cudnn_attention",
        "fused_attention_overrideable",
        "attention_math_for_mps",
    ]
    formulas: dict[str, Callable[..., int]] = {
        **{f"_scaled_dot_product_{name}": _attention for name in attention},
        "linear": lambda out, x, weight, *_: out.numel() * weight.shape[-1],
        "mv": lambda out, matrix, *_: matrix.numel(),
        "addmv": lambda out, _, matrix, *__: matrix.numel(),
        "dot": lambda out, vector, *_: vector.numel(),
        "vdot": lambda out, vector, *_: vector.numel(),
        "addbmm": lambda out, _, a, b, *__: a.numel() * b.shape[-1],
        "_addmm_activation": lambda out, _, a, *__: out.numel() * a.shape[-1],
        "_int_mm": lambda out, a, *_: out.numel() * a.shape[-1],
        "_weight_int8pack_mm": lambda out, a, *_: out.numel() * a.shape[-1],
        "_grouped_mm": _grouped,
        "_scaled_grouped_mm": _grouped,
        "_trilinear": _trilinear,
        "mkldnn_rnn_layer": lambda out, x, *given: _steps(x) * sum(w.numel() for w in given[:2]),
        "_cudnn_rnn": _recurrent,
        "miopen_rnn": _recurrent,
        # The fast path of torch's own encoder: one operator for a whole layer.
        "_native_multi_head_attention": lambda out, x, *given: _self_attention(
            x, given[4], given[6]
        ),
        "_transformer_encoder_layer_fwd": lambda out, x, *given: _self_attention(
            x, given[2], given[4], given[13], given[15]
        ),
    }
    found = {getattr(aten, name): f for name, f in formulas.items() if hasattr(aten, name)}
    int8 = (getattr(torch.ops.quantized, name, None) for name in _INT8)
    return found | {operator: _int8 for operator in int8 if operator is not None}


_FORMULAS = _by_name()
# Operators that ask for the layout of a tensor subclass, which the subclass answers itself.
_LAYOUT = {
    overload
    for name in ("is_contiguous", "size", "stride", "storage_offset", "numel", "dim")
    for packet in (getattr(torch.ops.aten, name), getattr(torch.ops.aten, f"sym_{name}", None))
    if packet is not None
    for overload in (getattr(packet, o) for o in packet.overloads())
} | {torch.ops.prim.layout.default}
