"""Two models side by side, measured in one run: size, multiply-accumulates, latency, metric."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_mi_prune.allocation.macs import count_macs
from lightning_mi_prune.allocation.measuring import device_of, measure_latency
from lightning_mi_prune.calibration.calls import RecordedCall, trim_padding
from lightning_mi_prune.checkpoint.recorded import present_plan, recorded_graph
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.core.errors import PruningError, counted
from lightning_mi_prune.core.options import check_count
from lightning_mi_prune.core.progress import progress_step
from lightning_mi_prune.core.running import map_tensors, move_tensors, undisturbed
from lightning_mi_prune.discovery.example_inputs import example_inputs
from lightning_mi_prune.export.card import Latency, Measured
from lightning_mi_prune.export.saving import network_of
from lightning_mi_prune.graph.groups import count_parameters
from lightning_mi_prune.reporting.tables import Table

__all__ = [
    "Comparison",
    "compare_networks",
    "compare_on",
    "compare_sizes",
    "first_row",
    "first_row_of",
    "metric_of",
    "network_called",
    "recorded_calls",
    "resized_call",
]

_SHARES = ("accuracy", "acc")  # metrics that are shares, by the end of their name
_IGNORED = -100  # a label that losses of torch and transformers leave out
_INPUTS = ("labels", "label", "start_positions", "end_positions")  # that are no inputs


@dataclass(frozen=True)
class Comparison:
    """What was measured of two models.

    Args:
        parameters: Parameters of the dense model, and of the pruned one.
        prunable_parameters: Those of the tensors that were cut, before and after.
        weight_bytes: Bytes of their weights.
        macs: Multiply-accumulates of one example.
        example: What that example is.
        latency: Median milliseconds of one forward pass of both, measured in turn.
        machine: Where that was.
        metrics: Metrics of both; None for a dense model that was not evaluated.
        data: What they were measured on.
        rows: Rows of the data.

    Example:
        >>> found = Comparison((200, 100), metrics={"accuracy": (0.9, 0.875)})
        >>> found.table().rows
        [('parameters', '200', '100', '2.00x'), ('accuracy', '90.00%', '87.50%', '-2.50 points')]
        >>> found.measured().metrics
        {'accuracy': (0.9, 0.875)}
    """

    parameters: tuple[int, int]
    prunable_parameters: tuple[int, int] | None = None
    weight_bytes: tuple[int, int] | None = None
    macs: tuple[int, int] | None = None
    example: str = ""
    latency: tuple[Latency, ...] = ()
    machine: str = ""
    metrics: Mapping[str, tuple[float | None, float]] = field(default_factory=dict)
    data: str = ""
    rows: int | None = None

    def table(self) -> Table:
        """Both models side by side, with the ratio."""
        about = [self.data, "" if self.rows is None else counted(self.rows, "row")]
        timed = f"Medians of one forward pass on {self.machine}" if self.latency else ""
        title = ", ".join(filter(None, about)) or "dense and pruned"
        columns = ("", "dense", "pruned", "ratio")
        return Table(title, columns, [*self._rows()], ("",), timed)

    def _rows(self) -> Iterator[tuple[str, str, str, str]]:
        sizes = {
            "parameters": self.parameters,
            "prunable parameters": self.prunable_parameters,
            f"MACs of {self.example or 'one example'}": self.macs,
        }
        for name, pair in sizes.items():
            if pair is not None:
                yield name, f"{pair[0]:,}", f"{pair[1]:,}", _ratio(*pair)
        if self.weight_bytes is not None:
            old, new = self.weight_bytes
            yield "weights, MB", f"{old / 1e6:,.2f}", f"{new / 1e6:,.2f}", _ratio(old, new)
        for row in self.latency:
            length = f" x {row.length}" if row.length else ""
            dense = row.dense_ms or math.nan
            ratio = _ratio(dense, row.ms)
            yield f"batch {row.batch}{length}, ms", f"{dense:.3g}", f"{row.ms:.3g}", ratio
        for name, (before, after) in self.metrics.items():
            share = name.lower().endswith(_SHARES) and 0 <= after <= 1
            write: Callable[[float], str] = "{:.2%}".format if share else "{:.4g}".format
            change = ""
            if before is not None:
                by = after - before
                change = f"{100 * by:+.2f} points" if share else f"{by:+.4g}"
            yield name, "not measured" if before is None else write(before), write(after), change

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON: ``dense``, ``pruned``, ``latency_ms`` and the rest."""
        pairs = {
            "parameters": self.parameters,
            "prunable_parameters": self.prunable_parameters,
            "weight_bytes": self.weight_bytes,
            "macs": self.macs,
        }
        sides = [
            {name: pair[place] for name, pair in pairs.items() if pair is not None}
            | {"metrics": {name: pair[place] for name, pair in self.metrics.items()}}
            for place in (0, 1)
        ]
        return {
            "dense": sides[0],
            "pruned": sides[1],
            "latency_ms": [
                {"batch": r.batch, "length": r.length, "dense": r.dense_ms, "pruned": r.ms}
                for r in self.latency
            ],
            "machine": self.machine,
            "example": self.example,
            "data": self.data,
            "rows": self.rows,
        }

    def measured(self) -> Measured:
        """The same for a model card."""
        rows = "" if self.rows is None else f", {counted(self.rows, 'row')}"
        return Measured(
            data=f"{self.data}{rows}" if self.metrics else "",
            metrics=self.metrics,
            macs=self.macs,
            latency=self.latency,
            machine=self.machine,
        )


