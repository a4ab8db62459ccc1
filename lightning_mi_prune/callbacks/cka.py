"""CKALayerPruning: whole layers removed by clusters of alike ones (MPruner), as one callback."""

from __future__ import annotations

from typing import Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_mi_prune.alignment import Kernel
from lightning_mi_prune.callbacks.companions import BestOf
from lightning_mi_prune.callbacks.layers import LayerPruning
from lightning_mi_prune.callbacks.options import (
    accuracy_budget,
    between,
    check_choices,
    check_counts,
    check_order,
    check_types,
    without_private,
)
from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.sparing import LayerCriterion, Thinning

__all__ = ["CKALayerPruning"]


class CKALayerPruning(LayerPruning):
    """Take layers out of a model while it trains, where others say the same.

    Validation compares all layers of a stack (centered kernel alignment). Neighbours that are alike
    form clusters; the next epoch starts with all but the first of each taken out. The first takes
    over what the others said, and training goes on. With ``max_drop`` a cut that costs too much
    after its recovery is taken back exactly, and every second, then every third layer of a cluster
    is tried instead.

    Args:
        threshold: Least CKA with the first layer of a cluster, above 0 and up to 1. None takes the
            clusters that lose least on the way to ``target_layers``.
        target_layers: Fewest layers that stay in every stack; None leaves it to the threshold.
        criterion: ``"cka"``, or what people do instead, which needs ``target_layers``:
            ``"angle"`` removes the layers that turn their input least (ShortGPT),
            ``"angular_run"`` the run of layers that together turn it least (Gromov et al.),
            ``"last"`` the top ones, ``"random"`` any.
        kernel: ``"linear"`` or ``"rbf"``.
        bandwidth: Width of the latter as a share of the median distance.
        positions: Positions to compare in a batch of validation, at least 4.
        refit: Whether layers that stay take over what the removed ones above them said, by least
            squares on stored inputs, before training goes on; in stacks of known Hugging Face
            models but GPT-2.
        refit_positions: Positions of inputs to store for that, over all ranks.
        stacks: Paths of the containers whose layers may go, such as ``"model.encoder.block"`` or
            ``"backbone.layer3"``; default: those of the Hugging Face models in the module.
        module: Path of the submodule to search for them; default: the whole module.
        cuts: Most attempts; default: 1, and with ``max_drop`` what fits, at most 4.
        first_epoch: Epoch that starts with the first cut, by Lightning's number
            (``trainer.current_epoch``, which counts from 0); at least 1, because a validation
            comes before it. Default: 1, and half-way for a single cut without ``max_drop``.
        last_epoch: Epoch of the last attempt, by the same number; default: half-way.
        max_drop: Largest loss of ``monitor``, in its own unit, that a cut may cost once it has
            recovered, against the best value of the models before it. None keeps every cut.
        monitor: Metric that ``max_drop`` watches, as validation logs it.
        mode: ``"max"`` if more of it is better, ``"min"`` if less is.
        seed: Seed of the draw of positions, and of ``"random"``.
        verbose: As for MutualInformationPruning.
        best_of: As for MutualInformationPruning.

    Raises:
        MisconfigurationException: If an option is outside its range, or two contradict each other.

    Example:
        >>> import lightning.pytorch as pl
        >>> callback = CKALayerPruning(max_drop=0.01, monitor="val_acc")
        >>> trainer = pl.Trainer(max_epochs=8, callbacks=[callback], logger=False)

    See Also:
        Hu et al., "MPruner", 2024 (arXiv 2408.13482). Beside MutualInformationPruning in
        one Trainer, layers go in the first half of the run and units in the second.
    """

    def __init__(
        self,
        threshold: float | None = 0.98,
        *,
        target_layers: int | None = None,
        criterion: LayerCriterion = "cka",
        kernel: Kernel = "linear",
        bandwidth: float = 1.0,
        positions: int = 256,
        refit: bool = True,
        refit_positions: int = 16384,
        stacks: list[str] | None = None,
        module: str | None = None,
        cuts: int | None = None,
        first_epoch: int | None = None,
        last_epoch: int | None = None,
        max_drop: float | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        seed: int = 0,
        verbose: bool = True,
        best_of: BestOf = "final_size",
    ) -> None:
        options = without_private(locals())
        check_types(module=module, verbose=verbose, refit=refit)
        check_counts(seed=seed, cuts=cuts, first_epoch=first_epoch, last_epoch=last_epoch)
        check_counts(positions=positions, least=4)
        check_counts(refit_positions=refit_positions, least=1)
        check_choices(kernel=kernel, best_of=best_of)
        between("bandwidth", bandwidth, 0, 100)
        check_order("linear", cuts, first_epoch, last_epoch)
        if stacks is not None and (isinstance(stacks, str) or not stacks or module):
            raise MisconfigurationException(
                f"stacks={stacks!r}, module={module!r}; expected one of the two, stacks as a list "
                "of paths such as ['model.encoder.layer']."
            )
        try:
            thinning = Thinning(threshold, target_layers, criterion, seed)
        except PruningError as error:
            raise MisconfigurationException(str(error)) from error
        super().__init__(
            thinning,
            kernel=kernel,
            bandwidth=bandwidth,
            positions=positions,
            calls=refit_positions if refit else 0,
            stacks=stacks,
            module=module or "",
            cuts=cuts,
            first_epoch=first_epoch,
            last_epoch=last_epoch,
            seed=seed,
            verbose=verbose,
            best_of=best_of,
            budget=accuracy_budget(max_drop, monitor, mode),
        )
        self._options = options
