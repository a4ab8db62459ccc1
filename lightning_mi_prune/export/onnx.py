"""export_onnx: a network as an ONNX file of any batch size and length, checked before it is there.

The file holds the network alone: this package is not needed to run it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import reduce
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_mi_prune.checkpoint.recorded import digest_of
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError, PruningWarning, require
from lightning_mi_prune.core.files import check_writable
from lightning_mi_prune.core.plan import PruningPlan, recorded_plan
from lightning_mi_prune.core.running import undisturbed
from lightning_mi_prune.core.untrusted import described
from lightning_mi_prune.export.dynamic_shapes import (
    Axes,
    Call,
    call_of,
    check_axes,
    default_axes,
    places_of,
    resized,
    sizes_of,
    smaller_sizes,
)

__all__ = [
    "METADATA",
    "OPSET",
    "TOLERANCE",
    "OnnxFile",
    "export_onnx",
]

OPSET = 18
"""The set of operators that is written unless another is asked for."""
TOLERANCE = 1e-4
"""Largest difference of an output from that of the network, as a share of its largest value."""
METADATA = "lightning_mi_prune."
"""What the names of our metadata in a file start with."""

_EXTRA, _WHAT = "onnx", "The ONNX model"
_ONE_FILE = 3 * 2**29  # bytes of weights: protobuf reads no message of 2 GiB
_HUGE = 1e20  # stands for infinity, as in masks, and is not part of the scale
_HALF = (torch.float16, torch.bfloat16)
_LOUD = ("torch", "onnxscript", "onnx_ir")  # loggers that log every step
_NETWORK = "network"

Tensors = Mapping[str, Tensor]
Sizes = tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was written.

    Args:
        path: Where it is.
        opset: Its set of operators.
        inputs: The sizes of every input; dynamic ones by name.
        outputs: The same of every output.
        largest: The dynamic dimensions, each with the largest size that the network takes, where
            the export showed one.
        plan_digest: Digest of the plan that the network was pruned with, if it was.
        size: Bytes, with those of the weights beside it.
        difference: Largest difference of ONNX Runtime from the network, as a share of the largest
            value of an output; None without ONNX Runtime.
        checked: The sizes of the dynamic dimensions at which it was compared.
    """

    path: Path
    opset: int
    inputs: Mapping[str, Sizes]
    outputs: Mapping[str, Sizes]
    largest: Mapping[str, int | None]
    plan_digest: str | None
    size: int
    difference: float | None
    checked: tuple[Mapping[str, int], ...]


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example: Any,
    *,
    opset: int = OPSET,
    dynamic_shapes: Axes | None = None,
    plan: PruningPlan | None = None,
) -> OnnxFile:
    """Write a network as an ONNX file whose batch size and length are free.

    The file is checked with ``onnx`` and, where ONNX Runtime is installed, compared with the
    network: on the example, on one row and on one row more, each with another length. Only then
    is it put in its place. The model stays as it is: its mode, its gradients, the random state.

    The metadata of the file hold the version of this package, the digest of the plan, the class of
    the network, the opset and the dynamic dimensions, under names that start with `METADATA`.

    Args:
        model: A network in float32; or a LightningModule, of which its own ``forward`` is exported
            or, where it has none, the one network in it.
        path: The file. Weights of more than 1.5 GB are put beside it, in ``<path>.data``.
        example: What the network is called with: a mapping of arguments, a tuple of them, or one
            tensor. Values that are no tensors become constants. Without labels, unless the loss is
            to be an output.
        opset: The set of operators, 18 or later.
        dynamic_shapes: The dimensions that are dynamic, by input:
            ``{"pixel_values": {0: "batch", 2: "height"}}``. Those of one name are equal. By
            default they are ``batch``, dimension 0 of every input that has as many rows as the
            first one, and ``length``, dimension 1 of inputs of two dimensions that hold integers,
            as token ids and masks do (``decoder_length`` if their names start with ``decoder_``).
        plan: The plan that the network was pruned with, where the network does not know it.

    Returns:
        The file, with the names and sizes of its inputs and outputs.

    Raises:
        PruningError: If a package is missing, the network cannot be exported, a dimension cannot
            be dynamic, or ONNX Runtime computes something else. There is no new file then.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export_onnx(network, f"{folder}/net.onnx", torch.randn(3, 4))
        >>> dict(file.inputs), dict(file.outputs), file.difference < 1e-4
        ({'input': ('batch', 4)}, {'output': ('batch', 2)}, True)
    """
    for package in ("onnx", "onnxscript"):
        require(package, _EXTRA)
    if type(opset) is not int or opset < OPSET:
        raise PruningError(
            f"opset is {described(opset)}; expected a whole number of {OPSET} or more."
        )
    target = Path(path)
    check_writable(target, _WHAT)
    network = _network_of(model)
    _check_precision(network)
    call = _without_cache(network, call_of(network, example))
    if dynamic_shapes is None:
        axes = default_axes(call.tensors)
    else:
        axes = check_axes(dynamic_shapes, call.tensors)
    digest = _digest_of(model, plan)
    forward = _Forward(network, call)
    with undisturbed(model), torch.no_grad(), _plain(network):
        expected = [(call.tensors, forward.example())]
        expected += _at_other_sizes(forward, axes, defined=_defined(expected[0][1]))
        program = _exported(forward, expected[-1][0], axes)
        largest = _largest(program, axes)
        graph = _translated(program, call, [*expected[0][1]], axes, opset)
    inputs, outputs = _shapes(graph.model.graph.inputs), _shapes(graph.model.graph.outputs)
    _check_dynamic(inputs, axes)
    metadata = {
        "version": version("lightning-mi-prune"),
        "class": type(network).__name__,
        "opset": str(opset),
        "dynamic": json.dumps(largest),
    }
    metadata |= {} if digest is None else {"plan_digest": digest}
    graph.model.metadata_props.update({METADATA + name: text for name, text in metadata.items()})
    size, difference = _written(graph, target, expected)
    return OnnxFile(
        path=target,
        opset=opset,
        inputs=inputs,
        outputs=outputs,
        largest=largest,
        plan_digest=digest,
        size=size,
        difference=difference,
        checked=tuple(
            sizes_of(tensors, axes) for tensors, _ in (() if difference is None else expected)
        ),
    )


