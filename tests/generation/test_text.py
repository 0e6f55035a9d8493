"""Text from Hugging Face folders, against transformers in the same folder."""

import argparse
import base64
import io
import json
import re
import shutil
import subprocess
import sys

import equinox as eqx
import jax
import numpy as np
import pytest
import torch
import transformers
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from llama_eqx import build_model, generate, generate_tokens, load_config, load_pretrained, save_pretrained
from llama_eqx.data.chat import chat_format
from llama_eqx.data.tokenizer import BytesTokenizer, CharsTokenizer, HuggingFaceTokenizer, TiktokenTokenizer, find_tokenizer
from llama_eqx.data.tokenizer.export import tokenizer_json
from llama_eqx.data.tokenizer.sentencepiece import LLAMA_SETTINGS
from llama_eqx.data.tokenizer.tiktoken import PATTERN
from llama_eqx.errors import DataError
from llama_eqx.generation.run import _said, loaded
from llama_eqx.generation.sampling import Sampling
from llama_eqx.generation.text import Continuation, following
from llama_eqx.generation.text import continued as continued_text
from llama_eqx.verb import run_verb

TEXT = "The quick brown fox, aged 1234, jumps over the lazy dog.\n" * 20


PROMPT = "The fox <|eot_id|>"


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """A model with Llama 3's kind of tokenizer.json, and one with Llama 2's tokenizer.model."""
    from tiktoken._educational import bpe_train
    from tokenizers.processors import TemplateProcessing
    from transformers.convert_slow_tokenizer import TikTokenConverter

    folder = tmp_path_factory.mktemp("text")
    (folder / "text.txt").write_text(TEXT)
    for name, vocab in {"llama2": 300, "llama3": 280 + 256}.items():
        model = build_model(tiny(f"model.dims.vocab={vocab}"), key=jax.random.key(1))
        save_pretrained(model, folder / name, format="hf")
    prefix = str(folder / "llama2" / "tokenizer")
    SentencePieceTrainer.train(input=str(folder / "text.txt"), model_prefix=prefix, vocab_size=300, **LLAMA_SETTINGS)
    ranks = bpe_train(TEXT, 280, PATTERN, visualise=None)
    file = folder / "tokenizer.model"
    file.write_bytes(b"".join(base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()))
    special = list(TiktokenTokenizer(file.read_bytes()).special)
    library = TikTokenConverter(str(file), PATTERN, extra_special_tokens=special).converted()
    library.post_processor = TemplateProcessing(single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 280)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.save_pretrained(folder / "llama3")
    return folder


def printed(monkeypatch, capsys, *arguments, said=None):
    """What comes on the terminal; into the list `said` goes what is said beside it."""
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_verb("generate", generate.main)
    assert not ended.value.code
    out, err = capsys.readouterr()
    if said is not None:
        said += err.splitlines()
    return out


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def failed(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["generate", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_verb("generate", generate.main)
    return ended.value.code, capsys.readouterr().err


def reference(folder, name):
    """The ids of the prompt and a function from ids to text: sentencepiece for Llama 2, transformers for Llama 3."""
    if name == "llama2":
        pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
        return [1, *pieces.encode(PROMPT)], pieces.decode
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer(PROMPT, split_special_tokens=True).input_ids, lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


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

    end = next(token for token in new[3:] if text([token]))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, end]}))
    shorter = continued(folder, ids)
    assert len(shorter) < 12
    said = text([*ids, *shorter[:-1]])  # what ends it has a text, which is not said
    assert said != text([*ids, *shorter])
    assert printed(monkeypatch, capsys, *arguments) == said + "\n"
    (line,) = lines(printed(monkeypatch, capsys, *arguments, "top_logprobs=1"))
    assert (line["tokens"], said.endswith(line["text"]), line["end"]) == (shorter, True, "stop")
    assert printed(monkeypatch, capsys, *arguments, "beams=1") == said + "\n"
    tokenizer = find_tokenizer(folder)
    assert continued_text(load_pretrained(folder), tokenizer, ids, 12, Sampling()) == said


