"""Decoders: a tiny random Llama on a byte-level corpus in the place of those with real weights."""

import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decoder_pages, decoders, language
from benchmarks.decoders import (
    DENSE,
    FLAP,
    LIBRARY,
    OURS,
    TRAINED,
    WAYS,
    Way,
    examine,
    fit,
    flap,
    measured,
    trained,
)
from benchmarks.language import as_batches, brown, pieces_of, plain_text, score_tokens
from benchmarks.records import Record
from benchmarks.subjects import Subject
from lightning_mi_prune.graph.groups import count_parameters

pytestmark = pytest.mark.filterwarnings("ignore::lightning_mi_prune.core.errors.PruningWarning")

LENGTH = 16


def tokenizer(text: str) -> dict[str, list[int]]:
    """Bytes, after a token that begins every text."""
    return {"input_ids": [1, *(byte % 64 for byte in text.encode())]}


def corpus(folder: Path, words: int = 120) -> Path:
    """As many files as the real one has, of tagged words that follow a rule."""
    folder.mkdir()
    for number in range(language.FILES):
        letter, index = divmod(number, 99)
        text = " ".join(f"w{(7 * number + place * place) % 31}/nn" for place in range(words))
        (folder / f"c{'abcdefghijklmnopqr'[letter]}{index:02d}").write_text(f"\n\n\t{text} ./.\n")
    return folder


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = corpus(tmp_path_factory.mktemp("data") / "brown")
    return {part: brown(part, folder) for part in ("calibration", "training", "test")}


@pytest.fixture(scope="module")
def subject(texts: dict[str, list[str]]) -> Subject:
    rows = pieces_of(texts["calibration"], tokenizer, 32, seed=0, length=LENGTH)
    test = pieces_of(texts["test"], tokenizer, 12, length=LENGTH)
    return examine(0, build(), as_batches(rows), as_batches(test))


@pytest.fixture
def opened(
    subject: Subject, texts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> Subject:
    def pieces(name: str, seed: int, count: int) -> torch.Tensor:
        return pieces_of(texts["training"], tokenizer, count, seed=seed, length=LENGTH)

    monkeypatch.setattr(decoders, "opened", lambda name, seed: subject)
    monkeypatch.setattr(decoders, "training_pieces", pieces)
    monkeypatch.setattr(decoders, "LIMIT", 2.0)
    return subject


# -------------------------------------------------------------------------------------------- text


def test_parts_share_no_file_and_no_word_keeps_its_tag(texts: dict[str, list[str]]) -> None:
    sizes = {part: len(found) for part, found in texts.items()}
    assert sizes == {"calibration": 50, "training": 400, "test": 50}
    every = [text for found in texts.values() for text in found]
    assert not any("/" in text for text in every)
    assert plain_text("\tand/or/cc 's/pos") == "and/or 's"


def test_pieces_are_seeded_of_one_length_and_begin_like_a_text(texts: dict[str, list[str]]) -> None:
    first, again, other = (
        pieces_of(texts["training"], tokenizer, 20, seed=seed, length=LENGTH) for seed in (0, 0, 1)
    )
    assert first.shape == (20, LENGTH)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert (first[:, 0] == 1).all()
    assert len(first.unique(dim=0)) > 10
    with pytest.raises(ValueError, match=r"give \d+ pieces of 16 tokens: expected 1000000"):
        pieces_of(texts["test"], tokenizer, 1_000_000, length=LENGTH)


def test_a_corpus_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="0 files of the Brown corpus: expected 500"):
        brown("test", tmp_path)


def test_cross_entropy_is_that_of_the_model_itself(subject: Subject) -> None:
    losses = [subject.model(**batch).loss.item() for batch in subject.test]
    assert score_tokens(subject.model, subject.test)[1] == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


# ------------------------------------------------------------------------------------------- cases


