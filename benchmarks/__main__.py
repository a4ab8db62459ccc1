"""Benchmarks of the package, their records, tables and figures.

    python -m benchmarks list
    python -m benchmarks run recovery --tasks trec-6 --seeds 0 --sparsities 0.75 --steps 100
    python -m benchmarks run --quick recovery ablations --records runs/quick
    python -m benchmarks tables
    python -m benchmarks plots

What has a record is not measured again, so a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from benchmarks.cases import CASES, OPTIONS, missing_jobs
from benchmarks.pages import TABLES, rewritten, table_lines
from benchmarks.plots import FIGURES, SHOWN, drawn
from benchmarks.records import FOLDER, Store
from lightning_mi_prune import PruningWarning

__all__ = ["main"]


def main(given: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser("benchmarks", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="name all cases, with the records that are there")
    run = commands.add_parser("run", help="measure what has no record yet")
    run.add_argument("cases", nargs="+", choices=[*CASES], metavar="CASE")
    run.add_argument("--quick", action="store_true", help="the smallest settings, to try it")
    for name, options in OPTIONS.items():
        takers = ", ".join(case.name for case in CASES.values() if name in case.options)
        run.add_argument(f"--{name}", help=f"of {takers}", **options)
    tables = commands.add_parser("tables", help="write the tables of README and docs")
    tables.add_argument("--only", nargs="+", choices=[*TABLES], help="print these instead")
    tables.add_argument("--check", action="store_true", help="fail where a page would change")
    plots = commands.add_parser("plots", help="draw figures")
    plots.add_argument("--only", nargs="+", choices=FIGURES, default=SHOWN)
    plots.add_argument("--folder", type=Path, default=Path("docs", "figures"))
    for command in (run, tables, plots):
        command.add_argument("--records", type=Path, help="default: the project's own")
    arguments = parser.parse_args(given)
    if arguments.command == "run":
        _run(run, arguments)
    elif arguments.command == "tables":
        _tables(arguments.only or (), arguments.records or FOLDER, check=arguments.check)
    elif arguments.command == "plots":
        for path in drawn(arguments.only, arguments.folder, arguments.records or FOLDER):
            print(path)
    else:
        for case in CASES.values():
            print(f"{case.name:16} {len([*Store(case.file)]):5} records  {case.question}")


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    options = {n: v for n in OPTIONS if (v := getattr(arguments, n)) is not None}
    taken = {name for case in arguments.cases for name in CASES[case].options}
    if unused := options.keys() - taken:
        parser.error(f"no case takes --{' --'.join(sorted(unused))}: {', '.join(arguments.cases)}")
    folder = arguments.records or (Path("runs", "quick") if arguments.quick else FOLDER)
    _quiet()
    for name in arguments.cases:
        store = Store(CASES[name].file, folder)
        for job in missing_jobs(CASES[name], options, folder, quick=arguments.quick):
            for setting, found in zip(job.settings, job.run(), strict=True):
                store.add(setting, job.seed, found)
                print(f"{name}, seed {job.seed}: {_short(setting)} {_short(found)}", flush=True)


def _short(values: Any) -> str:
    """Settings or figures on one line, without lists and tables."""
    plain = {n: v for n, v in values.items() if isinstance(v, str | int | float)}
    return json.dumps({n: round(v, 4) if isinstance(v, float) else v for n, v in plain.items()})


def _quiet() -> None:
    """No progress bars, and no warnings about what is compared on purpose, such as few samples."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=PruningWarning)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")


def _tables(names: Sequence[str], folder: Path, *, check: bool) -> None:
    for name in names:
        print("\n".join([*table_lines(name, folder), ""]))
    for path, old, new in () if names else rewritten(folder=folder):
        if new == old:
            continue
        if check:
            sys.exit(f"{path} differs from the records: run `python -m benchmarks tables`")
        path.write_text(new, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
