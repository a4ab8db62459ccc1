"""Strategies that damage what a reader would accept: trees of JSON, bytes, archives, tensors.

A damaged value is a list of small edits to a sound one, so most of the sound one stays and the
readers get past their first check.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

OUTSIDE = ("../../x", "/etc/passwd", "..\\..\\x", "a/../../../x", "\0", "\ud800", "\u202e💥")


Draw = Callable[..., Any]  # of hypothesis: a value of a strategy


def drawn(function: Callable[..., Any]) -> Callable[..., st.SearchStrategy[Any]]:
    """As ``st.composite``, for large arguments: hypothesis writes out those of its own."""

    @functools.wraps(function)
    def strategy(*args: Any, **options: Any) -> st.SearchStrategy[Any]:
        @st.composite
        def drawn(draw: Any) -> Any:
            return function(draw, *args, **options)

        return drawn()

    return strategy


def one_of(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of some values, which are not written out."""
    return st.integers(0, len(values) - 1).map(lambda index: values[index])


SCALARS = (
    *(None, True, False, 0, 1, 2, -1, 3, 7, 2**24, 2**31, 2**31 - 1, 2**63, -(2**63), 10**30),
    *(10**400, 0.5, 1.0, -0.0, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "0", "x" * 5000, "nan", "torch", "float32", "cpu", *OUTSIDE),
)
DEEP = "\1deep\1"  # stands for lists in lists, which json.dumps could not write
LONG = "\1long\1"  # for a whole number of many digits


def junk() -> st.SearchStrategy[Any]:
    """Any value of JSON, most of them odd ones."""
    plain = one_of(SCALARS) | st.integers() | st.text(max_size=8)
    holders = ([], {}, [[]], {"a": 1}, [0] * 100, [None], [[1, 2], [3]], DEEP, LONG)
    return st.one_of(
        one_of(SCALARS),
        one_of(holders).map(lambda holder: copy.deepcopy(holder)),
        st.lists(plain, max_size=4),
        st.dictionaries(st.sampled_from(["a", "version", *OUTSIDE[:3]]), plain, max_size=3),
        plain,
    )


JUNK = junk()


def places(value: Any) -> list[tuple[Any, ...]]:
    """Every place in nested containers, the shallow ones first."""
    found: list[tuple[Any, ...]] = []
    level: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while level:
        found += [path for path, _ in level]
        level = [
            ((*path, key), part)
            for path, holder in level
            if isinstance(holder, (dict, list, tuple))
            for key, part in (holder.items() if isinstance(holder, dict) else enumerate(holder))
        ]
    return found[1:]


def _place(draw: Draw, value: Any) -> tuple[Any, ...]:
    """A place; half of the draws are from the shallow ones, which are few."""
    known = places(value)
    most = draw(st.sampled_from((1, 2, 3, 99, 99, 99)))
    near = [path for path in known if len(path) <= most] or known
    return near[draw(st.integers(0, len(near) - 1))]


@drawn
def tree(draw: Draw, value: Any, *, most: int = 3, odd: Any = None, inside: bool = True) -> Any:
    """A tree with one to ``most`` edits; what is not edited is that of ``value``.

    Args:
        draw: Of hypothesis.
        value: The sound tree.
        most: Edits at most.
        odd: Strategy of the values to put in; any of JSON by default.
        inside: Whether text that is JSON itself is edited inside.
    """
    return _several(draw, value, most, JUNK if odd is None else odd, inside)


def _several(draw: Draw, value: Any, most: int, odd: Any, inside: bool) -> Any:
    for _ in range(draw(st.integers(1, most))):
        if not isinstance(value, (dict, list)) or not value:
            break
        path = _place(draw, value)
        value = _changed(value, path, lambda holder, key: _edit(draw, holder, key, odd, inside))
    return value


