"""A pruned checkpoint opens with one call, and errors name the reason."""

from __future__ import annotations

import copy
import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from safetensors.torch import save_file
from torch import nn
from torch.nn.modules import module as torch_module
from transformers import AutoModelForSequenceClassification

from lightning_mi_prune import PruningError, from_pretrained, load_pruned
from lightning_mi_prune.checkpoint.state_dict import PlanTracker
from lightning_mi_prune.checkpoint.validation import PLAN_KEY, is_plan
from lightning_mi_prune.core.empty_linear import modules_of, parameters_of
from lightning_mi_prune.core.plan import PruningPlan
from lightning_mi_prune.surgery.units import apply_plan
from tests.support.boring import Classifier, trainer
from tests.support.graphs import graph_of
from tests.support.models import batch, build, outputs, random_plan
from tests.support.runs import Module, fit


class WithOptions(Classifier):
    """Its checkpoints hold what it was built with; another family would not fit."""

    def __init__(self, name: str, *, width: int = 3) -> None:
        super().__init__(family=name)
        self.save_hyperparameters()
        self.extra = nn.Linear(width, 1)


class Late(Classifier):
    """Makes its layers where Lightning asks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = build()


class WithTeacher(Classifier):
    """Holds another module of its own class, and keeps the version of what it loads."""

    def __init__(self, teacher: bool = True) -> None:
        super().__init__()
        self.teacher = WithTeacher(teacher=False) if teacher else None
        self.seen = None

    def on_load_checkpoint(self, checkpoint):
        self.seen = checkpoint["pytorch-lightning_version"]


class Anything:
    """A class that torch does not allow."""

    def __eq__(self, other):
        return isinstance(other, Anything)

    __hash__ = None


class WithAnything(Classifier):
    def __init__(self, thing=None) -> None:
        super().__init__()
        self.save_hyperparameters()


class Runs:
    def __reduce__(self):
        return os.system, ("true",)


class Takes(WithOptions):
    """Passes its options on, as LightningModule itself does."""

    def __init__(self, name: str = "bert", **options: object) -> None:
        super().__init__(name, **options)


class Registered(Classifier):
    """Keeps a list of its modules and one of the classes that inherit from it."""

    made: ClassVar[list[Registered]] = []
    classes: ClassVar[list[type]] = []

    def __init_subclass__(cls, **_: object) -> None:
        Registered.classes.append(cls)

    def __init__(self) -> None:
        super().__init__()
        assert type(self) is Registered
        self.again = []
        Registered.made.append(self)

    def configure_model(self) -> None:
        self.again.append("configure_model")


CLASSES = {
    Classifier: Classifier,
    WithOptions: lambda: WithOptions("distilbert", width=5),
    Late: Late,
    WithTeacher: WithTeacher,
}
EVERY = pytest.mark.parametrize("cls", CLASSES)


def tracked(module):
    """The tracker of a module that learned what it can lose, as after a first batch."""
    tracker = PlanTracker.of(module)
    tracker.adopt(graph_of(module))
    return tracker


def pruned(module):
    """A cut module with its plan, as after a run with the callback."""
    module.configure_model()
    cut(module, tracked(module))
    return module


def cut(module, tracker, share=0.5, *, seed=0, empty=False):
    plan = tracker.plan.joined(random_plan(tracker.groups, share, seed=seed))
    if empty:
        gone = {group.name: () for group in tracker.groups if group.may_be_empty}
        plan = PruningPlan(plan.sizes, {**plan.kept, **gone})
    apply_plan(module, tracker.groups, plan)
    tracker.plan = plan


def save(module, path, *, weights_only=True):
    run = trainer()
    run.strategy.connect(module)
    run.save_checkpoint(path, weights_only=weights_only)
    return path


def same(module, other):
    assert module.state_dict().keys() == other.state_dict().keys()
    return torch.equal(outputs(module.model, batch()), outputs(other.model, batch()))


def quiet_cli(cls, words, **options):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return LightningCLI(
        cls,
        run=False,
        args=words,
        save_config_callback=None,
        seed_everything_default=False,
        trainer_defaults=quiet,
        **options,
    )


@pytest.fixture(autouse=True)
def _no_hook_stays():
    yield
    assert not torch_module._global_module_registration_hooks


@EVERY
def test_a_class(cls, tmp_path):
    module = pruned(CLASSES[cls]())
    again = load_pruned(cls, save(module, tmp_path / "a.ckpt"))
    assert type(again) is cls
    assert same(again, module)
    assert again.hparams == module.hparams
    assert PlanTracker.held_by(again).plan == PlanTracker.held_by(module).plan
    assert same(load_pruned(cls, save(again, str(tmp_path / "b.ckpt"))), module)


@EVERY
def test_a_module(cls, tmp_path):
    module = pruned(CLASSES[cls]())
    for path in (save(module, tmp_path / "a.ckpt"), tmp_path / "a.pt"):
        if path.suffix == ".pt":
            torch.save(module.state_dict(), path)
        fresh = CLASSES[cls]()
        assert load_pruned(fresh, path, map_location="cpu") is fresh
        assert same(fresh, module)
        assert load_pruned(fresh, path) is fresh  # a second time changes nothing
        assert same(fresh, module)


@EVERY
def test_an_uncut_module(cls, tmp_path):
    module = CLASSES[cls]()
    module.configure_model()
    path = save(module, tmp_path / "a.ckpt")
    assert same(load_pruned(cls, path), module)
    assert same(load_pruned(CLASSES[cls](), path), module)
    assert same(load_pruned(load_pruned(pruned(CLASSES[cls]()), path), path), module)


def test_a_checkpoint_of_a_run_and_its_weights_only(tmp_path):
    module, run = pruned(WithOptions("bert")), trainer(max_epochs=1)
    run.fit(module)
    for weights_only in (False, True):
        path = tmp_path / f"{weights_only}.ckpt"
        run.save_checkpoint(path, weights_only=weights_only)
        assert same(load_pruned(WithOptions, path), module)
        assert same(load_pruned(WithOptions("bert"), path), module)


def test_modules_without_lightning(tmp_path):
    net = pruned(Classifier()).model
    root = nn.ModuleDict({"model": net})
    tracker = PlanTracker.of(root)
    tracker.plan = tracker.plan
    torch.save(root.state_dict(), tmp_path / "a.pt")
    again = load_pruned(nn.ModuleDict({"model": build()}), tmp_path / "a.pt")
    assert torch.equal(outputs(again["model"], batch()), outputs(net, batch()))
    linear = nn.Linear(2, 1)
    torch.save(linear.state_dict(), tmp_path / "b.pt")
    assert torch.equal(load_pruned(nn.Linear(2, 1), tmp_path / "b.pt").weight, linear.weight)


@pytest.mark.parametrize("subclass", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_of_the_command_line(subclass, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py"])
    words = ["--model.name=distilbert", "--model.width=7"]
    if subclass:
        path = f"{WithOptions.__module__}.{WithOptions.__qualname__}"
        words = [f"--model={path}", *(w.replace("model.", "model.init_args.") for w in words)]
    cli = quiet_cli(Classifier if subclass else WithOptions, words, subclass_mode_model=subclass)
    module = pruned(cli.model)
    path = save(module, tmp_path / "a.ckpt")
    assert "_instantiator" in torch.load(path, weights_only=True)["hyper_parameters"]
    again = load_pruned(WithOptions, path)
    assert type(again) is WithOptions
    assert again.extra.in_features == 7
    assert same(again, module)


@pytest.mark.parametrize("named", [WithOptions, Takes])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_class_that_the_command_line_was_given(named, tmp_path, monkeypatch):
    """Opened by its base class: Lightning builds the class that the checkpoint names."""
    monkeypatch.setattr("sys.argv", ["train.py"])
    words = [
        f"--model={named.__module__}.{named.__qualname__}",
        "--model.init_args.name=distilbert",
    ]
    words += ["--model.init_args.width=7"] if named is WithOptions else []
    cli = quiet_cli(pl.LightningModule, words, subclass_mode_model=True)
    path = save(pruned(cli.model), tmp_path / "a.ckpt")
    assert "_class_path" in torch.load(path, weights_only=True)["hyper_parameters"]
    for cls in (pl.LightningModule, named):
        again = load_pruned(cls, path)
        assert type(again) is named
        assert same(again, cli.model)
        assert not PlanTracker.held_by(again).plan.is_full
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"]["_class_path"] = "os.path.join"
    torch.save(checkpoint, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="blocked to prevent arbitrary code"):
        load_pruned(pl.LightningModule, tmp_path / "b.ckpt")


def test_many_threads_at_once(tmp_path):
    module = pruned(WithTeacher())
    path, width = save(module, tmp_path / "a.ckpt"), sum(p.numel() for p in module.parameters())

    def load(_):
        return [load_pruned(WithTeacher, path) for _ in range(8)]

    with ThreadPoolExecutor(4) as pool:
        found = [again for many in pool.map(load, range(4)) for again in many]
    assert len(found) == 32
    for again in found:
        assert PlanTracker.held_by(again).plan == PlanTracker.held_by(module).plan
        assert PlanTracker.held_by(again.teacher) is None
        assert sum(p.numel() for p in again.parameters()) == width
    assert same(found[0], found[-1])


def test_base_classes_see_only_the_class_of_the_user(tmp_path):
    path = save(pruned(Registered()), tmp_path / "a.ckpt")
    Registered.made.clear()
    again = load_pruned(Registered, path)
    assert Registered.made == [again]
    assert again.again == ["configure_model"]
    assert type(again) is Registered
    assert not Registered.classes
    torch.save({**torch.load(path, weights_only=True), "state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(PruningError, match="do not fit this Registered"):
        load_pruned(Registered, path)
    failed = Registered.made[-1]
    assert failed is not again
    assert PlanTracker.held_by(failed) is None
    assert not failed._state_dict_hooks
    assert not failed._load_state_dict_pre_hooks
    Registered.made.clear()
    del failed
    gc.collect()
    assert not Registered.__subclasses__()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_of_the_other_lightning(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build()

    module = pruned(Other())
    run = other.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = load_pruned(Other, tmp_path / "a.ckpt")
    assert type(again) is Other
    assert same(again, module)
    assert same(load_pruned(Other(), tmp_path / "a.ckpt"), module)


def picture(module):
    """Everything that loading could change: objects, values, numbers, hooks, configs."""
    parts = {f"{name} {number}": part for number, (name, part) in enumerate(modules_of(module))}
    tracker = PlanTracker.held_by(module)
    return (
        {name: id(part) for name, part in parts.items()},
        {name: (id(p), p.clone()) for name, p in parameters_of(module).items()},
        {name: (id(b), b.clone()) for name, b in module.named_buffers()},
        {n: {k: v for k, v in vars(p).items() if isinstance(v, int)} for n, p in parts.items()},
        {n: sorted(vars(p)) for n, p in parts.items()},
        {n: p.config.to_dict() for n, p in parts.items() if hasattr(p, "config")},
        [len(module._state_dict_hooks), len(module._load_state_dict_pre_hooks)],
        id(tracker),
        tracker and tracker.plan,
    )


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


def spoiled(state, kind):
    cut = {name: value.clone() for name, value in state.items()}
    if kind == "more":
        cut["model.something"] = torch.zeros(1)
    elif kind == "less":
        del cut["model.bert.embeddings.LayerNorm.bias"]
    elif kind == "cut and less":
        del cut["model.bert.encoder.layer.0.output.dense.weight"]
    elif kind == "another head":
        cut["model.classifier.weight"] = torch.zeros(4, 12)
        cut["model.classifier.bias"] = torch.zeros(4)
    elif kind == "no plan":
        for key in [key for key in cut if is_plan(key)]:
            del cut[key]
    return cut


@pytest.mark.parametrize("kind", ["more", "less", "cut and less", "another head", "no plan"])
@pytest.mark.parametrize("before", ["fresh", "with a tracker", "cut otherwise", "emptied", "late"])
def test_a_refused_load_leaves_the_module_as_it_was(kind, before, tmp_path):
    torch.save(spoiled(pruned(Classifier()).state_dict(), kind), tmp_path / "a.pt")
    module = Late() if before == "late" else Classifier()
    if before == "with a tracker":
        assert tracked(module).plan.is_full
    elif before in ("cut otherwise", "emptied"):
        cut(module, tracked(module), 0.75, seed=3, empty=before == "emptied")
    # It takes no copy: all its entries are one.
    module.register_buffer("ones", torch.ones(1).expand(3), persistent=False)
    view = picture(module)
    for _ in range(2):
        with pytest.raises(PruningError):
            load_pruned(module, tmp_path / "a.pt")
        assert equal(picture(module), view)
    path = save(pruned(Classifier()), tmp_path / "b.ckpt")
    assert same(load_pruned(module, path), pruned(Classifier()))


def test_the_error_for_weights_without_a_plan_names_the_remedy(tmp_path):
    module = pruned(Classifier())
    state = {k: v for k, v in module.state_dict().items() if "lightning_mi_prune" not in k}
    torch.save(state, tmp_path / "a.pt")
    path = save(module, tmp_path / "b.ckpt")
    torch.save({**torch.load(path, weights_only=True), "state_dict": state}, path)
    for target, file in ((Classifier(), "a.pt"), (Classifier(), "b.ckpt"), (Classifier, "b.ckpt")):
        with pytest.raises(PruningError, match="the file holds no plan") as error:
            load_pruned(target, tmp_path / file)
        for way in ("torch.save(module.state_dict()", "save_checkpoint", "save_pretrained"):
            assert way in str(error.value)
    wider = WithOptions("bert")
    torch.save(WithOptions("bert", width=2).state_dict(), tmp_path / "c.pt")
    with pytest.raises(PruningError, match="do not fit this WithOptions"):  # narrow, but not cut
        load_pruned(wider, tmp_path / "c.pt")


def test_files_of_safetensors(tmp_path):
    module = pruned(Classifier())
    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    assert same(load_pruned(Classifier(), tmp_path / "a.safetensors"), module)
    fresh = Classifier()
    for content in (b"", b"no weights", (tmp_path / "a.safetensors").read_bytes()[:-5]):
        (tmp_path / "b.safetensors").write_bytes(content)
        with pytest.raises(PruningError, match="not a checkpoint, or it is damaged"):
            load_pruned(fresh, tmp_path / "b.safetensors")
    with pytest.raises(PruningError, match="There is no file"):
        load_pruned(fresh, tmp_path / "c.safetensors")
    assert PlanTracker.held_by(fresh) is None


def test_hyperparameters_may_be_given(tmp_path):
    path = save(pruned(WithOptions("bert")), tmp_path / "a.ckpt")
    (tmp_path / "h.yaml").write_text("name: bert\nwidth: 3\n")
    assert same(
        load_pruned(WithOptions, path, hparams_file=str(tmp_path / "h.yaml"), strict=True),
        load_pruned(WithOptions, path, name="bert"),
    )
    with pytest.raises(PruningError, match="made for another model"):
        load_pruned(WithOptions, path, name="distilbert")
    with pytest.raises(PruningError, match="do not fit this WithOptions"):
        load_pruned(WithOptions, path, width=4)
    with pytest.raises(PruningError, match=r"\['width'\] cannot be set on a WithOptions"):
        load_pruned(WithOptions("bert"), path, width=4)
    with pytest.raises(PruningError, match="weights_only is always True"):
        load_pruned(WithOptions, path, weights_only=False)
    with pytest.raises(TypeError, match="'name'"):  # the error of Lightning
        load_pruned(WithOptions, save(pruned(Classifier()), tmp_path / "b.ckpt"))


def test_strictness_is_that_of_the_module(tmp_path):
    module = pruned(Classifier())
    path = save(module, tmp_path / "a.ckpt")
    wider = WithOptions("bert")
    with pytest.raises(PruningError, match="Missing key"):
        load_pruned(wider, path)
    assert same_model(load_pruned(WithOptions("bert"), path, strict=False), module)
    wider = WithOptions("bert")
    wider.strict_loading = False
    assert same_model(load_pruned(wider, path), module)


def same_model(module, other):
    return torch.equal(outputs(module.model, batch()), outputs(other.model, batch()))


def test_only_the_returned_module_keeps_a_tracker(tmp_path):
    module = pruned(WithTeacher())
    path = save(module, tmp_path / "a.ckpt")
    again = load_pruned(WithTeacher, path)
    assert again.seen == pl.__version__
    assert PlanTracker.held_by(again.teacher) is None
    plans = [key.removesuffix(PLAN_KEY) for key in again.state_dict() if key.endswith(PLAN_KEY)]
    assert plans == ["model.bert.", "model.", "teacher.model.bert.", "teacher.model."]
    assert outputs(again.teacher.model, batch()).equal(outputs(module.teacher.model, batch()))
    assert PlanTracker.held_by(WithTeacher()) is None


def test_load_from_checkpoint_names_the_remedy(tmp_path):
    module = pruned(Classifier())
    path = save(module, tmp_path / "a.ckpt")
    remedy = "open it with lightning_mi_prune.load_pruned"
    with pytest.raises(RuntimeError, match=remedy):
        Classifier.load_from_checkpoint(path, weights_only=True)
    with pytest.raises(RuntimeError, match=remedy):
        Classifier().load_state_dict(module.state_dict())


def damaged(kind, folder):
    path = folder / kind
    if kind == "garbage":
        path.write_bytes(b"these are no weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "half":
        torch.save({"state_dict": {"a": torch.zeros(99)}}, path)
        path.write_bytes(path.read_bytes()[:300])
    elif kind == "code":
        torch.save({"state_dict": {}, "x": Runs()}, path)
    elif kind == "old code":
        path.write_bytes(pickle.dumps(Runs(), protocol=2))
    elif kind == "list":
        torch.save([torch.zeros(1)], path)
    elif kind == "numbers":
        torch.save({"epoch": 3, "weight": torch.zeros(1)}, path)
    elif kind == "nothing":
        torch.save({}, path)
    elif kind == "a list of weights":
        torch.save({"state_dict": [1], "pytorch-lightning_version": "2.6.0"}, path)
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "There is no file '.*missing'"),
        ("folder", "is a folder; expected one file"),
        ("garbage", "is not a checkpoint, or it is damaged"),
        ("empty", "is not a checkpoint, or it is damaged"),
        ("half", "is not a checkpoint, or it is damaged"),
        ("code", r"would run \w+.system when opened"),
        ("old code", "damaged|would run"),
        ("list", "holds no weights"),
        ("numbers", "holds no weights"),
        ("nothing", "holds no weights"),
        ("a list of weights", "holds no weights"),
    ],
)
def test_files_that_are_no_checkpoints(kind, message, tmp_path):
    path = damaged(kind, tmp_path)
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    for target in (Classifier, module):
        with pytest.raises(PruningError, match=message):
            load_pruned(target, path)
    assert PlanTracker.held_by(module) is None
    assert all(torch.equal(module.state_dict()[name], before[name]) for name in before)


def test_weights_only_do_not_build_a_class(tmp_path):
    torch.save(Classifier().state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": Classifier().state_dict()}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(PruningError, match=r"pass that: load_pruned\(Classifier\(...\), path"):
            load_pruned(Classifier, tmp_path / name)
        load_pruned(Classifier(), tmp_path / name)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (nn.Linear, "Linear is a class without load_from_checkpoint"),
        (dict, "dict is a class without load_from_checkpoint"),
        ("Classifier", "cannot be loaded into 'Classifier'"),
        (None, "cannot be loaded into None"),
    ],
)
def test_targets_that_are_no_modules(target, message, tmp_path):
    with pytest.raises(PruningError, match=message):
        load_pruned(target, tmp_path / "a.ckpt")


def test_hyperparameters_of_unknown_classes_name_the_remedy(tmp_path):
    module = pruned(WithAnything(Anything()))
    path = save(module, tmp_path / "a.ckpt")
    for target in (WithAnything, WithAnything()):
        with pytest.raises(PruningError, match=r"add_safe_globals\(\[\S*test_loading.Anything\]"):
            load_pruned(target, path)
    with torch.serialization.safe_globals([Anything]):
        assert same(load_pruned(WithAnything, path), module)
        assert same(load_pruned(WithAnything(), path), module)
    torch.save(module.state_dict(), tmp_path / "a.pt")
    assert same(load_pruned(WithAnything(), tmp_path / "a.pt"), module)


@pytest.mark.parametrize("had_a_tracker", [False, True])
def test_a_refused_file_leaves_the_module_as_it_was(had_a_tracker, tmp_path):
    module = pruned(Classifier())
    state = module.state_dict()
    state["model.classifier.weight"] = torch.zeros(3, 5)
    torch.save(state, tmp_path / "a.pt")
    fresh = Classifier()
    tracker = tracked(fresh) if had_a_tracker else None
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(PruningError, match=r"'model.classifier.weight' has shape \(3, 5\)"):
        load_pruned(fresh, tmp_path / "a.pt")
    assert PlanTracker.held_by(fresh) is tracker
    assert fresh.state_dict().keys() == before.keys()
    assert all(torch.equal(fresh.state_dict()[name], before[name]) for name in before)


def test_errors_of_the_module_itself_pass_through(tmp_path):
    path = save(pruned(Classifier()), tmp_path / "a.ckpt")

    class Broken(Classifier):
        def on_load_checkpoint(self, checkpoint):
            raise KeyError("own error")

    for target in (Broken, Broken()):
        with pytest.raises(KeyError, match="own error"):
            load_pruned(target, path)
    with pytest.raises(Exception, match="nowhere") as error:
        load_pruned(Classifier, "nowhere://a.ckpt")
    assert not isinstance(error.value, PruningError)


def test_a_network_that_was_opened_cut_loads_its_own_training(tmp_path):
    net = build()
    groups = graph_of(net).groups
    apply_plan(net, groups, random_plan(groups))
    net.save_pretrained(tmp_path)

    class Tuned(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = from_pretrained(AutoModelForSequenceClassification, tmp_path)

    module = Tuned()
    with torch.no_grad():
        module.model.classifier.weight.add_(1)
    path = save(module, tmp_path / "a.ckpt")
    assert same(load_pruned(Tuned, path), module)
    tracker = PlanTracker.of(module)
    assert not tracker.plan.is_full
    path = save(module, tmp_path / "b.ckpt")
    assert same(load_pruned(Tuned, path), module)
    assert same(load_pruned(Classifier(), path), module)


class Answers(Module):
    """Predicts logits and keeps what each of the three loops predicted."""

    def predict_step(self, batch, index):
        return self.model(**batch).logits

    def predict_dataloader(self):
        return self.val_dataloader()


@pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_right_after_fit_every_loop_opens_every_checkpoint(tmp_path):
    """Larger and smaller ones, while the smallest model is in memory; bit-equal predictions."""
    keep = ModelCheckpoint(
        tmp_path, filename="{epoch}", monitor="val_loss", save_top_k=-1, save_last=True
    )
    predictions: dict[str, torch.Tensor] = {}

    def logits(module):
        with torch.no_grad():
            return torch.cat([module.model(**b).logits for b in module.val_dataloader()])

    class Remember(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            if trainer.state.fn == "fit":
                predictions[str(tmp_path / f"epoch={trainer.current_epoch}.ckpt")] = logits(
                    pl_module
                )

    run, module, _ = fit(
        tmp_path, module=Answers, callbacks=[keep, Remember()], enable_checkpointing=True
    )
    predictions["best"] = predictions[keep.best_model_path]
    predictions["last"] = predictions[str(tmp_path / "epoch=3.ckpt")]
    assert len(predictions) == 6
    assert len({sum(p.numel() for p in module.parameters())}) == 1
    sizes = set()
    for path, expected in [*predictions.items(), *reversed(predictions.items())]:
        options = {"ckpt_path": path, "weights_only": True}
        assert torch.equal(torch.cat(run.predict(module, **options)), expected)
        for loop, name in ((run.validate, "val"), (run.test, "test")):
            (metrics,) = loop(module, verbose=False, **options)
            assert torch.equal(logits(module), expected)
            assert f"{name}_loss" in metrics
        sizes.add(sum(p.numel() for p in module.parameters()))
    assert len(sizes) == 3