@pytest.mark.parametrize("units", ["ffn", "ffn+heads"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.name))
def test_every_way_gives_figures_and_leaves_the_dense_model(
    opened: Subject, way: Way, units: str
) -> None:
    if way.method.startswith(LIBRARY):
        pytest.importorskip("torch_pruning")
    before = copy.deepcopy(opened.model.state_dict())
    found = measured("tiny", 0, units, way, 0.4)
    assert json.loads(json.dumps(found)) == found
    if "failed" not in found:
        assert found["perplexity"] > 1
        assert found["dense_perplexity"] == math.exp(opened.cross_entropy)
        assert 0 < found["macs"] < found["dense_macs"]
        assert found["n_test"] == 12 * (LENGTH - 1)
        assert 0.3 < found["reached"] < 0.6
    elif units == "ffn":
        pytest.fail(found["failed"])
    for name, value in opened.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_flap_gives_each_layer_the_mean_of_what_it_lost(subject: Subject) -> None:
    model, plan = flap(subject, 0.6)
    assert count_parameters(subject.chosen, plan.widths) <= 0.4 * count_parameters(subject.chosen)
    means: dict[str, list[torch.Tensor]] = {}

    def note(path: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            means.setdefault(path, []).append(output.flatten(0, 1))

        return hook

    # The inputs of the first layer are those of the dense model, so the mean output is, too.
    first = next(g.consumers[0] for g in subject.chosen if g.kind == "heads")
    for net in (subject.model, model):
        handle = net.get_submodule(first).register_forward_hook(note(first))
        for batch in subject.validation:
            net(input_ids=batch["input_ids"])
        handle.remove()
        means[first] = [torch.cat(means[first]).mean(0)] if net is subject.model else means[first]
    dense, *cut = means[first]
    assert plan.width(next(g.name for g in subject.chosen if g.consumers[0] == first)) < 3
    assert torch.allclose(torch.cat(cut).mean(0), dense, atol=1e-6)


def test_nothing_but_the_bias_compensates_in_flap(subject: Subject) -> None:
    model, _ = flap(subject, 0.3)
    for path, layer in model.named_modules():
        if path.endswith("down_proj"):
            dense = subject.model.get_submodule(path)
            columns = {tuple(column.tolist()) for column in dense.weight.T}
            assert {tuple(column.tolist()) for column in layer.weight.T} <= columns


def test_our_way_is_the_default_of_the_package() -> None:
    module = decoders.LanguageModel(build(), 1e-3)
    options, (callback,) = OURS.options(0.25, 0), decoders.callbacks_of(OURS, module, "ffn", 0.25)
    assert callback.method.importance == options.importance
    assert callback.method.reconstruction == options.reconstruction
    assert callback.method.widths == options.widths


@pytest.mark.parametrize("way", [DENSE, OURS], ids=lambda way: way.method)
def test_the_callback_cuts_while_a_decoder_trains(opened: Subject, way: Way) -> None:
    sparsity = 0.0 if way == DENSE else 0.25
    found = trained("tiny", 0, "ffn", way, sparsity, 8)
    assert found["reached"] == pytest.approx(sparsity, abs=0.03)
    assert found["perplexity"] != found["dense_perplexity"]
    assert trained("tiny", 0, "ffn", way, sparsity, 8)["perplexity"] == found["perplexity"]


def test_each_piece_is_trained_on_once(subject: Subject, texts: dict[str, list[str]]) -> None:
    seen: list[torch.Tensor] = []

    class Noting(decoders.LanguageModel):
        def training_step(self, batch, index):
            if self.training:
                seen.append(batch[0])
            return super().training_step(batch, index)

    rows = pieces_of(texts["training"], tokenizer, 16, seed=0, length=LENGTH)
    fit(Noting(copy.deepcopy(subject.model), 1e-3), subject, rows, [])
    assert torch.equal(torch.cat(seen), rows)


def test_every_method_that_is_trained_is_one_that_is_cut_in_one_shot() -> None:
    assert {way.name for way in TRAINED} - {DENSE.name} <= {way.name for way in WAYS}
    assert len({way.name for way in WAYS}) == len(WAYS)
    assert FLAP in {way.method for way in WAYS}
    assert sys.modules["benchmarks.decoders"].decoders.__doc__


# ------------------------------------------------------------------------------------------- pages


def record(way: Way, perplexity: float, *, sparsity: float = 0.25, seed: int = 0, steps: int = 0):
    setting = decoders._about("smollm2-135m", "ffn", way, sparsity, steps)
    figures = {"perplexity": perplexity, "dense_perplexity": 50.0, "macs": 3e9, "dense_macs": 4e9}
    figures |= {"cpu_seconds": 7.0, "dense_parameters": 134e6, "n_test": 6096}
    if not perplexity:
        figures = {"failed": "TimeLimitError: over 60 s of processor time"}
    return Record("decoders", setting, seed, figures, {"cpu": "A", "threads": 1}, {"torch": "2"})


RECORDS = [
    record(OURS, 80.0),
    record(OURS, 45.0, seed=1),  # the geometric mean of both is 60
    record(OURS, 70.0, sparsity=0.15),
    record(Way("activation-norm", "uniform", "none"), 1700.0),
    record(Way("activation-norm", "uniform", "none"), 60.0, sparsity=0.15),
    record(Way(f"{LIBRARY}taylor", "uniform", "none"), 0.0),
]


def test_tables_have_a_row_a_method_the_best_first() -> None:
    lines = decoder_pages.tables(RECORDS)
    assert lines[0] == "### smollm2-135m, neurons, one shot"
    assert lines[6:] == [
        "| **relevance-mi** | **global** | **layerwise** | 70.0 | 60.0 | 75% .. 75% | 7 |",
        "| activation-norm | uniform | none | 60.0 | 1,700 | 75% .. 75% | 7 |",
        "| torch-pruning-taylor | uniform | none |  | does not run |  |  |",
    ]


def test_a_method_that_is_better_is_listed() -> None:
    lines = decoder_pages.lost(RECORDS)
    assert "in 1 of 2 cells" in lines[0]
    assert lines[-1].endswith("| 15% | `activation-norm`, uniform, none | 60.0 | 70.0 |")


def test_a_dense_control_is_no_row() -> None:
    trained_too = [record(OURS, 55.0, steps=200), record(DENSE, 40.0, sparsity=0.0, steps=200)]
    lines = decoder_pages.tables(trained_too)
    assert lines[2] == "Dense perplexity 50.0; 40.0 after as many steps."
    assert len(lines) == 7
    assert "in 0 of 0 cells" in decoder_pages.lost(trained_too)[0]


def test_the_figure_is_clipped_and_has_a_panel_a_model() -> None:
    (axes, _) = decoder_pages.draw_decoders(RECORDS).axes
    heights = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert heights["ours"] == pytest.approx([70 / 50, 60 / 50])
    assert heights["activation norm (Wanda-like)"] == pytest.approx([60 / 50, decoder_pages.RATIO])
    assert "torch-pruning, Taylor" not in heights


def test_every_look_is_of_a_way_that_is_measured() -> None:
    assert decoder_pages.LOOKS.keys() <= {way.name for way in WAYS}
