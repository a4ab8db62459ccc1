"""The tables of README and docs, by name, and the pages that show them.

A page shows a table between ``<!-- table: NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import comparison, decoder_pages, layer_pages, memory
from benchmarks.comparison import nats, points, row, spread, with_head
from benchmarks.deploy import WAYS
from benchmarks.latency import BATCHES
from benchmarks.methods import DEFAULT, SETTINGS, Name
from benchmarks.records import FOLDER, Record, Store
from benchmarks.scaling import (
    ENCODERS,
    encoder,
    layer_groups,
    reconstruction_bytes,
    reduced_bytes,
    ring_seconds,
)
from benchmarks.vision import BATCHES as PICTURES
from benchmarks.zoo import tables as zoo

__all__ = ["TABLES", "rewritten", "table_lines"]

ROOT = Path(__file__).parent.parent
DOCS = (
    "ablations",
    "comparison",
    "cost",
    "decoders",
    "deploy",
    "distributed",
    "layers",
    "memory",
    "models",
    "results",
    "vision",
)
PAGES = ("README.md", *(f"docs/{name}.md" for name in DOCS))
Records = Sequence[Record]

FREE_OR_NOT = {"global": "free widths", "config": "widths that a config can describe"}

# -------------------------------------------------------------------------------------------- cost

PARTS = {
    "validation": "*the validation alone*",
    "calibration": "**calibration**: hooks and sums",
    "sums": "of which sums",
    "product": "plain product `XᵀX`, float64",
    "scores": "**scores** `I(xᵢ; Y)` from the sums",
    "scores_of_covariances": "of which scores, from covariances",
    "log_det": "one log-determinant per neuron, covariances given",
    "order": "**elimination order** by conditional information, and its loss curve",
    "compensation": "**compensation** for half of the units",
    "cut": "**cut** (of a copy)",
    "gradients": "gradients of as many batches",
    "taylor_step": "torch-pruning: Taylor importance and cut (of a copy)",
}


def digits(value: float) -> str:
    """Three digits, thousands apart."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1g}"


def measured_on(records: Records) -> list[str]:
    """Processors, threads and versions, and how often something was measured."""
    cpus = {f"{r.machine['cpu']}, threads: {r.machine['threads']}" for r in records}
    versions = ", ".join({f"torch {r.versions['torch']}" for r in records})
    repeats = {f"; median of {r['repeats']}" for r in records if r.get("repeats")}
    return [f"{'; '.join(sorted(cpus))}, {versions}{''.join(repeats)}."]


def cost_parts(records: Records) -> list[str]:
    """Seconds and memory of every part, ours in bold; medians."""

    def share(part: Mapping[str, Any]) -> str:
        unit = next((key.removeprefix("timed_") for key in part if key.startswith("timed_")), None)
        if unit is None:
            return "all"
        return f"{part[f'timed_{unit}']:,} of {part[unit]:,} {unit.replace('_', ' ')}"

    head = [f"{r['shape']}, {unit}" for r in records for unit in ("s", "CPU s", "peak MB")]
    rows = []
    for name, label in PARTS.items():
        found = [record["parts"][name] for record in records]
        keys = ("wall_s", "cpu_s", "peak_mb")
        cells = [digits(part[key]["median"]) for part in found for key in keys]
        rows.append(row([label, *cells, share(found[-1])]))
    return [row(["", *head, "measured"]), "|---" + "|---:" * len(head) + "|---|", *rows]


def growth(records: Records) -> list[str]:
    """Exponents of growth, with the seconds they were fitted to."""
    head = ["grows", "from .. to", "what", "CPU s", "exponent, CPU", "exponent, clock"]
    rows = []
    for r in records:
        sizes, seconds = r["sizes"], r["cpu_s"]
        cells = [r["grows"], f"{sizes[0]:,} .. {sizes[-1]:,}", r["part"].replace("_", " ")]
        cells.append(f"{digits(seconds[0])} .. {digits(seconds[-1])}")
        cells += [f"{r[f'{clock}_s_exponent']:.2f}" for clock in ("cpu", "wall")]
        rows.append(row(cells))
    return with_head(head, rows, 3)