@pytest.mark.parametrize("format", ["meta", "native"])
def test_other_formats_are_continued_alike(format, folders, tmp_path, monkeypatch, capsys):
    save_pretrained(load_pretrained(folders / "llama3"), tmp_path / format, format=format)
    if format == "meta":
        shutil.copy(folders / "tokenizer.model", tmp_path)  # beside the folder, as in Meta's own downloads
    else:
        find_tokenizer(folders / "llama3").save(tmp_path / format / "tokenizer")
    arguments = ["prompt=The fox", "max_new_tokens=12", "temperature=0"]
    wanted = printed(monkeypatch, capsys, f"checkpoint={folders / 'llama3'}", *arguments)
    assert printed(monkeypatch, capsys, f"checkpoint={tmp_path / format}", *arguments) == wanted


def test_a_file_of_prompts(folders, tmp_path, monkeypatch, capsys):
    """Each sample is what the prompt alone gives, whatever the batch; a mesh changes nothing."""
    folder, file = folders / "llama3", tmp_path / "prompts.txt"
    monkeypatch.setenv("HOME", str(tmp_path))
    file.write_text("The fox\nover\nA lazy dog\n")
    common = [f"checkpoint={folder}", "max_new_tokens=6", "temperature=1", "samples=2"]
    printed(monkeypatch, capsys, *common, "prompts=~/prompts.txt", "output=~/a.jsonl", "batch=2", "top_logprobs=2")
    found = lines((tmp_path / "a.jsonl").read_text())
    assert [(line["prompt"], line["sample"]) for line in found] == [(p, i) for p in ("The fox", "over", "A lazy dog") for i in (0, 1)]
    assert all(len(place) == 2 for line in found for place in line["top_logprobs"])
    alone = lines(printed(monkeypatch, capsys, *common, "prompt=The fox"))
    assert [line["text"] for line in alone] == [line["text"] for line in found[:2]]
    split = lines(printed(monkeypatch, capsys, *common, f"prompts={file}", "mesh=cpu-8"))
    assert [line["tokens"] for line in split] == [line["tokens"] for line in found]
    context = load_pretrained(folder).config.context
    full = next(text for n in range(context) if len(find_tokenizer(folder).encode(text := "The fox" + " a" * n)) == context - 3)
    file.write_text(f"{full}\nThe fox\n{full}\n")
    new = lines(printed(monkeypatch, capsys, *common, f"prompts={file}", said=(notes := [])))
    assert [(len(line["tokens"]), line["end"]) for line in new[::2]] == [(2, "length"), (6, "length"), (2, "length")]
    assert notes[0] == f"{file}:1: 2 new tokens fill the context of {context}; prompts with room for fewer than 6: 2"


def test_an_alternative_reads_as_it_does_there(folders):
    """Llama 2's tokens lose the space before them when they are alone."""
    tokenizer, text = find_tokenizer(folders / "llama2"), "The quick brown fox"
    first, *ids = tokenizer.encode(text)
    continuation = Continuation("", ids, [0.0] * len(ids), [[(i, 0.0)] for i in ids], "length")
    top = _said(tokenizer, [first], continuation, 0)["top_logprobs"]
    assert tokenizer.decode([first]) + "".join(best[0] for (best,) in top) == text


def test_a_model_with_more_ids_than_its_tokenizer(tiny, tmp_path, monkeypatch, capsys):
    """The most probable ids are not the tokenizer's: none is drawn, in any way of going on, nor told."""
    model = build_model(tiny("model.dims.vocab=512", "model.tied=false"), key=jax.random.key(1))
    model = eqx.tree_at(lambda m: m.lm_head, model, model.lm_head * jax.numpy.where(jax.numpy.arange(512) < 258, 1, 1e3))
    save_pretrained(model, tmp_path / "run", format="native")
    BytesTokenizer().save(tmp_path / "run" / "tokenizer")
    arguments = [f"checkpoint={tmp_path / 'run'}", "max_new_tokens=8"]
    for more in (["top_logprobs=3"], ["stop_strings=[never]"], ["beams=2"], [f"draft={tmp_path / 'run'}"]):
        assert printed(monkeypatch, capsys, *arguments, "prompt=The", *more)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n"))
    assert printed(monkeypatch, capsys, *arguments, "chat=true")
    assert continued_text(model, BytesTokenizer(), [256, 65], 8, Sampling()).startswith("A")


