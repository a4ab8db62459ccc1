"""The sections of `docs/comparison.md` on what decides speed: masks, lengths, layouts."""

from collections.abc import Sequence
from itertools import groupby

from examples.benchmark.by_time import ROWS
from examples.benchmark.latency import BATCHES
from examples.benchmark.paired import nats
from examples.benchmark.records import Record
from examples.benchmark.summarize import MINE
from examples.benchmark.tables import difference, variant_of


def mask_lines(masks: Sequence[Record]) -> list[str]:
    """What masked weights do to speed: a row a task, share and batch size; nothing without records.

    Args:
        masks: Records of :data:`latency.MASKED`.
    """
    if not masks:
        return []
    lines = [
        "## Masks and speed",
        "",
        "Lightning's `ModelPruning` (`l1_unstructured`, all matrices of neurons and heads ranked "
        "together) on the dense shape of a task, in turn with the dense model: milliseconds of a "
        "batch, and how many times as fast as dense. While training, masks are in place, and every "
        "call multiplies weights by them; permanent is after `make_pruning_permanent`.",
        "",
        "| task | weights masked | batch | dense | masks in place | permanent |",
        "|---|---|---|---|---|---|",
    ]
    for record in masks:
        for rows in BATCHES:
            dense, *ways = (
                record[f"{way}_latency_ms_b{rows}"] for way in ("dense", "masks", "zeros")
            )
            cells = [record["task"], f"{record['gone']:.0%}", str(rows), f"{dense:.1f}"]
            cells += [f"{ms:.1f} ({dense / ms:.2f}x)" for ms in ways]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", machine_line(masks), ""]


def length_lines(records: Sequence[Record]) -> list[str]:
    """Speed beside multiply-accumulates, for each length and layout; nothing without records.

    Args:
        records: Those of :mod:`examples.benchmark.lengths`.
    """
    if not records:
        return []
    lines = [
        "## Length, layout and speed",
        "",
        "How many times as fast as dense the shapes of TREC-6 (seed 0) are, beside the ratio of "
        "their multiply-accumulates (MACs); in brackets the share of that ratio that is reached. "
        "Norms, softmax, activations and calls stay, so one text falls short, and so does a batch "
        "at 90 %; above 1 the smaller products run better than the large ones. Ours are the widths "
        "that competition by parameters leaves: more heads and fewer neurons than uniform widths "
        "with as many parameters; heads mostly take more time. By time, the same axes compete by "
        "milliseconds of a batch (`target_latency_ms`, below). Compiled: all models, the dense "
        "one too, went through `torch.compile`.",
        "",
    ]
    for _, same in groupby(records, key=lambda record: record["machine"]["cpu"]):
        lines += [*speed_table([*same]), ""]
    return lines


def speed_table(records: Sequence[Record]) -> list[str]:
    """The shapes that were timed on one processor, which the last line names.

    Args:
        records: Those of that processor.
    """
    lines = ["| tokens | gone | widths | MACs | batch 1 | batch 32 | batch 32, compiled |"]
    lines += ["|---|---|---|---|---|---|---|"]
    compiled = {timed_shape(record): record for record in records if record["compiled"]}
    for record in records:
        if record["compiled"]:
            continue
        other = compiled.get(timed_shape(record))
        cells = [
            str(record["length"]),
            f"{record['target_sparsity']:.0%}",
            record["layout"],
            f"{record['dense_macs'] / record['macs']:.2f}x",
            *(reached(record, rows) for rows in BATCHES),
            "" if other is None else reached(other, BATCHES[-1]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", machine_line(records)]


def timed_shape(record: Record) -> tuple[int, str, float]:
    """What was timed."""
    return record["length"], record["layout"], record["target_sparsity"]


def paced_lines(paced: Sequence[Record], records: Sequence[Record]) -> list[str]:
    """Accuracy of competition by time beside that by parameters; nothing without records.

    Args:
        paced: Records of :mod:`examples.benchmark.by_time`.
        records: Those that are compared.
    """
    if not paced:
        return []
    mine = {
        (r["task"], r["seed"], r["target_sparsity"]): r
        for r in records
        if variant_of(r) == MINE and not r["steps"]
    }
    batches = sorted({f"{ROWS} texts of {record['length']} tokens" for record in paced})
    lines = [
        f"Axes that compete by milliseconds of {', '.join(batches)} instead of parameters, until "
        "as many parameters are gone: points and nats to the dense model in one shot, then heads "
        "and neurons that stay.",
        "",
        "| task | seed | gone | by parameters | by time |",
        "|---|---|---|---|---|",
    ]
    for record in paced:
        place = record["task"], record["seed"], record["target_sparsity"]
        cells = [record["task"], str(record["seed"]), f"{record['target_sparsity']:.0%}"]
        cells += [paced_cell(r) if r else "" for r in (mine.get(place), record)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", machine_line(paced), ""]


def paced_cell(record: Record) -> str:
    """Points and nats to dense, heads and neurons of all layers."""
    heads, neurons = (sum(record["kept"][kind]) for kind in ("heads", "ffn"))
    return f"{difference(record):+.2f}, {nats(record):+.3f}; {heads}, {neurons:,}"


def reached(record: Record, rows: int) -> str:
    """Speed-up for a batch size, and its share of the ratio of multiply-accumulates."""
    speed = record[f"dense_latency_ms_b{rows}"] / record[f"latency_ms_b{rows}"]
    return f"{speed:.2f}x ({speed * record['macs'] / record['dense_macs']:.2f})"


def machine_line(records: Sequence[Record]) -> str:
    """What the records were measured on."""
    cpus, threads = (
        ", ".join(sorted({str(record["machine"][name]) for record in records}))
        for name in ("cpu", "threads")
    )
    return f"Processors: {cpus}; threads: {threads}."
