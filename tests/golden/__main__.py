"""``python -m tests.golden`` writes results.json; with ``--check`` it compares, bit by bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from tests.golden.cases import CASES, RESULTS, load, machine, record


def differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Every place where two records differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}[{place}]")
    elif old != new or type(old) is not type(new):
        yield f"{path}: {old!r} was recorded, now {new!r}"


def main(arguments: list[str]) -> int:
    """Write or compare; names after the options narrow the cases that are compared."""
    check = "--check" in arguments
    wanted = [a for a in arguments if not a.startswith("--")]
    names = [n for n in CASES if not wanted or any(w in n for w in wanted)]
    if wanted and not check:
        sys.stderr.write("All cases are written together; names go with --check.\n")
        return 2
    found = {name: record(name) for name in names}
    if not check:
        lines = [f"{json.dumps(n)}: {json.dumps(r, sort_keys=True)}" for n, r in found.items()]
        head = f'{{"machine": {json.dumps(machine())}, "cases": {{\n'
        RESULTS.write_text(head + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
        sys.stdout.write(f"{len(found)} cases, {RESULTS.stat().st_size} bytes\n")
        return 0
    tag, recorded = load()
    bad = 0
    if tag != machine():
        sys.stdout.write(f"Recorded on {tag}, this is {machine()}: the last bits may differ.\n")
    if not wanted:
        for name in sorted(set(CASES) ^ set(recorded)):
            bad += 1
            sys.stdout.write(f"{name}: {'not recorded' if name in CASES else 'no such case'}\n")
    for name in sorted(set(found) & set(recorded)):
        for line in differences(recorded[name], found[name]):
            bad += 1
            sys.stdout.write(f"{name}: {line}\n")
    sys.stdout.write(f"{len(found)} cases, {bad} differences\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