def compare_networks(
    dense: nn.Module,
    pruned: nn.Module,
    *,
    calls: tuple[RecordedCall, RecordedCall] | None = None,
    row: RecordedCall | None = None,
    batch: Sequence[int] = (1, 32),
    length: Sequence[int] = (64,),
    seconds: float = 2.0,
) -> Comparison:
    """Sizes, multiply-accumulates and latencies of two networks.

    Args:
        dense: The network before pruning; it stays as it is, like the other.
        pruned: The network after it.
        calls: A call of each, of any size; Hugging Face networks need none.
        row: The example whose multiply-accumulates are counted; default: one of the first length.
        batch: Examples in a call that is timed.
        length: Tokens of an example, for each batch size; other inputs have no length.
        seconds: Time for each network, batch size and length.

    Raises:
        PruningError: If a network cannot run on a batch of such a size.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> sizes["vocab_size"] = 9
        >>> nets = [BertModel(BertConfig(intermediate_size=n, **sizes)) for n in (8, 4)]
        >>> found = compare_networks(*nets, batch=[2], length=[16], seconds=0.01)
        >>> found.parameters[0] - found.parameters[1], found.example
        (68, 'one example of 16 tokens')
        >>> [(row.batch, row.length) for row in found.latency]
        [(2, 16)]
    """
    for name, sizes in (("batch", batch), ("length", length)):
        for size in sizes:
            check_count(name, size, least=1)
    networks = dense, pruned
    if calls is None:
        calls = example_call(dense), example_call(pruned)
    has_length = _length_of(calls[0]) is not None
    lengths: Sequence[int] = length if has_length else (0,)
    first = tuple(resized_call(call, 1, next(iter(lengths), 0)) for call in calls)
    counted_on = first if row is None else (row, row)
    tokens = _length_of(counted_on[0])
    example = "one example" if tokens is None else f"one example of {counted(tokens, 'token')}"
    macs = [_refusing(count_macs, n, c) for n, c in zip(networks, counted_on, strict=True)]
    latency = []
    with progress_step("latency", "shape", len(batch) * len(lengths)) as step:
        for size, long in product(batch, lengths):
            inputs = [resized_call(call, size, long) for call in calls]
            latency.append(_timed(networks, inputs, size, long, seconds))
            step.advance()
    return replace(
        compare_sizes(dense, pruned),
        macs=(macs[0], macs[1]),
        example=example,
        latency=tuple(latency),
        machine=_machine(pruned) if latency else "",
    )


