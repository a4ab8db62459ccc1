"""The subcommands beside ``prune``: a small function each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_mi_prune.cli.config import Request
from lightning_mi_prune.cli.options import Command, Entry
from lightning_mi_prune.cli.printing import Shown
from lightning_mi_prune.core.errors import PruningError, counted, require
from lightning_mi_prune.reporting.tables import Table
from lightning_mi_prune.reporting.terminal import showing_in_terminal

__all__ = [
    "COMPARE",
    "CONVERT",
    "EXPORT",
    "INFO",
    "SMALLER",
    "compare",
    "convert",
    "export",
    "info",
    "smaller",
]

_FILES = (
    Entry("files of a LightningCLI", "--config", "FILE", "Its YAML; later ones override."),
    Entry(
        "files of a LightningCLI", "--model", "CLASS", "mypackage.MyModel, if no file names one."
    ),
    Entry("files of a LightningCLI", "--cli", "CLASS", "Your LightningCLI, for links, arguments."),
)

_CLASSES = (
    "Arguments of the classes: --model.NAME VALUE, --data.NAME VALUE. Defaults are in [brackets]."
)


def info(path: str, /) -> Shown:
    """Show what a folder, a checkpoint or a plan holds; nothing of it is built or run.

    Args:
        path: A Hugging Face folder, a checkpoint (.ckpt, .pt, .safetensors) or the JSON of a plan.
    """
    from lightning_mi_prune.export.contents import contents_of

    found = contents_of(path)
    facts = {
        "class": found.class_name,
        "parameters now": _whole(found.parameters),
        "parameters as built": _whole(found.parameters_built),
        "weights, MB": None if found.weight_bytes is None else f"{found.weight_bytes / 1e6:,.2f}",
        "plan": found.plan_digest,
        "rankings": None
        if found.plan_digest is None
        else f"of {counted(found.rankings, 'group')}"
        if found.rankings
        else "none",
        "transformers alone": None
        if found.class_name is None or found.what.startswith("checkpoint")
        else {True: "open it", False: "do not open it", None: "not known"}[found.plain],
    }
    rows = [(name, value) for name, value in facts.items() if value is not None]
    tables = [Table(f"{found.path}: {found.what}", ("", "is"), rows, ("", "is"))]
    if found.widths:
        columns = ("group", "kind", "units now", "as built")
        widths = [(w.name, w.kind, f"{w.now:,}", f"{w.built:,}") for w in found.widths]
        tables.append(Table("", columns, widths, columns[:2]))
    return Shown(found.to_dict(), tables, [found.opening])


def convert(
    request: Request,
    checkpoint: str,
    folder: str,
    /,
    *,
    code: bool = False,
    overwrite: bool = False,
    tokenizer: str | None = None,
) -> Shown:
    """Write the Hugging Face network of a checkpoint as a folder, pruned or not.

    Args:
        request: The command line.
        checkpoint: A checkpoint of a Trainer, or a state dict, of the module that the files name.
        folder: The folder to write.
        code: Add a modelling file for trust_remote_code, where the config does not describe it.
        overwrite: Replace a model that is there.
        tokenizer: Folder of a tokenizer or processor to save with it.
    """
    from lightning_mi_prune.checkpoint.loading import load_pruned
    from lightning_mi_prune.cli.building import build
    from lightning_mi_prune.cli.pruning import NAMES
    from lightning_mi_prune.export.contents import contents_of
    from lightning_mi_prune.export.saving import save_pretrained

    _check_file(checkpoint)
    processor = None if tokenizer is None else _processor(tokenizer)
    module = load_pruned(build(request, NAMES, checkpoint).model, checkpoint)
    target = save_pretrained(module, folder, processor=processor, code=code, overwrite=overwrite)
    found = contents_of(target)
    return Shown(found.to_dict(), lines=[f"The folder is {target}. {found.opening}"])


def compare(
    request: Request,
    dense: str,
    pruned: str,
    /,
    *,
    batch: Sequence[int] = (1, 32),
    length: Sequence[int] = (64,),
    batch_size: int = 32,
    evaluate: Literal["validate", "test", "none"] = "test",
    seconds: float = 2.0,
    device: str = "cpu",
    card: bool = False,
) -> Shown:
    """Measure two models side by side, in one run: size, MACs, latency, metric.

    Args:
        request: The command line.
        dense: A Hugging Face folder, or a checkpoint and the files of its LightningCLI.
        pruned: Another folder, or another checkpoint.
        batch: Examples in a call that is timed.
        length: Tokens of an example that is timed.
        batch_size: Rows of a batch of the metric on a data set.
        evaluate: Loop of the trainer that gives the metrics of checkpoints.
        seconds: Time for each model, batch size and length.
        device: Where folders are measured, as torch names it.
        card: Write what was measured into the model card of the pruned folder.
    """
    kinds = [_kind_of(path) for path in (dense, pruned)]
    if kinds[0] != kinds[1]:
        raise PruningError(
            f"{dense} is a {kinds[0]} and {pruned} a {kinds[1]}; expected two of one kind. Write "
            "the checkpoint as a folder first: convert CHECKPOINT FOLDER."
        )
    shapes: Any = {"batch": batch, "length": length, "seconds": seconds}
    if kinds[0] == "folder":
        _check_unused(request)
        found = _of_folders(
            dense, pruned, request.classes.get("data"), batch_size, device, card, shapes
        )
    else:
        if card:
            raise PruningError("Checkpoints have no card; expected folders with --card.")
        found = _of_checkpoints(request, dense, pruned, batch_size, evaluate, shapes)
    lines = [f"The card is {Path(pruned) / 'README.md'}."] if card else []
    paths = {"paths": {"dense": dense, "pruned": pruned}}
    return Shown(paths | found.to_dict(), [found.table()], lines)


def export(folder: str, file: str, /, *, opset: int = 18) -> Shown:
    """Write the model of a folder as an ONNX file of any batch size and length.

    Args:
        folder: A Hugging Face folder, pruned or not.
        file: The ONNX file to write.
        opset: The set of operators, 18 or later.
    """
    from lightning_mi_prune.discovery.example_inputs import example_inputs

    _check_folder(folder)
    network = _opened(folder)
    written = _written_onnx(network, file, dict(example_inputs(network)), opset)
    rows = [(f"input {name}", _sizes(shape)) for name, shape in written.inputs.items()]
    rows += [(f"output {name}", _sizes(shape)) for name, shape in written.outputs.items()]
    rows.append(("opset", str(written.opset)))
    rows.append(("size, MB", f"{written.size / 1e6:,.2f}"))
    if written.difference is not None:
        rows.append(("largest difference in ONNX Runtime", f"{written.difference:.1e}"))
    body = {
        "path": str(written.path),
        "opset": written.opset,
        "inputs": {name: list(shape) for name, shape in written.inputs.items()},
        "outputs": {name: list(shape) for name, shape in written.outputs.items()},
        "plan_digest": written.plan_digest,
        "bytes": written.size,
        "difference": written.difference,
    }
    return Shown(body, [Table(str(written.path), ("", "is"), rows, ("", "is"))])


def smaller(
    request: Request,
    folder: str,
    output: str,
    /,
    *,
    sparsity: Sequence[float] = (0.5, 0.75, 0.9),
    batch_size: int = 32,
    overwrite: bool = False,
) -> Shown:
    """Write smaller models of the one in a folder, a folder each, from one calibration.

    Args:
        request: The command line.
        folder: A Hugging Face folder, pruned or not.
        output: Folder for the results, NAME-75 for a sparsity of 0.75.
        sparsity: Shares of the prunable parameters to remove, against the model as built.
        batch_size: Rows of a batch of a data set.
        overwrite: Replace models that are there.
    """
    from lightning_mi_prune.export.contents import contents_of
    from lightning_mi_prune.export.sizes import smaller as written

    _check_folder(folder)
    _check_unused(request)
    data = request.classes.get("data")
    paths = list(
        written(folder, sparsity, output, data=data, overwrite=overwrite, batch_size=batch_size)
    )
    found = [contents_of(path) for path in paths]
    rows = [(str(one.path), f"{one.parameters:,}", _bytes(one.weight_bytes)) for one in found]
    table = Table(f"smaller models of {folder}", ("", "parameters", "weights, MB"), rows, ("",))
    return Shown({"folders": [one.to_dict() for one in found]}, [table])


def _bytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.2f}"


def _written_onnx(network: Any, file: str, example: Mapping[str, Any], opset: int) -> Any:
    from lightning_mi_prune.export.onnx import export_onnx

    return export_onnx(network, file, example, opset=opset)


def _sizes(shape: Sequence[int | str]) -> str:
    return " x ".join(map(str, shape))


def _whole(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _kind_of(path: str) -> str:
    if not Path(path).exists():
        raise PruningError(f"There is no {path!r}; expected a Hugging Face folder or a checkpoint.")
    return "folder" if Path(path).is_dir() else "checkpoint"


def _check_file(path: str) -> None:
    if not Path(path).is_file():
        raise PruningError(f"There is no file {path!r}; expected a checkpoint.")


def _check_folder(path: str) -> None:
    if not (Path(path) / "config.json").is_file():
        raise PruningError(
            f"{path!r} is no folder with a config.json; expected one of save_pretrained. A "
            "checkpoint becomes one by: convert CHECKPOINT FOLDER."
        )


def _check_unused(request: Request) -> None:
    """Refuse what folders do not need."""
    given = [*request.files, *(f"--{n}" for n in request.classes if n != "data")]
    given += [f"--{name}" for name, _ in request.others]
    if given:
        raise PruningError(
            f"{given[0]} is for checkpoints, and folders name their class themselves; leave it out."
        )


def _opened(folder: str, device: str = "cpu") -> Any:
    """The model of a folder, of the class of transformers that its config names.

    Raises:
        PruningError: If it cannot be opened.
    """
    from lightning_mi_prune.export.sizes import opened

    logging = require("transformers.utils.logging", "transformers")
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return opened(folder).to(device)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, PruningError):
            raise
        raise PruningError(
            f"{folder} cannot be opened on {device} ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}); expected the files of save_pretrained."
        ) from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _processor(folder: str) -> Any:
    transformers = require("transformers", "transformers")
    try:
        return transformers.AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError, ImportError) as error:
        raise PruningError(
            f"{folder} holds no tokenizer or processor ({' '.join(str(error).split())[:200]}); "
            "expected a folder that its save_pretrained wrote."
        ) from error


def _of_folders(
    dense: str,
    pruned: str,
    data: str | None,
    batch_size: int,
    device: str,
    card: bool,
    shapes: Any,
) -> Any:
    from lightning_mi_prune.calibration.datasets import batches_of
    from lightning_mi_prune.export.compare import compare_networks, compare_on
    from lightning_mi_prune.export.contents import contents_of
    from lightning_mi_prune.export.saving import rewrite_card

    for path in (dense, pruned):
        _check_folder(path)
    batches: Any = None
    if data is not None:
        batches = batches_of(data, batch_size=batch_size, splits=("test", "validation"))
    left, right = (_opened(path, device) for path in (dense, pruned))
    with showing_in_terminal():
        if batches is None:
            found = compare_networks(left, right, **shapes)
        else:
            found = compare_on(left, right, batches, data=str(data), rows=batches.rows, **shapes)
    sizes = [contents_of(path).weight_bytes for path in (dense, pruned)]
    if sizes[0] is not None and sizes[1] is not None:
        found = replace(found, weight_bytes=(sizes[0], sizes[1]))
    if card:
        rewrite_card(right, pruned, found.measured())
    return found


def _of_checkpoints(
    request: Request,
    dense: str,
    pruned: str,
    batch_size: int,
    loop: Literal["validate", "test", "none"],
    shapes: Any,
) -> Any:
    from lightning_mi_prune.cli.pruning import metrics_of
    from lightning_mi_prune.export import compare as measure

    (left, right), trainer, data = _modules(request, dense, pruned, batch_size)
    metrics, inside = [], []
    for module in (left, right):
        with measure.recorded_calls(module) as calls:
            metrics.append(metrics_of(trainer, module, data, loop))
        inside.append(measure.network_called(module, calls))
    found = measure.compare_sizes(left, right)
    if inside[0] is not None and inside[1] is not None:
        networks, calls_of = zip(*inside, strict=True)
        row = measure.first_row_of(calls_of[0]) if loop != "none" else None
        with showing_in_terminal():  # not while the trainer has bars
            run = measure.compare_networks(*networks, calls=calls_of, row=row, **shapes)
        found = replace(
            found, macs=run.macs, example=run.example, latency=run.latency, machine=run.machine
        )
    before, after = metrics
    name = type(left if data is None else data).__name__
    return replace(
        found,
        metrics={key: (before.get(key), value) for key, value in after.items()},
        data=f"{loop} of {name}" if after else "",
    )


def _modules(request: Request, dense: str, pruned: str, batch_size: int) -> Any:
    """Both modules with their weights, the trainer, and the data."""
    from lightning_mi_prune.calibration.datasets import batches_of
    from lightning_mi_prune.checkpoint.loading import load_pruned
    from lightning_mi_prune.cli.building import build
    from lightning_mi_prune.cli.pruning import NAMES, RowsModule

    built = [build(request, NAMES, dense), build(request, NAMES, pruned, quiet=True)]
    modules = [
        load_pruned(one.model, path) for one, path in zip(built, (dense, pruned), strict=True)
    ]
    data = built[0].data
    if isinstance(data, str):
        data = RowsModule(batches_of(data, batch_size=batch_size, splits=("test", "validation")))
    return modules, built[0].trainer, data


INFO = Command.of(info, "small.ckpt")
CONVERT = Command.of(
    convert,
    "small.ckpt small --config run.yaml --tokenizer dense",
    entries=_FILES,
    epilog=_CLASSES,
    builds=True,
)
COMPARE = Command.of(
    compare,
    "dense small --data test_rows --batch 1 32 --length 32 128",
    entries=(
        Entry(
            "data",
            "--data",
            "DATA",
            "Tokenized rows with labels: folder or name of a data set; its split test, else "
            "validation. For checkpoints also mypackage.MyData.",
        ),
        *_FILES,
    ),
    epilog=(
        "The metric of folders is the accuracy of classes, the perplexity of language models, else "
        f"the loss; that of checkpoints is what their own loop logs. {_CLASSES}"
    ),
    builds=True,
)
EXPORT = Command.of(export, "small small.onnx")
SMALLER = Command.of(
    smaller,
    "dense family --sparsity 0.5 0.75 0.9 --data rows",
    entries=(
        Entry(
            "data",
            "--data",
            "DATA",
            "Tokenized rows to calibrate on: folder or name of a data set. Default: the batches "
            "that save_pretrained(..., calibration=batches) stored in the folder.",
        ),
    ),
    builds=True,
)