# ----------------------------------------------------------------------------- what is exported


def _network_of(model: nn.Module) -> nn.Module:
    """The network that is exported of a module."""
    if not isinstance(model, nn.Module):
        raise PruningError(f"The model is {described(model)}; expected a torch.nn.Module.")
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return _network_of(compiled)
    if not hasattr(model, "training_step") or _has_forward(model):
        return model
    parts = {
        name: part
        for name, part in model.named_children()
        if not isinstance(part, Metric) and any(True for _ in part.parameters())
    }
    if len(parts) == 1:
        return _network_of(next(iter(parts.values())))
    found = f"the networks {', '.join(parts)}" if parts else "no network"
    raise PruningError(
        f"{type(model).__name__} has no forward of its own and {found}; expected one. Export a "
        "network by itself, or write a forward."
    )


def _has_forward(module: nn.Module) -> bool:
    """Whether the class of a LightningModule, not Lightning, defines what a call does."""
    home = next(cls.__module__ for cls in type(module).__mro__ if "forward" in vars(cls))
    return home.split(".")[0] not in ("lightning", "pytorch_lightning", "torch")


def _check_precision(network: nn.Module) -> None:
    half = next((n for n, p in network.named_parameters() if p.dtype in _HALF), None)
    if half is not None:
        raise PruningError(
            f"{half!r} is in {network.get_parameter(half).dtype}, which ONNX Runtime does not "
            "compute with on CPUs; expected float32. Export copy.deepcopy(network).float()."
        )