def compare_on(
    dense: nn.Module,
    pruned: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    data: str = "",
    rows: int | None = None,
    **shapes: Any,
) -> Comparison:
    """Two Hugging Face networks on labelled rows: the metric too, and MACs of the first row.

    Args:
        dense: The network before pruning; it stays as it is, like the other.
        pruned: The network after it.
        batches: Batches of their inputs, with ``labels``, which can be read more than once.
        data: What they are, for the table.
        rows: Rows in them.
        shapes: Sizes and time of :func:`compare_networks`.

    Raises:
        PruningError: If a network cannot run on the rows, or the two have other metrics.
    """
    row = first_row(dense, batches)
    found = compare_networks(dense, pruned, row=row, **shapes)
    before, after = (metric_of(network, batches) for network in (dense, pruned))
    if before.keys() != after.keys():
        raise PruningError(
            f"The dense model has the metric {sorted(before)} and the pruned one {sorted(after)}; "
            "expected two models for the same task."
        )
    pairs = {name: (before[name], after[name]) for name in after}
    return replace(found, metrics=pairs, data=data, rows=rows)


def compare_sizes(dense: nn.Module, pruned: nn.Module) -> Comparison:
    """Sizes of two modules, which are not run.

    Example:
        >>> compare_sizes(nn.Linear(4, 4), nn.Linear(4, 2)).parameters
        (20, 10)
    """
    return Comparison(
        parameters=(_parameters(dense), _parameters(pruned)),
        prunable_parameters=_prunable(dense, pruned),
        weight_bytes=(_bytes(dense), _bytes(pruned)),
    )