def _changed(value: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy along a path; ``change`` gets the container there and the key."""
    key, *rest = path
    new = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        new[key] = _changed(value[key], tuple(rest), change)
    else:
        change(new, key)
    return tuple(new) if isinstance(value, tuple) else new


def _edit(draw: Draw, holder: Any, key: Any, odd: Any, inside: bool) -> None:
    """One small change of an entry of a container."""
    old = holder[key]
    held = _parsed(old) if inside and draw(st.booleans()) else None
    if held:
        holder[key] = dumped(_several(draw, held, 2, odd, inside))
        return
    action = draw(st.sampled_from(("put", "near", "near", "drop", "more", "twice", "trade")))
    if action == "near" and type(old) in (int, float):
        step = draw(st.sampled_from((-1, 1, 2, -2, 1000, 2**20)))
        holder[key] = draw(st.sampled_from((old + step, old * step, -old)))
    elif action == "near" and type(old) is str:
        names = [old[:-1], f"{old}.", f"../{old}", old.upper(), old.replace("0", "1"), f"x.{old}"]
        holder[key] = draw(one_of(names))
    elif action == "near" and type(old) is list and old:
        lists = [old[::-1], old[:-1], [*old, old[-1]], old * 2, [old[0], *old]]
        holder[key] = draw(one_of(lists))
    elif action == "drop":
        del holder[key]
    elif action == "more" and isinstance(holder, dict):
        named = [f"{key}x", str(key).upper(), "more", *OUTSIDE]
        holder[draw(one_of(named))] = old if draw(st.booleans()) else draw(odd)
    elif action == "more":
        holder.insert(key, old if draw(st.booleans()) else draw(odd))
    elif action == "twice":
        holder[key] = [old, old]
    elif action == "trade":
        other = draw(one_of(list(holder) if isinstance(holder, dict) else range(len(holder))))
        holder[key], holder[other] = holder[other], holder[key]
    else:
        holder[key] = draw(odd)


def _parsed(text: Any) -> Any:
    """What a text holds that is JSON itself and was not damaged yet; None for any other."""
    try:
        return json.loads(text) if type(text) is str and text[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return None


def dumped(value: Any) -> str:
    """JSON text of a tree, with what stands for deep lists and long numbers written out."""
    text = json.dumps(value, default=str)
    text = text.replace(json.dumps(DEEP), "[" * 20_000 + "]" * 20_000)
    return text.replace(json.dumps(LONG), "9" * 10_000)


@drawn
def json_text(draw: Draw, value: Any, **options: Any) -> str:
    """Text of a damaged tree; now and then with a key that occurs twice or something after it."""
    chosen = {"most": 3, "odd": JUNK, "inside": True} | options
    text = dumped(_several(draw, value, **chosen))
    how = draw(st.integers(0, 19))
    if how == 0 and text.startswith("{"):
        return text.replace("{", '{"version": 1, ', draw(st.integers(1, 3)))
    if how == 1:
        return text + draw(st.sampled_from(("{}", " ", "\0", "]", "\ufeff")))
    if how == 2:
        return "\ufeff" + text
    return text


@drawn
def raw(draw: Draw, sound: bytes) -> bytes:
    """The bytes cut off, changed, repeated, put together with others, or something else."""
    return _raw(draw, sound)


def _raw(draw: Draw, sound: bytes) -> bytes:
    found = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(found)))
        if draw(st.booleans()):  # where formats keep their lengths
            at = min(at, draw(st.sampled_from((8, 64, 256))))
        action = draw(st.sampled_from(("cut", "flip", "flip", "put", "drop", "twice", "end")))
        if action == "cut":
            del found[at:]
        elif action == "flip" and at < len(found):
            found[at] ^= draw(st.sampled_from((1, 2, 16, 128, 255)))
        elif action == "put":
            found[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif action == "drop":
            del found[at : at + draw(st.integers(1, 64))]
        elif action == "twice":
            found[at:at] = found[: draw(st.sampled_from((16, 1024, len(found))))]
        elif action == "end":
            found += draw(st.sampled_from((b"\0", b"PK\5\6" + bytes(18), bytes(4096), b"}")))
    empty = st.sampled_from((b"", b"\0", b"{}", b"[]", b"PK\3\4", b"\x80\2}.", bytes(1000)))
    return draw(empty) if draw(st.integers(0, 15)) == 0 else bytes(found)


# ---------------------------------------------------------------- files of torch.save


@dataclass(frozen=True)
class Entry:
    """An entry of an archive: its name, what it holds, and how it is written."""

    name: str
    body: bytes
    compressed: bool = False


def archived(entries: list[Entry]) -> bytes:
    """A zip file, with whatever names."""
    import warnings

    target = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w") as archive:
        warnings.simplefilter("ignore")  # a name twice
        for entry in entries:
            info = zipfile.ZipInfo("x")
            info.filename = entry.name
            info.compress_type = zipfile.ZIP_DEFLATED if entry.compressed else zipfile.ZIP_STORED
            archive.writestr(info, entry.body)
    return target.getvalue()


def entries_of(sound: bytes) -> list[Entry]:
    """The entries of a zip file."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        return [Entry(info.filename, archive.read(info)) for info in archive.infolist()]


def _code(command: str) -> list[bytes]:
    """Pickles that run a command if they are trusted."""

    class Runs:
        def __init__(self, call: Callable[..., Any], *args: Any) -> None:
            self.made = call, args

        def __reduce__(self) -> Any:
            return self.made

    script = f"__import__('os').system({command!r})"
    return [
        pickle.dumps({"state_dict": Runs(*made)}, 2)
        for made in ((os.system, command), (eval, script), (exec, script))
    ]


def _claims() -> list[bytes]:
    """Pickles that ask for gigabytes in a few bytes, or nest without end."""
    many = struct.pack("<i", 2**30 + 2**29)
    start, end = b"\x80\x02}X\x01\x00\x00\x00w", b"s."
    names = (
        b"__builtin__\nbytearray",
        b"builtins\nbytearray",
        b"torch\nTensor",
        b"torch\nFloatTensor",
    )
    names += (
        b"torch.storage\nUntypedStorage",
        b"torch\nFloatStorage",
        b"torch.storage\nTypedStorage",
    )
    asked = [start + b"c" + name + b"\nJ" + many + b"\x85R" + end for name in names]
    asked += [start + b"c" + name + b"\nJ" + many + b"\x85\x81" + end for name in names]
    again = b"".join(
        b"q" + bytes([i]) + b"]h" + bytes([i]) + b"ah" + bytes([i]) + b"a" for i in range(60)
    )
    return [
        *asked,
        start + b"]" * 50_000 + b"a" * 49_999 + end,
        start + b"]" + again + end,
        start + b"]q\x00h\x00a" + end,
        start + b"X\xff\xff\xff\x7f" + end,
        start + b"\x8a\xff" + b"\xff" * 255 + end,
    ]


@drawn
def torch_file(draw: Draw, sound: bytes, command: str) -> bytes:
    """A file of ``torch.save`` whose entries lie.

    Args:
        draw: Of hypothesis.
        sound: A sound file.
        command: What no reader may run.
    """
    entries = entries_of(sound)
    at = draw(st.integers(0, len(entries) - 1))
    main = next(i for i, e in enumerate(entries) if e.name.endswith("data.pkl"))
    storages = [i for i, e in enumerate(entries) if "/data/" in e.name]
    one = entries[at]
    action = draw(
        st.sampled_from(
            ("pickle", "claims", "code", "bomb", "bombs", "name", "twice", "drop", "body", "old")
        )
    )
    if action == "pickle":
        entries[main] = Entry(entries[main].name, _raw(draw, entries[main].body))
    elif action == "claims":
        entries[main] = Entry(entries[main].name, draw(one_of(_claims())))
    elif action == "code":
        entries[main] = Entry(entries[main].name, draw(one_of(_code(command))))
    elif action == "bomb":
        at = draw(st.sampled_from((main, storages[0], at)))
        filler = entries[at].body if draw(st.booleans()) else b""
        entries[at] = Entry(entries[at].name, filler + BOMB, compressed=True)
    elif action == "bombs":
        entries += [Entry(f"{one.name}{i}", BOMB[: 2**24], compressed=True) for i in range(4)]
    elif action == "name":
        home, _, last = one.name.partition("/")
        odd = (f"../../{last}", f"/{last}", f"{home}/../{last}", one.name.upper(), f"x/{last}", "")
        entries[at] = Entry(draw(st.sampled_from(odd)), one.body)
    elif action == "twice":
        entries.insert(draw(st.integers(0, len(entries))), Entry(one.name, _raw(draw, one.body)))
    elif action == "drop":
        del entries[at]
    elif action == "body":
        entries[at] = Entry(one.name, _raw(draw, one.body))
    else:  # what torch wrote before 1.6: several pickles, then the storages
        return draw(one_of([*_old(), *_claims(), *_code(command)]))
    return archived(entries)


BOMB = bytes(2**27)


def _old() -> list[bytes]:
    target = io.BytesIO()
    torch.save({"w": torch.ones(3)}, target, _use_new_zipfile_serialization=False)
    sound = target.getvalue()
    numel = sound.rindex(b"K\x03") if b"K\x03N" not in sound else sound.index(b"K\x03N")
    huge = b"\x8a\x06" + (2**40).to_bytes(6, "little")
    return [sound, sound[:-5], sound[:numel] + huge + sound[numel + 2 :]]


# ---------------------------------------------------------------- tensors


def tensors() -> st.SearchStrategy[Any]:
    """Tensors and values that a state dict should not hold, all of a few bytes."""
    made = (
        torch.ones(2, 3),
        torch.ones(()),
        torch.zeros(0, 5),
        torch.full((4,), torch.nan),
        torch.ones(24, dtype=torch.complex64),
        torch.ones(24, dtype=torch.int8),
        torch.ones(24, dtype=torch.bool),
        torch.zeros(1).expand(2**34),
        torch.zeros(1).expand(40, 24),
        torch.ones(40, 24).to_sparse(),
        torch.ones(40, 24, device="meta"),
        torch.nn.Parameter(torch.ones(24)),
        torch.zeros(200, dtype=torch.uint8),
    )
    return one_of((*made, *SCALARS, [], {}, [torch.ones(1)], b"bytes", {1: 2}, (1, 2)))


@drawn
def weights(draw: Draw, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict with entries of another shape, type or name, or without some."""
    found = dict(state)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(one_of(sorted(map(str, found)) or [""]))
        value = found.pop(name, None)
        if value is None:
            continue
        action = draw(st.sampled_from(("drop", "name", "put", "narrow", "dtype", "turn", "wide")))
        if action == "name":
            others = (f"../{name}", name.upper(), f"x.{name}", name.replace("0", "1"), "")
            found[draw(st.sampled_from(others))] = value
        elif action == "put" or (action != "drop" and not isinstance(value, torch.Tensor)):
            found[name] = draw(tensors())
        elif action == "narrow" and value.ndim:
            found[name] = value[: draw(st.integers(0, len(value)))].clone()
        elif action == "wide" and value.ndim:
            found[name] = torch.cat([value, value])
        elif action == "turn" and value.ndim == 2:
            found[name] = value.T.contiguous()
        elif action == "dtype":
            kinds = (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool)
            found[name] = value.to(draw(st.sampled_from(kinds)))
    return found


# ---------------------------------------------------------------- safetensors


@drawn
def safetensors_file(draw: Draw, sound: bytes) -> bytes:
    """A file of safetensors whose header lies: lengths, types, places beyond the file."""
    (length,) = struct.unpack("<Q", sound[:8])
    header, body = json.loads(sound[8 : 8 + length]), sound[8 + length :]
    text = dumped(_several(draw, header, 3, JUNK, False)).encode("utf-8", "surrogatepass")
    claimed = len(text)
    if draw(st.integers(0, 5)) == 0:
        claimed = draw(st.sampled_from((0, 1, claimed - 1, claimed + 1, 2**26, 2**40, 2**64 - 1)))
    return struct.pack("<Q", claimed) + text + body
