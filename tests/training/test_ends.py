"""What a run keeps for whoever gets the model from it, without training, and read by `transformers`."""

import base64
import dataclasses
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
import transformers
from jaxtyping import Array, Float
from sentencepiece import SentencePieceTrainer

from llama_eqx import load_config
from llama_eqx.checkpoint.native import write_config
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.data.chat import FORMATS
from llama_eqx.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, TiktokenTokenizer, load_tokenizer
from llama_eqx.data.tokenizer.export import tokenizer_json
from llama_eqx.data.tokenizer.sentencepiece import LLAMA_SETTINGS
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.conversion import ConvertConfig, convert, save_pretrained
from llama_eqx.model import attention
from llama_eqx.model.attention import AttentionConfig, GroupedQueryAttention, GroupedQueryAttentionConfig
from llama_eqx.model.init import named
from llama_eqx.model.llama import build_model
from llama_eqx.model.rotary import Llama3Rotary
from llama_eqx.training.ends import handed_on, open_start, other_tokenizer, seen_before
from llama_eqx.training.identity import claim, file_tokenizer
from llama_eqx.training.run import with_vocab
from llama_eqx.training.setup import fresh_state, set_up

TEXT = pathlib.Path(__file__).parents[1] / "golden" / "text.md"
SIZES = {"layers": 1, "embed": 8, "heads": 2, "kv_heads": 1, "head_dim": 4, "mlp": 8}
TALK = [
    {"role": "system", "content": " Be brief."},
    {"role": "user", "content": "What is 12 + 3?\n"},
    {"role": "assistant", "content": "  It is 15, naïve 你好  x "},
    {"role": "user", "content": "Sure?"},
]


def settings(run_dir, *overrides):
    sizes = [f"model.dims.{name}={size}" for name, size in SIZES.items()]
    return load_config(*sizes, "model.tied=false", f"run_dir={run_dir}", *overrides)


class Beside(GroupedQueryAttention):
    """Llama's, with a matrix beside its own."""

    beside: Float[Array, "embed rank"]


class BesideConfig(AttentionConfig):
    rank: int

    def build(self, dims, init, *, key):
        plain = GroupedQueryAttentionConfig().build(dims, init, key=key)
        return Beside(**vars(plain), beside=init.matrix(Beside, "beside", dims, fan_in="embed", rank=self.rank, key=key))


@pytest.fixture
def beside(monkeypatch):
    """A config with that attention, and that of this package without it; what is built by name must be of this package."""
    monkeypatch.setattr(BesideConfig, "__module__", attention.__name__)
    monkeypatch.setattr(attention, "BesideConfig", BesideConfig, raising=False)
    return lambda config: dataclasses.replace(config, model=dataclasses.replace(config.model, attention=BesideConfig(rank=2)))


def named_leaves(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def handed_over(config, tokenizer, *, old=False):
    """The folder that `convert` makes of a run, and its notes. An `old` run keeps nothing beside its tokenizer."""
    config, run_dir = with_vocab(config, tokenizer), pathlib.Path(config.run_dir)
    file_tokenizer(config, tokenizer, {} if old else handed_on(config, tokenizer, open_start(config))[0])
    write_config(config, run_dir)
    with Checkpoints(run_dir / "checkpoints", load_config("checkpoint.every=1").checkpoint) as checkpoints:
        checkpoints.save(1, build_model(config.model, key=jax.random.key(0)), {"step": jnp.int32(1)})
    folder = run_dir.with_name(f"{run_dir.name}-hf")
    return folder, convert(ConvertConfig(from_=str(run_dir), to=str(folder), format="hf", dtype=None, shards=None))


def tokenizers(test_data):
    ranks = b"".join(base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256))
    llama2 = SentencePieceTokenizer((test_data / "llama2_tokenizer.model").read_bytes())
    return [BytesTokenizer(), llama2, TiktokenTokenizer(ranks, chat="llama3"), TiktokenTokenizer(ranks)]


