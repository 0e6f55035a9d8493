"""What a run's config takes from the tokenizer."""

import pytest

from llama_eqx import load_config
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.training.run import with_vocab


class Llama3(BytesTokenizer):
    """With the ids of Llama 3, at three of which a text may end."""

    vocab, bos, eos, stop = 128256, 128000, 128001, (128001, 128008, 128009)


@pytest.mark.parametrize(
    ("model", "tokenizer", "bos", "eos"),
    [
        ("llama3_1m", BytesTokenizer(), 256, (257,)),
        ("llama3_1m", Llama3(), 128000, (128001, 128008, 128009)),
        ("llama3_1_8b", Llama3(), 128000, (128001, 128008, 128009)),  # which says 128001
        ("llama3_3_70b", Llama3(), 128000, (128001, 128008, 128009)),
        ("llama3_1_8b", BytesTokenizer(), 128000, (128001,)),  # another's ids, of which a warning is given
    ],
)
def test_the_ends_of_a_text_are_all_that_the_tokenizer_knows(model, tokenizer, bos, eos):
    tokens = with_vocab(load_config(f"model={model}"), tokenizer).model.tokens
    assert (tokens.bos, tokens.eos) == (bos, eos)
