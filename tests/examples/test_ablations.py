"""The ablations on a tiny random model, and what their page says of the records."""

import copy
import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from examples.benchmark import ablation_tables, ablations
from examples.benchmark.ablation_tables import BEGIN, PAGE, written
from examples.benchmark.ablations import UNITS, Gathered, main, measure
from examples.benchmark.hearing import drawn, feel, read
from examples.benchmark.oneshot import Subject, cut, score
from examples.benchmark.page import rewritten
from examples.benchmark.records import load, part, write
from examples.benchmark.settings import DEFAULT, NAMED, REMOVED, SETTINGS, Hearing, Setting, rows
from lightning_mi_prune import find_axes
from lightning_mi_prune.axes import full_plan
from lightning_mi_prune.choosing import choose_axes
from lightning_mi_prune.ranking import rank_axes
from lightning_mi_prune.relevance import relevance_of
from lightning_mi_prune.sample import Heard
from tests.examples.test_benchmark import Data, labelled
from tests.models import build

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.errors.PruningWarning")

ROOT = Path(__file__).parents[2]
SPARSITY = 0.6


def gathered_of(model: torch.nn.Module) -> Gathered:
    axes, test = find_axes(model), Data().test_dataloader()
    chosen = choose_axes(axes, units=UNITS)
    rows = Data().val_dataloader()
    plain = Subject("trec-6", 0, model, axes, chosen, Heard(), 0.0, rows, test, *score(model, test))
    return Gathered(plain)


@pytest.fixture(scope="module")
def gathered() -> Gathered:
    return gathered_of(build())


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_gives_a_record(gathered: Gathered, setting: Setting) -> None:
    before = copy.deepcopy(gathered.plain.model.state_dict())
    record = measure(gathered, setting, SPARSITY)
    assert record["setting"] == setting.name
    assert record["target_sparsity"] == SPARSITY
    if setting.counted == "parameters":
        assert record["sparsity"] >= SPARSITY - 1e-9
    assert 0 < record["macs"] < record["dense_macs"]
    assert 0 <= record["accuracy"] <= 1
    assert record["cpu_seconds"] > 0
    assert record["machine"]["threads"] >= 1
    assert record["kept"].keys() == {"ffn", "heads", *setting.hearing.also}
    assert json.loads(json.dumps(record)) == record
    for name, value in gathered.plain.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_setting_changes_one_thing_but_for_the_few_that_explain_one() -> None:
    several = {setting.name: set(setting.changes) for setting in SETTINGS}
    assert several.pop("default") == set()
    assert {name for name, changes in several.items() if len(changes) > 1} == {
        "no new weights",
        "top-k, fold-in alone",
        "no relevance, uniform",
        "literal reading",
        "residual, same MACs",
    }
    assert len(NAMED) == len(SETTINGS)
    known = {field.name for field in fields(Setting)} - {"name", "question"}
    assert set().union(*several.values()) == known  # nothing can be changed that nothing changes


def test_evidence_is_gathered_once_by_all_that_can_share_it(monkeypatch) -> None:
    passes = []
    monkeypatch.setattr(ablations, "hear", lambda *given: passes.append("heard") or Heard())
    monkeypatch.setattr(ablations, "feel", lambda *given, **more: passes.append("felt") or {})
    gathered = gathered_of(build())
    for setting in SETTINGS:
        gathered.subject(setting)
    assert passes.count("heard") == len({setting.hearing for setting in SETTINGS}) == 7
    # Default, sampled labels, 8 batches, with the stream, with dimensions of heads.
    assert passes.count("felt") == 5


def test_fewer_positions_are_heard_and_stored() -> None:
    gathered = gathered_of(build())

    def heard(**given: int) -> Heard:
        return gathered.subject(Setting("any", "?", hearing=Hearing(**given))).heard

    few, less = heard(positions=512), heard(calls=512)
    assert {int(moments.count) for moments in few.moments.values()} <= set(range(480, 513))
    stored = [call.mask for calls in less.ranks[0].values() for call in calls]
    assert 0 < sum(mask.numel() for mask in stored) <= 1024


def test_sampled_labels_are_those_that_the_model_predicts() -> None:
    model, row = build(), labelled(range(1))[0]
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 2.0, -50.0]))
    rows = {name: value.repeat(40, *[1] * (value.ndim - 1)) for name, value in row.items()}
    labels = drawn(model, rows, torch.Generator().manual_seed(0))["labels"]
    share = float((labels == 1).double().mean())
    assert abs(share - torch.tensor(2.0).sigmoid()) < 0.05
    assert not (labels == 2).any()
    assert rows["labels"].unique().numel() == 3  # the batch itself is left alone