@pytest.mark.parametrize("which", range(4), ids=["bytes", "sentencepiece", "llama3", "llama3_1"])
def test_what_learned_to_chat_comes_with_the_template_that_gives_the_ids_it_learned(tmp_path, test_data, which):
    tokenizer = tokenizers(test_data)[which]
    folder, notes = handed_over(settings(tmp_path / "run", "data=sft", "data.path=talk.jsonl"), tokenizer)
    assert not [note for note in notes if "template" in note]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for messages, generate in ((TALK, True), (TALK[1:], True), (TALK[:3], False)):
        ids, _ = FORMATS[tokenizer.chat].encode(messages, tokenizer, generate=generate)
        assert theirs.apply_chat_template(messages, add_generation_prompt=generate, return_dict=False) == ids


def test_what_read_text_has_no_template_and_an_old_run_says_that_its_own_is_missing(tmp_path):
    for name, data, old, missing in (("text", "data=text", False, False), ("old", "data=sft", True, True)):
        folder, notes = handed_over(settings(tmp_path / name, data, "data.path=a"), BytesTokenizer(), old=old)
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template is None
        assert any("no chat template" in note and str(folder) in note for note in notes) is missing, notes


def test_what_lies_beside_a_tokenizer_json_is_kept_from_the_start(tmp_path):
    source, secret = tmp_path / "source", tmp_path / "secret"
    source.mkdir()
    secret.write_text("mine")
    (source / "tokenizer.json").write_text(tokenizer_json(BytesTokenizer()))
    names = {"bos_token": "<s>", "eos_token": "</s>", "auto_map": {"AutoTokenizer": "x.y"}}
    (source / "tokenizer_config.json").write_text(json.dumps(names))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    config = settings(tmp_path / "run", "tokenizer=hf", f"tokenizer.path={source}", "data=sft", "data.path=talk.jsonl")
    tokenizer = config.tokenizer.build(config.data)
    folder, _ = handed_over(config, tokenizer)
    found = transformers.AutoTokenizer.from_pretrained(folder)
    assert (found.chat_template, found.eos_token) == ("{{ messages }}", "</s>")
    assert "auto_map" not in (folder / "tokenizer_config.json").read_text()
    assert load_tokenizer(tmp_path / "run" / "tokenizer").fingerprint == tokenizer.fingerprint
    for template, foreign in (("{{ messages }}", True), (FORMATS["llama2"].template, False)):
        (source / "chat_template.jinja").write_text(template)
        assert any("not of it" in line for line in handed_on(config, tokenizer, None)[1]) is foreign
    (source / "chat_template.jinja").write_text(FORMATS["llama3"].template)
    assert "; next: tokenizer.chat=llama3, " in handed_on(config, tokenizer, None)[1][0]
    (source / "chat_template.jinja").unlink()
    (source / "chat_template.jinja").symlink_to(secret)
    (source / "chat_template.json").write_text("no JSON")
    (source / "added_tokens.json").write_text("[]")
    (source / "tokenizer.model").write_text("<!doctype html>")
    files, left = handed_on(config, tokenizer, None)
    assert files.keys() == {"tokenizer_config.json", "chat_template.jinja"}
    assert files["chat_template.jinja"].decode() == FORMATS["llama2"].template
    said = " ".join(left)
    for name, wrong in {"tokenizer.model": "a web", "added_tokens.json": "not a", "chat_template.json": "not JSON"}.items():
        assert f"{name} was left behind: {wrong}" in said
    assert "chat_template.jinja was left behind: chat_template.jinja lies outside" in said


def test_a_start_that_came_to_nothing_leaves_nothing_beside_the_tokenizer(tmp_path):
    config = settings(tmp_path / "run")
    file_tokenizer(config, BytesTokenizer(), {"chat_template.jinja": b"a"})
    file_tokenizer(config, BytesTokenizer(), {"generation_config.json": b"{}"})
    names = {file.name for file in (tmp_path / "run" / "tokenizer").iterdir()}
    assert names == {"generation_config.json", "tokenizer.bytes", "tokenizer_kind.json"}


