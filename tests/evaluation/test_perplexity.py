"""What `python -m llama_eqx.evaluate` says of a text, against a plain loop over transformers, token by token."""

import json
import math
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoTokenizer, LlamaForCausalLM

from llama_eqx import evaluate as verb
from llama_eqx import load_config, load_pretrained, save_pretrained
from llama_eqx.errors import NonFiniteError
from llama_eqx.evaluation import perplexity
from llama_eqx.evaluation.perplexity import evaluate, half_width
from llama_eqx.tracking.provenance import code as code_of

LENGTH = 16
TENSOR = ["mesh=cpu-8", "mesh.tensor=2", "sharding=fsdp_tensor"]


def evaluated(folder, corpus, *overrides):
    return evaluate(load_config(f"checkpoint={folder}", "data=test", f"data.path={corpus}", *overrides, name="evaluate"))


def read(corpus):
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


@torch.no_grad()
def plain_loop(folder, texts, stride):
    """Loss, whether it is right, position and document of every token of `texts`, which are (ids, document of each) pairs."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    found = []
    for ids, documents in texts:
        done = 1
        for begin in range(0, len(ids) - 1, stride):
            window = torch.tensor([ids[begin : begin + LENGTH]])
            logits = model(window).logits[0].double()
            end = min(begin + LENGTH, len(ids) - 1)
            for target in range(done, end + 1):
                line = logits[target - 1 - begin]
                loss = -torch.log_softmax(line, -1)[ids[target]].item()
                found.append((loss, line.argmax().item() == ids[target], target - 1 - begin, documents[target]))
            done = end + 1
            if end == len(ids) - 1:
                break
    return [np.array(column) for column in zip(*found, strict=True)]


def texts_of(folder, corpus, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in read(corpus)]
    if rows == "documents":
        return [(ids, [number] * len(ids)) for number, ids in enumerate(texts)]
    return [([i for ids in texts for i in ids], [number for number, ids in enumerate(texts) for _ in ids])]


@pytest.mark.parametrize(
    ("rows", "stride", "layout"),
    [
        ("documents", LENGTH, []),
        ("documents", 4, TENSOR),
        ("windows", LENGTH, ["batch_size=3"]),
        ("windows", 5, ["data.position_offset=64"]),
    ],
)
def test_every_number_is_that_of_a_plain_loop(hf_model, corpus, rows, stride, layout):
    settings = [f"length={LENGTH}", f"stride={stride}", f"data.rows={rows}", *layout]
    (result,) = evaluated(hf_model, corpus, *settings).results.values()
    losses, right, positions, documents = plain_loop(hf_model, texts_of(hf_model, corpus, rows), stride)
    assert result.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert result.accuracy == pytest.approx(right.mean(), abs=1e-12)
    assert result.tokens == len(losses)
    n_bytes = sum(len(text.encode()) for text in read(corpus))
    assert (result.bytes, result.bits_per_byte) == (n_bytes, pytest.approx(losses.sum() / math.log(2) / n_bytes, rel=1e-5))
    first = np.where(positions > 0, 2 ** np.floor(np.log2(np.maximum(positions, 1))), 0)
    wanted = {int(p): (pytest.approx(losses[first == p].mean(), rel=1e-5), (first == p).sum()) for p in np.unique(first)}
    assert result.by_position == wanted
    assert [tokens for _, _, tokens in result.documents] == np.bincount(documents).tolist()
    assert [loss for _, loss, _ in result.documents] == pytest.approx([losses[documents == number].mean() for number in range(5)], rel=1e-5)
    assert [name for name, _, _ in result.documents] == [f"texts.jsonl:{line}" for line in range(1, 6)]


@pytest.mark.parametrize("format", ["meta", "native"])
def test_other_formats_give_the_same_numbers(format, hf_model, corpus, tmp_path):
    save_pretrained(load_pretrained(hf_model), tmp_path / "model", format=format)
    shutil.copy(hf_model / "tokenizer.json", tmp_path / "model")
    wanted, found = (evaluated(folder, corpus, f"length={LENGTH}").results for folder in (hf_model, tmp_path / "model"))
    assert found == wanted


def test_an_interval_over_windows_where_documents_are_few(hf_model, corpus):
    (result,) = evaluated(hf_model, corpus, f"length={LENGTH}").results.values()
    losses, _, _, documents = plain_loop(hf_model, texts_of(hf_model, corpus, "documents"), LENGTH)
    starts = np.flatnonzero(np.diff(documents, prepend=-1))
    window = [(document, (i - starts[document]) // LENGTH) for i, document in enumerate(documents)]
    sums = {key: [0.0, 0] for key in window}
    for key, loss in zip(window, losses, strict=True):
        sums[key][0] += loss
        sums[key][1] += 1
    wanted = half_width(*np.array(list(sums.values())).T)
    assert result.clusters == "windows"
    assert (result.loss - result.low, result.high - result.loss) == (pytest.approx(wanted, rel=1e-4), pytest.approx(wanted, rel=1e-4))


def test_the_interval_is_the_sandwich_of_a_regression_on_a_constant():
    """By the matrices of Bell and McCaffrey, for every token."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), [1, 2, 3, 5, 8, 13, 21, 90])
    y, n = rng.normal(size=8)[groups] + rng.normal(size=len(groups)), len(groups)
    left = np.eye(n) - np.full((n, n), 1 / n)  # takes a token to its residual
    scores = np.stack([row_of(left, groups == g) for g in range(8)])
    products = scores @ scores.T
    freedom = np.trace(products) ** 2 / (products**2).sum()
    error = math.sqrt(((scores @ y) ** 2).sum()) / n
    wanted = stats.t.ppf(0.975, freedom) * error
    assert half_width(np.bincount(groups, y), np.bincount(groups).astype(float)) == pytest.approx(wanted)
    alike = rng.normal(size=(9, 4))
    low, high = stats.ttest_1samp(alike.mean(1), 0).confidence_interval()
    assert half_width(alike.sum(1), np.full(9, 4.0)) == pytest.approx((high - low) / 2)
    assert math.isnan(half_width(np.array([3.0]), np.array([2.0])))


