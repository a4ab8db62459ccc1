"""The benchmarks by name, their options, and the smallest settings to try them with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import (
    ablations,
    costs,
    decoders,
    deploy,
    latency,
    layer_choice,
    layers,
    memory,
    photographs,
    recovery,
    scaling,
    vision,
)
from benchmarks.methods import SETTINGS
from benchmarks.records import Job, Store, key_of
from benchmarks.tasks import QUICK, RECIPES
from benchmarks.zoo.measuring import zoo

__all__ = ["CASES", "OPTIONS", "missing_jobs"]


@dataclass(frozen=True)
class Case:
    """A benchmark.

    Args:
        name: Its name, and that of its file of records.
        jobs: What is to be measured; its arguments are the options of the case.
        quick: Options to see that it runs.
        writes: The file of records, where it shares that of another case.
    """

    name: str
    jobs: Callable[..., Iterator[Job]]
    quick: Mapping[str, Any]
    writes: str = ""

    @property
    def file(self) -> str:
        """The name of the file of its records."""
        return self.writes or self.name

    @property
    def question(self) -> str:
        """What it measures, in a line."""
        return (inspect.getdoc(self.jobs) or "").splitlines()[0]

    @property
    def options(self) -> set[str]:
        """Names of the options that it takes."""
        return {*inspect.signature(self.jobs).parameters} & OPTIONS.keys()


ONE: dict[str, Any] = {"tasks": [QUICK], "seeds": [0]}
HALF: dict[str, Any] = ONE | {"sparsities": [0.5]}
FAST: dict[str, Any] = {"seconds": 0.02, "rounds": 1}
TINY: dict[str, Any] = {"shapes": ["tiny"], "repeats": 1}
BASELINES = ["relevance-mi", "taylor", "movement-units"]
SMALL: dict[str, Any] = {"models": ["smollm2-135m"], "units": ["ffn"], "methods": ["flap"]}
PAIR = ["default", "MACs"]
PICTURES: dict[str, Any] = {"models": ["resnet"], "seeds": [0]}
ENTRIES = (*recovery.ENTRIES, *vision.WAYS, *decoders.WAYS, *decoders.TRAINED)
METHODS = [*dict.fromkeys(entry.method for entry in ENTRIES)]
CASES = {
    case.name: case
    for case in (
        Case("recovery", recovery.recovery, HALF | {"methods": BASELINES, "steps": [0, 2]}),
        Case("one-shot", recovery.one_shot, HALF | {"methods": ["mi-topk"]}, writes="recovery"),
        Case("described", recovery.described, {"tasks": ["trec-6"], "seeds": [0], "steps": [0]}),
        Case("distillation", recovery.distillation, HALF | {"steps": [2]}),
        Case("ablations", ablations.ablations, HALF | {"settings": PAIR}),
        Case("latency", latency.latency, ONE | FAST),
        Case("lengths", latency.lengths, {"tasks": [QUICK], "sparsities": [0.5]} | FAST),
        Case("deploy", deploy.deploy, {"tiny": True} | FAST),
        Case("opening", deploy.opening, {"tiny": True, "rounds": 2}),
        Case("layers", layers.layers, ONE | {"variants": 2}),
        Case("layers-one-shot", layers.layers_one_shot, ONE | {"layers": [4]}),
        Case("layer-choice", layer_choice.layer_choice, {"models": [QUICK], "layers": [5]}),
        Case("layers-speed", layers.layers_speed, FAST),
        Case("costs", costs.costs, TINY),
        Case("one-cut", costs.one_cut, TINY),
        Case("memory", memory.memory, {"tiny": True}),
        Case("scaling", scaling.scaling, {"repeats": 1, "tiny": True}),
        Case("demo", costs.demo, {"seeds": [0], "cuts": [1]}),
        Case("vision", vision.vision, PICTURES | {"sparsities": [0.5], "methods": ["taylor"]}),
        Case("vision-layers", vision.vision_layers, PICTURES),
        Case("vision-latency", vision.vision_latency, {"models": ["resnet"]} | FAST),
        Case("mobilenet", photographs.mobilenet, {"seeds": [0], "sparsities": [0.1]}),
        Case("decoders", decoders.decoders, SMALL | {"sparsities": [0.25]}),
        Case(
            "decoders-trained",
            decoders.decoders_trained,
            SMALL | {"steps": [4], "methods": ["relevance-mi"]},
        ),
        Case("zoo", zoo, {"models": ["bert", "cnn-flatten"]}),
    )
}
OPTIONS: dict[str, dict[str, Any]] = {
    "tasks": {"nargs": "+", "choices": [*RECIPES]},
    "seeds": {"nargs": "+", "type": int},
    "sparsities": {"nargs": "+", "type": float},
    "methods": {"nargs": "+", "choices": METHODS},
    "settings": {"nargs": "+", "choices": [setting.name for setting in SETTINGS]},
    "steps": {"nargs": "+", "type": int},
    "lengths": {"nargs": "+", "type": int},
    "cuts": {"nargs": "+", "type": int},
    "models": {"nargs": "+"},
    "units": {"nargs": "+", "choices": ["ffn", "ffn+heads"]},
    "libraries": {"nargs": "+", "choices": ["torch", "transformers", "torchvision", "timm"]},
    "layers": {"nargs": "+", "type": int},
    "criteria": {"nargs": "+", "choices": layer_choice.CRITERIA},
    "compensations": {"nargs": "+", "choices": decoders.COMPENSATIONS},
    "shapes": {"nargs": "+", "choices": [*costs.SHAPES]},
    "variants": {"type": int},
    "repeats": {"type": int},
    "rounds": {"type": int},
    "seconds": {"type": float},
    "compiled": {"action": "store_true", "default": None},
    "tiny": {"action": "store_true", "default": None},
}
"""All options of the cases, as the command line takes them."""


def missing_jobs(
    case: Case, given: Mapping[str, Any], folder: Path, *, quick: bool
) -> Iterator[Job]:
    """The jobs of a case that have no record yet."""
    options = dict(case.quick) if quick else {}
    options |= {name: value for name, value in given.items() if name in case.options}
    if "folder" in inspect.signature(case.jobs).parameters:
        options["folder"] = folder
    store, named = Store(case.file, folder), set[str]()
    for job in case.jobs(**options):
        keys = {key_of(setting, job.seed) for setting in job.settings}
        if not keys <= named and not all(store.has(s, job.seed) for s in job.settings):
            named |= keys  # several records of `recovery` may have one shape
            yield job
