"""A model on its way through the verbs, as a user types them: converted, trained, handed back, and the same at each step."""

import base64
import json
import re
import shutil

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from transformers.convert_slow_tokenizer import TikTokenConverter

from llama_eqx import load_pretrained
from llama_eqx.data.tokenizer import TiktokenTokenizer
from llama_eqx.data.tokenizer.tiktoken import PATTERN

transformers.utils.logging.disable_progress_bar()
SIZES = {"layers": 2, "embed": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96}
VOCAB, ENDS = 320 + 256, [321, 328, 329]  # ranks and special tokens; the ends of a text, a message and a turn
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (2, 20))
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def our_logits(folder):
    return np.asarray(eqx.filter_jit(lambda model, tokens: model(tokens))(load_pretrained(folder), jnp.asarray(TOKENS)))


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def in_transformers(folder):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as transformers writes it, with a tokenizer like Llama 3's, and the model that it was written from."""
    from tiktoken._educational import bpe_train

    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=SIZES["embed"],
            intermediate_size=SIZES["mlp"],
            num_hidden_layers=SIZES["layers"],
            num_attention_heads=SIZES["heads"],
            num_key_value_heads=SIZES["kv_heads"],
            max_position_embeddings=256,
            initializer_range=0.1,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 5e5},
            tie_word_embeddings=False,
            bos_token_id=320,
            eos_token_id=ENDS[0],
        )
    )
    folder = tmp_path_factory.mktemp("published") / "hf"
    model.save_pretrained(folder)
    text = "".join(f"What is {a} + {b}? It is {a + b}. The quick brown fox jumps over the lazy dog. " for a in range(20) for b in range(20))
    ranks = bpe_train(text, 320, PATTERN, visualise=None)
    lines = (base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items())
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    special = list(TiktokenTokenizer((folder / "tokenizer.model").read_bytes()).special)
    library = TikTokenConverter(str(folder / "tokenizer.model"), PATTERN, extra_special_tokens=special).converted()
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=library, chat_template="{{ messages }}", **ends).save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("starts", [("hf",), pytest.param(("meta", "hf", "native"), marks=pytest.mark.slow)], ids="-".join)
def test_there_and_back_again(tmp_path, published, starts, typed):
    source, reference = published
    expected = their_logits(reference)
    for format, begin, end in (("meta", source, "meta"), ("hf", "meta", "hf"), ("native", "hf", "native")):
        code, _, err = typed("convert", f"from={tmp_path / begin}", f"to={tmp_path / end}", f"format={format}")
        assert (code, "Traceback" in err) == (0, False), err
        assert np.abs(our_logits(tmp_path / end) - expected).max() < 1e-5
    assert np.abs(their_logits(in_transformers(tmp_path / "hf")) - expected).max() < 1e-5

    talk = ({"prompt": f"What is {a} + {b}?", "response": f"It is {a + b}."} for a in range(9) for b in range(9))
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(example) + "\n" for example in talk))
    for start in starts:
        run_dir = tmp_path / f"from {start}"
        sizes = [f"model.dims.{name}={size}" for name, size in SIZES.items()]
        tokenizer = ["tokenizer=tiktoken", f"tokenizer.path={tmp_path / start / 'tokenizer.model'}"]
        if start == "hf":
            tokenizer = ["tokenizer=hf", f"tokenizer.path={tmp_path / start}"]
        code, _, err = typed(
            "train",
            *("data=sft", f"data.path={tmp_path / 'talk.jsonl'}", *tokenizer),
            *(*sizes, f"model.dims.vocab={VOCAB}", "model.tied=false", f"init_from={tmp_path / start}", "checkpoint.export=hf"),
            *("train.steps=2", "train.batch_size=8", "train.seq_len=128", "train.sample_tokens=0", "schedule=constant"),
            *(f"run_dir={run_dir}", "tracking.wandb.mode=disabled"),
        )
        assert code == 0, err
        exported = in_transformers(run_dir / "export")
        assert np.abs(their_logits(exported) - our_logits(run_dir)).max() < 1e-5
        assert np.abs(their_logits(exported) - expected).max() > 1e-3  # it has learned something
        assert transformers.GenerationConfig.from_pretrained(run_dir / "export").eos_token_id == ENDS
        assert (run_dir / "export" / "original" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    handed_on = transformers.AutoTokenizer.from_pretrained(tmp_path / "from hf" / "export")
    assert handed_on.chat_template == "{{ messages }}"
    # The run itself keeps what the export has, whatever becomes of the folder that it had it from.
    shutil.rmtree(tmp_path / "hf")
    code, _, err = typed("convert", f"from={tmp_path / 'from hf'}", f"to={tmp_path / 'bare'}", "format=hf")
    assert code == 0, err
    text, bare = "What is 12 + 3?<|eot_id|>  don't", transformers.AutoTokenizer.from_pretrained(tmp_path / "bare")
    assert bare(text).input_ids == handed_on(text).input_ids == transformers.AutoTokenizer.from_pretrained(source)(text).input_ids
    assert bare.chat_template == "{{ messages }}"
    assert (bare.bos_token_id, bare.eos_token_id) == (handed_on.bos_token_id, handed_on.eos_token_id) == (320, 321)

    runs = [load_file(tmp_path / f"from {start}" / "export" / "model.safetensors") for start in starts]
    for name, x in runs[0].items():  # one model in three formats is one start
        assert all(np.array_equal(x, other[name]) for other in runs[1:]), name


def edit_tensors(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def flip(folder):
    """A bit of a weight, in a folder whose manifest knows better."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)


def index(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


BAD = {
    "bit-flipped": (flip, "damaged: model.safetensors"),
    "shapes": (edit_tensors, r"missing: model.layers.1.mlp.up_proj.weight \(96, 64\)\s+shape: model.norm.weight is \(3,\), wanted \(64,\)"),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
        r"not a complete safetensors file: .*\nwhere: hub/model/model.safetensors\nnext: download or copy this file again\n",
    ),
    "LFS pointer": (
        lambda folder: (folder / "model.safetensors").write_bytes(LFS),
        r"a Git LFS pointer.*\nwhere: hub/model/model.safetensors\nnext: download or copy this file again\n",
    ),
    "web page": (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>Sign in</html>"), r"a web page \(HTML\)"),
    "weight_map": (lambda folder: index(folder, "../model.safetensors"), "lies outside of the folder"),
    "code": (lambda folder: (folder / "modeling.py").write_text("1 / 0"), "a repository with code of its own: modeling.py"),
    "pickle": (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickled .bin files are not read"),
    "model id": (shutil.rmtree, "get it first: hf download hub/model "),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_ends_with_4_and_one_block(tmp_path, published, monkeypatch, bad, typed):
    source, _ = published
    change, said = BAD[bad]
    code, _, _ = typed("convert", f"from={source}", f"to={tmp_path / 'hub' / 'model'}", "format=hf")
    assert code == 0
    folder = tmp_path / "hub" / "model"
    if bad != "bit-flipped":
        (folder / "manifest.json").unlink()  # what a stranger sends has none
    change(folder)
    monkeypatch.chdir(tmp_path)
    for verb, arguments in (("convert", ["from=hub/model", "to=new", "format=meta"]), ("train", ["init_from=hub/model", "run_dir=run"])):
        if verb == "train":
            sizes = [f"model.dims.{name}={size}" for name, size in SIZES.items()]
            text = ["data=text", "data.path=text", "tokenizer=bytes", "train.seq_len=32"]
            arguments = [*arguments, *sizes, "model.dims.vocab=576", "model.tied=false", *text]
            (tmp_path / "text").mkdir()
            (tmp_path / "text" / "a.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
        code, _, err = typed(verb, *arguments)
        assert code == 4, err
        assert re.search(said, err), err
        assert "Traceback" not in err
        assert err.count("where:") == 1
        assert not (tmp_path / "new").exists()


def test_weights_that_are_not_there_are_missed_before_a_tokenizer_is_made(tmp_path, typed):
    code, _, err = typed("train", f"init_from={tmp_path / 'nowhere'}", "data=text", "data.path=nor-this", f"run_dir={tmp_path / 'run'}")
    assert (code, "the folder does not exist" in err) == (4, True), err