def row_of(left, group):
    """What takes all tokens to the sum of a cluster's residuals, corrected by the inverse square root of the cluster's block of `left`."""
    values, vectors = np.linalg.eigh(left[np.ix_(group, group)])
    return (vectors / np.sqrt(values) @ vectors.T @ left[group]).sum(0)


@pytest.mark.parametrize("spread", [0, 1])  # of the logarithm of the documents' sizes; files of source code have 1.5
def test_the_interval_covers_the_mean_as_often_as_it_says(spread):
    rng = np.random.default_rng(1)
    trials, hits = 2000, 0
    for _ in range(trials):
        sizes = np.ceil(np.exp(rng.normal(5, spread, 12)))
        totals = sizes * rng.normal(size=12) + np.sqrt(sizes) * rng.normal(size=12)  # the mean is 0; tokens of a document are alike
        hits += abs(totals.sum() / sizes.sum()) < half_width(totals, sizes)
    assert 0.93 < hits / trials < 0.97


def test_the_command_and_its_file(hf_model, corpus, monkeypatch, tmp_path, typed):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [f"checkpoint={hf_model}", "data=test", f"data.path={corpus}", f"length={LENGTH}", "output=~/r.json"]
    bar = perplexity.tqdm
    monkeypatch.setattr(perplexity, "tqdm", lambda batches, **settings: bar(batches, **{**settings, "disable": False}))  # as in a terminal
    code, out, err = typed("evaluate", *arguments)
    saved = json.loads((tmp_path / "r.json").read_text())
    result = saved["results"]["all"]
    assert code == 0
    assert f"{result['loss']:.4f} nats per token" in out
    assert re.search(rf"evaluating: 100%.* batches.*loss {result['loss']:.4f}", err)
    assert "16-" not in out
    assert (saved["length"], saved["stride"], result["interval_over"]) == (LENGTH, LENGTH, "windows")
    assert saved["code"] == code_of()
    assert {"commit", "extensions", "versions"} <= saved.keys()
    assert sum(document["tokens"] for document in result["documents"]) == result["tokens"]


def test_the_file_is_whole_where_the_reader_of_the_words_has_left(hf_model, corpus, monkeypatch, tmp_path):
    """As `| head` does."""

    def unread(*words, **places):
        raise BrokenPipeError

    monkeypatch.setattr(verb, "print", unread, raising=False)
    arguments = [f"checkpoint={hf_model}", "data=test", f"data.path={corpus}", f"length={LENGTH}", f"output={tmp_path / 'r.json'}"]
    with pytest.raises(BrokenPipeError):
        verb.main(load_config(*arguments, name="evaluate"), [])
    assert json.loads((tmp_path / "r.json").read_text())["results"]


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (2, "checkpoint=RUN_DIR", ["data=test"]),
        (2, "data=test data.path=FILE", ["checkpoint={model}"]),
        (2, "stride=16", ["checkpoint={model}", "data=test", "data.path={text}", "length=16", "stride=17"]),
        (2, "too small", ["checkpoint={model}", "length=0"]),
        (2, "the tokenizer has 258 ids", ["checkpoint={small}", "data=test", "data.path={text}", "tokenizer=bytes"]),
        (3, "nothing matches", ["checkpoint={model}", "data=test", "data.path=no/such/file"]),
        (3, "no tokenizer beside this model", ["checkpoint={small}", "data=test", "data.path={text}"]),
        (4, "does not exist", ["checkpoint=no/such/model", "data=test"]),
        (4, "does not exist", ["checkpoint=no/such/model"]),
        (6, "cannot write", ["checkpoint={model}", "data=test", "output=/proc/nowhere/a.json"]),
    ],
)
def test_bad_input(code, said, arguments, hf_model, small, corpus, typed):
    places = {"model": hf_model, "text": corpus, "small": small}
    found, _, err = typed("evaluate", *(argument.format(**places) for argument in arguments))
    assert said in err
    assert found == code
    assert len(err.splitlines()) <= 4


@pytest.mark.parametrize(
    ("code", "said", "processes", "model"),
    [(2, "not installed", 1, "{model}"), (2, "run in a single process", 2, "{model}"), (4, "does not exist", 1, "no/such/model")],
)
def test_benchmarks_that_cannot_be_run(code, said, processes, model, hf_model, monkeypatch, typed):
    """All is said before weights are loaded."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr("jax.process_count", lambda: processes)
    monkeypatch.setattr("llama_eqx.evaluation.opened.load_pretrained", lambda *given: pytest.fail("loaded the weights"))
    found, _, err = typed("evaluate", f"checkpoint={model.format(model=hf_model)}", "tasks=hellaswag")
    assert said in err
    assert found == code


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """A model of 64 ids, alone in its folder."""
    import jax

    from llama_eqx import build_model

    folder = tmp_path_factory.mktemp("small") / "model"
    save_pretrained(build_model(tiny(), key=jax.random.key(0)), folder, format="native")
    return folder


def test_a_loss_that_is_no_number_names_the_document(hf_model, corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(hf_model, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][ord("S")] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="nan") as error:
        evaluated(folder, corpus, f"length={LENGTH}")
    assert error.value.where == "texts.jsonl:1"