def test_what_lies_where_the_tokenizer_is_read_from_stays_there(tmp_path):
    folder = tmp_path / "run" / "tokenizer"
    folder.mkdir(parents=True)
    for name, text in {
        "tokenizer.json": tokenizer_json(BytesTokenizer()),
        "tokenizer.model": "mine",
        "generation_config.json": "{}",
    }.items():
        (folder / name).write_text(text)
    config = settings(tmp_path / "run", "tokenizer=hf", f"tokenizer.path={folder}")
    tokenizer = config.tokenizer.build(config.data)
    file_tokenizer(config, tokenizer, {})
    names = {file.name for file in folder.iterdir()}
    assert names == {"generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_kind.json"}


def test_a_run_that_keeps_nothing_beside_its_tokenizer_gets_it_when_it_goes_on(tmp_path):
    config, tokenizer = settings(tmp_path / "run", "data=sft", "data.path=talk.jsonl"), BytesTokenizer()
    handed_over(config, tokenizer, old=True)
    for said, kept in ((b"a", b"a"), (b"b", b"a")):
        file_tokenizer(config, tokenizer, {"chat_template.jinja": said})
        assert (tmp_path / "run" / "tokenizer" / "chat_template.jinja").read_bytes() == kept


def test_rows_that_the_weights_have_seen_are_told(tmp_path):
    """Those of a run with the same seed, data and length of rows; of a folder without a run nothing is known."""
    first = with_vocab(settings(tmp_path / "first"), BytesTokenizer())
    save_pretrained(build_model(first.model, key=jax.random.key(0)), first.run_dir, format="native")
    again = dataclasses.replace(first, run_dir=str(tmp_path / "again"), init_from=first.run_dir)
    assert seen_before(again, "0abc") == []
    claim(dataclasses.replace(first, run_dir=str(tmp_path / "run")), "tokenizer", "0abc")
    (tmp_path / "run" / "config.yaml").replace(tmp_path / "first" / "config.yaml")
    assert [note.endswith("seed=1 takes others") for note in seen_before(again, "0abc")] == [True]
    for other in ({"seed": 1}, {"train": dataclasses.replace(first.train, seq_len=64)}, {"init_from": None}):
        assert seen_before(dataclasses.replace(again, **other), "0abc") == []
    assert seen_before(again, "1abc") == []


def test_weights_of_another_tokenizer_are_told(tmp_path):
    """And what to type for their own, whether the sizes agree or not; the same tokenizer in another format is no other."""
    model, lines = io.BytesIO(), TEXT.read_text().split("\n")
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, vocab_size=400, **LLAMA_SETTINGS)
    base, own = tmp_path / "base", SentencePieceTokenizer(model.getvalue())
    asked = ["data=text", "data.path=a", f"init_from={base}", "tokenizer=bytes"]
    save_pretrained(build_model(with_vocab(settings(base), own).model, key=jax.random.key(0)), base, format="native")
    run = settings(tmp_path / "run", *asked)
    assert other_tokenizer(run, own) == []  # there is none beside the weights
    own.save(base / "tokenizer")
    typed = f"tokenizer=sentencepiece tokenizer.path={base / 'tokenizer' / 'tokenizer.model'}"
    for same in (own, HuggingFaceTokenizer(tokenizer_json(own).encode())):
        assert other_tokenizer(run, same) == []
    assert [said.partition("next: ")[2] for said in other_tokenizer(run, BytesTokenizer())] == [typed]
    with pytest.raises(CheckpointError, match=r"dims\.vocab is 400 there, 258 here") as error:
        open_start(with_vocab(run, BytesTokenizer()))
    assert error.value.next.startswith(typed)


