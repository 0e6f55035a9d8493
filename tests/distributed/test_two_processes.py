"""Two real processes with four devices each give the losses of one device, through the whole of `train`."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from two_processes import PARALLEL, STEPS, evaluation, generated, overrides

from llama_eqx import load_config
from llama_eqx.data.dataset import open_data
from llama_eqx.data.pipeline import Parts
from llama_eqx.evaluation.perplexity import evaluate
from llama_eqx.sharding import MeshConfig
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.training.loop import train

ROOT = pathlib.Path(__file__).parents[2]


def test_two_processes_are_one_device(tmp_path):
    """All of it is one test: the processes run every rule one after another, and are dear to start."""
    folder, alone = tmp_path / "two", losses_of_one_device(tmp_path / "alone")
    folder.mkdir()
    (folder / "prompts.txt").write_text("Monday.\nThe lamp\nWind from the\n")
    said = run_two_processes(folder)
    for name in PARALLEL:
        found = losses(folder / name)
        assert len(found) == (STEPS // 2 if name == "fsdp" else STEPS), name
        np.testing.assert_allclose(found, alone[: len(found)], rtol=1e-5, err_msg=name)
    the_ledgers_are_those_of_one_process(folder)
    process_0_alone_writes(folder, said)
    they_evaluate_as_one_does(folder)
    they_generate_as_one_does(folder)
    one_process_goes_on_where_two_ended(folder / "fsdp", alone)


def launched(*overrides, cwd=None, **environment):
    """Two processes by the launcher, which are not told how many devices they have. The exit code, and what was said."""
    (folder,) = (override.partition("=")[2] for override in overrides if override.startswith("data.path="))
    pathlib.Path(cwd or "", folder).write_text("To be, or not to be. " * 200)
    small = ["tokenizer=bytes", "data=text", "train.seq_len=16", "train.batch_size=8", "train.steps=1", "train.sample_tokens=0"]
    small += ["model.dims.layers=1", "tracking.wandb.mode=disabled"]
    command = [sys.executable, ROOT / "scripts" / "launch_local.py", "2", *small, *overrides]
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout + done.stderr


def test_the_launcher_splits_virtual_devices_among_its_processes(tmp_path):
    code, said = launched(f"data.path={tmp_path}/text.txt", f"run_dir={tmp_path}/run")
    assert code == 0, said
    (start,) = (tmp_path / "run" / "provenance.jsonl").read_text().splitlines()
    assert [json.loads(start)["computed"][name] for name in ("processes", "devices")] == [2, 8]


def test_the_launcher_says_how_to_go_on_when_a_process_was_killed(tmp_path):
    odd = "import os\nif os.environ.get('JAX_PROCESS_ID') == '1':\n    os.environ['LLAMA_EQX_CRASH_AT'] = 'step'\n"
    (tmp_path / "sitecustomize.py").write_text(odd)
    code, said = launched("data.path=text.txt", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 137, said
    *_, before, again = said.splitlines()
    assert before == "SIGKILL ended a process"
    assert again.startswith(f"next: python {ROOT}/scripts/launch_local.py 2 tokenizer=bytes ")
    (run_dir,) = [word.partition("=")[2] for word in again.split() if word.startswith("run_dir=")]
    assert (tmp_path / run_dir / "config.yaml").exists()


def test_processes_that_compute_otherwise_are_refused(tmp_path):
    """As those with other code, which is compared with JAX's settings: here one process has 64 bits."""
    odd = "import os\nif os.environ.get('JAX_PROCESS_ID') == '1':\n    os.environ['JAX_ENABLE_X64'] = '1'\n"
    (tmp_path / "sitecustomize.py").write_text(odd)
    code, said = launched(f"data.path={tmp_path}/text.txt", f"run_dir={tmp_path}/run", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert code == 3, said
    assert "processes 1 have different code, JAX version or JAX settings from process 0" in said
    assert not (tmp_path / "run" / "config.yaml").exists()


def run_two_processes(folder):
    """What process 1 says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, str(pathlib.Path(__file__).with_name("two_processes.py")), str(folder)]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, env={**environment, "JAX_PROCESS_ID": str(i)}, **streams) for i in range(2)]
    try:
        said = [process.communicate(timeout=900)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    return said[1]


def losses_of_one_device(run_dir):
    build = MeshConfig.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MeshConfig, "build", lambda self: build(self, jax.devices()[:1]))
        return losses(train(load_config(*overrides(run_dir))).run_dir)


def losses(run_dir):
    return [record["train/loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in record]


def the_ledgers_are_those_of_one_process(folder):
    """All have seen the same batches."""
    config = load_config(*overrides(folder))
    data = open_data(config.data, config.tokenizer.build(config.data), seq_len=config.train.seq_len, seed=config.seed)
    parts = Parts(data.train, data.order, config.train.batch_size, fingerprint=data.fingerprint)
    for name in PARALLEL:
        found = [record["data/ledger"] for record in read_metrics(folder / name / "metrics.jsonl") if "data/ledger" in record]
        assert found == [parts.after(step).ledger for step in range(1, len(found) + 1)], name
        assert len(found) >= STEPS // 2


def process_0_alone_writes(folder, said):
    for name in PARALLEL:
        assert (folder / name / "loss.png").stat().st_size
        assert len((folder / name / "provenance.jsonl").read_text().splitlines()) == 1, name
    assert "step" not in said


def they_evaluate_as_one_does(folder):
    said = [(folder / f"evaluated.{process}.json").read_text() for process in range(2)]
    assert said[0] == said[1]
    both = json.loads(said[0])["all"]
    (alone,) = evaluate(load_config(*evaluation(folder), name="evaluate")).results.values()
    assert (both["tokens"], both["windows"]) == (alone.tokens, alone.windows)
    np.testing.assert_allclose([both["loss"], *both["loss_interval_95"]], [alone.loss, alone.low, alone.high], rtol=1e-5)


def they_generate_as_one_does(folder):
    """The same tokens, which process 0 alone prints and writes."""
    both, second = (json.loads((folder / f"generated.{process}.json").read_text()) for process in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama_eqx.generation.decode.FEWEST", 32)
        alone = generated(folder, "alone")
    for name, (out, _) in alone.items():
        assert both["said"][name][0] == out, name
        assert out.startswith("It is a truth") or name == "drawn"
    assert "6 texts in" in both["said"]["drawn"][1]
    assert [*second["said"].values()] == [["", ""]] * len(alone)
    lines, wanted = ([json.loads(line) for line in (folder / f"drawn.{who}.jsonl").read_text().splitlines()] for who in (0, "alone"))
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in wanted]
    assert len(lines) == 6
    assert not (folder / "drawn.1.jsonl").exists()
    for refused in (both["refused"], second["refused"]):
        assert refused[0] == "a chat is held by one process"
        assert refused[1].startswith("several processes continue text together, on a mesh")


def one_process_goes_on_where_two_ended(run_dir, alone):
    train(load_config(*overrides(run_dir)))
    np.testing.assert_allclose(losses(run_dir), alone, rtol=1e-5)
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in record] == list(range(1, STEPS + 1))
    assert len((run_dir / "provenance.jsonl").read_text().splitlines()) == 2
