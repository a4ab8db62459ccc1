"""export_onnx: what ONNX Runtime computes, at sizes the file was not made for; what is refused."""

import copy
import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

import lightning_mi_prune
from lightning_mi_prune import PruningError, PruningWarning, prune
from lightning_mi_prune.export import onnx as exporting
from lightning_mi_prune.export.dynamic_shapes import default_axes
from lightning_mi_prune.export.onnx import METADATA, OPSET, TOLERANCE, OnnxFile, export_onnx
from tests.support.exports import FAMILIES, cut, logits
from tests.support.models import batch

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

# Seconds each, so `make exports` runs the others.
FAST = ("bert", "vit", "llama", "cnn")
EVERY = [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]


def session(path: Path) -> "onnxruntime.InferenceSession":
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def run(path: Path, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a file in ONNX Runtime."""
    opened = session(path)
    names = [value.name for value in opened.get_outputs()]
    found = opened.run(names, {name: x.numpy() for name, x in inputs.items()})
    return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}


def metadata(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


def state_of(model: nn.Module) -> list[object]:
    """All of a model, and of the process, that an export must leave alone."""
    parts = [
        (name, part.training, len(part._forward_hooks)) for name, part in model.named_modules()
    ]
    tensors = [(n, id(p), p.clone(), p.grad) for n, p in model.named_parameters()]
    buffers = [(n, id(b), b.clone()) for n, b in model.named_buffers()]
    draws = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    return [parts, tensors, buffers, draws, [*vars(model)]]


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("family", EVERY)
def test_a_cut_model_runs_as_onnx_at_another_size(family: str, tmp_path: Path) -> None:
    _, model, inputs, _ = cut(family)
    file = export_onnx(model, tmp_path / "cut.onnx", inputs)
    assert set(file.inputs) == set(inputs)
    assert all(sizes[0] == "batch" for sizes in (*file.inputs.values(), *file.outputs.values()))
    other = {name: x[[2, 0, 1, 3, 0, 1, 2]] for name, x in inputs.items()}  # none of those checked
    if "input_ids" in inputs:
        assert file.inputs["input_ids"] == ("batch", "length")
        other = {name: x[:, :9] for name, x in other.items()}
    found, expected = run(file.path, other), logits(model, other)
    assert (next(iter(found.values())) - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert file.difference is not None
    assert file.difference <= TOLERANCE
    assert file.size == file.path.stat().st_size
    # Rounded to int8 by ONNX Runtime, which has its own rules about the graphs it takes.
    quantization = pytest.importorskip("onnxruntime.quantization")
    quantization.quantize_dynamic(file.path, tmp_path / "int8.onnx", reduce_range=True)
    rounded = next(iter(run(tmp_path / "int8.onnx", other).values()))
    assert (rounded - expected).norm() <= 0.1 * expected.norm()


def test_the_length_may_grow_to_what_the_model_takes(tmp_path: Path) -> None:
    _, model, _, _ = cut("distilbert")
    file = export_onnx(model, tmp_path / "net.onnx", batch(3, 6), opset=20)
    assert (file.opset, file.largest) == (20, {"batch": None, "length": 40})
    longest = batch(2, 40)
    found = run(file.path, longest)["logits"]
    assert torch.allclose(found, logits(model, longest), rtol=0, atol=1e-4)


class Net(nn.Module):
    """A convolution with a norm, whose statistics move while it trains."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(3, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, object]:
        hidden = self.drop(self.norm(self.conv(x)).relu())
        return {"logits": scale * self.head(hidden.mean(-1)), "states": (x, hidden), "none": None}


X = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


def test_the_file_says_what_it_is_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    model = Net().train()
    model(X)["logits"].sum().backward()
    before = state_of(model)
    shapes = {"x": {0: "batch", 2: "time"}}
    example = {"x": X, "scale": 3.0}
    file = export_onnx(model, tmp_path / "new" / "net.onnx", example, dynamic_shapes=shapes)
    assert same(before, state_of(model))
    assert file.inputs == {"x": ("batch", 3, "time")}
    assert file.outputs == {
        "logits": ("batch", 2),
        "states.0": ("batch", 3, "time"),
        "states.1": ("batch", 4, "time"),
    }
    assert file.plan_digest is None
    assert {"batch": 4, "time": 8} in file.checked
    assert len({tuple(sizes.items()) for sizes in file.checked}) == 3
    with torch.no_grad():
        expected = model.eval()(X[:3, :, :5], 3.0)["logits"]
    assert torch.allclose(run(file.path, {"x": X[:3, :, :5]})["logits"], expected, atol=1e-5)
    assert metadata(file.path) == {
        f"{METADATA}version": lightning_mi_prune.__version__,
        f"{METADATA}class": "Net",
        f"{METADATA}opset": str(OPSET),
        f"{METADATA}dynamic": '{"batch": null, "time": null}',
    }
    graph = onnx.load(file.path)
    assert graph.opset_import[0].version == OPSET
    assert {"conv.weight", "head.weight"} <= {each.name for each in graph.graph.initializer}
    assert str(Path(__file__).parent).encode() not in file.path.read_bytes()
    assert [path.name for path in file.path.parent.iterdir()] == ["net.onnx"]


class Learner(pl.LightningModule):
    """Its network is what is exported, unless it has a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.loss_of, self.seen = nn.Linear(3, 2), nn.MSELoss(), MeanMetric()

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.loss_of(self.network(batch), batch[:, :2])


class Called(Learner):
    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).softmax(-1)


def test_a_lightning_module_is_its_network_or_its_own_forward(tmp_path: Path) -> None:
    x = torch.randn(3, 3)
    for module, expected in ((Learner(), lambda m: m.network(x)), (Called(), lambda m: m(x))):
        file = export_onnx(module, tmp_path / "net.onnx", (x,))
        (found,) = run(file.path, {next(iter(file.inputs)): x}).values()
        assert torch.allclose(found, expected(module).detach(), atol=1e-6)
    module = Learner()
    module.teacher = nn.Linear(3, 2)
    with pytest.raises(PruningError, match="no forward of its own and the networks network, teach"):
        export_onnx(module, tmp_path / "two.onnx", x)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")  # tiny data
def test_the_digest_is_that_of_the_plan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    rows = [(torch.randn(64, 3),) for _ in range(4)]
    result = prune(model, rows, sparsity=0.5, loss=lambda m, b: m(*b).square().mean())
    file = export_onnx(model, tmp_path / "net.onnx", rows[0])
    assert file.plan_digest == result.plan.digest()
    assert metadata(file.path)[f"{METADATA}plan_digest"] == result.plan.digest()
    other = copy.deepcopy(model)
    for tracked in (nn.Sequential(other), other):  # inside another module, and given by hand
        given = cut("vit").plan if tracked is other else None
        wanted = given or result.plan  # as named from the network, wherever that is
        assert exporting._digest_of(tracked, given) == wanted.digest()


def test_large_weights_are_put_beside_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_ONE_FILE", 1000)
    network, path = nn.Linear(400, 3), tmp_path / "net.onnx"
    x = torch.randn(2, 400)
    file = export_onnx(network, path, x)
    weights = tmp_path / "net.onnx.data"
    assert {path, weights} == set(tmp_path.iterdir())
    assert file.size == path.stat().st_size + weights.stat().st_size
    assert weights.stat().st_size >= 4 * 1200
    assert torch.allclose(run(path, {"input": x})["output"], network(x).detach(), atol=1e-5)


# ---------------------------------------------------------------------------------- what is refused


class Loop(nn.Module):
    """A network that runs a loop over its positions, of which an export keeps the number."""

    def forward(self, ids: Tensor) -> Tensor:
        return sum(ids[:, i] * i for i in range(ids.shape[1]))


class Counted(nn.Module):
    """A network that makes numbers of both sizes."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids / (int(ids.shape[0]) * int(ids.shape[1]))


class Noise(nn.Module):
    """A network whose outputs are never the same."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class Rows(nn.Module):
    """A network for four rows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, 24)


