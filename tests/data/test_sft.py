"""Conversations: what is learned of them, and what is wrong with a file of them."""

import base64
import dataclasses
import gzip
import json

import numpy as np
import pytest

from llama_eqx import load_config
from llama_eqx.data.dataset import open_data
from llama_eqx.data.sft import SftConfig
from llama_eqx.data.shards import DELETE
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer, TiktokenTokenizer
from llama_eqx.errors import ConfigError, DataError

TOKENIZER = BytesTokenizer()

GSM8K = {
    "question": "Natalia sold clips to {a} of her friends in April, and then she sold {b} more in May. How many did she sell altogether?",
    "answer": "Natalia sold {a}+{b} = <<{a}+{b}={c}>>{c} clips altogether.\n#### {c}",
}


def gsm8k(count):
    numbers = [{"a": i, "b": 2 * i, "c": 3 * i} for i in range(count)]
    return [{key: text.format(**values) for key, text in GSM8K.items()} for values in numbers]


@pytest.fixture
def sft(tmp_path):
    """The config of data=sft with those lines in a file."""

    def sft(lines, *overrides):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
        return load_config("data=sft", f"data.path={path}", "data.validation_fraction=0.3", *overrides).data

    return sft


def opened(config, seq_len=512, tokenizer=TOKENIZER):
    return open_data(config, tokenizer, seq_len=seq_len, seed=0)


def learned(rows):
    """The text of the targets that the loss counts, of each segment of all rows."""
    batch = rows.read(np.arange(len(rows)))
    found = []
    for targets, mask, segments in zip(batch.targets, batch.loss_mask, batch.segment_ids, strict=True):
        for segment in range(1, segments.max() + 1):
            found.append(bytes(t for t in targets[(segments == segment) & (mask > 0)].tolist() if t < 256).decode())
    return found