def test_with_gradients_top_down_and_bottom_up_are_one_order(gathered: Gathered) -> None:
    """Every axis is weighed against the dense model, whatever was kept above it."""
    model, chosen = gathered.plain.model, gathered.plain.chosen
    heard = gathered.subject(DEFAULT).heard
    weights, plan = dict(model.named_parameters()), full_plan(gathered.plain.axes)
    widths = {axis.name: axis.size // 4 for axis in chosen}
    known = heard.moments, weights, plan

    def orders(relevance, **given) -> list[tuple[int, ...]]:
        found = rank_axes(chosen, *known, relevance=relevance, **given)
        return [found[axis.name].order for axis in chosen]

    for relevance in (relevance_of(heard.gradients), None):
        assert orders(relevance, widths=widths) == orders(relevance)
    # The readers that were kept above are others than all of them.
    bottom_up = orders("readers")
    assert orders("readers", widths=widths) != bottom_up
    assert orders(relevance_of(read(model, chosen))) == bottom_up


def test_the_default_is_that_of_the_one_shot_benchmark(gathered: Gathered) -> None:
    from examples.benchmark.variants import OURS

    subject = gathered.subject(DEFAULT)
    ours, mine = (cut(subject, way, SPARSITY) for way in (OURS, DEFAULT))
    assert ours[1].kept == mine[1].kept
    for name, value in ours[0].state_dict().items():
        assert torch.equal(value, mine[0].state_dict()[name]), name


def test_where_macs_are_counted_as_many_stay_as_the_default_leaves(gathered: Gathered) -> None:
    default = measure(gathered, DEFAULT, SPARSITY)
    for name in ("MACs", "residual, same MACs"):
        found = measure(gathered, NAMED[name], SPARSITY)
        assert 0.9 * default["macs"] < found["macs"] <= default["macs"]


def test_gradients_of_fewer_batches_are_spread(gathered: Gathered) -> None:
    felt = feel(gathered.plain.model, gathered.plain.chosen, labelled(range(12)), steps=4)
    assert {tuple(sums.counts.tolist()) for sums in felt.values()} == {(4 * 32, 4, 0)}


def test_a_run_goes_on_where_it_was_and_writes_the_page(tmp_path: Path, monkeypatch) -> None:
    opened = []

    def finetuned(task, seed):
        opened.append(seed)
        return build(seed=seed), Data()

    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{BEGIN}\n{ablation_tables.END}\n")
    monkeypatch.setattr(ablations, "finetuned", finetuned)
    monkeypatch.setattr(ablations, "FOLDER", tmp_path / "parts")
    monkeypatch.setattr(ablations, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(ablations, "rewrite", lambda found: ablation_tables.rewrite(found, page))
    few = ["--sparsities", "0.5", "--settings", "default"]
    main([*few, "--seeds", "0", "1"])
    main([*few, "top-k", "--seeds", "0"])
    main([*few, "top-k", "--seeds", "0"])  # nothing was missing, so nothing was opened
    assert opened == [0, 1, 0]
    assert len(load(ablations.RESULTS)) == 3
    part(ablations.FOLDER, ablations.NAME, "trec-6", 0).unlink()  # as on another machine
    main([*few, "--seeds", "0"])
    assert opened == [0, 1, 0]
    assert "\n".join(written(load(ablations.RESULTS))) in page.read_text()


def test_the_table_pairs_by_seed() -> None:
    def record(setting: str, seed: int, accuracy: float, nats: float) -> dict[str, object]:
        dense = {
            "dense_accuracy": 0.9,
            "dense_cross_entropy": 0.2,
            "n_test": 10,
            "macs": 1,
            "dense_macs": 4,
        }
        about = {"task": "trec-6", "target_sparsity": 0.75, "setting": setting, "seed": seed}
        return about | dense | {"accuracy": accuracy, "cross_entropy": nats, "cpu_seconds": 2.0}

    lines = written(
        [
            record("top-k", 0, 0.7, 0.5),
            record("default", 0, 0.8, 0.3),
            record("top-k", 1, 0.8, 0.6),
            record("default", 1, 0.8, 0.5),
            record("ridge 10", 2, 0.8, 0.5),
            record("residual", 1, 0.8, 0.5),
            record("copula", 1, 0.8, 0.6),
        ]
    )
    assert lines[0].startswith("**trec-6, 75% gone**; dense 90.00%, 0.200 nats; 10 test rows.")
    assert lines[4:] == [
        "| default | 2 | +0.200 (+0.100 .. +0.300) |  | -10.00 (-10.00 .. -10.00) |  | 25% | 2 |",
        "| top-k | 2 | +0.350 (+0.300 .. +0.400) | +0.150 (+0.100 .. +0.200) "
        "| -15.00 (-20.00 .. -10.00) | -5.00 (-10.00 .. +0.00) | 25% | 2 |",
        "| ridge 10 | 1 | +0.300 |  | -10.00 |  | 25% | 2 |",
        "| copula | 1 | +0.400 | +0.100 | -10.00 | +0.00 | 25% | 2 |",
        "| residual | 1 | +0.300 | +0.000 | -10.00 | +0.00 | 25% | 2 |",
    ]
    assert written([]) == ["There are no records yet."]


def test_what_was_removed_is_shown_and_not_offered(capsys: pytest.CaptureFixture[str]) -> None:
    names = rows()
    assert [name for name in names if name in NAMED] == [*NAMED]
    assert [name for name in names if name not in NAMED] == ["copula"]
    assert REMOVED.keys() <= NAMED.keys()
    with pytest.raises(SystemExit, match="2"):
        main(["--settings", "copula"])
    assert "invalid choice: 'copula'" in capsys.readouterr().err


def test_the_page_is_what_its_script_writes(tmp_path: Path) -> None:
    text = (ROOT / PAGE).read_text()
    records = load(ROOT / "examples/benchmark/results/ablations.json")
    lines = written(records)
    assert rewritten(text, lines, BEGIN, ablation_tables.END) == text
    assert {record["setting"] for record in records} <= set(rows())
    assert [name for name in rows() if f"**{name}**" not in text] == []
    write(tmp_path / "again.json", records)
    assert written(load(tmp_path / "again.json")) == lines
