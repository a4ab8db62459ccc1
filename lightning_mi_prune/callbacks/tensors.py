"""Tensors out of a checkpoint, which is untrusted input: plain, whole and finite, or an error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_mi_prune.states import is_plain_tensor
from lightning_mi_prune.untrusted import described, mapping

__all__ = ["check_finite", "check_tensors", "tensor", "tensors"]

_REPEATED = 8  # bytes that tensors may show for each that the file holds
_SMALL = 2**20


def check_tensors(state: Any) -> None:
    """Refuse tensors that claim more than a file holds, each and all together.

    A view can claim gigabytes with the few bytes of a small file behind it; so can a thousand
    views of a megabyte.

    Args:
        state: Containers that :func:`untrusted.check_nesting` found to be bounded.

    Raises:
        ValueError: If the elements of a tensor are not in the file.
    """
    claimed, storages, todo = 0, {}, [state]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo.extend(value.values())
        elif isinstance(value, (list, tuple)):
            todo.extend(value)
        elif isinstance(value, Tensor):
            if value.device.type == "meta":
                raise ValueError(f"{described(value)} holds no elements")
            if is_plain_tensor(value):
                storage, size = value.untyped_storage(), value.numel() * value.element_size()
                if size > storage.nbytes():
                    raise ValueError(f"{described(value)} claims more elements than the file holds")
                claimed += size
                storages[storage.data_ptr()] = storage.nbytes()
    if claimed > _SMALL + _REPEATED * sum(storages.values()):
        raise ValueError("its tensors show the same few elements again and again")


def tensor(value: Any) -> Tensor:
    """A plain dense tensor."""
    if not isinstance(value, Tensor) or not is_plain_tensor(value):
        raise TypeError(f"{described(value)} is no plain dense tensor")
    return value.detach()


def tensors(value: Any) -> dict[str, Tensor]:
    """Plain dense tensors by name."""
    return {name: tensor(found) for name, found in mapping(value).items()}


def check_finite(found: Mapping[str, Tensor]) -> None:
    """Refuse NaN and infinite values; numbers that are no fractions never are."""
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise ValueError(f"{described(name)} holds NaN or infinite values")
