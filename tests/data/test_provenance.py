"""A run on a mixture of packed text and conversations: its records say which batches it saw, and each row can be traced."""

import json
import math
import pathlib
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llama_eqx import load_config, load_pretrained
from llama_eqx.batch import Batch
from llama_eqx.checkpoint.manifest import read_manifest
from llama_eqx.data.dataset import open_data
from llama_eqx.data.pipeline import Parts, Progress
from llama_eqx.data.prepare import prepare
from llama_eqx.data.provenance import provenance
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.errors import CheckpointError, ConfigError, DataError
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.training.loop import train

BATCH, SEQ, STEPS = 8, 64, 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The config of a finished run of which every second step was logged."""
    folder, patch = tmp_path_factory.mktemp("run"), pytest.MonkeyPatch()
    patch.setenv("LLAMA_EQX_CACHE", str(folder / "cache"))
    for i in range(60):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / f"{i:02}.txt").write_text(f"document {i} " + "abc " * i)
    lines = [{"prompt": f"{i}?", "response": f"It is {i}."} for i in range(60)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes = {"layers": 1, "embed": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 16}
    config = load_config(
        *(f"model.dims.{axis}={size}" for axis, size in sizes.items()),
        *("data=mixture", "data@data.components.code=sft", f"data.components.code.path={folder / 'a.jsonl'}"),
        *(f"data.components.prose.path={folder / 'text'}", "data.components.prose.rows=packed", "data.components.prose.long_documents=cut"),
        *("tokenizer=bytes", "tracking.wandb.mode=disabled", f"run_dir={folder / 'run'}", f"train.steps={STEPS}"),
        *(f"train.batch_size={BATCH}", f"train.seq_len={SEQ}", "train.log_every=2", "train.sample_tokens=0", "schedule.warmup_steps=2"),
    )
    train(config)
    yield config
    patch.undo()


@pytest.fixture
def data(run, monkeypatch):
    monkeypatch.setenv("LLAMA_EQX_CACHE", f"{run.run_dir}/../cache")
    return open_data(run.data, BytesTokenizer(), seq_len=SEQ, seed=run.seed)


def trace(run, step, row):
    return provenance(load_config(f"run_dir={run.run_dir}", f"step={step}", f"row={row}", name="provenance"))


def test_records_have_the_ledger_the_counted_tokens_and_the_epochs(run, data):
    records = [record for record in read_metrics(f"{run.run_dir}/metrics.jsonl") if "train/loss" in record]
    parts = Parts(data.train, data.order, BATCH, fingerprint=data.fingerprint)
    assert [record["step"] for record in records] == [1, 2, 4, 5]
    for record in records:
        step = int(record["step"])
        assert (step, record["data/ledger"], record["tokens"]) == parts.after(step)
        assert record["tokens"] == sum(parts[i].batch.loss_mask.sum() for i in range(step))
        assert {name: record[name] for name in record if "epoch" in name} == data.epochs(step * BATCH)
    saved = read_manifest(pathlib.Path(run.run_dir, "checkpoints", str(STEPS)))
    assert Progress(**saved["progress"]) == parts.after(STEPS)
    evaluated = read_metrics(f"{run.run_dir}/metrics.jsonl")[-1]
    assert evaluated["val/bits_per_byte"] == pytest.approx(evaluated["val/loss"] / math.log(2) * data.val.targets / data.val.bytes)


def test_a_row_is_traced_to_its_documents(run, data):
    drawn = Parts(data.train, data.order, BATCH)[2].batch
    seen = set()
    for row in range(BATCH):
        said = trace(run, 3, row)
        assert f"step 3, row {row}" in said
        stretches = re.findall(r"\n\n(code|prose): (\S+) \(document ([\d,]+)\), tokens (\d+) to (\d+) of (\d+)\n([^\n]*)", said)
        assert len(stretches) == drawn.segment_ids[row].max()
        for segment, (source, origin, _, begin, end, _, text) in enumerate(stretches, 1):
            tokens = drawn.tokens[row][drawn.segment_ids[row] == segment]
            assert int(end) - int(begin) == len(tokens) + 1
            assert BytesTokenizer().decode(tokens.tolist()) in text + " "
            name = re.match(r"document (\d+) ", text) if source == "prose" else re.match(r"\[INST\] (\d+)\?", text)
            if int(begin) == 0:
                number = int(name[1])
                assert origin == (f"{number:02}.txt" if source == "prose" else f"a.jsonl:{number + 1}")
            seen.add(source)
    assert seen == {"code", "prose"}


def test_what_cannot_be_traced_is_said(run, data, tmp_path):
    with pytest.raises(ConfigError, match="the rows 0 to 7"):
        trace(run, 1, 8)
    for step, row in ((0, 0), (1, -1)):
        with pytest.raises(ConfigError, match="steps count from 1"):
            trace(run, step, row)
    with pytest.raises(ConfigError, match="run_dir= step= row="):
        load_config(name="provenance")
    with pytest.raises(CheckpointError, match="no such folder"):
        provenance(load_config(f"run_dir={tmp_path / 'no'}", "step=1", "row=0", name="provenance"))
    assert not (tmp_path / "no").exists()
    changed = pathlib.Path(run.data.components["prose"].path, "00.txt")
    before = changed.read_text()
    changed.write_text(before + "!")
    with pytest.raises(DataError, match="no longer what the run was trained on"):
        trace(run, 1, 0)
    changed.write_text(before)


@pytest.mark.parametrize(("kind", "path"), [("prepared", "a"), ("sft", "*.jsonl")])
def test_data_at_a_relative_path_is_looked_for_where_the_run_was_started(tmp_path, monkeypatch, kind, path):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    pathlib.Path("a.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?", "response": f"{i}."}) + "\n" for i in range(60)))
    prepare(load_config("input=a.jsonl", "field=prompt", "output=a", "tokenizer=bytes", "validation_fraction=0.2", name="prepare"))

    def opened(path):
        return open_data(load_config(f"data={kind}", f"data.path={path}", "data.rows=packed").data, BytesTokenizer(), seq_len=SEQ, seed=0)

    opened(path)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError) as error:
        opened(path)
    assert f"{path} is relative, and not in {tmp_path / 'here'}: " in error.value.next
    assert str(tmp_path / "here") in error.value.next
    pathlib.Path("b").write_text("no data")
    for other in ("b", tmp_path / "no"):  # it is not for being relative that these are no data
        with pytest.raises(DataError) as error:
            opened(other)
        assert "was started" not in error.value.next


def test_a_document_has_the_loss_in_its_row_that_it_has_alone(run, data):
    """Attention stays within a document, and positions begin with it."""
    batch = data.train.read(np.arange(3))
    places = [np.flatnonzero(batch.segment_ids[row] == i) for row in range(3) for i in range(1, batch.segment_ids[row].max() + 1)]
    rows = [row for row in range(3) for _ in range(batch.segment_ids[row].max())]
    alone = Batch(*(np.zeros((len(rows), SEQ), leaf.dtype) for leaf in (batch.tokens, batch.targets, batch.loss_mask, batch.segment_ids)))
    for line, (row, place) in enumerate(zip(rows, places, strict=True)):
        for leaf, source in zip(jax.tree.leaves(alone), jax.tree.leaves(batch), strict=False):
            leaf[line, : len(place)] = source[row, place]
    model = load_pretrained(run.run_dir)

    @eqx.filter_jit
    def losses(batch):
        logits = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)

    together, apart = (np.asarray(losses(jax.tree.map(jnp.asarray, b))) for b in (batch, alone))
    for line, (row, place) in enumerate(zip(rows, places, strict=True)):
        np.testing.assert_allclose(apart[line, : len(place)], together[row, place], rtol=2e-5)