def communication(_: Records) -> list[str]:
    """Bytes and seconds of a cut over many ranks, from shapes alone."""
    head = [f"{name}, MB" for name in ("sums a rank", "before the choice", "reconstruction")]
    head += ["gradients a step, MB", *(f"{number:,} ranks, s" for number in (8, 64, 1024))]
    rows = []
    for name, shape in ENCODERS.items():
        with torch.device("meta"):
            network = encoder(**shape)
        groups = layer_groups(shape)
        before, solving = reduced_bytes(groups, network), reconstruction_bytes(groups, network)
        gradients = 4 * sum(p.numel() for p in network.parameters())
        sizes = [reduced_bytes(groups, network, whole=True), before, solving, gradients]
        seconds = [ring_seconds(before, n) + ring_seconds(solving, n) for n in (8, 64, 1024)]
        cells = [*(f"{size / 1e6:,.0f}" for size in sizes), *(f"{s:.2f}" for s in seconds)]
        rows.append(row([name, *cells]))
    return with_head(["shapes", *head], rows, len(head))


def one_cut(records: Records) -> list[str]:
    """Seconds of every part of one cut, with its share of the whole, and memory."""
    names = [name for name in records[0].figures if name.endswith(", CPU s")]
    whole = [name for name in names if not name.startswith("of which")]
    place = whole.index("reconstruction, CPU s") + 1
    parts = [*whole[:place], *(name for name in names if name not in whole), *whole[place:]]
    own = [name for name in parts if not name.startswith(("of which", "validation"))]
    rows = []
    for name in parts:
        cells = []
        for record in records:
            value = record[name]["median"]
            share = 100 * value / sum(record[part]["median"] for part in own)
            cells.append(f"{value:.2f}" + (f" ({share:.0f} %)" if name != parts[0] else ""))
        title = name.removesuffix(", CPU s")
        rows.append(row([f"*{title} alone*" if name == parts[0] else title, *cells]))
    rows += [
        row([name, *(f"{record[name]['median']:,.0f}" for record in records)])
        for name in ("sums, MB", "peak, MB")
    ]
    return with_head(["", *(record["shape"] for record in records)], rows)


def demo_before(records: Records) -> list[str]:
    """The demo at an earlier revision, over its seeds; its cuts had no name."""
    earlier = [record for record in records if record.get("cuts") is None]
    rows = []
    for name in earlier[0].figures if earlier else ():
        values = [record[name] for record in earlier]
        found = statistics.median(values), min(values), max(values)
        rows.append(row([name, *(f"{value:.2f}" for value in found)]))
    return with_head(["", "median", "min", "max"], rows)


def demo(records: Records) -> list[str]:
    """The demo by number of cuts, over its seeds."""
    dense = {r["seed"]: r["dense accuracy, %"] for r in records if r.get("cuts") is None}
    dense |= {r["seed"]: r["accuracy, %"] for r in records if r.get("cuts") == 0}
    first = min(epochs for epochs, _, _ in _demo_runs(records))
    columns = {
        "speed-up, batch 1": "encoder speed-up, batch 1",
        "batch 32": "encoder speed-up, batch 32",
        "training, CPU s": "training, CPU s",
        "pruning, % of it": "pruning, % of training",
    }
    rows = []
    for (epochs, cuts, how), found in sorted(_demo_runs(records).items()):
        about = [str(cuts or "dense"), how, str(epochs), str(len(found))]
        about.append(_medians([record["accuracy, %"] for record in found]))
        paired = [r["accuracy, %"] - dense[r["seed"]] for r in found if r["seed"] in dense]
        about.append(_means(paired, 2) if cuts and epochs == first and paired else "")
        values = [[r[name] for r in found if r.get(name) is not None] for name in columns.values()]
        rows.append(row([*about, *(_medians(each) if each else "" for each in values)]))
    head = ["cuts", "weights", "epochs", "seeds", "accuracy, %", "against dense, points", *columns]
    return with_head(head, rows)


def _demo_runs(records: Records) -> dict[tuple[int, int, str], list[Record]]:
    """Runs of the demo by epochs, cuts and what happens to the weights that stay."""
    found: dict[tuple[int, int, str], list[Record]] = {}
    for record in records:
        if record.get("cuts") is not None:
            about = (record["epochs"], record["cuts"], record["compensation"])
            found.setdefault(about, []).append(record)
    return found


