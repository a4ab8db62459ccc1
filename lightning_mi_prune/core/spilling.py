"""Large tensors in temporary files instead of memory, within a block that asks for it.

The files are mapped into memory: the system reads and writes the parts that are used, and takes the
room back for others whenever it runs short. They have no name once they are open, so nothing
remains of them after a crash.
"""

from __future__ import annotations

import atexit
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from lightning_mi_prune.core.errors import PruningError, number

__all__ = [
    "check_room",
    "in_file",
    "is_spilling",
    "spill_outputs",
    "spilled",
    "spilled_zeros",
    "spilling",
    "spilling_saved_tensors",
]

_SMALLEST = 2**18  # bytes; below, a file of its own is not worth it
_spilling: ContextVar[bool] = ContextVar("spilling", default=False)


@contextmanager
def spilling(active: bool = True) -> Iterator[None]:
    """A block in which :func:`spilled` and its like put tensors into files.

    Args:
        active: Whether they do; False leaves everything in memory.
    """
    token = _spilling.set(active)
    try:
        yield
    finally:
        _spilling.reset(token)


def is_spilling() -> bool:
    """Whether such a block runs."""
    return _spilling.get()


def spilled(x: Tensor) -> Tensor:
    """:func:`in_file` within a block of :func:`spilling`; else the tensor itself."""
    return in_file(x) if is_spilling() else x


def spilled_zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on the CPU within a block of :func:`spilling` in a file, which reads as zeros."""
    if is_spilling() and _is_worth_it(shape, dtype, device):
        return _mapped(shape, dtype)
    return torch.zeros(*shape, dtype=dtype, device=device)


def in_file(x: Tensor) -> Tensor:
    """The values of a tensor in a temporary file; small tensors and those on devices stay.

    The strides stay where no entry is stored twice, so that products round as they would.

    Args:
        x: Any tensor; no gradient flows through what is returned.

    Raises:
        PruningError: If the disk of the folder for temporary files has no room.

    Example:
        >>> x = torch.arange(2.0**17)
        >>> torch.equal(in_file(x), x), in_file(x).data_ptr() == x.data_ptr()
        (True, False)
    """
    x = x.detach()
    plain = x.layout == torch.strided and type(x) in (Tensor, nn.Parameter)
    if not plain or not _is_worth_it(x.shape, x.dtype, x.device):
        return x
    with torch.inference_mode(False), torch.no_grad():  # validation may run in it
        strides = torch.empty_like(x, device="meta").stride()  # those of x, where it is dense
        return _mapped([x.numel()], x.dtype).as_strided(x.shape, strides).copy_(x)


def check_room(size: int) -> None:
    """Refuse a disk that has no room for temporary files of so many bytes.

    Raises:
        PruningError: Naming the folder and the remedy.
    """
    _mapped([max(1, size)], torch.uint8)


def spill_outputs(outputs: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
    """Move what an operator returned into files, within a block of :func:`spilling`.

    The tensors stay the same objects. Views of inputs stay where those are.

    Args:
        outputs: Tensors without gradients that were just made.
        inputs: What they were made from.
    """
    if not is_spilling():
        return
    held = {x.untyped_storage().data_ptr() for x in inputs}
    for x in outputs:
        large = x.layout == torch.strided and _is_worth_it(x.shape, x.dtype, x.device)
        if large and type(x) is Tensor and x.untyped_storage().data_ptr() not in held:
            x.set_(in_file(x))  # type: ignore[call-overload]


@contextmanager
def spilling_saved_tensors(model: nn.Module) -> Iterator[None]:
    """A block in which what backward passes need is in files, but for parameters and buffers.

    Within a block of :func:`spilling`; else nothing changes.

    Args:
        model: Module whose losses are computed.
    """
    if not is_spilling():
        yield
        return
    held = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(x: Tensor) -> Tensor:
        is_weight = x.untyped_storage().data_ptr() in held if x.layout == torch.strided else True
        return x if is_weight or 0 in x.stride() else in_file(x)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


def _is_worth_it(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    return device.type == "cpu" and dtype.itemsize * math.prod(shape) >= _SMALLEST


def _mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros in a file whose room on the disk is reserved: a full disk would end the process."""
    size = dtype.itemsize * math.prod(shape)
    handle, path = tempfile.mkstemp(prefix="lightning_mi_prune-")
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)
        flat = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise PruningError(
            f"{number(size // 2**20)} MB for a temporary file do not fit in "
            f"{tempfile.gettempdir()!r}; expected a folder on a disk with enough room. Set TMPDIR "
            "to one, or calibrate on fewer positions."
        ) from error
    finally:
        os.close(handle)
        _remove(path)
    return flat.view(dtype).view(*shape)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except PermissionError:  # Windows keeps files that are mapped

        def again() -> None:
            with suppress(OSError):
                os.unlink(path)

        atexit.register(again)
