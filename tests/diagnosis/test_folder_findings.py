"""A good folder gives no finding; each way to break it gives one that names the place and says what is wrong in words."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file, save_file

from llama_eqx import save_pretrained
from llama_eqx.diagnosis.examination import examine
from llama_eqx.doctor import published
from llama_eqx.interop import huggingface
from llama_eqx.model.llama import build_model

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
HTML = b"\n<!DOCTYPE html><html><body>Access denied</body></html>"
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|pad|>", "<|python_tag|>")  # 58 to 63


def write_tokenizer(folder, *special):
    """58 letters and then the special tokens."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE({chr(0x4E00 + i): i for i in range(58)}, []))
    library.add_special_tokens(list(special))
    library.save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def good(tmp_path_factory, tiny):
    """Complete folders with a tokenizer, made once."""

    @functools.cache
    def make(tied=False, sharded=False, dtype="float32"):
        config = tiny(f"model.tied={str(tied).lower()}", "model/rotary=llama3_2")
        model = jax.tree.map(lambda x: x.astype(dtype), build_model(config, key=jax.random.key(0)))
        path = tmp_path_factory.mktemp("good") / "hf"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(huggingface, "SHARD_BYTES", 30_000 if sharded else 10**9)
            save_pretrained(model, path, format="hf")
        (path / "manifest.json").unlink()  # what is broken here is not the copy
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 59}))
        write_tokenizer(path, *SPECIAL)
        return path

    return make


@pytest.fixture
def folder(good, tmp_path):
    """`folder(tied=True)` is a copy to be broken."""
    return lambda **made: shutil.copytree(good(**made), tmp_path / "hf")