def test_stop_strings(folders, tmp_path, monkeypatch, capsys):
    """The text ends before the string, printed as it comes and in a file, and no token counts that was drawn after it."""
    folder = folders / "llama3"
    arguments = [f"checkpoint={folder}", "prompt=The fox", "max_new_tokens=40", "temperature=1", "seed=3"]
    whole = printed(monkeypatch, capsys, *arguments)[len("The fox") : -1]
    string = re.search("[A-Za-z0-9]", whole[2:])[0]
    cut = whole[: whole.index(string)]
    stops = "stop_strings=" + json.dumps([string, "never"])
    assert printed(monkeypatch, capsys, *arguments, stops) == "The fox" + cut + "\n"
    (line,) = lines(printed(monkeypatch, capsys, *arguments, stops, "top_logprobs=1"))
    assert (line["text"], line["end"]) == (cut, "stop")
    assert len(line["tokens"]) == len(line["logprobs"]) == len(line["top_logprobs"]) < 40


def test_a_character_at_the_edge_of_the_prompt(folders):
    """Llama 2's tokenizer.json decodes a run of bytes as a whole, and each as U+FFFD where the whole is not valid."""
    pieces = find_tokenizer(folders / "llama2")
    tokenizer = HuggingFaceTokenizer(tokenizer_json(pieces).encode())
    for prompt, rest in [("fox 你", "好"), ("😀", "😀 fox"), ("fox", " dog"), ("fox ", " dog")]:
        for each in (pieces, tokenizer):
            ids, whole = each.encode(prompt), each.encode(prompt + rest)
            assert whole[: len(ids)] == ids
            assert "".join(following(each, [1, *ids], whole[len(ids) :])) == rest


@pytest.mark.parametrize(
    ("content", "where", "what"),
    [
        ('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}', "p.jsonl", "raw text in line 1 and a conversation in line 2"),
        ('{"prompt": ""}', "p.jsonl:1", "empty prompt"),
        ("{", "p.jsonl:1", "not JSON"),
        ("[" * 3000, "p.jsonl:1", "not JSON"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "p.jsonl:1", "not valid Unicode"),
        ("[]", "p.jsonl:1", "either a prompt or messages"),
        ('{"messages": [{"role": "assistant", "content": "b"}]}', "p.jsonl:1: messages[0].role", "'assistant' at the beginning"),
        ("\n", "p.jsonl", "no prompts"),
        (None, "p.jsonl", "No such file"),
    ],
)
def test_bad_files_of_prompts(folders, tmp_path, monkeypatch, capsys, content, where, what):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    monkeypatch.setattr("llama_eqx.generation.run.loaded", lambda *given: pytest.fail("loaded the weights"))
    code, said = failed(monkeypatch, capsys, f"checkpoint={folders / 'llama3'}", f"prompts={tmp_path / 'p.jsonl'}")
    assert code == 3
    assert what in said
    assert f"where: {tmp_path / where}\n" in said


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["temperature=-1"], "-1.0 is not a temperature"),
        (["stop=[99999]"], "id 99999 is outside of the vocabulary"),
        (["prompts=FILE"], "prompt and prompts do not go together"),
        (["stop_strings=['']"], "an empty stop string"),
        (["min_p=2"], "2.0 is not in [0, 1]"),
        (["batch=0"], "0 is less than 1"),
        (["beams=0"], "0 is less than 1"),
        (["chat=true"], "prompt and chat do not go together"),
        (["prompt=null", "chat=true", "shift=true"], "chat and shift do not go together"),
        (["system=Be brief."], "a system message is for chat=true"),
        (["beams=4", "stop_strings=[a]"], "beams and stop_strings do not go together"),
        (["beams=4", "draft=somewhere"], "beams and draft do not go together"),
        (["beams=4", "repetition_penalty=1.2", "top_k=1"], "beams and top_k, repetition_penalty do not go together"),
        (["draft=somewhere", "top_logprobs=2"], "draft and top_logprobs do not go together"),
        (["draft=somewhere", "presence_penalty=0"], "draft and presence_penalty do not go together"),
        (["draft=somewhere", "drafted=0"], "0 is less than 1"),
        (["prefill_chunk=0"], "0 is less than 1"),
        (["seed=4294967296"], "4294967296 is more than 4294967295"),
        (["prompt="], "an empty prompt"),
        (["beams=2", "samples=3"], "3 samples of 2 beams"),
        (["mesh=cpu-8", "mesh.fsdp=1", "mesh.tensor=8"], "heads=4 does not divide"),
        (["max_new_tokens=0"], "0 is less than 1"),
        (["quantize=int8", "quantize_text=no/such/file"], "No such file or directory"),
        (["quantize=int8", "quantize_text=/dev/null"], "nothing to measure: 1 tokens"),
    ],
)
def test_bad_settings(folders, monkeypatch, capsys, arguments, what):
    """All is said before weights are loaded."""
    monkeypatch.setattr("llama_eqx.generation.run.load_pretrained", lambda *given, **settings: pytest.fail("loaded the weights"))
    code, said = failed(monkeypatch, capsys, f"checkpoint={folders / 'llama3'}", "prompt=The", *arguments)
    assert code == (3 if "quantize=int8" in arguments else 2)
    assert what in said
    assert "\nnext: " in said
    assert len(said.splitlines()) <= 4


