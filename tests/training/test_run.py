"""What a run's config takes from the tokenizer."""

import pytest

from llama_eqx import load_config
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.errors import CheckpointError
from llama_eqx.training.run import claim, warnings, with_vocab


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


@pytest.mark.parametrize("dropout", ["model.dropout=0.1", "model.block.dropout=0.1"])
def test_with_dropout_another_microbatch_is_another_run(tmp_path, dropout):
    asked = ["tokenizer=bytes", f"run_dir={tmp_path}", "train.batch_size=4"]
    claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0"), "")
    claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0", "train.microbatch_size=2"), "")
    asked[1] = f"run_dir={tmp_path / 'dropout'}"
    (tmp_path / "dropout").mkdir()
    claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0", dropout), "")
    with pytest.raises(CheckpointError, match="microbatch_size"):
        claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0", dropout, "train.microbatch_size=2"), "")


def test_parameters_in_bfloat16_are_warned_of():
    said = lambda *overrides: warnings(load_config("tokenizer=bytes", "model.dims.vocab=258", *overrides), BytesTokenizer())  # noqa: E731
    assert said() == []
    assert "precision=mixed keeps float32" in said("precision=mixed", "precision.params=bfloat16")[0]
