"""What a run's config takes from the tokenizer."""

import json

import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel

from llama_eqx import load_config
from llama_eqx.checkpoint.manifest import write_manifest
from llama_eqx.checkpoint.native import read_config
from llama_eqx.data.dataset import open_data
from llama_eqx.data.prepare import prepare
from llama_eqx.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, load_tokenizer
from llama_eqx.data.tokenizer.export import tokenizer_json
from llama_eqx.errors import CheckpointError
from llama_eqx.training.identity import claim, file_tokenizer, is_over, is_same, origin
from llama_eqx.training.run import warnings, with_vocab


class Llama3(BytesTokenizer):
    """With the ids of Llama 3, at three of which a text may end."""

    vocab, bos, eos, stop, pad = 128256, 128000, 128001, (128001, 128008, 128009), 7


@pytest.mark.parametrize(
    ("model", "tokenizer", "bos", "eos", "pad"),
    [
        ("llama3_1m", BytesTokenizer(), 256, (257,), None),
        ("llama3_1m", Llama3(), 128000, (128001, 128008, 128009), 7),
        ("llama3_8b", Llama3(), 128000, (128001, 128008, 128009), 7),  # which says 128001
        ("llama3_3_70b", Llama3(), 128000, (128001, 128008, 128009), 128004),
        ("llama3_8b", BytesTokenizer(), 128000, (128001,), None),  # another's ids, of which a warning is given
        ("llama3_8b", type("Other", (Llama3,), {"eos": 5})(), 128000, (128001,), None),
    ],
)
def test_the_special_ids_are_those_of_the_tokenizer(model, tokenizer, bos, eos, pad):
    """Among the ends of a text are all that it knows."""
    tokens = with_vocab(load_config(f"model={model}"), tokenizer).model.tokens
    assert (tokens.bos, tokens.eos, tokens.pad) == (bos, eos, pad)


def test_a_run_from_before_it_knew_its_padding_goes_on_and_gets_it(tmp_path):
    asked = load_config("tokenizer=bytes", f"run_dir={tmp_path}")
    claim(with_vocab(asked, type("Before", (Llama3,), {"pad": None})()), "", "")
    now = with_vocab(asked, Llama3())
    assert claim(now, "", "") == []
    assert read_config(tmp_path)["model"]["tokens"]["pad"] == 7
    assert is_same(asked, read_config(tmp_path), ())


@pytest.mark.parametrize("dropout", ["model.dropout=0.1", "model.block.dropout=0.1"])
def test_with_dropout_another_microbatch_is_another_run(tmp_path, dropout):
    asked = ["tokenizer=bytes", f"run_dir={tmp_path}", "train.batch_size=4"]
    claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0"), "", "")
    claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0", "train.microbatch_size=2"), "", "")
    asked[1] = f"run_dir={tmp_path / 'dropout'}"
    (tmp_path / "dropout").mkdir()
    claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0", dropout), "", "")
    with pytest.raises(CheckpointError, match="microbatch_size"):
        claim(load_config(*asked, "model.dropout=0", "model.block.dropout=0", dropout, "train.microbatch_size=2"), "", "")


@pytest.mark.parametrize("change", ["loss.z_loss=1e-4", "guard.spike=5", "precision=mixed", "schedule.peak=1"])
def test_a_run_that_computes_otherwise_is_another(tmp_path, change):
    asked = ["tokenizer=bytes", f"run_dir={tmp_path}"]
    claim(load_config(*asked), "", "")
    with pytest.raises(CheckpointError, match=change.partition("=")[0]):
        claim(load_config(*asked, change), "", "")


def test_what_is_seldom_meant_is_warned_of():
    said = lambda *overrides: warnings(load_config("tokenizer=bytes", "model.dims.vocab=258", *overrides), BytesTokenizer())  # noqa: E731
    assert said() == []
    assert "precision=mixed keeps float32" in said("precision=mixed", "precision.params=bfloat16")[0]
    bfloat16 = [said("precision.params=bfloat16", f"optimizer.b2={b2}")[1:] for b2 in (0.95, 0.998, 0.999)]
    assert [len(each) for each in bfloat16] == [0, 0, 1]
    assert [float(jnp.bfloat16(b2)) == 1 for b2 in (0.998, 0.999)] == [False, True]
    assert "optimizer.b2=0.99, or precision=mixed" in bfloat16[2][0]
    assert said("train.steps=50")[0].endswith("; next: schedule.warmup_steps=5")
    assert said("train.steps=50", "init_from=here")[0].endswith("; next: schedule.warmup_steps=5, or recipe=finetune")
    recipe = ["init_from=here", "recipe=finetune", "model.context=2048"]
    steps = load_config(*recipe).schedule.warmup_steps
    assert said(f"train.steps={steps}", *recipe)[0].endswith(f"; next: schedule.warmup_steps={steps // 10}")
    unmarked = HuggingFaceTokenizer(tokenizer_json(BytesTokenizer()).encode())
    assert ["neither BOS nor EOS" in each for each in warnings(load_config("model.dims.vocab=258"), unmarked)] == [True]


