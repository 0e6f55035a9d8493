"""Prompts are read from a file and a text ends at a stop string, both without a model."""

import json
import re
import subprocess

import pytest

from llama_eqx import load_config
from llama_eqx.compose import conf_dir
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer
from llama_eqx.errors import DataError
from llama_eqx.generation.prompts import read_prompts
from llama_eqx.generation.text import _continuation, stops_at, up_to


def test_the_stop_string_of_the_help():
    """What a shell makes of it is a line that is empty."""
    typed = re.search(r"stop_strings=\S+", (conf_dir() / "generate.yaml").read_text().split("template:")[1])[0]
    given = subprocess.run(["bash", "-c", f"printf %s {typed}"], capture_output=True, text=True, check=True).stdout
    assert load_config("checkpoint=a", "prompt=b", given, name="generate").stop_strings == ("\n\n",)


class Counting(BytesTokenizer):
    decoded = 0

    def _decode(self, ids):
        self.decoded += len(ids)
        return super()._decode(ids)


def test_what_is_looked_through_for_a_stop_string():
    """It is found as soon as it is there, over calls and within characters, and of a long text only what is new is decoded."""
    prompt, row, tokenizer = list(b"so "), list(("naïve 你好, " * 200 + "the end: more").encode()), Counting()
    strings = ("好, the e", "never")
    ended = stops_at(tokenizer, [prompt], strings)
    for n in range(1, len(row) + 7, 7):
        text = bytes(row[:n]).decode(errors="replace")
        assert ended([row[:n]]) == [strings[0] in text]
    assert tokenizer.decoded < 8 * len(row)
    tokenizer.decoded = 0
    found = _continuation(tokenizer, prompt, strings, (), row, [0.0] * len(row), [[]] * len(row))
    assert bytes(found.tokens).decode().endswith(strings[0])
    assert tokenizer.decoded < 8 * len(row) * len(row).bit_length()


@pytest.mark.parametrize("strings", [("end",), ("n", "xyz"), ("ab", "bca")])
def test_text_up_to_a_string_in_any_parts(strings):
    text = "ababcabc xy the end."
    places = [text.find(string) for string in strings if string in text]
    for size in range(1, 8):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        assert "".join(up_to(strings, parts)) == text[: min(places)]
    assert list(up_to((), ["a", "b"])) == ["a", "b"]


def test_what_ends_a_line_of_prompts(tmp_path):
    """A line feed does, and none of what Python's splitlines takes for an end beside it; a BOM is no part of the text."""
    texts = ["a\u2028b", "c\x85d", "e\x0cf"]
    plain, objects, capitals = tmp_path / "p.txt", tmp_path / "p.jsonl", tmp_path / "p.NDJSON"
    plain.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    objects.write_bytes(b"\xef\xbb\xbf" + "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for text in texts).encode())
    capitals.write_bytes(objects.read_bytes())
    for file in (plain, objects, capitals):
        asked = read_prompts(None, str(file), BytesTokenizer())
        assert [each.given["prompt"] for each in asked] == texts
        assert [each.where for each in asked] == [f"{file}:{number}" for number in (1, 2, 3)]


def test_a_prompt_with_a_character_that_the_tokenizer_does_not_know(tmp_path):
    (file := tmp_path / "p.txt").write_text("ab\nabc\n")
    for given, where in (((None, str(file)), f"{file}:2"), (("abc", None), "prompt")):
        with pytest.raises(DataError, match="the character 'c'") as error:
            read_prompts(*given, CharsTokenizer(b"ab"))
        assert error.value.where == where
