"""What the command line of the one-shot benchmark can ask for."""

import argparse
import warnings
from collections.abc import Sequence

import transformers

from examples.benchmark.finetuned import RECIPES, SEEDS, TASKS
from examples.benchmark.variants import FOLD_INS, METHODS, Variant
from lightning_mi_prune import PruningWarning

SPARSITIES = (0.75, 0.9)


def share(text: str) -> float:
    """A share above 0 and below 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a share above 0 and below 1")
    return value


def positive(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def whole(text: str) -> int:
    """A whole number from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 0")
    return value


def count(text: str) -> int:
    """A whole number from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number from 1")
    return value


def quiet() -> None:
    """No bars, and no warnings of what is part of the comparison: thin evidence, kept copies."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=PruningWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def arguments(given: Sequence[str] | None, description: str | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("examples.benchmark.oneshot", description=description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--tasks", nargs="+", choices=[*RECIPES], default=TASKS, help=f"default: {' '.join(TASKS)}")
    add("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS, help="default: all")
    add("--sparsities", nargs="+", type=share, default=SPARSITIES, help="default: 0.75 0.9")
    add("--methods", nargs="+", choices=[*METHODS], default=[*METHODS], help="default: all")
    add("--widths", nargs="+", choices=("global", "uniform"), default=("global", "uniform"))
    add("--fold-ins", nargs="+", choices=FOLD_INS, default=FOLD_INS, help="default: all")
    add("--cuts", nargs="+", type=int, default=None, help="only variants with so many cuts")
    add("--gather", action="store_true", help="only merge the records that are there")
    add("--table", action="store_true", help="only merge and print the records that are there")
    return parser.parse_args(given)


def asked_variants(asked: argparse.Namespace) -> list[Variant]:
    """The variants that the command line leaves."""
    return [
        variant
        for method in dict.fromkeys(asked.methods)
        for variant in METHODS[method]
        if variant.widths in asked.widths
        and variant.fold_in in asked.fold_ins
        and (asked.cuts is None or variant.cuts in asked.cuts)
    ]