def _without_cache(network: nn.Module, call: Call) -> Call:
    """The call without keys and values of earlier positions among the outputs."""
    config: Any = getattr(network, "config", None)
    taken = "use_cache" in inspect.signature(network.forward).parameters
    if call.by_position or not taken or "use_cache" in call.order:
        return call
    if not getattr(config, "use_cache", False):
        return call
    constants = {**call.constants, "use_cache": False}
    return Call(call.tensors, constants, (*call.order, "use_cache"), call.by_position)


def _digest_of(model: nn.Module, plan: PruningPlan | None) -> str | None:
    """Digest of a plan, else of that which a module carries, if it does."""
    if plan is not None:
        return plan.digest()
    tracker = PlanTracker.held_by(model)
    if tracker is not None and tracker.is_known:
        return digest_of(tracker.plan, tracker.graph)
    known: dict[str, PruningPlan] = {}
    for path, part in model.named_modules():  # the parts of a network share its config
        if any(top == "" or path.startswith(f"{top}.") for top in known):
            continue
        below = PlanTracker.held_by(part)
        found = below.plan if below is not None and below.is_known else recorded_plan(part)
        known |= {} if found is None else {path: found.prefixed(path)}
    if len(known) == 1:
        ((path, found),) = known.items()
        return found.under(path).digest()
    return reduce(PruningPlan.joined, known.values()).digest() if known else None


class _Forward(nn.Module):
    """A network that takes tensors by position and returns its outputs as one tuple."""

    def __init__(self, network: nn.Module, call: Call) -> None:
        super().__init__()
        self.network = network
        self.call = call
        self.training = False

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(dict(zip(self.call.tensors, values, strict=True))).values())

    def named(self, tensors: Tensors) -> dict[str, Tensor]:
        """The outputs for some inputs, by name."""
        found = dict(_outputs(self.call.run(self.network, tensors), ""))
        return {f"{n}_output" if n in self.call.tensors else n: x for n, x in found.items()}

    def example(self) -> dict[str, Tensor]:
        """The outputs for the example.

        Raises:
            PruningError: If the network does not take it, or returns no tensors.
        """
        kind = type(self.network).__name__
        try:
            found = self.named(self.call.tensors)
        except PruningError:
            raise
        except Exception as error:
            raise PruningError(
                f"{kind} cannot be called with the example, {', '.join(self.call.order)} "
                f"({_first_line(error)}); expected the arguments of one call."
            ) from error
        if not found:
            raise PruningError(f"{kind} returns no tensor; expected one output or more.")
        return found


