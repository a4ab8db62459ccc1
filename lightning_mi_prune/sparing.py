"""THIN     which layers of a stack go, by one of five criteria (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from lightning_mi_prune.errors import PruningError
from lightning_mi_prune.redundancy import Cluster, cheapest, clusters_of, redundant
from lightning_mi_prune.rivals import closest_run, last_layers, least_turning, random_layers
from lightning_mi_prune.untrusted import listed, mapping, number, text, whole

__all__ = ["Compared", "LayerCriterion", "StackCut", "Thinning", "nearest"]

LayerCriterion = Literal["cka", "angle", "angular_run", "last", "random"]
"""``"cka"``: clusters of alike layers (MPruner); ``"angle"``: the layers that turn their input
least (ShortGPT); ``"angular_run"``: the run of layers that together turn it least (Gromov et al.);
``"last"``: the top ones; ``"random"``: any."""

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Compared:
    """How alike the layers of a stack were in one validation run.

    Args:
        layers: The layers, as numbered when built, bottom to top.
        similarity: CKA of every pair ``(L, L)``.
        angles: Mean angle between every pair of states ``(L + 1, L + 1)``, the input first.
        fixed: Layers at the bottom that must stay: others use what they hold, or their output
            has another shape than their input.
    """

    layers: tuple[int, ...]
    similarity: Matrix
    angles: Matrix
    fixed: int = 0


@dataclass(frozen=True)
class StackCut:
    """What was decided about one stack, all layers as numbered when the model was built.

    Args:
        name: Path of the stack.
        before: Layers before.
        after: Layers that stay.
        similarity: CKA of every pair of layers before.
        clusters: Runs of alike layers; every layer by itself where clusters decide nothing.
        criterion: What decided.
        threshold: Least likeness to the first of its cluster that a layer has (``"cka"``).
        every: Of each cluster every so manieth layer goes, never the first.
    """

    name: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    similarity: Matrix
    clusters: tuple[Cluster, ...]
    criterion: str
    threshold: float
    every: int = 1

    @property
    def removed(self) -> tuple[int, ...]:
        """Layers that go."""
        return tuple(layer for layer in self.before if layer not in self.after)

    @classmethod
    def read(cls, state: object) -> StackCut:
        """What :func:`dataclasses.asdict` made, also through a checkpoint or JSON.

        Raises:
            TypeError: If a part is of another type.
            ValueError: If it is no such cut.
        """
        found = mapping(state, [f.name for f in fields(cls)])
        before = _layers(found["before"])
        after = _layers(found["after"])
        clusters = tuple(_layers(cluster) for cluster in listed(found["clusters"]))
        if not before or len(set(before)) < len(before) or not set(after) <= set(before):
            raise ValueError(f"{len(after)} layers stay of {len(before)}, or one occurs twice")
        if not all(cluster and set(cluster) <= set(before) for cluster in clusters):
            raise ValueError("a cluster is empty or holds a layer that was not there")
        rows = listed(found["similarity"], len(before))
        return cls(
            name=text(found["name"]),
            before=before,
            after=after,
            similarity=tuple(tuple(map(number, listed(row, len(before)))) for row in rows),
            clusters=clusters,
            criterion=text(found["criterion"]),
            threshold=number(found["threshold"]),
            every=whole(found["every"], low=1),
        )


def _layers(value: object) -> tuple[int, ...]:
    return tuple(whole(layer) for layer in listed(value))


@dataclass(frozen=True)
class Thinning:
    """How the layers that go are chosen.

    Args:
        threshold: Least CKA with the first layer of a cluster, above 0 and up to 1; None takes
            the clusters that lose least on the way to ``target`` (:func:`redundancy.cheapest`).
        target: Fewest layers that stay in every stack; None leaves it to the threshold.
        criterion: What decides (:data:`LayerCriterion`).
        seed: Seed of ``"random"``.

    Raises:
        PruningError: If an option is out of range, or the criterion needs a target.

    Example:
        >>> alike = ((1.0, 0.99, 0.9), (0.99, 1.0, 0.97), (0.9, 0.97, 1.0))
        >>> turned = ((0.0,) * 4,) * 4
        >>> Thinning().choose("layers", Compared((0, 1, 2), alike, turned)).removed
        (1,)
        >>> Thinning(None, target=1).choose("layers", Compared((0, 1, 2), alike, turned)).removed
        (1, 2)
    """

    threshold: float | None = 0.98
    target: int | None = None
    criterion: LayerCriterion = "cka"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in get_args(LayerCriterion):
            raise PruningError(
                f"criterion={self.criterion!r}; expected one of {get_args(LayerCriterion)}."
            )
        if self.threshold is not None:
            clusters_of(((1.0,),), self.threshold)
        target = self.target
        if target is not None and (
            isinstance(target, bool) or not isinstance(target, int) or target < 1
        ):
            raise PruningError(f"target_layers={target!r}; expected a whole number from 1.")
        if target is None and (self.threshold is None or self.criterion != "cka"):
            asked = f"criterion={self.criterion!r}, threshold={self.threshold}"
            raise PruningError(
                f"{asked} says nothing of how many layers go; expected target_layers too."
            )

    def choose(
        self,
        name: str,
        compared: Compared,
        *,
        every: int = 1,
        progress: float = 1.0,
        built: int = 0,
    ) -> StackCut:
        """Which layers of a stack go now.

        Args:
            name: Path of the stack.
            compared: How alike its layers are.
            every: Of each cluster every so manieth layer goes (``"cka"``).
            progress: Share of the way from the stack as built to the target.
            built: Layers as built; default: those that were compared.
        """
        count, size = len(compared.layers), built or len(compared.layers)
        most = count
        if self.target is not None:
            left = size - round(max(0, size - self.target) * progress)
            most = max(0, count - max(left, compared.fixed, 1))
        clusters: list[Cluster] = [(place,) for place in range(count)]
        threshold = self.threshold or 0.0
        if self.criterion == "cka":
            if self.threshold is not None:
                clusters = clusters_of(compared.similarity, self.threshold)
            elif most:
                clusters = cheapest(compared.similarity, most, compared.fixed)
                heads = {place: cluster[0] for cluster in clusters for place in cluster}
                threshold = min(compared.similarity[heads[place]][place] for place in heads)
            gone = _closest(clusters, redundant(clusters, every), compared, most)
        else:
            gone = set(self._rival(compared, most))
        places = compared.layers
        return StackCut(
            name=name,
            before=places,
            after=tuple(layer for place, layer in enumerate(places) if place not in gone),
            similarity=compared.similarity,
            clusters=tuple(tuple(places[place] for place in cluster) for cluster in clusters),
            criterion=self.criterion,
            threshold=threshold,
            every=every,
        )

    def _rival(self, compared: Compared, count: int) -> Sequence[int]:
        """Places of ``count`` layers, none of the fixed ones."""
        fixed = compared.fixed
        angles = [row[fixed:] for row in compared.angles[fixed:]]
        layers = len(compared.layers) - fixed
        if count >= layers:  # all that are free
            return range(fixed, fixed + layers)
        if self.criterion == "angle":
            found = least_turning(angles, count)
        elif self.criterion == "angular_run":
            found = closest_run(angles, count)
        elif self.criterion == "last":
            found = last_layers(layers, count)
        else:
            found = random_layers(layers, count, self.seed)
        return [place + fixed for place in found]


def nearest(compared: Compared) -> float:
    """CKA of the two neighbours that are most alike."""
    rows = enumerate(compared.similarity[:-1])
    return max((row[place + 1] for place, row in rows), default=0.0)


def _closest(
    clusters: Sequence[Cluster], gone: Sequence[int], compared: Compared, most: int
) -> set[int]:
    """At most so many of the layers that may go: those most alike to the first of their cluster."""
    first = {place: cluster[0] for cluster in clusters for place in cluster}
    free = [place for place in gone if place >= compared.fixed]
    free.sort(key=lambda place: (-compared.similarity[first[place]][place], place))
    return set(free[:most])
