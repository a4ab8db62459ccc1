"""Files of torch.save that ask for more than they hold are refused before they are opened."""

from __future__ import annotations

import os
import zipfile

import pytest
import torch
from torch import nn

from lightning_mi_prune import PruningError, load_pruned
from lightning_mi_prune.checkpoint.archive import check_archive
from tests.fuzz.mutations import Entry, archived, entries_of

PICKLE, STORAGE = "file/data.pkl", "file/data/0"


def saved(path, value=None, **options):
    torch.save({"weight": torch.ones(2, 3)} if value is None else value, path, **options)
    return path


def rewritten(path, change):
    """The file with other entries; ``change`` gets them by name."""
    saved(path)
    entries = entries_of(path.read_bytes())
    path.write_bytes(archived(change({entry.name: entry for entry in entries})))
    return path


def called(name):
    """A pickle of a few bytes that calls something with a number."""
    return b"\x80\x02}X\x01\x00\x00\x00wc" + name + b"\nJ\x00\x00\x00\x60\x85Rs."


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.pt"


@pytest.mark.parametrize("archive", [True, False])
def test_files_of_all_that_torch_saves_are_opened(archive, path):
    layer = nn.TransformerEncoderLayer(8, 2, 8)
    adam = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2, 8)).sum().backward()
    adam.step()
    values = {
        "plain": [1, 2.5, "a", None, True, {1, 2}, b"abc", bytearray(b"xyz"), 1 + 2j, 2**70, -1],
        "views": [torch.zeros(1).expand(5), torch.ones(10)[2:4], torch.ones(2, 2).T],
        "kinds": [torch.ones(2, 2).to_sparse(), torch.ones(0, 3), nn.Parameter(torch.ones(2))],
        "types": [torch.float16, torch.Size([1, 2]), torch.device("cpu")],
        "states": [layer.state_dict(), adam.state_dict()],
    }
    saved(path, values, _use_new_zipfile_serialization=archive)
    check_archive(path)
    check_archive(path.with_name("nothing.pt"))


CHANGES = {
    "a storage that inflates": (
        lambda e: [*e.values(), Entry("file/data/1", bytes(2**25), compressed=True)],
        "entries grow from",
    ),
    "a pickle that inflates": (
        lambda e: [*e.values(), Entry("file/Data.pkl", bytes(2**25), compressed=True)],
        "an entry occurs twice",
    ),
    "an entry twice": (lambda e: [*e.values(), e[STORAGE]], "an entry occurs twice"),
    "a path outside": (lambda e: [*e.values(), Entry("../../x", b"")], r"has the name '../../x'"),
    "a path from the root": (lambda e: [*e.values(), Entry("/tmp/x", b"")], "the name '/tmp/x'"),  # noqa: S108
    "bytes": (lambda e: changed(e, called(b"__builtin__\nbytearray")), "asks for 1610612736"),
    "a tensor": (lambda e: changed(e, called(b"torch\nTensor")), "asks for 1610612736"),
    "a storage": (lambda e: changed(e, called(b"torch.storage\nUntypedStorage")), "asks for"),
    "a storage of the file": (
        lambda e: changed(e, e[PICKLE].body.replace(b"K\x06t", b"J\x00\x00\x00\x60t")),
        "asks for 1610612736",
    ),
    "a size beyond its storage": (
        lambda e: changed(
            e, e[PICKLE].body.replace(b"K\x02K\x03\x86", b"J\x00\x00\x00\x60K\x03\x86")
        ),
        "asks for 48318382",
    ),
}


def changed(entries, pickled):
    assert pickled != entries[PICKLE].body
    return [*(entries | {PICKLE: Entry(PICKLE, pickled)}).values()]


@pytest.mark.parametrize("kind", CHANGES)
def test_archives_that_would_expand_are_refused(kind, path):
    change, message = CHANGES[kind]
    rewritten(path, change)
    linear = nn.Linear(3, 2, bias=False)
    before = linear.weight.clone()
    with pytest.raises(PruningError, match=message):
        load_pruned(linear, path)
    assert torch.equal(linear.weight, before)


def test_two_lists_of_entries_are_refused(path):
    """Of an archive in front of another, torch and zipfile could read different ones."""
    sound = saved(path).read_bytes()
    path.write_bytes(sound + sound)
    with pytest.raises(PruningError, match="another list of entries"):
        check_archive(path)
    path.write_bytes(sound + b"\0" * 30)
    with pytest.raises(PruningError, match=r"it has no end|not a zip"):
        check_archive(path)


def test_a_file_from_before_archives_that_asks_for_memory_is_refused(path):
    saved(path, _use_new_zipfile_serialization=False)
    check_archive(path)
    path.write_bytes(path.read_bytes().replace(b"K\x06N", b"J\x00\x00\x00\x60N"))
    with pytest.raises(PruningError, match="asks for 1610612736"):
        check_archive(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_refused(path):
    os.mkfifo(path)
    with pytest.raises(PruningError, match="no regular file"):
        load_pruned(nn.Linear(1, 1), path)


def test_a_compressed_archive_that_stays_small_is_opened(path):
    saved(path)
    entries = entries_of(path.read_bytes())
    small = archived([Entry(e.name, e.body, compressed=True) for e in entries])
    path.write_bytes(small)
    assert zipfile.is_zipfile(path)
    assert torch.equal(load_pruned(nn.Linear(3, 2, bias=False), path).weight, torch.ones(2, 3))