def demo_parts(records: Records) -> list[str]:
    """Where pruning spends its share of the training of the demo."""
    cutting = [record for record in records if record.get("cuts")]
    parts = [name for name in cutting[0].figures if name.endswith("% of training")]
    before = [name for name in parts if not name.startswith(("discovery", "gradients", "pruning"))]
    rows = []
    for (epochs, cuts, how), found in sorted(_demo_runs(cutting).items()):
        values = [statistics.median([record[name] for record in found]) for name in parts]
        sums = [sum(record[name] for name in before) for record in found]
        values.append(statistics.median(sums))
        steps = statistics.median([record["steps"] for record in found])
        about = [str(cuts), how, str(epochs), f"{steps:.0f}"]
        rows.append(row([*about, *(f"{value:.1f}" for value in values)]))
    names = [name.removesuffix(", % of training") for name in parts]
    return with_head(["cuts", "weights", "epochs", "steps", *names, "as counted before"], rows)


# ----------------------------------------------------------------------------------------- quality


def _means(values: Sequence[float], places: int) -> str:
    """Mean, and the range where there are several."""
    ends = f"{min(values):+.{places}f} .. {max(values):+.{places}f}"
    return f"{statistics.mean(values):+.{places}f}" + (f" ({ends})" if len(values) > 1 else "")


