"""What the length of texts, the layout of widths and `torch.compile` do to speed.

    python -m examples.benchmark.lengths
    python -m examples.benchmark.lengths --lengths 23 256 --sparsities 0.75 --compile

Run it on a machine that does nothing else. For each length, the dense model takes turns with the
shapes that the records name: our widths, ours where axes compete by time (`by_time`), and uniform
ones, all with as many parameters. As in `latency`, weights are random. What is there of this
processor is not measured again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig

from examples.benchmark import by_time, oneshot, recovery
from examples.benchmark.finetuned import RECIPES
from examples.benchmark.latency import shaped, timed
from examples.benchmark.options import count, positive, share
from examples.benchmark.records import Record, load, write
from examples.benchmark.rivals.size import Kept
from examples.benchmark.texts import inputs_of
from examples.text_classification.packaged import model_path
from lightning_mi_prune.measure import count_macs
from lightning_mi_prune.sample import Example

RESULTS = Path(__file__).parent / "results" / "lengths.json"
TASK, SEED = "trec-6", 0
LENGTHS = (23, 64, 128)  # tokens; the first is that of the task's median batch
SPARSITIES = (0.5, 0.75, 0.9)
# Whose shape stands for a layout: method, widths and fold-in of a record without training.
LAYOUTS = {
    "ours": ("relevance-mi", "global", "refit"),
    "ours, by time": ("relevance-mi", by_time.WIDTHS, "refit"),
    "uniform": ("taylor", "uniform", "none"),
}


def shapes(records: Sequence[Record], sparsities: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Layout, sparsity and widths of what is timed, by name.

    Args:
        records: Those of :mod:`examples.benchmark.recovery` and :mod:`examples.benchmark.by_time`.
        sparsities: Shares of the prunable parameters that are gone.

    Raises:
        LookupError: No record has one of the shapes.
    """
    found = {}
    for layout, (method, widths, fold_in) in LAYOUTS.items():
        for sparsity in sparsities:
            about = {"task": TASK, "seed": SEED, "steps": 0, "target_sparsity": sparsity}
            about |= {"method": method, "widths": widths, "fold_in": fold_in, "cuts": 1}
            same = [r for r in records if all(r[name] == value for name, value in about.items())]
            if not same:
                script = by_time if widths == by_time.WIDTHS else recovery
                raise LookupError(f"no record of {about}; {script.__name__} makes it")
            (record,) = same
            found[f"{layout}-{sparsity}"] = {
                "layout": layout,
                "target_sparsity": sparsity,
                "kept": record["kept"],
            }
    return found


def network_of(kept: Kept | None = None) -> nn.Module:
    """The task's classifier with random weights and these widths; None keeps all."""
    config = AutoConfig.from_pretrained(model_path(RECIPES[TASK].model), num_labels=6)
    return shaped(config, kept)


def gauge(
    named: dict[str, dict[str, Any]],
    length: int,
    *,
    compiled: bool,
    seconds: float,
    rounds: int,
) -> list[Record]:
    """Multiply-accumulates and latency of the shapes, all in turn with the dense model.

    Args:
        named: What :func:`shapes` finds.
        length: Tokens of a text.
        compiled: Whether all of them go through `torch.compile` first.
        seconds: Time for each model and batch size.
        rounds: How often they take turns.
    """
    networks = {"dense_": network_of()}
    networks |= {f"{name}_": network_of(shape["kept"]) for name, shape in named.items()}
    example = Example((), inputs_of(1, length))
    macs = {name: count_macs(network, example) for name, network in networks.items()}
    if compiled:
        for network in networks.values():
            network.compile(dynamic=False)
    times = timed(networks, length, seconds=seconds, rounds=rounds)

    def measured(name: str) -> Record:
        taken = {k.removeprefix(name): ms for k, ms in times.items() if k.startswith(name)}
        return {"macs": macs[name], **taken}

    dense = {f"dense_{key}": value for key, value in measured("dense_").items()}
    about = {"task": TASK, "seed": SEED, "length": length, "compiled": compiled}
    about |= {"machine": oneshot.machine()}
    return [about | shape | measured(f"{name}_") | dense for name, shape in named.items()]


def key_of(record: Record) -> tuple[Any, ...]:
    """What a record is about: a processor, and what was timed on it."""
    names = ("compiled", "length", "layout", "target_sparsity")
    return record["machine"]["cpu"], *(record[name] for name in names)


def is_there(record: Record | None, shape: dict[str, Any], about: dict[str, Any]) -> bool:
    """Whether a record is of this very shape, with as many threads."""
    if record is None or record["kept"] != shape["kept"]:
        return False
    return bool(record["machine"]["threads"] == about["machine"]["threads"])


def main(given: Sequence[str] | None = None) -> None:
    """Measure what is missing, one length after another."""
    parser = argparse.ArgumentParser("examples.benchmark.lengths", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--lengths", nargs="+", type=count, default=LENGTHS, help="tokens; default: 23 64 128")
    add("--sparsities", nargs="+", type=share, default=SPARSITIES, help="default: 0.5 0.75 0.9")
    add("--compile", action="store_true", help="compile all models first; wants a C++ compiler")
    add("--seconds", type=positive, default=1.0, help="for each model and batch size")
    add("--rounds", type=count, default=10, help="how often the models take turns")
    asked = parser.parse_args(given)
    transformers.logging.set_verbosity_error()
    about = {"compiled": asked.compile, "machine": oneshot.machine()}
    paced = [r for r in load(by_time.RESULTS) if r["machine"]["cpu"] == about["machine"]["cpu"]]
    try:
        named = shapes(load(recovery.RESULTS) + paced, asked.sparsities)
    except LookupError as error:
        parser.error(str(error))
    found = {key_of(record): record for record in load(RESULTS)}
    for length in asked.lengths:
        missing = {
            name: shape
            for name, shape in named.items()
            if not is_there(found.get(key_of(about | shape | {"length": length})), shape, about)
        }
        if not missing:
            continue
        torch.compiler.reset()
        options = {"compiled": asked.compile, "seconds": asked.seconds, "rounds": asked.rounds}
        for record in gauge(missing, length, **options):
            found[key_of(record)] = record
            ratio = record["dense_latency_ms_b32"] / record["latency_ms_b32"]
            print(f"{length} tokens, {record['layout']}: {ratio:.2f}x at batch 32", flush=True)
        write(RESULTS, [found[key] for key in sorted(found)])


if __name__ == "__main__":
    main()