def _outputs(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a network returns, with their names."""
    if isinstance(value, Tensor):
        yield name or "output", value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _outputs(part, f"{name}.{key}" if name else str(key))
    elif is_dataclass(value) and not isinstance(value, type):
        for key in (field.name for field in fields(value)):
            yield from _outputs(getattr(value, key), f"{name}.{key}" if name else key)
    elif isinstance(value, (tuple, list)):
        keys = getattr(value, "_fields", range(len(value)))
        for key, part in zip(keys, value, strict=True):
            top = key if isinstance(key, str) else f"output_{key}"
            yield from _outputs(part, f"{name}.{key}" if name else top)
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        remedy = " Give use_cache=False." if "past_key_values" in name else ""
        raise PruningError(
            f"The output {name or 'of the network'!r} is a {type(value).__name__}; expected "
            f"tensors, in mappings or tuples.{remedy}"
        )


# --------------------------------------------------------------------------------- at other sizes


def _at_other_sizes(
    forward: _Forward, axes: Axes, *, defined: bool
) -> list[tuple[Tensors, dict[str, Tensor]]]:
    """One row, and one more than the example has, each shorter than it, with the outputs.

    The last of them is fit to be exported: a size of 1 would be taken for a constant.

    Args:
        forward: The network.
        axes: The dynamic dimensions.
        defined: Whether outputs must be numbers, as those for the example are.
    """
    sizes = sizes_of(forward.call.tensors, axes)
    if not sizes:
        return []
    one = {n: [1] if n == "batch" else smaller_sizes(size, 1)[::-1] for n, size in sizes.items()}
    more = {n: [size + 1] if n == "batch" else smaller_sizes(size, 2) for n, size in sizes.items()}
    return [_first_that_runs(forward, axes, tried, defined) for tried in (one, more)]


def _first_that_runs(
    forward: _Forward, axes: Axes, tried: Mapping[str, Sequence[int]], defined: bool
) -> tuple[Tensors, dict[str, Tensor]]:
    """The example at the first sizes that the network takes, with the outputs."""
    why = ""
    most = max(map(len, tried.values()))
    for index, last in product(range(most), (False, True)):
        sizes = {name: each[min(index, len(each) - 1)] for name, each in tried.items()}
        tensors = resized(forward.call.tensors, axes, sizes, last=last)
        try:
            outputs = forward.named(tensors)
        except Exception as error:  # whatever a network raises for sizes that it does not take
            why = why or f"at {_listed(sizes)}: {_first_line(error)}"
            continue
        if not defined or _defined(outputs):
            return tensors, outputs
        why = why or f"at {_listed(sizes)}: the outputs are not numbers"
    raise PruningError(
        f"{type(forward.network).__name__} does not run at other sizes than those of the example "
        f"({why}), so {', '.join(tried)} cannot be dynamic. Expected an example that can be made "
        "shorter at its start or end. Or name the dimensions that are dynamic: "
        "dynamic_shapes={...}."
    )


def _defined(outputs: Tensors) -> bool:
    return not any(bool(x.isnan().any()) for x in outputs.values() if x.is_floating_point())


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())


def _root_of(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root_of(error.__cause__)


def _remedy(error: BaseException) -> str:
    if "grouped_mm" not in str(error):
        return ""
    return ' For experts: network.set_experts_implementation("batched_mm").'


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# -------------------------------------------------------------------------------- to operators


@contextmanager
def _plain(network: nn.Module) -> Iterator[None]:
    """Run a network as it is written: not compiled, not under autocast, without fused layers."""
    devices = {p.device.type for p in network.parameters()}
    device = "cuda" if "cuda" in devices else "cpu"
    fused = torch.backends.mha.get_fastpath_enabled()
    with torch.compiler.set_stance("force_eager"), torch.autocast(device, enabled=False):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and logs of the exporters, about steps of their own."""
    levels = {name: logging.getLogger(name).level for name in _LOUD}
    with warnings.catch_warnings(), ExitStack() as stack:
        warnings.simplefilter("ignore")
        for name, level in levels.items():
            logging.getLogger(name).setLevel(logging.ERROR)
            stack.callback(logging.getLogger(name).setLevel, level)
        yield


def _captured(forward: _Forward, tensors: Tensors, axes: Axes) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(axes.get(name, {}), dynamic) for name in tensors)
    values = tuple(tensors.values())
    with _quiet():
        return torch.export.export(forward, values, dynamic_shapes={"values": shapes}, strict=False)


def _exported(forward: _Forward, tensors: Tensors, axes: Axes) -> Any:
    """The exported program.

    Raises:
        PruningError: If there is none; it names a dynamic dimension without which there is one.
    """
    try:
        return _captured(forward, tensors, axes)
    except Exception as error:
        kind, reason = type(forward.network).__name__, _first_line(error)
        words = [*sizes_of(tensors, axes)]
        for fixed in dict.fromkeys([*((word,) for word in words), tuple(words)]):
            left = {
                name: {dim: word for dim, word in named.items() if word not in fixed}
                for name, named in axes.items()
            }
            try:
                _captured(forward, tensors, left)
            except Exception:  # noqa: S112 - it is not these alone
                continue
            places = "; ".join(f"{word!r}, {places_of(word, axes)}" for word in fixed)
            raise PruningError(
                f"Dimensions cannot be dynamic ({places}): {kind} computes with a size as a "
                f"constant ({reason}). Read the size off the input where the network has a number "
                "or a loop, or name the dimensions that are dynamic: dynamic_shapes={...}."
            ) from error
        raise PruningError(
            f"torch.export cannot follow {kind} ({reason}); expected a network without control "
            "flow on values and without other effects than its outputs."
        ) from error