def test_virtual_devices_are_there_before_files_are_opened(folders, tmp_path):
    """In a process of its own, since this one has eight devices already."""
    save_pretrained(load_pretrained(folders / "llama3"), tmp_path / "native", format="native")
    find_tokenizer(folders / "llama3").save(tmp_path / "native" / "tokenizer")
    arguments = [f"checkpoint={tmp_path / 'native'}", "prompt=The", "mesh=cpu-8", "mesh.fsdp=1", "mesh.tensor=8"]
    done = subprocess.run([sys.executable, "-m", "llama_eqx.generate", *arguments], capture_output=True, text=True)
    assert "heads=4 does not divide" in done.stderr


def test_past_the_context(folders, monkeypatch, capsys):
    arguments = [f"checkpoint={folders / 'llama3'}", "prompt=" + "a b c d " * 300, "max_new_tokens=5", "temperature=0"]
    code, said = failed(monkeypatch, capsys, *arguments)
    assert code == 2
    assert "pass the context of" in said
    assert "shift=true" in said
    context, notes = load_pretrained(folders / "llama3").config.context, []
    assert printed(monkeypatch, capsys, *arguments, "shift=true", said=notes)
    assert re.search(rf"prompt: shift leaves {context - 5} of its \d+ tokens, and room for 5 new ones", notes[0])


def test_a_chat_in_the_terminal(folders, tmp_path, monkeypatch, capsys):
    """Two turns of Llama 3's format: the second answer is that to the whole conversation. Between them lines that have no answer.

    A file with the first turn has the first answer.
    """
    folder = folders / "llama3"
    typed = b"Who are you?\n\n" + b"a b c d " * 300 + b"\nna\xefve\nReally?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
    arguments = [f"checkpoint={folder}", "max_new_tokens=8", "temperature=0"]
    (folder / "chat_template.jinja").write_text("<|im_start|>")
    first, second, end = printed(monkeypatch, capsys, *arguments, "chat=true", "system=Be brief.", said=(notes := [])).split("\n")
    assert end == ""
    assert notes[0] == "conversations in the format 'llama3_1', which is not that of chat_template.jinja"
    assert ["fill the context" in notes[1], "not valid Unicode" in notes[4]] == [True, True], notes
    tokenizer, model = find_tokenizer(folder), load_pretrained(folder)
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
    (file := tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}))
    (line,) = lines(printed(monkeypatch, capsys, *arguments, f"prompts={file}", said=(again := [])))
    assert (line["text"], again) == (first, notes[:1])
    for answer in (first, second):
        ids, _ = chat_format(tokenizer).encode(talk, tokenizer, generate=True)
        (row,) = generate_tokens(model, [ids], 8, stop=tokenizer.stop).tokens
        assert answer == "".join(following(tokenizer, ids, row))
        talk += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Really?"}]


