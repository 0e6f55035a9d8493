"""What a run is told about data that it cannot use: exit code 3, before its first step or at the batch, and nothing silently skipped."""

import json
import random
import shutil

import numpy as np
import pytest

from llama_eqx import load_config
from llama_eqx import prepare as verb
from llama_eqx.data.dataset import sliding
from llama_eqx.data.prepare import prepare
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.errors import DataError

TINY = [
    *("model.dims.layers=1", "model.dims.embed=16", "model.dims.heads=2", "model.dims.kv_heads=2", "model.dims.head_dim=8"),
    *("model.dims.mlp=16", "train.seq_len=32", "train.batch_size=8", "train.steps=2", "train.log_every=1", "tracking.wandb.mode=disabled"),
]
LETTERS = {"here": "abcd", "there": "efgh"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two datasets of one vocabulary size and two tokenizers."""
    folder = tmp_path_factory.mktemp("prepared")
    draw = random.Random(0)
    for name, letters in LETTERS.items():
        texts = ["".join(draw.choices(letters, k=draw.randrange(10, 30))) for _ in range(90)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        options = [f"input={folder / name}.jsonl", f"output={folder / name}", "validation_fraction=0.1", "tokenizer=chars"]
        prepare(load_config(*options, name="prepare"))
    return folder


@pytest.fixture
def prepared(made, tmp_path):
    """The two datasets, to be damaged."""
    for name in LETTERS:
        shutil.copytree(made / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def run(typed, tmp_path):
    """The exit code of a run, what it said, and how many steps it made."""

    def run(*arguments):
        code, out, err = typed("train", *TINY, *arguments, f"run_dir={tmp_path / 'run'}")
        metrics = tmp_path / "run" / "metrics.jsonl"
        return code, out + err, metrics.read_text().count("train/loss") if metrics.exists() else 0

    return run


def truncated(folder):
    ids = folder / "train-00000.ids.npy"
    ids.write_bytes(ids.read_bytes()[:-2])


def emptied(folder):
    (folder / "train-00000.offsets.npy").write_bytes(b"")


def missing(folder):
    (folder / "val-00000.ids.npy").unlink()


def changed(folder):
    ids = np.load(folder / "train-00000.ids.npy", mmap_mode="r+")
    ids[5] += 1


def other_tokenizer(folder):
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(folder.parent / "there" / "tokenizer", folder / "tokenizer")


def signed(folder):
    """Ids that may be negative: a file of another type with the same size."""
    ids = np.load(folder / "train-00000.ids.npy")
    np.save(folder / "train-00000.ids.npy", -ids.astype(np.int16))


@pytest.mark.parametrize(
    ("damage", "options", "said"),
    [
        (truncated, [], "train-00000.ids.npy: "),
        (emptied, [], "train-00000.offsets.npy: 0 bytes instead of"),
        (missing, [], "val-00000.ids.npy: No such file"),
        (changed, [], "train-00000.ids.npy: changed"),
        (other_tokenizer, [], "prepared with the tokenizer"),
        (signed, ["data.verify=false"], "int16"),
        (lambda folder: (folder / "index.json").unlink(), [], "no prepared data here"),
        (lambda folder: None, ["data.rows=packed", "train.seq_len=16"], "documents of train are longer than the 17 tokens of a row"),
    ],
)
def test_prepared_data_that_cannot_be_used_ends_before_the_first_step(prepared, run, damage, options, said):
    damage(prepared / "here")
    code, error, steps = run("data=prepared", f"data.path={prepared / 'here'}", *options)
    assert (code, steps) == (3, 0)
    assert said in error
    assert str(prepared / "here") in error or "here.jsonl" in error
    assert "next:" in error


def test_the_tokenizers_are_of_one_size(made):
    vocabs, fingerprints = (
        {json.loads((made / name / "index.json").read_text())[key] for name in LETTERS} for key in ("vocab", "tokenizer")
    )
    assert (len(vocabs), len(fingerprints)) == (1, 2)


def test_an_id_that_is_not_in_the_vocabulary_ends_the_run_at_its_batch(prepared, run):
    ids = np.load(prepared / "here" / "train-00000.ids.npy", mmap_mode="r+")
    ids[-1000:] = 60_000
    code, error, steps = run("data=prepared", f"data.path={prepared / 'here'}", "data.verify=false")
    assert (code, steps) == (3, 0)  # every batch has such a row
    assert "id 60000 is not in the vocabulary of" in error
    assert f"{prepared / 'here' / 'train-00000.ids.npy'}, offset " in error


@pytest.mark.parametrize("rows", ["documents", "packed"])
def test_an_offset_that_is_out_of_order_ends_the_run(prepared, run, rows):
    offsets = np.load(prepared / "here" / "train-00000.offsets.npy", mmap_mode="r+")
    offsets[5], offsets[9] = -7, offsets[3]
    code, error, _ = run("data=prepared", f"data.path={prepared / 'here'}", "data.verify=false", f"data.rows={rows}")
    assert code == 3
    assert "the offsets are out of order" in error
    assert f"{prepared / 'here' / 'train-00000.offsets.npy'}, document " in error


def test_an_empty_component_of_a_mixture_ends_before_the_first_step(made, tmp_path, run):
    (tmp_path / "nothing.txt").write_text("")
    mixture = ["data=mixture", f"data.components.prose.path={tmp_path / 'nothing.txt'}", "tokenizer=bytes"]
    mixture += ["data@data.components.code=text", f"data.components.code.path={made / 'here.jsonl'}"]
    code, error, steps = run(*mixture)
    assert (code, steps) == (3, 0)
    assert f"the component prose: no text here\nwhere: {tmp_path / 'nothing.txt'}\n" in error


def test_weights_that_do_not_sum_end_before_the_first_step(run):
    code, error, steps = run("data=mixture", "data.weights.prose=0.4")
    assert (code, steps) == (3, 0)
    assert "the weights of the mixture sum to 0.9" in error


@pytest.fixture
def lines(tmp_path):
    """Lines of JSON among which the seventh and the 22nd are none."""
    good = [json.dumps({"text": f"{i} and more words", "prompt": f"{i}?", "response": "yes"}) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*good[:6], "{", *good[6:20], "?", *good[20:]]))
    return tmp_path / "a.jsonl"


@pytest.mark.parametrize("option", ["text", "sft"])
def test_a_line_that_is_not_json_is_named(lines, run, option):
    code, error, steps = run(f"data={option}", f"data.path={lines}", "tokenizer=bytes")
    assert (code, steps) == (3, 0)
    assert f"where: {lines}:7\n" in error
    assert "data.on_error=skip" in error


def test_lines_that_are_not_json_are_counted_when_they_are_to_be_skipped(lines, run):
    code, said, steps = run("data=text", f"data.path={lines}", "tokenizer=bytes", "data.on_error=skip")
    assert (code, steps) == (0, 2)
    assert f"warning: 2 records or files cannot be read and are skipped, the first at {lines}:7" in said


def test_prepare_names_or_counts_it_too(tmp_path, typed):
    (tmp_path / "a.jsonl").write_text("\n".join([*[json.dumps({"text": f"{i} words"}) for i in range(200)], "{"]))
    options = [f"input={tmp_path / 'a.jsonl'}", f"output={tmp_path / 'out'}", "tokenizer=bytes", "validation_fraction=0.1"]
    code, _, error = typed("prepare", *options)
    assert code == 3
    assert f"where: {tmp_path / 'a.jsonl'}:201" in error
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    talk = typed("prepare", f"input={tmp_path / 'talk.jsonl'}", f"output={tmp_path / 'talk'}", "tokenizer=bytes")[2]
    assert f"next: python -m llama_eqx.train data=sft data.path={tmp_path / 'talk.jsonl'} trains" in talk
    shutil.rmtree(tmp_path / "out")
    assert typed("prepare", *options, "on_error=skip")[0] == 0
    assert json.loads((tmp_path / "out" / "index.json").read_text())["dropped"]["named"] == [
        'a.jsonl:201: not a JSON object with a string "text"'
    ]


@pytest.mark.parametrize("rows", ["windows", "documents", "packed"])
def test_prepared_data_of_which_nothing_is_held_out_is_refused(tmp_path, run, capsys, rows):
    (tmp_path / "a.txt").write_text("some words " * 20)
    options = [f"input={tmp_path / 'a.txt'}", f"output={tmp_path / 'out'}", "tokenizer=bytes", "validation_fraction=0", "prepare.workers=1"]
    verb.main(load_config(*options, name="prepare"), options)
    assert "train       needs held-out text" in capsys.readouterr().out
    code, error, steps = run("data=prepared", f"data.path={tmp_path / 'out'}", f"data.rows={rows}", "data.long_documents=cut")
    assert (code, steps) == (3, 0)
    assert "the val split is empty" in error
    assert "next: python -m llama_eqx.prepare validation_fraction=0.01" in error
    data = load_config("data=prepared", f"data.path={tmp_path / 'out'}", f"data.rows={rows}").data
    with pytest.raises(DataError, match="the val split is empty"):
        sliding(data, BytesTokenizer(), seq_len=8, stride=8)