def _largest(program: Any, axes: Axes) -> dict[str, int | None]:
    """The largest size of every dynamic dimension that a program takes, where it shows one."""
    inputs = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    found: dict[str, int | None] = {}
    for named, place in zip(axes.values(), inputs, strict=True):
        for dim, word in named.items():
            size = values[place].shape[dim]
            limits = program.range_constraints.get(getattr(getattr(size, "node", None), "expr", 0))
            upper = str(getattr(limits, "upper", ""))
            limit = int(upper) if upper.isdecimal() and int(upper) < 2**31 else None
            before = found.get(word)
            found[word] = limit if before is None else min(before, limit or before)
    return found


def _translated(program: Any, call: Call, outputs: Sequence[str], axes: Axes, opset: int) -> Any:
    """A program in operators of ONNX, without notes on how it came about.

    Raises:
        PruningError: If it cannot be written with these operators.
    """
    try:
        with _quiet():
            graph: Any = torch.onnx.export(
                program,
                input_names=[*call.tensors],
                output_names=[*outputs],
                opset_version=opset,
                dynamo=True,
                dynamic_shapes={"values": tuple(dict(axes.get(n, {})) for n in call.tensors)},
                verbose=False,
            )
    except Exception as error:
        raise PruningError(
            f"torch.onnx cannot write the network with opset {opset} "
            f"({_first_line(_root_of(error))}); expected operators that it translates. Newer "
            f"versions of torch and onnxscript know more of them.{_remedy(error)}"
        ) from error
    found = graph.model.opset_imports.get("")
    if found != opset:
        raise PruningError(
            f"torch.onnx wrote opset {found} where opset={opset} was asked for; expected {OPSET} "
            "or a later one that it can write."
        )
    # Notes of operators hold the source of the network, with the paths of its files.
    require("onnx_ir.passes.common", _EXTRA).ClearMetadataAndDocStringPass()(graph.model)
    body = graph.model.graph
    taken = {value.name for node in body for value in node.outputs} | {*call.tensors}
    for value in [*body.initializers.values()]:  # as in the state dict
        name = value.name.removeprefix(f"{_NETWORK}.")
        value.name = value.name if name in taken else name
    return graph


def _shapes(values: Sequence[Any]) -> dict[str, Sizes]:
    """The sizes of inputs or outputs of a graph."""
    return {
        value.name: tuple(
            size if isinstance(size, int) else str(size.value or "?") for size in value.shape
        )
        for value in values
    }


def _check_dynamic(inputs: Mapping[str, Sizes], axes: Axes) -> None:
    """Refuse a graph in which a dimension is fixed that was to be dynamic."""
    for name, named in axes.items():
        for dim, word in named.items():
            size = inputs[name][dim]
            if isinstance(size, int):
                raise PruningError(
                    f"The dimension {word!r} ({places_of(word, axes)}) cannot be dynamic: the "
                    f"export fixed it at {size}. Name the dimensions that are: dynamic_shapes=..."
                )


# ----------------------------------------------------------------------------------- to a file


def _written(
    graph: Any, target: Path, expected: Sequence[tuple[Tensors, Tensors]]
) -> tuple[int, float | None]:
    """Write, check and compare a graph in a folder of its own, then move it to its place.

    Returns:
        Bytes that were written, and the largest difference, None if it was not compared.

    Raises:
        PruningError: If it cannot be written, or ONNX Runtime computes something else.
    """
    weights = sum(value.const_value.nbytes for value in graph.model.graph.initializers.values())
    folder = target.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as temporary:
            draft = Path(temporary, target.name)
            with _quiet():
                graph.save(draft, external_data=weights > _ONE_FILE)
                _check(draft)
            difference = _compared(draft, expected)
            return _moved(draft, target), difference
    except OSError as error:
        raise PruningError(
            f"{_WHAT} cannot be written to {target} ({error.strerror or error}); expected room on "
            "the disk, and a folder that can be written to."
        ) from error