def test_a_run_goes_on_where_its_data_lies_elsewhere_and_not_with_other_data(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(tmp_path / "cache"))
    for folder, text in (("here", "some text " * 200), ("there", "some text " * 200), ("other", "some test " * 200)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
        (tmp_path / folder / "b.jsonl").write_text("".join(f'{{"text": "{i} {text[:50]}"}}\n' for i in range(50)))
        options = [f"input={tmp_path / folder / 'b.jsonl'}", f"output={tmp_path / folder / 'shards'}", "validation_fraction=0.3"]
        prepare(load_config(*options, "tokenizer=bytes", "prepare.workers=1", name="prepare"))

    def goes_on(name, *overrides):
        config = load_config(*overrides, f"run_dir={tmp_path / name}")
        tokenizer = config.tokenizer.build(config.data)
        claim(config, tokenizer.fingerprint, open_data(config.data, tokenizer, seq_len=16, seed=0).fingerprint)

    def settings(folder):
        mixture = ["data=mixture", "data@data.components.code=prepared", f"data.components.code.path={tmp_path / folder / 'shards'}"]
        return {
            "text": ["data=text", f"data.path={tmp_path / folder / 'a.txt'}", "tokenizer=bytes"],
            "prepared": ["data=prepared", f"data.path={tmp_path / folder / 'shards'}"],
            "mixture": [*mixture, f"data.components.prose.path={tmp_path / folder / 'a.txt'}", "tokenizer=bytes"],
        }

    for name, overrides in settings("here").items():
        goes_on(name, *overrides)
        goes_on(name, *settings("there")[name])
        with pytest.raises(CheckpointError, match=r"another run:\n +data_fingerprint: \w+ -> \w+\n"):
            goes_on(name, *settings("other")[name])
    goes_on("prepared", *settings("there")["prepared"], "data.verify=true")


def test_where_a_run_started_from_is_not_read_and_kept_once_it_has_a_checkpoint(tmp_path):
    asked = ["tokenizer=hf", f"run_dir={tmp_path}"]
    claim(load_config(*asked, "init_from=here", "tokenizer.path=here"), "", "")
    asked.append("tokenizer.path=there")  # as of the data, its content is in the fingerprint
    claim(load_config(*asked, "init_from=here"), "", "")
    with pytest.raises(CheckpointError, match="init_from: here -> there"):
        claim(load_config(*asked, "init_from=there"), "", "")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "manifest.json").touch()
    assert claim(load_config(*asked, "init_from=there"), "", "") == ["init_from=there is not read: this run began from here"]
    assert claim(load_config(*asked), "", "") == claim(load_config(*asked, "init_from=here"), "", "") == []
    assert read_config(tmp_path)["init_from"] == "here"
    named = load_config(*asked, "init_from=here", "init_new=[a,b]")
    assert claim(named, "", "") == ["init_new=[a,b] is not read: this run began with []"]
    assert read_config(tmp_path)["init_new"] is None
    metrics = [{"step": load_config(*asked).train.steps, "val/loss": 3.0}]
    assert is_over(load_config(*asked), read_config(tmp_path), metrics)
    assert is_over(named, read_config(tmp_path), metrics)


def test_parameters_that_are_new_belong_to_the_run(tmp_path):
    asked = ["tokenizer=bytes", f"run_dir={tmp_path}", "init_from=here"]
    claim(load_config(*asked), "", "")
    before = (tmp_path / "config.yaml").read_text()
    lines = before.splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(line for line in lines if not line.startswith("init_new:")))
    assert claim(load_config(*asked), "", "") == []  # from before there was this setting
    assert (tmp_path / "config.yaml").read_text() == before
    with pytest.raises(CheckpointError, match="init_new: None -> "):
        claim(load_config(*asked, "init_new=[a,b]"), "", "")


