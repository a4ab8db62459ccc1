"""Files of the command that expand, refer to themselves or hold odd values are refused."""

from __future__ import annotations

import os

import pytest

from lightning_mi_prune import PruningError
from lightning_mi_prune.cli.config import read_file, read_words

BOMB = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 9)}]" for i in range(12))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a.yaml", "refers to itself"),
        ("fit: {data: ./../files/a.yaml}", "refers to itself"),
        ("model: b.yaml", "refers to itself"),
        (BOMB, "values are repeated"),
        ("a: &a {b: *a}", "holds itself"),
        ("a: " + "[" * 3000 + "]" * 3000, "nests more than 64|nested too deeply"),
        ("a: " + "9" * 5000, "is damaged"),
        ("a: \x07", "is no valid YAML"),
    ],
    ids=["itself", "by a path", "in turn", "aliases", "a loop", "deep", "digits", "bell"],
)
def test_a_file_that_does_not_end_or_is_no_yaml_is_refused(text, message, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "a.yaml").write_text(text)
    (folder / "b.yaml").write_text("data: a.yaml")
    with pytest.raises(PruningError, match=message) as error:
        read_file(folder / "a.yaml")
    assert "\n" not in str(error.value)


def test_a_file_that_refers_to_others_twice_is_read(tmp_path):
    (tmp_path / "a.yaml").write_text("model: b.yaml\ndata: b.yaml\nfit: {model: b.yaml}")
    (tmp_path / "b.yaml").write_text("class_path: Net")
    assert read_file(tmp_path / "a.yaml")["fit"]["model"] == {"class_path": "Net"}


@pytest.mark.parametrize("path", ["\0", "\ud800", "x" * 5000, "."])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(PruningError, match="cannot be read from"):
        read_words(["--config", path], [])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "a.yaml")
    with pytest.raises(PruningError, match="no regular file"):
        read_file(tmp_path / "a.yaml")