@contextmanager
def recorded_calls(module: nn.Module) -> Iterator[dict[str, RecordedCall]]:
    """The first call of a module, and of the parts that may be its network.

    Args:
        module: A module that is run meanwhile.

    Yields:
        The calls by path: of the module itself, of its children, of the Hugging Face network in it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> with recorded_calls(net) as calls:
        ...     _ = net(torch.zeros(4, 2))
        >>> sorted(calls), calls[""].rows
        (['', '0'], 4)
    """
    calls: dict[str, RecordedCall] = {}

    def keep(path: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if path not in calls:
            mask = kwargs.get("attention_mask")
            named = {name: value for name, value in kwargs.items() if name not in _INPUTS}
            known = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            calls[path] = RecordedCall(args, named, known)

    paths = [
        "",
        *(n for n, part in module.named_children() if any(True for _ in part.parameters())),
    ]
    inside = _network_path(module)
    paths += [] if inside is None or inside in paths else [inside]
    handles = [
        module.get_submodule(path).register_forward_pre_hook(partial(keep, path), with_kwargs=True)
        for path in paths
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def network_called(
    module: nn.Module, calls: Mapping[str, RecordedCall]
) -> tuple[nn.Module, RecordedCall] | None:
    """The network inside a module, with a call of it; None where several are called in turn.

    Args:
        module: The module.
        calls: Its :func:`recorded_calls`.
    """
    path = _network_path(module)
    if path is not None:
        network = module.get_submodule(path)
        call = calls[path] if path in calls else example_call(network)
    elif "" in calls or len(calls) == 1:
        path = "" if "" in calls else next(iter(calls))
        network, call = module.get_submodule(path), calls[path]
    else:
        return None
    device = next(network.parameters()).device
    return network, replace(call, **move_tensors(vars(call), device))


def _network_path(module: nn.Module) -> str | None:
    try:
        return network_of(module)[0]
    except PruningError:  # none, or several
        return None


def example_call(network: nn.Module) -> RecordedCall:
    """A call of a Hugging Face network on inputs made from its config."""
    return RecordedCall((), dict(example_inputs(network)))


def first_row(network: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> RecordedCall:
    """The call of a network on the first row of its data, without padding or labels."""
    taken = _taken(network, next(iter(batches)))
    inputs = {name: x for name, x in taken.items() if name not in _INPUTS}
    return first_row_of(RecordedCall((), inputs, inputs.get("attention_mask")))


def first_row_of(call: RecordedCall) -> RecordedCall:
    """The first row of a call, without padding.

    Example:
        >>> ids, mask = torch.tensor([[3, 4, 0], [5, 6, 7]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
        >>> first_row_of(RecordedCall((ids,), {"attention_mask": mask}, mask)).args[0].tolist()
        [[3, 4]]
    """
    return trim_padding(call.select(torch.zeros(1, dtype=torch.long)))


def resized_call(call: RecordedCall, batch: int, length: int = 0) -> RecordedCall:
    """A call with another number of examples and tokens; those that are there are repeated.

    Args:
        call: The call.
        batch: Its number of examples then.
        length: Its number of tokens then; 0 leaves them.

    Example:
        >>> call = RecordedCall((torch.tensor([[1, 2, 3]]),), {})
        >>> resized_call(call, 2, 5).args[0].tolist()
        [[1, 2, 3, 1, 2], [1, 2, 3, 1, 2]]
    """
    rows = call.select(torch.arange(batch) % max(1, call.rows))
    old = _length_of(call)
    if not length or old is None:
        return rows

    def longer(x: Tensor) -> Tensor:
        tokens = x.ndim == 2 and x.shape[1] == old and not x.is_floating_point()
        return x[:, torch.arange(length, device=x.device) % old] if tokens else x

    return replace(
        rows,
        args=map_tensors(rows.args, longer),
        kwargs=map_tensors(rows.kwargs, longer),
        mask=None,
    )


def metric_of(network: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """The metric of a Hugging Face network on labelled rows.

    Of classes the accuracy, of language models the perplexity, of others the loss. A language model
    without labels predicts its own tokens.

    Args:
        network: The network; it stays as it is.
        batches: Batches of its inputs, with ``labels``; columns that it does not take are left out.

    Raises:
        PruningError: If there are no labels, or the network cannot run on the rows.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> net = BertForSequenceClassification(BertConfig(vocab_size=9, **sizes))
        >>> rows = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 0])}
        >>> metric_of(net, [rows, {**rows, "labels": 1 - rows["labels"]}])
        {'accuracy': 0.5}
    """
    name, value, weight = "", 0.0, 0.0
    many = len(batches) if isinstance(batches, Sized) else None
    shown = progress_step("metric", "batch", many)
    with shown as step, undisturbed(network), torch.no_grad():
        for batch in batches:
            given = _with_labels(network, _taken(network, batch))
            output = _refusing(lambda network, given: network(**given), network, given)
            name, part, share = _part_of_metric(network, given["labels"], output)
            value, weight = value + part, weight + share
            step.advance()
    if not weight:
        raise PruningError("The data have no rows with labels; expected some hundred.")
    mean = value / weight
    return {name: math.exp(min(mean, 700.0)) if name == "perplexity" else mean}


def _part_of_metric(network: Any, labels: Tensor, output: Any) -> tuple[str, float, float]:
    """The metric of a batch, as a sum with its weight, and its name."""
    logits, config = getattr(output, "logits", None), network.config
    whole = not labels.is_floating_point()
    if isinstance(logits, Tensor) and whole and logits.ndim == labels.ndim + 1:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        if logits.ndim == 3 and logits.shape[-1] == getattr(text, "vocab_size", None):
            kept = labels[:, 1:] if _predicts_next(network) else labels
            tokens = int((kept != _IGNORED).sum())
            return "perplexity", float(output.loss) * tokens if tokens else 0.0, tokens
        if logits.shape[-1] > 1:
            known = labels != _IGNORED
            right = (logits.argmax(-1) == labels) & known
            return "accuracy", float(right.sum()), float(known.sum())
    if getattr(output, "loss", None) is None:
        raise PruningError(
            f"{type(network).__name__} returns no loss; expected a class with a head, such as "
            "AutoModelForSequenceClassification saves."
        )
    return "loss", float(output.loss) * len(labels), len(labels)


def _predicts_next(network: Any) -> bool:
    """Whether the loss of a language model compares each token with the one before it."""
    return not network.config.is_encoder_decoder and "MaskedLM" not in type(network).__name__


def _taken(network: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The columns that a network takes, on its device."""
    known = inspect.signature(network.forward).parameters
    device = next(network.parameters()).device
    return {name: x.to(device) for name, x in batch.items() if name in known}


def _with_labels(network: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    if "labels" in given:
        return given
    if "CausalLM" not in type(network).__name__ and "LMHead" not in type(network).__name__:
        raise PruningError(
            f"The data have no column 'labels' that {type(network).__name__} takes; expected one, "
            "with a number or numbers for each row."
        )
    ids, mask = given["input_ids"], given.get("attention_mask")
    return given | {"labels": ids if mask is None else ids.masked_fill(mask == 0, _IGNORED)}


def _timed(
    networks: tuple[nn.Module, nn.Module],
    calls: Sequence[RecordedCall],
    batch: int,
    length: int,
    seconds: float,
) -> Latency:
    with undisturbed(networks[0]), undisturbed(networks[1]):
        work = {
            side: partial(_refusing, _forward, network, call)
            for side, network, call in zip(("dense", "pruned"), networks, calls, strict=True)
        }
        found = measure_latency(work, seconds=seconds)
    return Latency(batch, length, found["pruned"], found["dense"])


@torch.inference_mode()
def _forward(network: nn.Module, call: RecordedCall) -> None:
    network(*call.args, **call.kwargs)
    device = next(network.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _refusing(run: Callable[[Any, Any], Any], network: nn.Module, call: Any) -> Any:
    """What a network computes; an error that it raises becomes a sentence."""
    try:
        return run(network, call)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        if isinstance(error, PruningError):
            raise
        inputs = vars(call) if isinstance(call, RecordedCall) else {"kwargs": call}
        named = inputs["kwargs"] | dict(enumerate(inputs.get("args", ())))
        shapes = {str(n): tuple(x.shape) for n, x in named.items() if isinstance(x, Tensor)}
        raise PruningError(
            f"{type(network).__name__} cannot run on inputs of the shapes {shapes} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); expected what it was "
            "made for. Is the length more than its positions, or are the data for another model?"
        ) from error


def _length_of(call: RecordedCall) -> int | None:
    """Tokens of each example: the second dimension of the first whole numbers."""
    inputs = (*call.args, *call.kwargs.values())
    return next(
        (
            x.shape[1]
            for x in inputs
            if isinstance(x, Tensor) and x.ndim == 2 and not x.is_floating_point()
        ),
        None,
    )


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _bytes(network: nn.Module) -> int:
    tensors = {id(t): t for t in (*network.parameters(), *network.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _prunable(dense: nn.Module, pruned: nn.Module) -> tuple[int, int] | None:
    """Parameters of the kinds of groups that were cut, where these explain the whole difference."""
    tracker = PlanTracker.held_by(pruned)
    if tracker is not None and tracker.is_known:
        graph, plan = tracker.graph, tracker.plan
    else:
        recorded = recorded_graph(pruned)
        if recorded is None:
            return None
        graph, plan = recorded, present_plan(pruned, recorded.groups)
    kinds = {group.kind for group in graph.groups if plan.width(group.name) < group.size}
    groups = [group for group in graph.groups if group.kind in kinds]
    before = count_parameters(groups)
    after = count_parameters(groups, plan.widths)
    gone = _parameters(dense) - _parameters(pruned)
    return (before, after) if before - after == gone else None


def _machine(network: nn.Module) -> str:
    device = device_of(network)
    threads = f", {counted(device.threads, 'thread')}" if device.type == "cpu" else ""
    return f"{device.name}{threads}, {device.dtype}"


def _ratio(before: float, after: float) -> str:
    return f"{before / after:.2f}x" if after else ""