def test_a_checkpoint_says_what_it_was_made_with_where_config_yaml_does_not(tmp_path):
    asked = ["tokenizer=bytes", "data=text", "data.path=here", f"run_dir={tmp_path}", "init_from=here"]

    def saved(step, *without):
        facts = origin(tmp_path, "bytes", "text")
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
        write_manifest(tmp_path / "checkpoints" / step, {}, **{name: fact for name, fact in facts.items() if name not in without})

    def again(*overrides, tokenizer="bytes", data="text"):
        (tmp_path / "config.yaml").unlink()
        return claim(load_config(*asked, *overrides), tokenizer, data)

    claim(load_config(*asked), "bytes", "text")
    saved("3")
    manifest = json.loads((tmp_path / "checkpoints" / "3" / "manifest.json").read_text())
    assert {"code", "commit", "extensions", "versions"} <= manifest.keys()
    assert again() == []
    assert read_config(tmp_path)["data_fingerprint"] == "text"
    said = again("train.steps=7", "data.path=there", "init_from=there", "train.log_every=3", "remat=full")
    assert said[0].startswith("train.steps: ")
    assert said[1] == "init_from=there is not read: this run began from here"
    assert read_config(tmp_path)["init_from"] == "here"
    for differs, overrides, fingerprints, back in (
        ("seed: 0 -> 1", ["seed=1"], {}, "settings"),
        ("data_fingerprint: text -> other", [], {"data": "other"}, "data"),
        ("tokenizer_fingerprint: bytes -> other", [], {"tokenizer": "other"}, "tokenizer"),
    ):
        advice = (
            f"give another run_dir, with init_from=.*/checkpoints/3 to begin with its weights, or bring back the {back} of the run there"
        )
        with pytest.raises(CheckpointError, match=f"another run:\n +{differs}\nwhere: .*/3/manifest.json\n(.*\n)*next: {advice}$"):
            again(*overrides, **fingerprints)
        assert not (tmp_path / "config.yaml").exists()  # else the right settings would be refused from then on
        claim(load_config(*asked), "bytes", "text")

    once = read_config(tmp_path) | {"of_yore": 1}
    del once["train"]["unroll"], once["seed"]
    (tmp_path / "checkpoints" / "4").mkdir()
    write_manifest(tmp_path / "checkpoints" / "4", {}, settings=once)
    assert again() == []  # from before there were these settings

    saved("6", "settings")  # as it once was
    assert "config.yaml was missing" in again("seed=1")[0]
    with pytest.raises(CheckpointError, match="data_fingerprint: text -> other"):
        again("seed=1", data="other")


def test_steps_that_are_trained_already_change_nothing(tmp_path):
    def claimed(steps):
        return claim(load_config("tokenizer=bytes", f"run_dir={tmp_path}", f"train.steps={steps}"), "", "")

    claimed(8)
    (tmp_path / "checkpoints" / "6").mkdir(parents=True)
    write_manifest(tmp_path / "checkpoints" / "6", {}, **origin(tmp_path, "", ""))
    before = (tmp_path / "config.yaml").read_text()
    for steps in (6, 3):
        assert claimed(steps) == [f"train.steps={steps} changes nothing: this run is trained to step 6 already, with train.steps=8"]
        assert (tmp_path / "config.yaml").read_text() == before
    assert claimed(8) == []
    assert claimed(7) == ["train.steps: 8 -> 7; the learning rate now takes the course of a run of that length"]
    (tmp_path / "checkpoints" / "7").mkdir()
    write_manifest(tmp_path / "checkpoints" / "7", {}, **origin(tmp_path, "", ""))
    claimed(9)  # and is given up
    assert claimed(7) == []
    assert read_config(tmp_path)["train"]["steps"] == 7


def test_a_config_that_was_emptied_is_removed_where_a_checkpoint_says_the_same(tmp_path):
    config = load_config("tokenizer=bytes", f"run_dir={tmp_path}")

    def advice():
        (tmp_path / "config.yaml").write_text("")
        with pytest.raises(CheckpointError, match="is not a mapping") as error:
            claim(config, "", "")
        return error.value.next

    assert advice().startswith(f"rm {tmp_path / 'config.yaml'}, then the same command")
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    write_manifest(tmp_path / "checkpoints" / "3", {}, data="")
    assert advice() == "bring back a copy of this file, or give another run_dir"
    write_manifest(tmp_path / "checkpoints" / "3", {}, settings={})
    assert advice().startswith("rm ")


def test_the_tokenizer_that_was_filed_stays_once_there_is_a_checkpoint(tmp_path):
    definition = Library(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")).to_str().encode()
    config, folder = load_config("tokenizer=hf", "tokenizer.path=here", f"run_dir={tmp_path}"), tmp_path / "tokenizer"

    def filed(stop):
        file_tokenizer(config, HuggingFaceTokenizer(definition, eos=0, stop=[stop]), {})
        return load_tokenizer(folder).stop

    assert (filed(1), filed(2)) == ((0, 1), (0, 2))
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "checkpoints" / "3" / "manifest.json").touch()
    assert filed(1) == (0, 2)
    (folder / "tokenizer.json").write_bytes(definition[:-1])  # damaged
    assert filed(1) == (0, 1)
