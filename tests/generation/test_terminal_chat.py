"""Turns of a conversation on one cache, against the whole conversation read anew."""

import equinox as eqx
import jax
import pytest

from llama_eqx import build_model
from llama_eqx.data.chat import chat_format
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer
from llama_eqx.errors import ConfigError
from llama_eqx.generation.chat import Chat
from llama_eqx.generation.decode import generate_tokens
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.text import following

TOKENIZER = BytesTokenizer()
TURNS = ["Who are you?", "Ça va, 世界?", "Go on"]


@pytest.fixture(scope="module")
def model(tiny):
    """With weights so large that a single token of the conversation tells."""
    model = build_model(tiny("model.dims.vocab=258", "model.context=256"), key=jax.random.key(0))
    return eqx.tree_at(lambda m: m.blocks, model, jax.tree.map(lambda leaf: 3 * leaf, model.blocks))


def anew(model, messages, n):
    ids, _ = chat_format(TOKENIZER).encode(messages, TOKENIZER, generate=True)
    (row,) = generate_tokens(model, [ids], n, stop=TOKENIZER.stop).tokens
    return "".join(following(TOKENIZER, ids, row))


def test_each_turn_answers_the_whole_conversation(model):
    chat = Chat(model, TOKENIZER, Sampling(), 12, system="Be brief.")
    talk, reused = [{"role": "system", "content": "Be brief."}], []
    for turn in TURNS:
        answer = "".join(chat.say(turn))
        talk.append({"role": "user", "content": turn})
        assert answer == anew(model, talk, 12)
        talk.append({"role": "assistant", "content": answer})
        reused.append(chat.reused)
    assert chat.messages == talk
    assert 0 == reused[0] < reused[1] < reused[2]


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


def test_the_oldest_turns_are_forgotten(model, capsys):
    chat = Chat(model, TOKENIZER, Sampling(), 12, system="Be brief.")
    for turn in range(6):
        "".join(chat.say(f"{turn} " * 20))
    assert chat.messages[0]["content"] == "Be brief."
    assert len(chat.messages) < 13
    assert "forgotten" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="context of 256"):
        "".join(chat.say("x" * 300))


def test_a_tokenizer_without_a_format(model):
    with pytest.raises(ConfigError, match="no chat format"):
        Chat(model, CharsTokenizer(b"abc"), Sampling(), 12)