def _check(draft: Path) -> None:
    onnx = require("onnx", _EXTRA)
    try:
        onnx.checker.check_model(str(draft), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PruningError(
            f"onnx refuses what torch.onnx wrote ({_first_line(error)}); there is no file. Try "
            "another opset, or newer versions of torch and onnxscript."
        ) from error


def _compared(draft: Path, expected: Sequence[tuple[Tensors, Tensors]]) -> float | None:
    """The largest difference of ONNX Runtime from the network; None where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        warnings.warn(
            "The ONNX file is not compared with the network, since onnxruntime is not installed; "
            f"run: pip install 'lightning-mi-prune[{_EXTRA}]'",
            PruningWarning,
            stacklevel=4,
        )
        return None
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = runtime.InferenceSession(str(draft), options, providers=["CPUExecutionProvider"])
        taken = {value.name for value in session.get_inputs()}
        most = 0.0
        for tensors, outputs in expected:
            given = {name: x.cpu().numpy() for name, x in tensors.items() if name in taken}
            found = session.run([*outputs], given)
            for (name, x), value in zip(outputs.items(), found, strict=True):
                most = max(most, _checked_difference(name, x.cpu(), value, tensors))
        return most
    except PruningError:
        raise
    except Exception as error:  # its errors share no class
        raise PruningError(
            f"ONNX Runtime does not run what torch.onnx wrote ({_first_line(error)}); there is no "
            "file. Try another opset, or newer versions of torch and onnxruntime."
        ) from error


def _checked_difference(name: str, x: Tensor, found: Any, tensors: Tensors) -> float:
    """The difference of an output from that of the network, refused if it is too large."""
    value = torch.as_tensor(found)
    difference = _relative_difference(value, x) if value.shape == x.shape else float("inf")
    if difference > TOLERANCE:
        sizes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items())
        reason = (
            f"has shape {tuple(value.shape)}, where the network gives {tuple(x.shape)}"
            if value.shape != x.shape
            else f"differs by {difference:.1e} of its largest value"
        )
        raise PruningError(
            f"In ONNX Runtime the output {name!r} {reason}, with inputs {sizes}; expected at most "
            f"{TOLERANCE:.0e}. There is no file. Is a size or a value a constant in the network? "
            "Try another opset, or name the dimensions that are dynamic: dynamic_shapes=..."
        )
    return difference


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    """The largest difference of two tensors, as a share of the largest value that is expected.

    What stands for infinity is compared by itself, and whole numbers have to be equal.

    Example:
        >>> _relative_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0]))
        0.25
        >>> _relative_difference(torch.tensor([1, 2]), torch.tensor([1, 3]))
        inf
    """
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found.to(expected.dtype), expected) else float("inf")
    x, y = found.double(), expected.double()
    plain = y.abs() < _HUGE  # neither infinite nor nan
    same = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= TOLERANCE * y.abs())
    if not bool(same[~plain].all()):
        return float("inf")
    if not bool(plain.any()):
        return 0.0
    difference, scale = (x - y).abs()[plain].max(), y[plain].abs().max()
    if bool(difference.isnan()):
        return float("inf")
    return float(difference / scale) if scale else (0.0 if difference == 0 else float("inf"))


def _moved(draft: Path, target: Path) -> int:
    """Move a file, and the weights beside it, to their place; returns their bytes."""
    beside = [path for path in draft.parent.iterdir() if path != draft]
    size = sum(path.stat().st_size for path in (draft, *beside))
    target.parent.mkdir(parents=True, exist_ok=True)
    if beside:  # never an old file with new weights
        target.unlink(missing_ok=True)
    for path in (*beside, draft):
        os.replace(path, target.parent / path.name)
    return size
