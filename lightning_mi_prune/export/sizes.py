"""smaller: a family of sizes of a model in a folder, each a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_mi_prune.calibration.datasets import batches_of
from lightning_mi_prune.checkpoint.pretrained import from_pretrained
from lightning_mi_prune.core.errors import PruningError, require
from lightning_mi_prune.core.running import evaluating
from lightning_mi_prune.core.untrusted import described
from lightning_mi_prune.export.batches import read_batches
from lightning_mi_prune.export.card import Measured
from lightning_mi_prune.export.saving import check_target, save_pretrained
from lightning_mi_prune.pruner import PruneOptions, prune_sizes

__all__ = ["opened", "smaller"]

# Of a tokenizer or processor; the weights, the config and the card are written anew.
_PROCESSOR_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*processor*", "chat_template*")


def smaller(
    folder: str | Path,
    sparsities: Sequence[float],
    output: str | Path,
    *,
    data: Any = None,
    overwrite: bool = False,
    **options: Unpack[PruneOptions],
) -> Iterator[Path]:
    """Write smaller models of the one in a folder, all from one calibration.

    Each goes to a folder of its own below ``output``, named by its sparsity, with tokenizer files,
    and a card with its loss on the calibration batches beside that of the model it was made of.

    Args:
        folder: A folder of :func:`save_pretrained` or of transformers.
        sparsities: Shares of the prunable parameters to remove, against the model as built.
        output: Folder for the results.
        data: Calibration batches, or a data set; default: those stored in the folder.
        overwrite: Whether models that are there already are replaced.
        options: As for :func:`prune`.

    Yields:
        Each folder, once it is written.

    Raises:
        PruningError: If the folder cannot be opened, there are no batches, or a size is out of
            reach; nothing is written then.
    """
    batch_size, seed = options.get("batch_size", 32), options.get("seed", 0)
    given = read_batches(folder) if data is None else data
    batches = batches_of(given, batch_size=batch_size, seed=seed)
    targets = [Path(output) / _name(folder, sparsity) for sparsity in sparsities]
    for target in targets:
        check_target(target, overwrite=overwrite)
    network = opened(folder)
    if "loss" not in options and all("labels" in batch for batch in batches):
        options["loss"] = _loss
    before = _mean_loss(network, batches, options)
    sizes = prune_sizes(network, batches, sparsities, **options)
    for target, (small, result) in zip(targets, sizes, strict=True):
        metrics = {} if before is None else {"loss": (before, _mean_loss(small, batches, options))}
        measured = Measured(
            "the batches that it was calibrated on",
            (seed,),
            {name: (old, new) for name, (old, new) in metrics.items() if new is not None},
            macs=result.macs,
        )
        save_pretrained(small, target, measured=measured, overwrite=overwrite)
        _copy_processor(Path(folder), target)
        yield target


def opened(folder: str | Path) -> Any:
    """The model in a folder, with the class that it was saved from.

    Raises:
        PruningError: If the folder does not name a class of transformers.
    """
    transformers = require("transformers", "transformers")
    try:
        fields, _ = transformers.PreTrainedConfig.get_config_dict(folder)
    except OSError as error:
        raise PruningError(
            f"{folder} has no config.json; expected a folder of save_pretrained."
        ) from error
    names = fields.get("architectures") or [None]
    found = getattr(transformers, names[0], None) if isinstance(names[0], str) else None
    if not isinstance(found, type) or not issubclass(found, nn.Module):
        raise PruningError(
            f"The config of {folder} names {described(names[0])} as its class; expected one of "
            "transformers. Open it in Python, and call prune_sizes and save_pretrained."
        )
    return from_pretrained(found, folder).eval()


def _name(folder: str | Path, sparsity: float) -> str:
    if not 0 < sparsity < 1:
        raise PruningError(f"sparsity={sparsity!r}; expected a number above 0 and below 1.")
    return f"{Path(folder).name}-{100 * sparsity:g}"


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Iterable[Any], options: PruneOptions) -> float | None:
    """The mean loss of batches, each weighted by its examples; None without a loss."""
    loss = options.get("loss")
    if loss is None:
        return None
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            rows = len(next(iter(batch.values()))) if isinstance(batch, Mapping) else 1
            total += rows * float(loss(model, batch))
            count += rows
    return total / max(1, count)


def _copy_processor(source: Path, target: Path) -> None:
    for pattern in _PROCESSOR_FILES:
        for file in source.glob(pattern):
            if file.is_file() and not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