def rounded(folder):
    """The model in transformers, with the weights of its products as torch's own quantiser rounds them to 8 bits, output by output."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for module in (module for module in model.modules() if isinstance(module, torch.nn.Linear)):
        weight = module.weight.detach()
        scales, zeros = weight.abs().amax(dim=1) / 127, torch.zeros(len(weight), dtype=torch.int32)
        # A new parameter: a head that is tied is rounded, and the embedding is not.
        module.weight = torch.nn.Parameter(torch.fake_quantize_per_channel_affine(weight, scales, zeros, 0, -128, 127))
    return model


def test_a_draft_and_beams(folders, monkeypatch, capsys):
    folder = folders / "llama3"
    arguments = [f"checkpoint={folder}", "prompt=The fox", "max_new_tokens=12", "temperature=0"]
    plain = printed(monkeypatch, capsys, *arguments)
    drafted = printed(monkeypatch, capsys, *arguments, f"draft={folder}", "drafted=2", said=(notes := []))
    assert (drafted, notes) == (plain, ["2.75 tokens of each reading of the model, with 2 drafted"])
    assert printed(monkeypatch, capsys, *arguments, "beams=1", said=(notes := [])) == plain
    assert notes == []
    assert printed(monkeypatch, capsys, *arguments, "beams=1", "temperature=2", "seed=5", said=notes) == plain
    assert notes == ["beams are searched and not drawn: temperature, top_p and seed change nothing"]
    best, second = lines(printed(monkeypatch, capsys, *arguments, "beams=3", "samples=2"))
    assert best["score"] > second["score"]


def test_a_text_to_measure_that_the_tokenizer_does_not_know(monkeypatch):
    """As that of Python's library, of whose characters a corpus need not have all."""
    monkeypatch.setattr("llama_eqx.generation.run.load_pretrained", lambda *given, **settings: pytest.fail("loaded the weights"))
    config = load_config("checkpoint=anywhere", "prompt=ab", "quantize=int8", name="generate")
    with pytest.raises(DataError, match="cannot read a text to measure: the character") as error:
        loaded(config, "anywhere", CharsTokenizer(b"ab"))
    assert (error.value.where, error.value.next) == (argparse.__file__, "quantize_text=FILE")


def test_eight_bits(folders, tmp_path, monkeypatch, capsys):
    """The perplexities that are printed are those of the model in transformers, as it is and rounded by another quantiser."""
    folder, text = folders / "llama3", tmp_path / "text.txt"
    text.write_text(TEXT[:100])  # fewer tokens than the context
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [f"checkpoint={folder}", "prompt=The fox", "quantize=int8", "quantize_text=~/text.txt"]
    out = printed(monkeypatch, capsys, *arguments, said=(notes := []))
    assert out.startswith("The fox")
    found = re.search(r"perplexity of the first \d+ tokens of \S+ ([\d.]+) -> ([\d.]+)", "\n".join(notes)).groups()
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(TEXT[:100])])
    models = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), rounded(folder)
    with torch.no_grad():
        before, after = (model(ids, labels=ids).loss.exp().item() for model in models)
    assert abs(after / before - 1) > 1e-4
    np.testing.assert_allclose(list(map(float, found)), [before, after], rtol=1e-5)


def test_eight_bits_of_a_model_of_a_long_context(folders, tmp_path, monkeypatch, capsys):
    """The text is read at once, all logits and scores of it: with a long context, only its beginning is."""
    folder = shutil.copytree(folders / "llama3", tmp_path / "long", ignore=shutil.ignore_patterns("manifest.json"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 131072}))
    (tmp_path / "text.txt").write_text(TEXT * 10)
    printed(
        monkeypatch, capsys, f"checkpoint={folder}", "prompt=The", "quantize=int8", f"quantize_text={tmp_path}/text.txt", said=(notes := [])
    )
    assert "perplexity of the first 2048 tokens of text.txt" in notes[0]