def edit(folder, change):
    """Applies `change` to the tensors of each file."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def put(name, index, value):
    def change(tensors):
        if name in tensors:
            tensors[name] = tensors[name].copy()
            tensors[name][index] = value

    return change


def config(**changes):
    return lambda folder, change_json: change_json(folder / CONFIG, **changes)


def tensors(change):
    return lambda folder, change_json: edit(folder, change)


def write(name, content):
    return lambda folder, change_json: (folder / name).write_bytes(content)


def chat(**changes):
    def break_(folder, change_json):
        change_json(folder / "tokenizer_config.json", chat_template="{{ messages }}", eos_token="<|eot_id|>")
        change_json(folder / "generation_config.json", **changes)

    return break_


def shard(folder, number):
    return sorted(folder.glob("*.safetensors"))[number]


Q0, NORM, HEAD, UP1 = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
    "model.layers.1.mlp.up_proj.weight",
)
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

# What is done to a folder of one file (or of several), the severity, where it is said to be, and words that say what it is.
BROKEN = {
    "NaN": (
        tensors(put(Q0, (3, 5), np.nan)),
        "error",
        WEIGHTS,
        "model.layers.0.self_attn.q_proj.weight has 1 NaN and 0 infinite of 1,024 numbers, the first at (3, 5)",
    ),
    "infinity": (tensors(put(NORM, slice(2, 4), -np.inf)), "error", WEIGHTS, "0 NaN and 2 infinite of 32 numbers, the first at (2,)"),
    "zeros": (tensors(put(Q0, ..., 0)), "warning", WEIGHTS, "q_proj.weight is all zeros"),
    "missing tensor": (tensors(lambda t: t.pop(UP1)), "error", CONFIG, f"1 tensors are missing: {UP1}"),
    "missing head": (tensors(lambda t: t.pop(HEAD)), "error", CONFIG, '"tie_word_embeddings": true'),
    "extra tensor": (
        tensors(lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32)})),
        "error",
        CONFIG,
        "1 tensors are not part of this model: model.layers.0.self_attn.q_proj.bias",
    ),
    "integers": (tensors(lambda t: t.update({NORM: t[NORM].astype(np.int8)})), "error", CONFIG, "1 tensors are I8: model.norm.weight"),
    "mixed dtypes": (
        tensors(lambda t: t.update({NORM: t[NORM].astype(np.float16)})),
        "note",
        CONFIG,
        "the dtypes are mixed: model.norm.weight in F16",
    ),
    "other rank": (tensors(lambda t: t.update({NORM: t[NORM][None]})), "error", WEIGHTS, "model.norm.weight is (1, 32), wanted (32,)"),
    "kv_heads": (
        config(num_key_value_heads=4),
        "error",
        CONFIG,
        "num_key_value_heads x head_dim is 32, but 16 in the weights: model.layers.{0-2}.self_attn.k_proj.weight",
    ),
    "layers": (config(num_hidden_layers=2), "error", CONFIG, "9 tensors are not part of this model: model.layers.2.input_layernorm.weight"),
    "more layers": (config(num_hidden_layers=5), "error", CONFIG, "18 tensors are missing: model.layers.{3-4}.input_layernorm.weight"),
    "layers beyond all sense": (
        config(num_hidden_layers=1000),
        "error",
        CONFIG,
        "the settings ask for 1,000 layers, and there are 30 tensors",
    ),
    "vocabulary": (config(vocab_size=80), "error", CONFIG, "vocab_size is 80, but 64 in the weights"),
    "mlp": (config(intermediate_size=64), "error", CONFIG, "intermediate_size is 64, but 48 in the weights"),
    "dtype": (config(dtype="bfloat16"), "warning", CONFIG, "dtype is bfloat16, but the weights are float32: transformers rounds them"),
    "activation": (config(hidden_act="gelu"), "error", CONFIG, "hidden_act is 'gelu'"),
    "two thetas": (config(rope_theta=1e4), "error", CONFIG, "rope_theta is 10000.0 by the older keys and 500000.0 in rope_parameters"),
    "own code": (
        config(auto_map={"AutoModel": "evil.Model"}),
        "error",
        CONFIG,
        "a repository with code of its own: auto_map in config.json",
    ),
    "config cut short": (write(CONFIG, b'{"vocab_size": 6'), "error", CONFIG, "not JSON"),
    "config is a page": (write(CONFIG, HTML), "error", CONFIG, "a web page (HTML)"),
    "no config": (lambda folder, _: (folder / CONFIG).unlink(), "error", CONFIG, "the model's sizes are not known"),
    "LFS pointer": (write(WEIGHTS, LFS), "error", WEIGHTS, "a Git LFS pointer, not the file itself"),
    "LFS tokenizer": (write("tokenizer.json", LFS), "error", "tokenizer.json", "a Git LFS pointer"),
    "web page": (write(WEIGHTS, HTML), "error", WEIGHTS, "a web page (HTML)"),
    "empty": (write(WEIGHTS, b""), "error", WEIGHTS, "an empty file"),
    "cut short": (
        lambda folder, _: write(WEIGHTS, (folder / WEIGHTS).read_bytes()[:-100])(folder, _),
        "error",
        WEIGHTS,
        "not a complete safetensors file",
    ),
    "no weights": (lambda folder, _: (folder / WEIGHTS).unlink(), "error", WEIGHTS, "there are no weights here"),
    "pickles": (
        lambda folder, _: (folder / WEIGHTS).rename(folder / "pytorch_model.bin"),
        "error",
        WEIGHTS,
        "weights are pickled (pytorch_model.bin)",
    ),
    "index as well": (write(INDEX, b'{"weight_map": {}}'), "warning", INDEX, "beside model.safetensors, which is read instead"),
    "stray shard": (
        lambda folder, _: write("model-00002-of-00002.safetensors", (folder / WEIGHTS).read_bytes())(folder, _),
        "warning",
        "model-00002-of-00002.safetensors",
        "a shard too many",
    ),
    "tokenizer too large": (
        lambda folder, _: write_tokenizer(folder, *SPECIAL, *"abcdefg"),
        "error",
        "tokenizer.json",
        "has 71 ids, and the embedding 64 rows: the ids from 64 on have no embedding",
    ),
    "tokenizer too small": (lambda folder, _: write_tokenizer(folder, *SPECIAL[:2]), "note", "tokenizer.json", "the last 4 are never read"),
    "EOS out of range": (
        lambda folder, change: change(folder / "generation_config.json", eos_token_id=[59, 64]),
        "error",
        "generation_config.json",
        "eos_token_id is 64, outside of the vocabulary of 64",
    ),
    "padding out of range": (
        config(pad_token_id=128004),
        "error",
        CONFIG,
        "pad_token_id is 128,004, outside of the vocabulary of 64",
    ),
    "no EOS": (
        lambda folder, change: (change(folder / "generation_config.json", eos_token_id=...), change(folder / CONFIG, eos_token_id=None)),
        "warning",
        CONFIG,
        "eos_token_id is not set",
    ),
    "chat, one EOS": (
        chat(eos_token_id=59),
        "warning",
        "generation_config.json",
        'eos_token_id 59 lacks <|eom_id|>, <|eot_id|>: answers run past the end of the turn. Next: "eos_token_id": [59, 60, 61]',
    ),
    "chat, EOS of turns": (chat(eos_token_id=61), "warning", "generation_config.json", "eos_token_id 61 lacks <|end_of_text|>, <|eom_id|>"),
    "other EOS": (
        lambda folder, change: change(folder / "tokenizer_config.json", eos_token="<|eom_id|>"),
        "warning",
        "tokenizer_config.json",
        "eos_token is <|eom_id|> (60), and generation_config.json says eos_token_id 59",
    ),
}

SHARDED = {
    "missing shard": (lambda folder, _: shard(folder, 1).unlink(), "error", "model-00002-of-", "a missing shard: the index names it"),
    "extra shard": (
        lambda folder, _: write("model-00009-of-00009.safetensors", shard(folder, 0).read_bytes())(folder, _),
        "warning",
        "model-00009-of-00009.safetensors",
        "a shard too many",
    ),
    "shards exchanged": (
        lambda folder, _: write(shard(folder, 1).name, shard(folder, 0).read_bytes())(folder, _),
        "error",
        INDEX,
        "tensors are not in the file that the index names for them",
    ),
    "outside": (
        lambda folder, _: write(INDEX, (folder / INDEX).read_bytes().replace(b"model-00001", b"../model-00001"))(folder, _),
        "error",
        INDEX,
        "lies outside of the folder",
    ),
    "no index": (lambda folder, _: (folder / INDEX).unlink(), "error", INDEX, "no reader knows of model-00001"),
    "index without a map": (write(INDEX, b'{"weight_map": ["a"]}'), "error", INDEX, "weight_map is not a map"),
    "size": (lambda folder, change: change(folder / INDEX, metadata={"total_size": 7}), "note", INDEX, "total_size is 7 bytes"),
}

TIED = {
    "stored twice": (
        tensors(lambda t: t.update({HEAD: t["model.embed_tokens.weight"] + np.float32(0.25)})),
        "error",
        CONFIG,
        "tied, yet stored twice and different: lm_head.weight and model.embed_tokens.weight are up to 0.25 apart",
    ),
    "filed as untied": (
        lambda folder, change: (
            change(folder / CONFIG, tie_word_embeddings=False),
            edit(folder, lambda t: t.update({HEAD: t["model.embed_tokens.weight"].copy()})),
        ),
        "note",
        CONFIG,
        "a copy of model.embed_tokens.weight: they diverge from the first training step on",
    ),
}


@pytest.mark.parametrize("made", [{}, {"tied": True}, {"sharded": True}, {"dtype": "bfloat16"}, {"dtype": "float16", "sharded": True}])
def test_good_folders_give_no_finding(folder, made):
    report = examine(str(folder(**made)), published, weights=True)
    assert report.findings == ()
    assert str(report).endswith("nothing wrong found")
    assert not report.wrong


def test_a_copy_of_a_tied_table_and_old_frequencies_are_no_finding(folder):
    folder = folder(tied=True)
    extra = {HEAD: "model.embed_tokens.weight"}
    edit(
        folder,
        lambda t: t.update(
            {name: t[source].copy() for name, source in extra.items()},
            **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)},
        ),
    )
    assert examine(str(folder), published, weights=True).findings == ()


@pytest.mark.parametrize("broken", [*BROKEN, *SHARDED, *TIED])
def test_broken_folders(folder, change_json, broken):
    break_, severity, where, words = (BROKEN | SHARDED | TIED)[broken]
    path = folder(tied=broken in TIED, sharded=broken in SHARDED)
    break_(path, change_json)
    report = examine(str(path), published, weights=True)
    found = [finding for finding in report.findings if finding.where.startswith(where) and words in str(finding)]
    assert [finding.severity for finding in found] == [severity], str(report)
    assert report.wrong is any(finding.severity != "note" for finding in report.findings)
    assert str(found[0]) in str(report).splitlines()
