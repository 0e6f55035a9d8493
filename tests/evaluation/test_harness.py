"""Scores of the lm-evaluation-harness, with its own `hf` model on the same weights as the reference."""

import functools
import json
import os
import shutil
import warnings

import numpy as np
import pytest

from llama_eqx import load_config

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    pytest.importorskip("accelerate", reason="the harness's own `hf` model, which is the reference, needs accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llama_eqx.evaluation.harness import HarnessModel
    from llama_eqx.evaluation.opened import open_model
    from llama_eqx.generation.sampling import Sampling

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 48
LINES = [
    {"question": "To be, or", "choices": [" not to be", " to see", " or"], "answer": 0},
    {"question": "The slings and", "choices": [" arrows", " bows"], "answer": 1},
    {
        "question": "A long question that does not fit into a row of 48 tokens, and so it is cut",
        "choices": [" yes", " no"],
        "answer": 0,
    },
    {"question": "naïve ", "choices": ["你好", "x"], "answer": 1},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[answer]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[0]}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "t"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks as a user would write them."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for name, task in TASKS.items():
        common = {"task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0}
        data = {"dataset_kwargs": {"data_files": {"test": str(folder / "lines.jsonl")}, "cache_dir": str(folder / "cache")}}
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **data, **task}))  # YAML includes JSON
    return folder


@pytest.fixture(scope="module")
def both(hf_model):
    return opened(hf_model)


def opened(folder):
    ours = HarnessModel(open_model(load_config(f"checkpoint={folder}", f"length={LENGTH}", name="evaluate")))
    return ours, HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, max_length=LENGTH)


def without_bos(folder, bare):
    """A copy whose tokenizer.json puts nothing before a text."""
    shutil.copytree(folder, bare)
    definition = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(json.dumps({**definition, "post_processor": None}))
    return bare


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


@pytest.mark.parametrize("bos", [True, False])
def test_tokens(both, bos, hf_model, tmp_path):
    ours, theirs = both if bos else opened(without_bos(hf_model, tmp_path / "bare"))
    for text in ("", "To be", "<s>To be", " spaces ", "a</s>b", "naïve 你好"):
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        assert ours.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, add_special_tokens=False)
    assert (ours.eot_token_id, ours.prefix_token_id) == (theirs.eot_token_id, theirs.prefix_token_id)


def test_loglikelihoods(both):
    pairs = [(line["question"], choice) for line in LINES for choice in line["choices"]] + [("", " alone"), ("ends with a space ", "x")]
    found, wanted = (model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for model in both)
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in wanted], rtol=1e-5, atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


def test_what_is_greedy(both):
    """A continuation that the model itself would write is, and one with another last token is not."""
    ours, _ = both
    prompt = ours.tok_encode("To be")
    written = ours.continued([prompt], 3, Sampling(), [])[0]
    other = [*written[:-1], (written[-1] + 1) % 256]
    answers = [model._loglikelihood_tokens([(None, prompt, written), (None, prompt, other)], disable_tqdm=True) for model in both]
    assert [[greedy for _, greedy in answer] for answer in answers] == [[True, False]] * 2


def test_rolling_loglikelihoods(both):
    texts = [(line["question"] * times,) for times, line in enumerate(LINES, 1)]
    found, wanted = (model.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for model in both)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_continuations(both):
    settings = [{"until": ["e"], "max_gen_toks": 12}, {"max_gen_toks": 12, "do_sample": False}]
    asked = [(line["question"], each) for line in LINES for each in settings]
    found, wanted = (model.generate_until(requests("generate_until", asked), disable_tqdm=True) for model in both)
    assert found == wanted
    assert len({len(text) for text in found}) > 1  # some were stopped


def test_repeated_requests_have_draws_of_their_own_whatever_the_batch(both, monkeypatch):
    """A task may ask one question many times, and count the answers."""
    ours, _ = both
    asked = [("To be", {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0})] * 6
    found = []
    for size in (1, 2, 6):
        monkeypatch.setattr(ours, "_batch_size", size)
        found.append(ours.generate_until(requests("generate_until", asked), disable_tqdm=True))
    assert found[0] == found[1] == found[2]
    assert len(set(found[0])) == 6


def test_the_command_gives_the_scores_of_hf(both, hf_model, tasks, tmp_path, typed):
    wanted = lm_eval.simple_evaluate(
        both[1], tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks), include_defaults=False), bootstrap_iters=0
    )
    arguments = [f"tasks={','.join(TASKS)}", f"include_path={tasks}", f"length={LENGTH}", f"output={tmp_path / 'r.json'}"]
    code, out, err = typed("evaluate", f"checkpoint={hf_model}", *arguments)
    assert code == 0, err
    saved = json.loads((tmp_path / "r.json").read_text())["results"]
    for task in TASKS:
        assert f"|{task}" in out
        scores = {name: value for name, value in wanted["results"][task].items() if isinstance(value, float)}
        assert scores
        assert {name: saved[task][name] for name in scores} == pytest.approx(scores, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("said", "arguments"),
    [
        ("an answer of", ["tasks=choice", "include_path={tasks}", "length=4"]),
        ("leave no room", ["tasks=writing", "include_path={tasks}", "length=12"]),
        ("leave out tasks or data", ["tasks=choice", "data=test"]),
    ],
)
def test_bad_input(said, arguments, hf_model, tasks, typed):
    code, _, err = typed("evaluate", f"checkpoint={hf_model}", *(argument.format(tasks=tasks) for argument in arguments))
    assert said in err
    assert code == 2


@pytest.mark.parametrize(
    ("said", "arguments"),
    [("no task is called nonesuch", ["tasks=nonesuch"]), ("did you mean choice?", ["tasks=choise", "include_path={tasks}"])],
)
def test_unknown_tasks(said, arguments, hf_model, tasks, monkeypatch, typed):
    """They are told before weights are loaded."""
    own = functools.partial(TaskManager, include_defaults=False)  # the harness's own tasks take ten seconds to find
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, include_defaults=True: own(include_path=include_path))
    monkeypatch.setattr("llama_eqx.evaluation.opened.load_pretrained", lambda *given: pytest.fail("loaded the weights"))
    test_bad_input(said, arguments, hf_model, tasks, typed)