@pytest.mark.parametrize("through", ["hf", "run"])
def test_how_the_first_model_generates_goes_along_with_the_ids_of_this_one(tmp_path, through):
    asked = ["data=text", "data.path=a", "model.context=64", "train.seq_len=64"]
    first = with_vocab(settings(tmp_path / "run", *asked), BytesTokenizer())
    save_pretrained(build_model(first.model, key=jax.random.key(1)), tmp_path / "base", format="hf")
    (tmp_path / "base" / "manifest.json").unlink()
    ids = {"eos_token_id": [9, 10], "pad_token_id": 11, "forced_bos_token_id": 12, "suppress_tokens": [13], "bad_words_ids": [[14]]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, **ids}))
    asked += ["model.dims.vocab=258"]
    other = settings(tmp_path / "run", *asked, f"init_from={tmp_path / 'base'}", "model.context=128")
    weights = open_start(other)
    assert any("model.context=64 keeps it" in note for note in weights.notes)
    config = settings(tmp_path / "run", *asked, f"init_from={tmp_path / 'base'}")
    if through == "run":
        handed_over(config, BytesTokenizer())
        config = settings(tmp_path / "second", *asked, f"init_from={tmp_path / 'run'}")
    assert not any("context" in note for note in open_start(config).notes)
    folder, _ = handed_over(config, type("Padding", (BytesTokenizer,), {"pad": 3})())
    found = json.loads((folder / "generation_config.json").read_text())
    assert found == {"do_sample": True, "temperature": 0.6, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 3}
    assert transformers.AutoConfig.from_pretrained(folder).pad_token_id == 3
    for wrong in ("", "[]", "version https://git-lfs.github.com/spec/v1"):
        (tmp_path / "base" / "generation_config.json").write_text(wrong)
        files, left = handed_on(other, BytesTokenizer(), weights)
        assert (files, [note.split(":")[0] for note in left]) == ({}, ["generation_config.json was left behind"])


@pytest.mark.parametrize("format", ["hf", "meta", "native"])
def test_what_the_weights_have_not_starts_fresh_where_it_is_named(tmp_path, beside, format):
    """Split over eight devices and in bfloat16; what is drawn is what a run without weights draws."""
    asked = ["model.dims.layers=2", "model.dims.vocab=258", "data=text", f"data.path={TEXT}", "tokenizer=bytes", "train.seq_len=32"]
    asked += ["mesh=cpu-8", "precision.params=bfloat16", "model/norm=layer"]
    there = build_model(settings(tmp_path, *asked, "model/norm=rms").model, key=jax.random.key(7))
    save_pretrained(there, tmp_path / "base", format=format)
    fresh = set_up(beside(settings(tmp_path, *asked)))
    drawn = named_leaves(fresh.program.initial(named(jax.random.key(0), "init")).model)
    config = beside(settings(tmp_path, *asked, f"init_from={tmp_path / 'base'}", "init_new=[attention.beside,bias]"))
    setup = set_up(config)
    weights = open_start(setup.config)
    state = fresh_state(setup, weights)
    new = ["blocks.attn_norm.bias", "blocks.attention.beside", "blocks.ffn_norm.bias", "final_norm.bias"]
    given, places = named_leaves(there), named_leaves(setup.program.shardings.model)
    for name, leaf in named_leaves(state.model).items():
        assert (name in new) is (name not in given)
        assert (leaf.dtype, leaf.sharding) == ("bfloat16", places[name])
        assert jnp.array_equal(leaf, drawn[name] if name in new else given[name].astype("bfloat16")), name
    said = f"4 parameters that the weights lack start fresh, drawn with seed=0: {', '.join(new)}"
    notes = [note for note in weights.notes if note.startswith((said, "model."))]
    assert [note.split(" ")[0] for note in notes] == ["4", "model.attention._target_", "model.attention.rank", "model.norm._target_"]

    save_pretrained(state.model, tmp_path / "own", format="native")
    again = dataclasses.replace(setup.config, init_from=str(tmp_path / "own"), init_new=None)
    weights = open_start(again)
    assert weights.notes == ()
    for a, b in zip(*map(jax.tree.leaves, (fresh_state(setup._replace(config=again), weights).model, state.model)), strict=True):
        assert jnp.array_equal(a, b)


ALL = "init_new=[blocks.attention.beside]"
LAYER = ["model/norm=layer", "init_new=[beside]"]


