"""Text from Hugging Face folders, against transformers in the same folder."""

import base64
import json
import sys

import jax
import pytest
import torch
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama_eqx import build_model, generate, save_pretrained
from llama_eqx.compose import run_verb
from llama_eqx.data.tokenizer import TiktokenTokenizer
from llama_eqx.data.tokenizer.tiktoken import PATTERN

TEXT = "The quick brown fox, aged 1234, jumps over the lazy dog.\n" * 20
PROMPT = "The fox <|eot_id|>"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A model with Llama 3's kind of tokenizer.json, and one with Llama 2's tokenizer.model."""
    from tiktoken._educational import bpe_train
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    for name, vocab in {"llama2": 300, "llama3": 280 + 256}.items():
        model = build_model(tiny(f"model.dims.vocab={vocab}"), key=jax.random.key(1))
        save_pretrained(model, folder / name, format="hf")
    SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "llama2" / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    ranks = bpe_train(TEXT, 280, PATTERN, visualise=None)
    file = folder / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))
    special = list(TiktokenTokenizer(file.read_bytes()).special)
    library = TikTokenConverter(str(file), PATTERN, extra_special_tokens=special).converted()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.save_pretrained(folder / "llama3")
    return folder


def printed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_verb("generate", generate.main)
    assert not ended.value.code
    return capsys.readouterr().out


def reference(folder, name):
    """The ids of the prompt and a function from ids to text: sentencepiece for Llama 2, transformers for Llama 3."""
    if name == "llama2":
        pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
        return [1, *pieces.encode(PROMPT)], pieces.decode
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = tokenizer(PROMPT, add_special_tokens=False, split_special_tokens=True).input_ids
    return [280, *ids], lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def continued(folder, ids):
    """The greedy continuation by transformers, which stops where generation_config.json says."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = torch.tensor([ids])
    found = model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=12, pad_token_id=0)
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_a_hugging_face_folder_is_continued_as_by_transformers(name, folders, monkeypatch, capsys):
    folder = folders / name
    ids, text = reference(folder, name)
    new = continued(folder, ids)
    assert len(new) == 12
    arguments = [f"checkpoint={folder}", f"prompt={PROMPT}", "max_new_tokens=12", "temperature=0"]
    assert printed(monkeypatch, capsys, *arguments) == text([*ids, *new]) + "\n"

    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, new[5]]}))
    shorter = continued(folder, ids)
    assert len(shorter) < 12
    assert printed(monkeypatch, capsys, *arguments) == text([*ids, *shorter]) + "\n"
