"""The callback writes a plan instead of cutting, and cuts by a plan; the log has an estimate."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_mi_prune import MutualInformationPruning, PruningError, PruningGraph, options
from lightning_mi_prune.allocation.plan_file import plan_from_yaml, read_plan
from lightning_mi_prune.planning.estimate import estimate_cut, products_per_second
from tests.planning.test_plan_files import PLAN
from tests.support.boring import Classifier, trainer
from tests.support.graphs import graph_of
from tests.support.ranks import launch
from tests.support.runs import Module, sha

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


@pytest.fixture(scope="module")
def graph() -> PruningGraph:
    return graph_of(Classifier())


def fitted(folder: Path, *callbacks: pl.Callback, **more: Any) -> Classifier:
    torch.manual_seed(0)
    module = Classifier()
    trainer(*callbacks, default_root_dir=folder, **{"max_epochs": 2, **more}).fit(module)
    return module


def pruning(*args: Any, **more: Any) -> MutualInformationPruning:
    solving = options.Reconstruction("compensation")
    return MutualInformationPruning(*args, verbose=False, reconstruction=solving, **more)


def alike(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, graph: PruningGraph) -> Any:
    """A run that only plans: its folder, its module and its callback."""
    folder = tmp_path_factory.mktemp("planned")
    callback = pruning(0.6, plan_only=True, graph=graph, max_drop=0.01, monitor="val_loss")
    stopping = EarlyStopping("val_loss", patience=50)
    return folder, fitted(folder, callback, stopping), callback


def test_a_run_that_only_plans_is_one_without_pruning(planned: Any, tmp_path: Path) -> None:
    folder, module, callback = planned
    assert alike(module, fitted(tmp_path))
    assert callback.plan.is_full
    assert callback.report.cuts == []
    assert [path.name for path in folder.iterdir()] == ["plan.yaml"]
    found = read_plan(folder / "plan.yaml")
    assert [column.label for column in found.columns] == ["60%", "50%", "75%", "90%"]
    assert found.cut == "60%"
    assert found.size.parameters == sum(p.numel() for p in module.parameters())
    assert found.size.macs == callback.report.macs > 0


def test_a_run_with_the_plan_is_one_with_its_budget(
    planned: Any, tmp_path: Path, graph: PruningGraph
) -> None:
    path = str(planned[0] / "plan.yaml")
    first, second = pruning(0.6, graph=graph), pruning(plan=path, graph=graph)
    direct, carried = fitted(tmp_path, first), fitted(tmp_path, second)
    assert first.plan == second.plan
    assert alike(direct, carried)
    widths = read_plan(path).columns[0].widths
    assert {name: second.plan.width(name) for name in widths} == dict(widths)


def test_several_cuts_approach_edited_widths(
    planned: Any, tmp_path: Path, graph: PruningGraph
) -> None:
    text = (planned[0] / "plan.yaml").read_text()
    plan = plan_from_yaml(re.sub(r"(layer\.0\.ffn: .*now: 40), 60%: \d+", r"\1, pin: 11", text))
    assert [g.pin for g in plan.groups if "0.ffn" in g.name] == [11]
    callback = pruning(plan=plan, graph=graph, schedule=options.Schedule(cuts=2, last_epoch=2))
    fitted(tmp_path, callback, max_epochs=3)
    name = "model.bert.encoder.layer.0.ffn"
    widths = [{g.name: g.after for g in cut.groups}[name] for cut in callback.report.cuts]
    assert len(widths) == 2
    assert 11 < widths[0] < 40
    assert widths[0] % 8 == 0
    assert widths[1] == 11
    wanted = plan.carried_out().widths
    assert {name: callback.plan.width(name) for name in wanted} == wanted


def test_the_plan_is_beside_the_logs_and_its_path_in_the_log(
    tmp_path: Path, graph: PruningGraph, caplog: pytest.LogCaptureFixture
) -> None:
    callback, logger = pruning(plan_only=True, graph=graph), CSVLogger(tmp_path, name="mine")
    with caplog.at_level(logging.INFO):
        fitted(tmp_path, callback, logger=logger, limit_train_batches=1)
    path = Path(logger.log_dir) / "plan.yaml"
    assert read_plan(path).cut == "50%"
    assert f"The plan is in {path}" in caplog.text
    assert "plan_only=True: no cut is made" in caplog.text


def test_the_start_of_a_run_estimates_what_a_cut_takes(
    tmp_path: Path, graph: PruningGraph, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        fitted(tmp_path, pruning(graph=graph), fast_dev_run=True)
    (line,) = [r.getMessage() for r in caplog.records if "Estimate" in r.getMessage()]
    start, _, end = line.partition(", from a product of matrices timed on this cpu, and ")
    parts = r"\(calibration .+ s, ranking .+ s\)"
    assert re.fullmatch(rf"Estimate for a cut: (under )?[\d.]+ s beside validation {parts}", start)
    assert re.fullmatch(r"[\d,]+ MB of memory beside the model\.", end)


def test_an_estimate_grows_with_positions_and_with_widths(graph: PruningGraph) -> None:
    module, random = Classifier(), torch.get_rng_state()
    groups = [group for group in graph.groups if group.kind in ("ffn", "heads")]

    def estimated(positions: int, stored: int = 0, kinds: str = "ffn heads") -> Any:
        chosen = [group for group in groups if group.kind in kinds]
        sizes = {"positions": positions, "stored_positions": stored, "gradients": True}
        return estimate_cut(module, chosen, graph.full, per_second=1e9, **sizes)

    assert estimated(2000).total > estimated(1000).total > estimated(1000, kinds="ffn").total
    assert set(estimated(1000).seconds) == {"calibration", "ranking"}
    solved = estimated(1000, 1000)
    assert solved.seconds["reconstruction"] > 0
    assert solved.needs.ordinary > 0
    assert products_per_second(torch.device("cpu")) > 1e7
    assert torch.equal(torch.get_rng_state(), random)


def test_options_that_contradict_a_plan_are_refused(planned: Any, tmp_path: Path) -> None:
    path = str(planned[0] / "plan.yaml")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"plan": path, "plan_only": True}, "asks for a cut, and plan_only=True for none"),
        ({"plan": path, "sparsity": 0.55}, r"sparsity=0\.55 is no budget of the plan"),
        ({"plan": str(tmp_path / "no.yaml")}, "cannot be read from"),
        ({"plan": 7}, r"plan=7; expected the path"),
    ]
    for given, message in wrong:
        with pytest.raises(MisconfigurationException, match=message):
            MutualInformationPruning(**given)
    assert pruning(0.75, plan=path).engine.strategy.budget.startswith("75% of the plan (")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"plan": PLAN}, "it belongs to another model"),
        ({"kinds": ["ffn"]}, "which kinds, include, exclude or module leave out"),
        ({"widths": "uniform"}, "the plan was made with widths='global'"),
    ],
    ids=["model", "kinds", "widths"],
)
def test_a_plan_that_does_not_fit_is_refused_before_training(
    given: dict[str, Any], message: str, planned: Any, tmp_path: Path, graph: PruningGraph
) -> None:
    callback = pruning(**{"plan": str(planned[0] / "plan.yaml"), "graph": graph, **given})
    module = Classifier()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(PruningError, match=message):
        trainer(callback, max_epochs=2, default_root_dir=tmp_path).fit(module)
    after = {name: after for name, after in module.state_dict().items() if name in before}
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def run(folder: str, plan_only: bool) -> tuple[str, list[str], str]:
    """On a rank: a digest of the weights after a run, the files of its folder, the plan's text."""
    torch.manual_seed(0)
    module = Module()
    callbacks = []
    if plan_only:
        callbacks = [pruning(plan_only=True, graph=graph_of(module))]
    mine = Path(folder) / os.environ["RANK"]
    mine.mkdir(exist_ok=True)
    options = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "num_sanity_val_steps": 0}
    trainer(*callbacks, default_root_dir=mine, **options).fit(module)
    files = sorted(path.name for path in mine.rglob("*") if path.is_file())
    texts = [(mine / name).read_text() for name in files if name == "plan.yaml"]
    return sha(*module.state_dict().values()), files, "".join(texts)


def both(folder: str) -> list[tuple[str, list[str], str]]:
    return [run(folder, plan_only) for plan_only in (False, True)]


def test_over_ranks_one_plan_is_written_and_nothing_is_cut(tmp_path: Path) -> None:
    found = launch(2, both, str(tmp_path))
    assert found[0][0][0] == found[0][1][0] == found[1][0][0] == found[1][1][0]
    assert found[0][1][1] == ["plan.yaml"]
    assert found[1][1][1] == found[0][0][1] == []
    plan = plan_from_yaml(found[0][1][2])
    assert [column.label for column in plan.columns] == ["50%", "75%", "90%"]
