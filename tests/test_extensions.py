"""A package of one's own: its classes are built, its YAML is found and its meters are known once it is installed with an entry point."""

import dataclasses
import importlib
import os
import subprocess
import sys

import jax
import pytest

from llama_eqx import build_model, extensions, load_config, load_pretrained, save_pretrained
from llama_eqx.config import load
from llama_eqx.errors import ConfigError
from llama_eqx.training.meters import METERS
from llama_eqx.verb import guarded, help_text

CODE = """
from llama_eqx.model.norm import Norm, NormConfig

class Nothing(Norm):
    def __call__(self, x):
        return x

class NothingConfig(NormConfig):
    def build(self, dims):
        return Nothing()
"""
METER = """
import jax.numpy as jnp
from llama_eqx.training.meters import METERS

METERS["largest"] = lambda model, gradient, update: jnp.abs(gradient.embed).max()
"""


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A package that is installed, and the environment of a process that sees it."""
    files = {
        "lab/__init__.py": METER,
        "lab/norms.py": CODE,
        "lab/conf/model/norm/nothing.yaml": "_target_: lab.norms.NothingConfig\n",
        "lab/conf/experiment/quiet.yaml": "# @package _global_\nmodel: {dropout: 0.25}\n",
        "lab-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: lab\nVersion: 1\n",
        "lab-1.dist-info/entry_points.txt": "[llama_eqx]\nlab = lab\n",
    }
    for name, text in files.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    extensions.extensions.cache_clear()
    yield {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])}
    METERS.pop("largest", None)
    for name in [name for name in sys.modules if name.split(".")[0] == "lab"]:
        del sys.modules[name]
    monkeypatch.undo()
    extensions.extensions.cache_clear()


def test_a_variant_is_chosen_built_and_kept(lab, tmp_path):
    config = load_config("model/norm=nothing", "model.dims.vocab=64", "model.dims.layers=1", "model.dims.mlp=32").model
    model = build_model(config, key=jax.random.key(0))
    save_pretrained(model, tmp_path / "model", format="native")
    tokens = jax.numpy.arange(8)[None]
    assert jax.numpy.array_equal(load_pretrained(tmp_path / "model")(tokens), model(tokens))
    assert ["nothing" in help_text(verb) for verb in ("train", "report")] == [True, False]
    assert "\nplan: " not in help_text("train")


def test_an_error_in_it_is_its_own(lab, capsys):
    def job():
        METERS["largest"](None, None, None)

    importlib.import_module("lab")
    assert guarded(job) == 1
    said = capsys.readouterr().err
    assert "error: unexpected AttributeError: 'NoneType' object has no attribute 'embed'\nwhere: " in said
    assert said.endswith("lab/__init__.py:5\nnext: look at this line, which is in an extension\n")
    assert guarded(lambda: 1 // 0) == 1
    assert capsys.readouterr().err.endswith("next: please report this with the lines above\n")


def test_a_typo_is_answered_with_its_options(lab):
    with pytest.raises(ConfigError) as raised:
        load_config("model/norm=nothin")
    assert raised.value.next == "did you mean nothing? There are layer, nothing, rms, rms_1e-6"


def test_its_experiments_are_options_of_runs_and_not_of_reports(lab):
    assert load_config("experiment=quiet").model.dropout == 0.25
    assert load_config("experiment=quiet", name="report").experiment == "quiet"


def test_its_meters_are_known_whatever_is_chosen(lab):
    assert load_config("train.meters=[largest]").train.meters == ("largest",)


def test_without_the_entry_point_nothing_of_it_is_imported_or_written(lab, tmp_path):
    config = load_config("model/norm=nothing", "model.dims.vocab=64", "model.dims.layers=1").model
    model = build_model(config, key=jax.random.key(0))
    (tmp_path / "site" / "lab-1.dist-info" / "entry_points.txt").unlink()
    for name in ("lab", "lab.norms"):
        del sys.modules[name]
    extensions.extensions.cache_clear()
    for attempt in (
        lambda: load({"_target_": "lab.norms.NothingConfig"}),
        lambda: save_pretrained(model, tmp_path / "model", format="native"),
    ):
        with pytest.raises(ConfigError, match="not a config class of llama_eqx, and only these"):
            attempt()
    assert "lab" not in sys.modules
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("from lab import helpers", "ImportError: cannot import name 'helpers' from 'lab'"),
        ("if", "SyntaxError: invalid syntax"),
    ],
)
def test_what_cannot_be_imported_is_named(lab, tmp_path, line, said):
    (tmp_path / "site" / "lab" / "norms.py").write_text(f"{line}\n{CODE}")
    with pytest.raises(ConfigError) as raised:
        load_config("model/norm=nothing")
    assert raised.value.what.startswith(f"lab.norms cannot be imported: {said}")


def test_a_config_runs_no_script_of_an_extension(lab, tmp_path):
    (tmp_path / "site" / "lab" / "analyse.py").write_text("raise SystemExit('this was run')")
    with pytest.raises(ConfigError, match="not a config class of llama_eqx or lab"):
        load({"_target_": "lab.analyse.X"})


def test_what_lies_in_the_working_directory_is_not_installed(lab, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "site")
    extensions.extensions.cache_clear()
    assert extensions.extensions() == ()


def test_what_is_no_package_or_has_the_name_of_another_option_is_refused(lab, tmp_path):
    folder = tmp_path / "site" / "lab"
    (folder / "conf" / "model" / "norm" / "rms.yaml").write_text("")
    with pytest.raises(ConfigError, match="llama_eqx already has an option of this name"):
        load_config()
    (folder / "conf" / "model" / "norm" / "rms.yaml").unlink()
    (folder / "__init__.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match="names 'lab', which is not a package with an __init__"):
        load_config()


def test_a_run_and_a_sweep_by_the_command_line(lab, tmp_path):
    tiny = ["tokenizer=bytes", "model.dims.layers=1", "model.dims.mlp=32", "train.steps=2", "train.batch_size=2", "train.seq_len=16"]
    tiny += ["data=text", f"data.path={tmp_path / 'text.txt'}", "tracking.wandb.mode=disabled", "train.meters=[largest]"]
    (tmp_path / "text.txt").write_text("What is trained on, a line of it.\n" * 200)
    command = [sys.executable, "-m", "llama_eqx.train", "model/norm=nothing", *tiny, f"hydra.sweep.dir={tmp_path / 'sweep'}", "-m"]
    done = subprocess.run(command, env=lab, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "sweep").rglob("metrics.jsonl")
    assert '"optim/largest"' in record.read_text()
    assert dataclasses.asdict(load_pretrained(record.parent).config)["norm"] == {}
