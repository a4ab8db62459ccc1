"""Where activations go: residual inputs, what reads an output, the calls around an operator."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

from torch import Tensor, nn

from lightning_mi_prune.discovery.stacks import shared_path
from lightning_mi_prune.discovery.tracing.recording import ModuleCall, Operator, Recording
from lightning_mi_prune.discovery.tracing.trace import Trace, WeightUse
from lightning_mi_prune.graph.groups import join_path

__all__ = [
    "Streams",
]

# An activation keeps its values through these. A scale or a normalisation is none of them: what
# the residual stream lacks behind it is not what the layer before it would have to add.
_PASS = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "clone", "detach", "alias"),
        *("dropout", "native_dropout", "_to_copy", "transpose", "permute", "t", "contiguous"),
        *("unsqueeze", "squeeze", "slice"),
    )
)
_LONGEST = 24  # operators between a product and the addition of its output to the residual stream


class Streams:
    """Paths of activations through a recording.

    Args:
        model: The module that was called.
        recording: Its recording.
        trace: The trace of all its operators.
    """

    def __init__(self, model: nn.Module, recording: Recording, trace: Trace) -> None:
        self._model, self._recording, self._trace = model, recording, trace

    @cached_property
    def _users(self) -> dict[int, list[Operator]]:
        users: dict[int, list[Operator]] = defaultdict(list)
        for operator in self._recording.operators:
            for tensor in operator.inputs:
                users[id(tensor)].append(operator)
        return users

    @cached_property
    def _calls_by_input(self) -> dict[int, list[ModuleCall]]:
        found: dict[int, list[ModuleCall]] = defaultdict(list)
        for call in self._recording.calls:
            for tensor in call.inputs[:1]:
                found[self._trace.root(tensor)].append(call)
        return found

    def residual(self, use: WeightUse) -> str | None:
        """Module whose input is the residual stream that is added to the output of a consumer.

        Args:
            use: The use of the consumer's weight.

        Returns:
            Path of a module that receives it as its first argument, the innermost; None if nothing
            is added, no module receives what is, or it has other dimensions than the output, as
            behind the experts of a mixture, which run on all positions in one row.
        """
        owner = use.tensor.rpartition(".")[0]
        made = [call for call in self.calls_around(use.index) if call.path == owner]
        shapes = [sorted(call.outputs[0].shape) for call in made[:1] if call.outputs]
        for other in self._added_to(use.output):
            if shapes and sorted(other.shape) != shapes[0]:
                continue
            calls = [
                call
                for call in self._calls_by_input.get(self._trace.root(other), ())
                if call.start <= use.index
                and call.path
                and self._has_weight(call.path)
                and self._is_last(call, use.index)
            ]
            if calls:
                near = [len(shared_path([owner, call.path]).split(".")) for call in calls]
                best = max(range(len(calls)), key=lambda i: (near[i], -calls[i].start))
                return calls[best].path
        return None

    @cached_property
    def _calls_by_path(self) -> dict[str, list[ModuleCall]]:
        found: dict[str, list[ModuleCall]] = defaultdict(list)
        for call in self._recording.calls:
            found[call.path].append(call)
        return found

    def _is_last(self, call: ModuleCall, index: int) -> bool:
        """Whether a module was not called again, on something else, before an operator."""
        return not any(
            call.start < other.start <= index for other in self._calls_by_path[call.path]
        )

    def _has_weight(self, path: str) -> bool:
        return next(self._model.get_submodule(path).parameters(), None) is not None

    def _added_to(self, output: Tensor) -> Iterator[Tensor]:
        """Activations that are added to an output, one after another."""
        tensor, trace = output, self._trace
        for _ in range(_LONGEST):
            following = None
            for operator in self._users.get(id(tensor), ()):
                if operator.name in ("add", "add_") and len(operator.inputs) == 2:
                    one, two = operator.inputs
                    other = two if one is tensor else one
                    if other.shape == tensor.shape and trace.parameter_of(other) is None:
                        yield other
                        following = operator
                    elif trace.parameter_of(other) is not None:
                        following = following or operator  # a bias
                elif operator.name in _PASS and operator.outputs[0].numel() == tensor.numel():
                    activations = [t for t in operator.inputs if t.numel() == tensor.numel()]
                    if len(activations) == 1:
                        following = following or operator
            if following is None:
                return
            tensor = following.outputs[0]

    # ---------------------------------------------------------------------- calls of modules

    @cached_property
    def _by_length(self) -> Sequence[ModuleCall]:
        return sorted(self._recording.calls, key=lambda call: call.end - call.start)

    def calls_around(self, index: int) -> list[ModuleCall]:
        """Calls of modules in which an operator ran, the innermost first."""
        return [call for call in self._by_length if call.start <= index < call.end]

    def start(self, path: str) -> int:
        """Running number of the first operator in a call of a module."""
        return self._calls_by_path[path][0].start

    def last_module(self, path: str) -> str:
        """The module inside another that makes its first output, named from there; "" for none."""
        call = next(call for call in self._by_length if call.path == path)
        root = self._trace.root(call.outputs[0])
        made = [
            inner.path[len(path) + 1 :]
            for inner in self._by_length
            if inner.path.startswith(f"{path}.")
            and inner.outputs
            and self._trace.root(inner.outputs[0]) == root
            and self._has_weight(inner.path)
        ]
        return made[0] if made else ""

    def network(self, index: int) -> str:
        """Path of the outermost Hugging Face model around an operator, or of any module called."""
        paths = [call.path for call in self.calls_around(index)]
        known = [p for p in paths if _is_pretrained(self._model.get_submodule(p))]
        if known or not paths:
            return min(known, key=len) if known else ""
        return min(paths, key=len)

    def base(self, network: str) -> str:
        """Path of the base model inside a Hugging Face model with a head; else the network's."""
        module = self._model.get_submodule(network)
        prefix = str(getattr(module, "base_model_prefix", ""))
        inner = getattr(module, prefix, None) if prefix else None
        return join_path(network, prefix) if isinstance(inner, nn.Module) else network

    def home(self, index: int, network: str) -> str:
        """Path of the base model around an operator, or of its network."""
        base = self.base(network)
        inside = any(call.path == base for call in self.calls_around(index))
        return base if inside else network

    def scope(self, index: int) -> str | None:
        """Path of the innermost module that received ``attention_mask`` of examples x positions."""
        for call in self.calls_around(index):
            mask = call.arguments.get("attention_mask")  # layers may get one of position pairs
            if mask is not None and mask.ndim == 2:
                return call.path
        return None


def _is_pretrained(module: nn.Module) -> bool:
    return hasattr(module, "base_model_prefix") and hasattr(
        getattr(module, "config", None), "to_dict"
    )