class Stateful(nn.Module):
    """A network that returns no tensors only."""

    def forward(self, x: Tensor) -> dict[str, object]:
        return {"past_key_values": object(), "x": x}


IDS = torch.ones(4, 6).long()
REFUSED: dict[str, tuple[Callable[[], nn.Module], object, dict[str, object], str]] = {
    "specialised": (
        Loop,
        {"ids": IDS},
        {},
        r"Dimensions cannot be dynamic \('length', dimension 1 of 'ids'\): Loop computes with",
    ),
    "both": (Counted, {"ids": IDS}, {}, r"\('batch', dimension 0 of 'ids'; 'length', dimension 1 "),
    "rows": (Rows, X, {}, r"Rows does not run at other sizes .* batch 1: RuntimeError"),
    "random": (Noise, X, {}, r"output 'output' differs by .* expected at most 1e-04"),
    "cache": (Stateful, X, {}, r"The output 'past_key_values' is a object.*use_cache=False"),
    "half": (lambda: nn.Linear(8, 2).half(), X, {}, r"'weight' is in torch.float16.*\.float\(\)"),
    "call": (Net, {"y": X}, {}, r"Net cannot be called with the example, y \(TypeError"),
    "example": (Net, 3, {}, "The example is 3; expected a mapping of arguments, a tuple"),
    "nested": (Net, {"x": [X]}, {}, "'x' of the example holds tensors in a list"),
    "empty": (Net, {}, {}, "The example holds no tensor"),
    "many": (Net, (X, X, X), {}, r"has 3 values, but Net\.forward takes \(x, scale\)"),
    "input": (
        Net,
        X,
        {"dynamic_shapes": {"y": {0: "b"}}},
        "names the input 'y'; expected one of x",
    ),
    "dim": (Net, X, {"dynamic_shapes": {"x": {3: "b"}}}, "dimension 3 of 'x'; expected 0 to 2"),
    "name": (Net, X, {"dynamic_shapes": {"x": {0: "a b"}}}, "'a b'; expected a name of letters"),
    "sizes": (Net, X, {"dynamic_shapes": {"x": {0: "a", 2: "a"}}}, "'a' has size 8 in dimension 2"),
    "form": (Net, X, {"dynamic_shapes": ["x"]}, "dynamic_shapes is a list of 1; expected names of"),
    "opset": (Net, X, {"opset": 7}, "opset is 7; expected a whole number of 18 or more"),
    "model": (lambda: 3, X, {}, "The model is 3; expected a torch.nn.Module"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    build, example, options, message = REFUSED[name]
    old = tmp_path / "old.onnx"
    old.write_bytes(b"as it was")
    with pytest.raises(PruningError, match=message):
        export_onnx(build(), old, example, **options)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [
        ("old.onnx", b"as it was")
    ]


def test_a_path_that_cannot_be_written_to_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(PruningError, match=r"cannot be written to .*\(it is a folder\)"):
        export_onnx(Net(), tmp_path, X)


def test_without_its_packages_an_export_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    with pytest.warns(PruningWarning, match=r"not compared .* 'lightning-mi-prune\[onnx\]'"):
        file = export_onnx(nn.Linear(8, 2), tmp_path / "net.onnx", X)
    assert isinstance(file, OnnxFile)
    assert (file.difference, file.checked) == (None, ())
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(PruningError, match=r"'onnxscript'.*'lightning-mi-prune\[onnx\]'"):
        export_onnx(nn.Linear(8, 2), tmp_path / "none.onnx", X)


def test_tokens_have_a_length_and_pictures_have_none() -> None:
    ids, rows = torch.ones(2, 5).long(), {0: "batch"}
    both = {0: "batch", 1: "length"}
    found = default_axes(
        {
            "input_ids": ids,
            "attention_mask": ids.bool(),
            "bbox": torch.ones(2, 5, 4).long(),
            "decoder_input_ids": ids,
            "inputs_embeds": torch.ones(2, 5, 8),
            "pixel_values": torch.ones(2, 5, 8),
            "labels": torch.ones(2).long(),
            "prompt": torch.ones(2, 3).long(),
            "table": torch.ones(7, 5),
            "number": torch.tensor(2),
        }
    )
    assert found == {
        "input_ids": both,
        "attention_mask": both,
        "bbox": both,
        "decoder_input_ids": {0: "batch", 1: "decoder_length"},
        "inputs_embeds": both,
        "pixel_values": rows,
        "labels": rows,
        "prompt": {0: "batch", 1: "prompt_length"},
        "table": {},
        "number": {},
    }


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, -torch.inf], [1.0, -torch.inf], 0.0),
        ([1.0, -3e38], [1.0, -3e38], 0.0),
        ([1.0, 3e38], [1.0, -3e38], torch.inf),
        ([1.5, -3e38], [2.0, -3e38], 0.25),  # the large value is no scale
        ([torch.nan, 1.0], [torch.nan, 1.0], 0.0),
        ([torch.nan, 1.0], [0.0, 1.0], torch.inf),
        ([0.0, 0.0], [0.0, 0.0], 0.0),
        ([0.0, 1e-9], [0.0, 0.0], torch.inf),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_to_plain_values(
    found: list[float], expected: list[float], difference: float
) -> None:
    measured = exporting._relative_difference(torch.tensor(found), torch.tensor(expected))
    assert measured == difference