@pytest.mark.parametrize(
    ("base", "asked", "said", "advice"),
    [
        ([], [], r"GroupedQueryAttentionConfig there, .*BesideConfig here\s+model.attention.rank is None there, 2 here", ALL),
        ([], LAYER, "model.norm._target_ is", "attention.beside,blocks.ffn_norm.bias,final_norm.bias]"),
        (
            [],
            [*LAYER, "init_new=[beside,final_norm.bias]"],
            "model.norm._target_ is",
            "attention.beside,blocks.ffn_norm.bias,final_norm.bias]",
        ),
        ([], ["init_new=[beside]", "model.norm.eps=1e-3"], "model.norm.eps is 1e-05 there, 0.001 here", "another model="),
        ([], ["init_new=[beside]", "model.rotary.theta=7"], "model.rotary.theta is", "init_new=[blocks.attention.beside,rotary]"),
        ([], ["init_new=[beside]", "model.dims.mlp=16"], "model.dims.mlp is 8 there, 16 here", "another model="),
        ([], ["init_new=[beside]", "model.tied=true"], r"tied is False .*\s+not part of this model: lm_head", "another model="),
        (
            ["model/rotary=nope"],
            ["init_new=[beside]"],
            "model.rotary._target_ is",
            ", or model/rotary=nope; or init_new=[blocks.attention.beside,rotary]",
        ),
        (
            ["model/rotary=llama3_2", "model.rotary.original_context=64", "model.block.dropout=0.5"],
            ["init_new=[beside]", "model.dims.mlp=16"],
            "model.rotary._target_ is",
            ", or model/rotary=llama3_2 model.dims.mlp=8 model.rotary.original_context=64",
        ),
        (["model.tied=true"], ["init_new=[beside,lm_head]"], "model.tied is True there, False here", "another model="),
        (["model/feed_forward=plain"], ["init_new=[beside,gate_proj]"], "activation is relu there, silu here", "another model="),
        (
            ["model.feed_forward.activation=relu"],
            ["model/feed_forward=plain", "init_new=[beside]"],
            "model: .*gate_proj",
            "model/feed_forward=gated model.feed_forward.activation=relu",
        ),
    ],
)
def test_what_new_parameters_do_not_explain_is_refused(tmp_path, beside, base, asked, said, advice):
    asked = ["model.dims.vocab=16", f"init_from={tmp_path / 'base'}", *asked]
    there = build_model(settings(tmp_path, "model.dims.vocab=16", *base).model, key=jax.random.key(0))
    save_pretrained(there, tmp_path / "base", format="native")
    with pytest.raises(CheckpointError, match=said) as raised:
        open_start(beside(settings(tmp_path, *asked)))
    assert advice in raised.value.next
    assert ("; or init_new=" in raised.value.next) is (advice.endswith("]"))


def test_a_rotary_that_is_new_to_the_weights_is_named(tmp_path):
    """As for a longer context. The weights stay."""
    asked = ["model.dims.vocab=258", "data=text", f"data.path={TEXT}", "tokenizer=bytes", "train.seq_len=32"]
    there = build_model(settings(tmp_path, *asked).model, key=jax.random.key(7))
    save_pretrained(there, tmp_path / "base", format="hf")
    asked += [f"init_from={tmp_path / 'base'}", "init_new=[rotary]"]
    setup = set_up(settings(tmp_path, *asked, "model/rotary=llama3_1", "model.rotary.original_context=32"))
    weights = open_start(setup.config)
    model = fresh_state(setup, weights).model
    assert type(model.rotary) is Llama3Rotary
    assert all(jnp.array_equal(a, b) for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(there), strict=True))
    assert "model.rotary.original_context is None there, 32 here" in weights.notes
    with pytest.raises(ConfigError, match="the rotary of this model is that of the weights"):
        open_start(settings(tmp_path, *asked))


def test_names_of_no_new_parameter_are_refused(tmp_path, beside):
    asked = ["model.dims.vocab=16", f"init_from={tmp_path / 'base'}"]
    model = settings(tmp_path, *asked).model
    save_pretrained(build_model(model, key=jax.random.key(0)), tmp_path / "base", format="native")
    for names, said in (
        ("besides", "no parameter besides"),
        ("side", "no parameter side"),
        ("beside,q_proj", "have: blocks.attention.q_proj"),
    ):
        with pytest.raises(ConfigError, match=said) as raised:
            open_start(beside(settings(tmp_path, *asked, f"init_new=[{names}]")))
        assert raised.value.next == ALL
    with pytest.raises(ConfigError, match="q_proj names") as raised:
        open_start(settings(tmp_path, *asked, "init_new=[q_proj]"))
    assert raised.value.next == "leave init_new out"
    with pytest.raises(ConfigError, match="no weights to start from"):
        settings(tmp_path, "init_new=[beside]")
