"""Calibration batches in a file beside a model, from which smaller ones can be made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from lightning_mi_prune.checkpoint.loading import read_tensors
from lightning_mi_prune.core.errors import PruningError
from lightning_mi_prune.core.untrusted import described, reading

__all__ = ["BATCHES_FILE", "read_batches", "store_batches"]

BATCHES_FILE = "calibration.safetensors"


def store_batches(batches: Iterable[Mapping[str, Tensor]], folder: Path) -> None:
    """Write batches to a folder.

    Args:
        batches: Keyword arguments of the model, with labels where there are some.
        folder: The folder.

    Raises:
        PruningError: If there are none, or one is no mapping of names to tensors.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    for place, batch in enumerate(batches):
        if not isinstance(batch, Mapping) or not all(isinstance(t, Tensor) for t in batch.values()):
            raise PruningError(
                f"Calibration batch {place} is {described(batch)}; expected names mapped to "
                "tensors, the keyword arguments of the model."
            )
        tensors |= {
            f"{place:06}.{name}": t.detach().cpu().clone().contiguous() for name, t in batch.items()
        }
    if not tensors:
        raise PruningError("There are no calibration batches to store; expected one or more.")
    save_file(tensors, folder / BATCHES_FILE, metadata={"format": "pt"})


def read_batches(folder: str | Path) -> list[dict[str, Tensor]]:
    """The batches in a folder, in order.

    Raises:
        PruningError: If there are none, or the file is damaged.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store_batches([{"x": torch.ones(2)}, {"x": torch.zeros(1)}], Path(folder))
        ...     read_batches(folder)
        [{'x': tensor([1., 1.])}, {'x': tensor([0.])}]
    """
    path = Path(folder) / BATCHES_FILE
    if not path.is_file():
        raise PruningError(
            f"{folder} has no {BATCHES_FILE}; expected a folder saved with calibration batches, "
            "save_pretrained(..., calibration=batches). Or give the data."
        )
    found: dict[str, dict[str, Tensor]] = {}
    with reading(f"{path}", "copy or save the folder again"):
        for key, tensor in sorted(read_tensors(path).items()):
            place, _, name = key.partition(".")
            if not place.isdecimal() or not name:
                raise ValueError(f"{described(key)} is no entry of a batch")
            found.setdefault(place, {})[name] = tensor
    return list(found.values())
