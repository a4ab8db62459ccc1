"""Install built packages in clean environments and try them: ``python -m tools.packages dist``.

The wheel is looked into first. Then the wheel and the sdist are installed, each in an environment
of its own, with every interpreter from Python 3.10 to 3.13 that is found (``--python`` names
others), and a small network is pruned there, saved and loaded. The index is chosen as for pip, with
PIP_INDEX_URL and PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["check_contents", "interpreters", "tried"]

VERSIONS = ("3.10", "3.11", "3.12", "3.13")
PACKAGE = Path(__file__).parent.parent / "lightning_mi_prune"
TRIAL = """
import sys, torch
from importlib.metadata import version
from torch import nn
import lightning_mi_prune
from lightning_mi_prune import load_pruned, prune

assert "site-packages" in lightning_mi_prune.__file__, lightning_mi_prune.__file__
assert version("lightning-mi-prune") == lightning_mi_prune.__version__
assert "transformers" not in sys.modules
for name in lightning_mi_prune.__all__:
    getattr(lightning_mi_prune, name)
def network():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
small, data = network(), [torch.randn(500, 16) for _ in range(4)]
result = prune(small, data, 0.5, loss=lambda model, x: model(x).square().mean())
torch.save(small.state_dict(), "small.pt")
assert torch.equal(load_pruned(network(), "small.pt")(data[0]), small(data[0]))
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {result.parameters}")
"""


def interpreters() -> Iterator[tuple[str, str]]:
    """Version and path of every interpreter that can make environments."""
    for version in VERSIONS:
        roots = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
        found = [*map(str, reversed(roots)), shutil.which(f"python{version}")]
        if sys.version_info[:2] == tuple(map(int, version.split("."))):
            found.append(sys.executable)
        for path in filter(None, found):
            ran = subprocess.run([path, "-c", "import ensurepip, venv"], capture_output=True)  # noqa: S603
            if ran.returncode == 0:
                yield version, path
                break


def check_contents(wheel: Path) -> None:
    """Whether a wheel holds every file of the package, and nothing else.

    Raises:
        SystemExit: If not.
    """
    built = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    if built != expected:
        sys.exit(
            f"{wheel.name}: {sorted(expected - built)} lacking, {sorted(built - expected)} odd"
        )
    kinds = {Path(name).suffix or Path(name).name for name in built}
    print(f"{wheel.name}: {len(built)} files ({', '.join(sorted(kinds))})")


def tried(python: str, package: Path) -> str:
    """What the trial prints in a new environment with a package and what it requires.

    Raises:
        CalledProcessError: If the package cannot be installed, or the trial fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        inside = f"{folder}/bin/python"
        subprocess.run([python, "-m", "venv", folder], check=True)  # noqa: S603
        install = [inside, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*install, f"{package.absolute()}[cli]"], check=True)  # noqa: S603
        run = [inside, "-W", "error::SyntaxWarning", "-c", TRIAL]
        done = subprocess.run(run, check=True, cwd=folder, capture_output=True, text=True)  # noqa: S603
        command = [f"{folder}/bin/lightning-mi-prune", "--help"]
        subprocess.run(command, check=True, cwd=folder, capture_output=True)  # noqa: S603
        return done.stdout.strip()


def main() -> None:
    """Check what was built."""
    parser = argparse.ArgumentParser(description="Install built packages and try them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", nargs="+", default=[], help="interpreters to use, as paths")
    arguments = parser.parse_args()
    (wheel,), (sdist,) = arguments.folder.glob("*.whl"), arguments.folder.glob("*.tar.gz")
    check_contents(wheel)
    pythons = [("", path) for path in arguments.python] or [*interpreters()]
    if not pythons:
        sys.exit(f"No interpreter of {', '.join(VERSIONS)} was found; expected one or more.")
    for _, python in pythons:
        for package in (wheel, sdist):
            start = time.monotonic()
            print(f"{package.name}: {tried(python, package)} ({time.monotonic() - start:.0f} s)")
    missing = set(VERSIONS) - {version for version, _ in pythons}
    if missing and not arguments.python:
        print(f"Not tried, since not found here: Python {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
