"""Turns of a conversation on one cache, against the whole conversation read anew."""

import equinox as eqx
import jax
import numpy as np
import pytest

from llama_eqx import build_model
from llama_eqx.data.chat import chat_format
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer
from llama_eqx.errors import ConfigError
from llama_eqx.generation.chat import Chat
from llama_eqx.generation.decode import generate_tokens
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.text import following


class Llama3Bytes(BytesTokenizer):
    """Bytes with Llama 3's special tokens: the ids of an answer are those that it has as a part of the conversation."""

    vocab, bos, eos, stop = 260, 256, 259, (259,)
    special = {"<|begin_of_text|>": 256, "<|start_header_id|>": 257, "<|end_header_id|>": 258, "<|eot_id|>": 259}  # noqa: RUF012
    chat = "llama3"


TOKENIZER = BytesTokenizer()
TURNS = ["Who are you?", "Ça va, 世界?", "Go on"]


@pytest.fixture(scope="module")
def model(tiny):
    """It says letters only."""
    model = build_model(tiny("model.dims.vocab=260", "model.context=256"), key=jax.random.key(0))
    letters = jax.numpy.zeros(260).at[ord("a") : ord("z") + 1].set(1)
    return eqx.tree_at(lambda m: m.lm_head, model, model.unembed * letters, is_leaf=lambda x: x is None)


def ids_of(messages, tokenizer=TOKENIZER):
    return chat_format(tokenizer).encode(messages, tokenizer, generate=True)[0]


def anew(model, messages, n, tokenizer=TOKENIZER):
    ids = ids_of(messages, tokenizer)
    (row,) = generate_tokens(model, [ids], n, stop=tokenizer.stop).tokens
    return "".join(following(tokenizer, ids, row))


@eqx.filter_jit
def read(model, tokens, real):
    return model.hidden(tokens, segment_ids=real, cache=model.init_cache(1, tokens.shape[1]))[1]


def assert_what_is_kept_is_what_was_said(chat):
    """The cache of a chat against one into which the same ids are read at once."""
    tokens, real, length = np.zeros((1, 256), np.int32), np.zeros((1, 256), np.int32), len(chat._ids)
    tokens[0, :length], real[0, :length] = chat._ids, 1
    fresh = read(chat.model, tokens, real)
    assert chat._cache.length.tolist() == [length] * len(chat._cache.length)
    for name in ("keys", "values", "segment_ids"):
        found, wanted = (getattr(cache, name)[:, :, :length] for cache in (chat._cache, fresh))
        np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("tokenizer", [TOKENIZER, Llama3Bytes()], ids=["llama2", "llama3"])
def test_each_turn_answers_the_whole_conversation(model, tokenizer):
    """Of what was read and said before nothing is read again, up to where the conversation is written otherwise than it was said."""
    chat = Chat(model, tokenizer, Sampling(), 12, system="Be brief.")
    talk, before = [{"role": "system", "content": "Be brief."}], 0
    for turn in TURNS:
        answer = "".join(chat.say(turn))
        talk.append({"role": "user", "content": turn})
        assert answer == anew(model, talk, 12, tokenizer)
        assert_what_is_kept_is_what_was_said(chat)
        # Llama 2's format has a space before an answer, which these bytes are said without.
        assert chat.reused == (before and before + (11 if tokenizer.chat == "llama3" else 0))
        before = len(ids_of(talk, tokenizer))
        talk.append({"role": "assistant", "content": answer})
    assert chat.messages == talk


def test_an_answer_that_is_broken_off(model):
    """It is not part of the conversation, which goes on as if it had not been asked for."""
    chat = Chat(model, TOKENIZER, Sampling(), 12)
    "".join(chat.say(TURNS[0]))
    before = list(chat.messages)
    broken = chat.say(TURNS[1])
    next(broken)
    broken.close()
    assert chat.messages == before
    assert "".join(chat.say(TURNS[2])) == anew(model, [*before, {"role": "user", "content": TURNS[2]}], 12)


def test_a_stop_token_with_a_text_is_not_said(model):
    whole = "".join(Chat(model, TOKENIZER, Sampling(temperature=4.0), 12).say(TURNS[0]))
    before = max(whole.index(letter) for letter in whole if letter.isascii())  # the others are several ids
    assert before > 2
    chat = Chat(model, TOKENIZER, Sampling(temperature=4.0), 12, stop=[ord(whole[before])])
    assert "".join(chat.say(TURNS[0])) == whole[:before] == chat.messages[-1]["content"]
    assert_what_is_kept_is_what_was_said(chat)


def test_the_oldest_turns_are_forgotten(model, capsys):
    chat = Chat(model, TOKENIZER, Sampling(), 12, system="Be brief.")
    for turn in range(6):
        "".join(chat.say(f"{turn} " * 20))
    assert chat.messages[0]["content"] == "Be brief."
    assert len(chat.messages) < 13
    assert "forgotten" in capsys.readouterr().err
    before = list(chat.messages)
    with pytest.raises(ConfigError, match="this message and the system message fill the context of 256") as error:
        "".join(chat.say("x" * 300))
    assert "shift" not in str(error.value)  # a chat has none
    assert chat.messages == before
    assert "forgotten" not in capsys.readouterr().err


def test_a_tokenizer_without_a_format(model):
    with pytest.raises(ConfigError, match="no chat format"):
        Chat(model, CharsTokenizer(b"abc"), Sampling(), 12)