def _medians(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ablations(records: Records) -> list[str]:
    """A table for each task and sparsity: a row a setting."""
    lines: list[str] = []
    for task, sparsity in sorted({(r["task"], r["sparsity"]) for r in records}):
        same = [r for r in records if (r["task"], r["sparsity"]) == (task, sparsity)]
        dense = {r.seed: r for r in same}.values()
        accuracy = statistics.mean(r["dense_accuracy"] for r in dense)
        entropy = statistics.mean(r["dense_cross_entropy"] for r in dense)
        lines += [
            f"**{task}, {sparsity:.0%} sparsity**; dense {accuracy:.2%}, {entropy:.3f} nats; "
            f"{same[0]['n_test']} test rows.",
            "",
        ]
        default, rows = {r.seed: r for r in same if r["setting"] == DEFAULT.name}, []
        for setting in SETTINGS:
            found = {r.seed: r for r in same if r["setting"] == setting.name}
            if not found:
                continue
            cells = [setting.name, str(len(found))]
            both = sorted(found.keys() & default.keys()) if setting != DEFAULT else []
            for sign, value, places in ((-1, nats, 3), (1, points, 2)):
                cells.append(_means([sign * value(r) for r in found.values()], places))
                gaps = [sign * (value(found[seed]) - value(default[seed])) for seed in both]
                cells.append(_means(gaps, places) if gaps else "")
            work = statistics.mean(r["macs"] / r["dense_macs"] for r in found.values())
            seconds = statistics.mean(r["cpu_seconds"] for r in found.values())
            rows.append(row([*cells, f"{work:.0%}", f"{seconds:.0f}"]))
        head = ["setting", "seeds", "rise of cross-entropy", "to default", "accuracy", "to default"]
        lines += [*with_head([*head, "MACs", "CPU s"], rows), ""]
    return lines[:-1]


def distillation(records: Records) -> list[str]:
    """What a teacher changes, paired by seed."""
    plain, *others = dict.fromkeys(record["loss"] for record in records)
    rows = []
    for place in sorted({(r["task"], r["sparsity"], r["steps"]) for r in records}):
        found: dict[str, dict[int, Record]] = {name: {} for name in (plain, *others)}
        for r in records:
            if (r["task"], r["sparsity"], r["steps"]) == place:
                found[r["loss"]][r.seed] = r
        seeds = sorted(set.intersection(*map(set, found.values())))
        if not seeds:
            continue
        mean = statistics.mean(found[plain][seed]["accuracy"] for seed in seeds)
        cells = [place[0], f"{place[1]:.0%}", str(place[2]), str(len(seeds)), f"{mean:.2%}"]
        for name in others:
            pairs = [(found[name][seed], found[plain][seed]) for seed in seeds]
            gaps = [100 * (mine["accuracy"] - other["accuracy"]) for mine, other in pairs]
            rises = [mine["cross_entropy"] - other["cross_entropy"] for mine, other in pairs]
            cells.append(f"{spread(gaps)}; {spread(rises, 3)}")
        rows.append(row(cells))
    return with_head(["task", "sparsity", "steps", "seeds", plain, *others], rows)


def layers(records: Records) -> list[str]:
    """Layers removed while a model is fine-tuned, beside the dense control of the same seed."""
    dense = {(r["task"], r.seed): r["accuracy"] for r in records if r["criterion"] == "none"}
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for r in records:
        about = r["task"], -r["layers"], r["criterion"], r["reconstruction"]
        groups.setdefault((*about, r["first_epoch"] or 0), []).append(r)
    rows = []
    for (task, number, criterion, solved, epoch), found in sorted(groups.items()):
        gaps = [100 * (r["accuracy"] - dense[task, r.seed]) for r in found]
        control = criterion == "none"
        lost = ("+".join(" ".join(map(str, cut)) for cut in r["removed"]) for r in found)
        cells = [task, str(-number), "" if control else f"`{criterion}`"]
        cells += ["" if control else str(epoch or "half-way"), "yes" if solved else ""]
        cells += [str(len(found)), _medians([100 * r["accuracy"] for r in found])]
        cells += ["", ""] if control else [_medians(gaps), "; ".join(lost)]
        rows.append(row(cells))
    head = ["task", "layers", "removed by", "at epoch", "reconstructed", "seeds", "accuracy"]
    return with_head([*head, "minus dense", "removed"], rows)


def layers_one_shot(records: Records) -> list[str]:
    """Layers removed without a training step, with and without a reconstruction."""
    rows = []
    for task, number in sorted({(r["task"], -r["layers"]) for r in records}):
        same = [r for r in records if (r["task"], r["layers"]) == (task, -number)]
        dense = [100 * r["dense_accuracy"] for r in same if r["reconstruction"]]
        gaps = [[points(r) for r in same if r["reconstruction"] == s] for s in (False, True)]
        cells = [task, str(-number), str(len(dense)), f"{statistics.median(dense):.2f}"]
        rows.append(row([*cells, *map(_medians, gaps)]))
    return with_head(["task", "layers", "seeds", "dense", "removed", "reconstructed"], rows)


# ------------------------------------------------------------------------------------------ vision


def vision(records: Records) -> list[str]:
    """A table for each network: points to the dense control, MACs and parameters that are left."""
    lines: list[str] = []
    for task in sorted({r["task"] for r in records}):
        same = [r for r in records if r["task"] == task]
        dense = [r for r in same if not r["sparsity"]]
        accuracy = statistics.mean(r["accuracy"] for r in dense)
        lines += [
            f"**{task}**: dense {accuracy:.2%} ({len(dense)} seeds), "
            f"{dense[0]['parameters']:,} parameters, {dense[0]['macs'] / 1e6:.1f} million MACs, "
            f"{statistics.mean(r['cpu_seconds'] for r in dense):.0f} CPU s; "
            f"{dense[0]['steps']} steps, {dense[0]['n_test']} test pictures.",
            "",
        ]
        sparsities = sorted({r["sparsity"] for r in same} - {0.0})
        found: dict[Name, dict[float, list[Record]]] = {}
        for r in same:
            if r["sparsity"]:
                found.setdefault(comparison.name_of(r), {}).setdefault(r["sparsity"], []).append(r)
        rows = []
        for name, by_sparsity in found.items():
            cells = [*name]
            for sparsity in sparsities:
                mine = by_sparsity.get(sparsity, [])
                ours = found.get(comparison.MINE, {}).get(sparsity, [])
                gaps = [comparison.by_seed(each, [task]) for each in (mine, ours)]
                other = gaps[1] if name != comparison.MINE else None
                cells += [str(len(mine) or ""), comparison.cell(gaps[0], other, 2)]
                cells += [_left(mine, size) for size in ("macs", "parameters")]
            every = [r["cpu_seconds"] for group in by_sparsity.values() for r in group]
            rows.append(row([*cells, f"{statistics.mean(every):.0f}"]))
        head = ["method", "widths", "weights"]
        for sparsity in sparsities:
            head += ["seeds", f"{sparsity:.0%}: points; ours minus it", "MACs", "parameters"]
        lines += [*with_head([*head, "CPU s"], rows), ""]
    return lines[:-1]


def _left(records: Records, size: str) -> str:
    shares = [r[size] / r[f"dense_{size}"] for r in records]
    return f"{statistics.mean(shares):.0%}" if shares else ""


def mobilenet(records: Records) -> list[str]:
    """Agreement of a network pruned in one shot with the dense one."""
    rows = []
    for r in sorted(records, key=lambda r: (r["sparsity"], -r["top1"])):
        cells = [f"{r['sparsity']:.0%}", *comparison.name_of(r), str(r.seed)]
        cells += [f"{r['top1']:.1%}", f"{r['top5']:.1%}", f"{r['divergence']:.2f}"]
        rows.append(row([*cells, *(_left([r], size) for size in ("macs", "parameters"))]))
    head = ["sparsity", "method", "widths", "weights", "seed", "same class", "among five"]
    head += ["divergence, nats", "MACs", "parameters"]
    return [*with_head(head, rows), "", f"{records[0]['n_test']} crops."]


def vision_layers(records: Records) -> list[str]:
    """Blocks removed while a network is trained."""
    groups: dict[tuple[str, str, bool], list[Record]] = {}
    for r in records:
        groups.setdefault((r["task"], r["criterion"], r["reconstruction"]), []).append(r)
    rows = []
    for (task, criterion, solved), found in groups.items():
        lost = [sum(map(len, r["removed"][0])) for r in found]
        cells = [task, f"`{criterion}`", "yes" if solved else ""]
        cells += [f"{lost[0]} of {found[0]['layers']}"]
        cells += [_left(found, "macs"), _left(found, "parameters"), str(len(found))]
        which = ["/".join(",".join(map(str, each)) for each in r["removed"][0]) for r in found]
        rows.append(row([*cells, spread([points(r) for r in found]), "; ".join(which)]))
    head = ["task", "removed by", "reconstructed", "layers gone", "MACs", "parameters", "seeds"]
    return with_head([*head, "points to dense", "removed (of each stage)"], rows)


def vision_latency(records: Records) -> list[str]:
    """Milliseconds of the dense network and of its pruned shapes, in turn."""
    rows = []
    for r in sorted(records, key=lambda r: (r["task"], r["sparsity"])):
        cells = [r["task"], f"{r['sparsity']:.0%}", r["method"], r["widths"]]
        cells.append(f"{r['dense_macs'] / r['macs']:.2f}x")
        for size in PICTURES:
            dense, cut = r[f"dense_ms_b{size}"], r[f"ms_b{size}"]
            cells.append(f"{dense / cut:.2f}x ({dense:.2f} to {cut:.2f} ms)")
        rows.append(row(cells))
    head = ["task", "sparsity", "method", "widths", "MACs", *(f"batch {n}" for n in PICTURES)]
    return [*with_head(head, rows), "", *measured_on(records)]


# ------------------------------------------------------------------------------------------- speed


def layers_speed(records: Records) -> list[str]:
    """Latency by number of layers."""
    (speed,) = records
    rows = []
    for size in BATCHES:
        ms = {n: speed[f"{n}_ms_b{size}"] for n in (6, 4, 3)}
        ratios = [f"{ms[6] / ms[n] / (6 / n):.2f}" for n in (4, 3)]
        rows.append(row([f"batch {size}", *(f"{value:.1f}" for value in ms.values()), *ratios]))
    head = f"encoder, {speed['length']} tokens, {speed.machine['threads']} threads"
    names = [head, *(f"{n} layers, ms" for n in (6, 4, 3)), "speed-up by layer ratio, 4", "3"]
    return with_head(names, rows)


def lengths(records: Records) -> list[str]:
    """Speed beside multiply-accumulates, for each length and kind of widths, by processor."""

    def reached(r: Record, size: int) -> str:
        speed = r[f"dense_ms_b{size}"] / r[f"ms_b{size}"]
        return f"{speed:.2f}x ({speed * r['macs'] / r['dense_macs']:.2f})"

    def place(r: Record) -> tuple[Any, ...]:
        return r["length"], r["widths"], r["sparsity"]

    lines: list[str] = []
    for cpu in sorted({record["cpu"] for record in records}):
        same = [record for record in records if record["cpu"] == cpu]
        compiled = {place(r): reached(r, BATCHES[-1]) for r in same if r["compiled"]}
        rows = []
        for r in sorted((r for r in same if not r["compiled"]), key=place):
            cells = [str(r["length"]), f"{r['sparsity']:.0%}", r["widths"]]
            cells += [f"{r['dense_macs'] / r['macs']:.2f}x", *(reached(r, n) for n in BATCHES)]
            rows.append(row([*cells, compiled.get(place(r), "")]))
        head = ["tokens", "sparsity", "widths", "MACs", "batch 1", "batch 32", "batch 32, compiled"]
        lines += [*with_head(head, rows), "", *measured_on(same), ""]
    return lines[:-1]


def deploy(records: Records) -> list[str]:
    """Size and latency of the dense and the pruned model in every way to serve them."""

    def cell(ms: Mapping[str, float]) -> str:
        return f"{digits(ms['median'])} ({digits(ms['min'])} .. {digits(ms['max'])})"

    sizes = [f"batch {rows}" for rows in BATCHES]
    head = ["served by", *(f"{name}, MB" for name in ("dense", "pruned"))]
    head += [f"{name}, {size}, ms" for size in sizes for name in ("dense", "pruned")]
    head += [f"times as fast as dense PyTorch, {size}" for size in sizes]
    lines: list[str] = []
    for r in sorted(records, key=lambda r: (r["task"], r["sparsity"], r["cpu"], r["threads"])):
        rows = []
        for way, label in WAYS.items():
            both = [r[name][way] for name in ("dense", "pruned")]
            cells = [label, *(f"{found['mb']:.1f}" for found in both)]
            keys = [f"ms_b{rows}" for rows in BATCHES]
            cells += [cell(found[key]) for key in keys for found in both]
            eager = r["dense"]["eager"]
            cells += [f"{eager[key]['median'] / both[1][key]['median']:.1f}" for key in keys]
            rows.append(row(cells))
        removed = f"{r['sparsity']:.0%} of the prunable parameters removed"
        lines += [f"{r['task']}, {removed}, {r['length']} tokens.", "", *with_head(head, rows), ""]
        found = f"{r['rounds']} rounds in turn, ONNX Runtime {r['onnxruntime']}"
        lines += [f"{measured_on([r])[0].removesuffix('.')}, {found}.", ""]
    return lines[:-1]


def opening(records: Records) -> list[str]:
    """Milliseconds to open a pruned folder, beside an uncut model of as many parameters."""
    auto = "`AutoModelForSequenceClassification`"
    names = {
        "uncut": "uncut, its class of transformers",
        "pruned": "pruned, `from_pretrained` of this package with that class",
        "uncut_auto": f"uncut, {auto}",
        "auto": f"pruned, {auto} with this package imported",
    }
    rows = []
    for r in records:
        for name, label in names.items():
            ms, uncut = r[f"{name}_ms"], "uncut_auto" if "auto" in name else "uncut"
            cells = [label, f"{r['parameters'][name.split('_')[0].replace('auto', 'pruned')]:,}"]
            times = f"{digits(ms['median'])} ({digits(ms['min'])} .. {digits(ms['max'])})"
            ratio = f"{ms['median'] / r[f'{uncut}_ms']['median']:.2f}"
            rows.append(row([*cells, times, ratio]))
    head = ["opened", "parameters", "ms", "times as long"]
    return [*with_head(head, rows, numbers=3), "", *measured_on(records)]


def described(records: Records) -> list[str]:
    """Points against the dense control with free widths, and with those a config describes."""

    def cell(values: Sequence[float]) -> str:
        return f"{statistics.mean(values):+.2f} ({min(values):+.2f} .. {max(values):+.2f})"

    def setting(record: Record) -> tuple[Any, ...]:
        return record["task"], record["sparsity"], record["steps"]

    rows = []
    for task, sparsity, steps in sorted({setting(record) for record in records}):
        same = [record for record in records if setting(record) == (task, sparsity, steps)]
        of = {w: {r.seed: points(r) for r in same if r["widths"] == w} for w in FREE_OR_NOT}
        seeds = sorted(set[int].intersection(*map(set, of.values())))
        if not seeds:
            continue
        free, plain = ([values[seed] for seed in seeds] for values in of.values())
        pairs = [new - old for old, new in zip(free, plain, strict=True)]
        about = [f"{task}, {sparsity:.0%} sparsity", comparison.after(steps), str(len(seeds))]
        rows.append(row([*about, *map(cell, (free, plain, pairs))]))
    head = ["task", "training", "seeds", *FREE_OR_NOT.values(), "difference, in pairs"]
    return with_head(head, rows)


# ------------------------------------------------------------------------------------------- pages

TABLES: dict[str, tuple[str, Callable[[Records], list[str]]]] = {
    "comparison-short": ("recovery", comparison.front),
    "comparison-front": ("recovery", comparison.few),
    "comparison-facts": ("recovery", comparison.facts),
    "comparison-lost": ("recovery", comparison.lost),
    "comparison": ("recovery", comparison.tables),
    "comparison-nats": ("recovery", partial(comparison.tables, measure="nats")),
    "distillation": ("distillation", distillation),
    "lengths": ("lengths", lengths),
    "deploy": ("deploy", deploy),
    "opening": ("opening", opening),
    "described": ("described", described),
    "ablations": ("ablations", ablations),
    "costs-machine": ("costs", measured_on),
    "costs": ("costs", cost_parts),
    "scaling-machine": ("scaling", measured_on),
    "scaling": ("scaling", growth),
    "communication": ("scaling", communication),
    "memory": ("memory", memory.by_size),
    "memory-exponents": ("memory", memory.exponents),
    "memory-paper": ("memory", memory.on_paper),
    "memory-machine": ("memory", measured_on),
    "one-cut": ("one-cut", one_cut),
    "demo": ("demo", demo),
    "demo-before": ("demo", demo_before),
    "demo-parts": ("demo", demo_parts),
    "one-cut-machine": ("one-cut", measured_on),
    "layers": ("layers", layers),
    "layers-one-shot": ("layers-one-shot", layers_one_shot),
    "layer-choice": ("layer-choice", layer_pages.layer_choice),
    "layer-choice-short": ("layer-choice", layer_pages.short),
    "layer-choice-lost": ("layer-choice", layer_pages.lost),
    "layers-speed": ("layers-speed", layers_speed),
    "vision": ("vision", vision),
    "vision-lost": ("vision", comparison.lost),
    "mobilenet": ("mobilenet", mobilenet),
    "vision-layers": ("vision-layers", vision_layers),
    "vision-latency": ("vision-latency", vision_latency),
    "decoders-facts": ("decoders", decoder_pages.facts),
    "decoders-lost": ("decoders", decoder_pages.lost),
    "decoders": ("decoders", decoder_pages.tables),
    "decoders-trained": ("decoders-trained", decoder_pages.tables),
    "zoo-machine": ("zoo", measured_on),
    "zoo-summary": ("zoo", zoo.summary),
    "zoo-shortfalls": ("zoo", zoo.shortfalls),
    "zoo": ("zoo", zoo.every_model),
}
"""The case whose records a table is made of, and what makes it."""


def table_lines(name: str, folder: Path = FOLDER) -> list[str]:
    """A table, from the records of its case."""
    case, make = TABLES[name]
    records = [*Store(case, folder)]
    return make(records) if records else [f"No records yet: `python -m benchmarks run {case}`."]


def filled(text: str, folder: Path = FOLDER) -> str:
    """A page with its tables made anew.

    Raises:
        ValueError: If a table is not known, or not closed.
    """

    def table(found: re.Match[str]) -> str:
        if found[1] not in TABLES:
            raise ValueError(f"table {found[1]!r}: expected one of {', '.join(TABLES)}")
        lines = "\n".join(table_lines(found[1], folder))
        return f"<!-- table: {found[1]} -->\n\n{lines}\n\n<!--"

    if text.count("<!-- table: ") != text.count("<!-- /table -->"):
        raise ValueError("expected a `<!-- /table -->` after each `<!-- table: NAME -->`")
    return re.sub(r"<!-- table: (\S+) -->.*?<!--(?= /table -->)", table, text, flags=re.S)


def rewritten(root: Path = ROOT, folder: Path = FOLDER) -> Iterator[tuple[Path, str, str]]:
    """Every page with its text as it is, and as the records have it."""
    for name in PAGES:
        text = (root / name).read_text(encoding="utf-8")
        yield root / name, text, filled(text, folder)
