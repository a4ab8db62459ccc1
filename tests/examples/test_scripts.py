"""The short scripts of the examples run as they are."""

import contextlib
import io
import json
import re
import runpy
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.support.ranks import launch

EXAMPLES = Path(__file__).parents[2] / "examples"

# Tiny models on random data: few samples for their sizes.
pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")


def printed(name: str) -> str:
    """What a script prints, run as ``python examples/NAME.py`` runs it."""
    with contextlib.redirect_stdout(io.StringIO()) as output, patch("sys.argv", [name]):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return output.getvalue()


def test_one_shot() -> None:
    text = printed("one_shot")
    before, after = re.search(r"([\d,]+) parameters before, ([\d,]+) after", text).groups()
    assert int(after.replace(",", "")) < 0.6 * int(before.replace(",", ""))
    assert text.count("of the information") == 6
    assert "gives the same outputs: True" in text


def test_plan_first() -> None:
    text = printed("plan_first")
    assert re.search(r"^now +[\d,]+ +[\d,]+$.*^50% \* .*^75% .*^90% ", text, re.M | re.S)
    assert text.count(" heads ") == 2
    assert "The first layer has 120 neurons" in text


def before_and_after(text: str, measure: str) -> list[tuple[int, float]]:
    """Parameters and the measure of both models that a script trained."""
    found = re.findall(rf"^(?:before|after): +([\d,]+) parameters, {measure} ([\d.]+)", text, re.M)
    return [(int(size.replace(",", "")), float(value)) for size, value in found]


CLASSIFIERS = [
    ("cnn", ["channels"], 0.8),
    ("vit", ["ffn", "heads"], 0.6),
    ("torch_encoder", ["ffn"], 0.8),
]


@pytest.mark.parametrize(("name", "kinds", "most"), CLASSIFIERS)
def test_classifiers(name: str, kinds: list[str], most: float) -> None:
    text = printed(name)
    (size, accuracy), (smaller, after) = before_and_after(text, "accuracy")
    assert smaller < most * size
    assert accuracy > 60
    assert after > accuracy - 5
    assert all(re.search(rf" {kind} .* yes$", text, re.M) for kind in kinds)


def test_hand_written() -> None:
    text = printed("hand_written")
    (size, _), (smaller, accuracy) = before_and_after(text, "accuracy")
    assert smaller < 0.3 * size
    assert accuracy > 80
    assert re.search(r" ffn .* yes$", text, re.M)


def test_decoder() -> None:
    text = printed("decoder")
    (size, before), (smaller, after) = before_and_after(text, "perplexity")
    assert smaller < 0.6 * size
    assert after < before
    (tokens,) = json.loads(text.splitlines()[-1])
    assert len(tokens) == 12


def test_own_network() -> None:
    text = printed("own_network")
    widths = list(map(int, re.search(r"each block: \[(.+)\]", text)[1].split(", ")))
    assert len(widths) == 3
    assert sum(widths) <= 0.25 * 3 * 128
    assert float(re.search(r"Accuracy: (.+)%", text)[1]) > 80


def test_layers_then_units() -> None:
    text = printed("layers_then_units")
    layers, units = re.findall(r"^epoch \d+: ([\d,]+) parameters", text, re.M)
    assert int(units.replace(",", "")) < int(layers.replace(",", ""))
    assert re.search(
        r"^epoch \d+: layers \(\d,\) of network.bert.encoder.layer removed$", text, re.M
    )
    assert text.endswith("3 layers are left\n")


def test_ddp() -> None:
    lines = {rank: text.splitlines()[-1] for rank, text in launch(2, printed, "ddp").items()}
    assert sorted(line[:6] for line in lines.values()) == ["rank 0", "rank 1"]
    assert len({line[6:] for line in lines.values()}) == 1  # the same plan, the same weights


def test_every_script_is_short_and_tested() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    tested = {name for name, _, _ in CLASSIFIERS}
    tested |= {name.removeprefix("test_") for name in globals()}
    assert [path.stem for path in scripts if path.stem not in tested] == []
    assert [path.name for path in scripts if len(path.read_text().splitlines()) >= 95] == []
