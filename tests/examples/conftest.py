"""What the tests of the examples share."""

import pytest
from transformers import BertTokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that knows the words w0 to w299, so that a token id identifies its row."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(300))]
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return str(folder)