@pytest.mark.parametrize("rows", ["packed", "single"])
def test_answers_are_learned_and_questions_are_not(sft, rows):
    examples = gsm8k(30)
    lines = [example | {"answer": f"{example['answer']}\n"} for example in examples]  # white space around is not written
    data = opened(sft(lines, "data.prompt_key=question", "data.response_key=answer", f"data.rows={rows}"))
    answers = learned(data.train) + learned(data.val)
    assert sorted(answer.strip() for answer in answers) == sorted(example["answer"] for example in examples)
    assert len(data.train) == (len(learned(data.train)) if rows == "single" else -(-len(learned(data.train)) // 2))
    batch = data.train.read(np.arange(len(data.train)))
    ends = batch.targets[batch.loss_mask > 0] == BytesTokenizer.eos
    assert ends.sum() == len(learned(data.train))  # the end of the turn is learned too
    assert batch.loss_mask.sum() == data.train.counted(np.arange(len(data.train)))
    assert data.val.bytes == sum(len(answer.strip().encode()) for answer in learned(data.val))


def test_every_turn_of_the_assistant_is_learned(sft):
    turns = [("system", "Be brief."), ("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2")]
    conversation = {"messages": [{"role": role, "content": content} for role, content in turns]}
    pairs = [{"prompt": str(i), "response": "x"} for i in range(20)]
    data = opened(sft([conversation, *pairs]))
    found = [text.split() for text in learned(data.train) + learned(data.val)]
    assert sorted(found) == sorted([["1", "2"], *[["x"]] * 20])


BAD = {
    "{": "not JSON",
    "[1]": "not a JSON object",
    '{"prompt": "a"}': 'neither "messages" nor strings "prompt" and "response"',
    '{"prompt": "a", "answer": "b"}': "data.prompt_key=KEY data.response_key=KEY name two of prompt, answer",
    '{"prompt": "a", "response": 1}': 'neither "messages" nor strings',
    '{"messages": {}}': '"messages" is not a list',
    '{"messages": [{"role": "user"}]}': r"messages\[0\]: not a message",
    '{"messages": []}': "no messages",
    '{"messages": [{"role": "assistant", "content": "a"}]}': r"messages\[0\].role: 'assistant' at the beginning",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}': (
        r"messages\[1\].role: 'user' after user"
    ),
    '{"messages": [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]}': "a content, not name",
    '{"messages": [{"role": "user", "content": "a"}]}': "the assistant says nothing",
    r'{"prompt": "\ud800", "response": "a"}': "not JSON",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_or_skipped_and_counted(sft, line):
    good = gsm8k(30)
    lines = [*good[:5], "", line, *good[5:]]
    keys = ["data.prompt_key=question", "data.response_key=answer"] if "prompt" not in line else []
    lines = lines if keys else [{"prompt": x["question"], "response": x["answer"]} if isinstance(x, dict) else x for x in lines]
    with pytest.raises(DataError, match=BAD[line]) as error:
        opened(sft(lines, *keys))
    assert error.value.where.endswith("a.jsonl:7")
    assert "data.on_error=skip" in error.value.next
    data = opened(sft(lines, "data.on_error=skip", *keys))
    assert len(learned(data.train) + learned(data.val)) == 30
    assert data.notes == [f"1 records or files cannot be read and are skipped, the first at {error.value.where}"]
    assert opened(sft(lines, "data.on_error=skip", *keys)).notes == data.notes  # from the cache, too


@pytest.mark.parametrize("damage", ["train-learned.ids.npy", "sha256.json"])
def test_damaged_marks_are_named(sft, cache, damage):
    config = sft([{"prompt": "a" * i, "response": "b"} for i in range(30)])
    opened(config)
    (folder,) = (cache / "tokens").iterdir()
    content = bytearray((folder / damage).read_bytes())
    content[-1] ^= 64
    (folder / damage).write_bytes(content)
    with pytest.raises(DataError) as error:
        opened(config)
    assert (error.value.where, error.value.next) == (str(folder), DELETE)


def test_conversations_that_change_meanwhile_are_not_kept(sft, cache, monkeypatch):
    config, identity = sft([{"prompt": str(i), "response": "b"} for i in range(30)]), SftConfig.identity

    def then_another(self):
        found = identity(self)
        sft([{"prompt": str(i), "response": "c"} for i in range(30)])
        return found

    monkeypatch.setattr(SftConfig, "identity", then_another)
    with pytest.raises(DataError, match="the files changed while they were read"):
        opened(config)
    assert list((cache / "tokens").iterdir()) == []


def test_a_damaged_compressed_file_is_left_out_whole(sft, tmp_path):
    config = sft([{"prompt": "a" * i, "response": "b"} for i in range(30)], "data.on_error=skip")
    content = bytearray(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    content[-8] ^= 1  # of the checksum
    (tmp_path / "b.ndJSON.gz").write_bytes(content)
    data = opened(dataclasses.replace(config, path=str(tmp_path)))
    assert len(learned(data.train) + learned(data.val)) == 30
    assert data.notes == [f"1 records or files cannot be read and are skipped, the first at {tmp_path / 'b.ndJSON.gz'}"]
    with pytest.raises(DataError, match="cannot read") as error:
        opened(dataclasses.replace(config, path=str(tmp_path), on_error="refuse"))
    assert error.value.next == "download or copy this file again, or data.on_error=skip"


def test_a_conversation_that_the_format_does_not_know_is_named(sft, monkeypatch):
    monkeypatch.setattr(BytesTokenizer, "chat", "llama2")
    messages = [{"role": role, "content": "x"} for role in ("user", "assistant", "tool", "assistant")]
    with pytest.raises(DataError, match="'tool' after assistant, where user is expected") as error:
        opened(sft([{"messages": messages}, *({"prompt": "a", "response": "b"} for _ in range(9))]))
    assert error.value.where.endswith(r"a.jsonl:1, messages[2].role")


def test_a_long_conversation_is_refused_or_cut(sft):
    lines = [{"prompt": "a" * 10 * i, "response": "b" * 100} for i in range(1, 20)]
    with pytest.raises(DataError, match="longer than the 65 tokens of a row") as error:
        opened(sft(lines), seq_len=64)
    assert "a.jsonl:" in error.value.where
    data = opened(sft(lines, "data.long_documents=cut"), seq_len=64)
    assert sum(text.count("b") for text in learned(data.train) + learned(data.val)) == 1900
    assert data.train.index.counted.min() > 0  # pieces without an answer are in no row


def test_no_path_no_conversation_and_no_validation_split_say_what_to_type(sft, tmp_path):
    with pytest.raises(ConfigError, match=r"data=sft needs data\.path=FILE\.jsonl"):
        opened(load_config("data=sft").data)
    with pytest.raises(DataError, match="no conversation here"):
        opened(sft([""]))
    with pytest.raises(DataError, match=r"no conversation fell into the (train|val) split") as error:
        opened(sft(gsm8k(1), "data.prompt_key=question", "data.response_key=answer"))
    assert "data.validation_fraction" in error.value.next
    with pytest.raises(ConfigError, match="no chat format") as error:
        opened(sft(gsm8k(9), "data.prompt_key=question", "data.response_key=answer"), tokenizer=CharsTokenizer(b"abc"))
    assert error.value.next.startswith("tokenizer=bytes")


def test_other_roles_are_other_data(sft):
    one, two = ([{"role": "system", "content": "x"}] * n + [{"role": "user", "content": "x"}] for n in (0, 1))
    identities = {sft([{"messages": [*turns, {"role": "assistant", "content": "y"}]}]).identity() for turns in (one, two)}
    assert len(identities) == 2


def test_another_format_is_other_data(sft):
    """Its fingerprint does not tell the chat format of a tokenizer."""
    ranks = b"".join(base64.b64encode(bytes([i])) + f" {i}\n".encode() for i in range(256))
    config = sft([{"prompt": "a", "response": "b"}] * 9)
    longest = [opened(config, tokenizer=TiktokenTokenizer(ranks, chat=chat)).train.index.lengths.max() for chat in ("llama3", "llama3_1")]
    assert longest[0] < longest[1]  # which has a system turn
