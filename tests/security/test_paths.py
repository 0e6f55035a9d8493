"""No name in a file that somebody else wrote leads out of the folder that the file is in."""

import hashlib
import json
import os
import pathlib
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from llama_eqx import load_config
from llama_eqx.checkpoint.manifest import MANIFEST, _own_digest, verify
from llama_eqx.data.shards import FORMAT, open_dataset
from llama_eqx.errors import CheckpointError, ConfigError, DataError
from llama_eqx.interop.files import carried
from llama_eqx.interop.huggingface import CONFIG, INDEX, SINGLE, weight_files
from llama_eqx.interop.pretrained import load_pretrained
from llama_eqx.studies.page import Page
from llama_eqx.tracking.wandb import _id
from llama_eqx.writer import held

NAMES = [
    "../secret",
    "../../secret",
    "a/../../secret",
    "./../secret",
    "..",
    "a/..",
    "/etc/passwd",
    "//etc/passwd",
    "../" * 12 + "etc/passwd",
    "link",
    "linked/secret",
    "loop",
    "a/../link",
    "secret\0.safetensors",
    "n" * 300,
]


@pytest.fixture
def folder(tmp_path):
    """A folder beside a secret, with links to it."""
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "downloaded"
    (folder / "a").mkdir(parents=True)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    (folder / "loop").symlink_to(folder / "loop")
    return folder


@pytest.fixture(autouse=True)
def nothing_outside_is_opened(folder, monkeypatch):
    """Fails when a file outside of the folder is opened by one of Python's means."""
    outside = {(folder.parent / "secret").resolve(), pathlib.Path("/etc/passwd").resolve()}
    real = pathlib.Path.open

    def watched(self, *args, **kwargs):
        if "\0" not in str(self) and pathlib.Path(os.path.realpath(self)) in outside:
            pytest.fail(f"{self} was opened")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "open", watched)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_map(folder, name):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match=r"lies outside of the folder|is no file"):
        weight_files(folder)


@pytest.mark.parametrize("name", [name for name in NAMES if "link" not in name])
def test_a_manifest(folder, name):
    said = {"files": {name: {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}}
    (folder / MANIFEST).write_text(json.dumps({**said, "sha256": _own_digest(said)}))
    with pytest.raises(CheckpointError, match=r"lies outside of the folder|missing: (loop|secret|n{300})"):
        verify(folder)


@pytest.mark.parametrize("name", [name for name in NAMES if "link" not in name])
def test_an_index_of_token_shards(folder, name):
    counts = {"tokens": 4, "documents": 1, "bytes": 4}
    empty = {"tokens": 0, "documents": 0, "bytes": 0}
    hashes = {kind: "0" * 64 for kind in ("ids", "offsets", "origins")}
    shards = [{"name": name, "split": "train", "sha256": hashes, **counts}]
    index = {"format": FORMAT, "vocab": 300, "tokenizer": "t", "splits": {"train": counts, "val": empty}, "shards": shards}
    (folder / "index.json").write_text(json.dumps(index))
    for kind, array in (("ids", np.zeros(4, "<u2")), ("offsets", np.array([0, 4])), ("origins", np.zeros((1, 2), int))):
        np.save(folder.parent / f"secret.{kind}.npy", array)  # it would be whole
    with pytest.raises(DataError) as error:
        open_dataset(folder, remedy="", verify=False)
    assert "lies outside of the folder" in str(error.value) or name in ("..", "loop", "n" * 300)


@pytest.mark.parametrize("name", [CONFIG, SINGLE, "tokenizer.json", "tokenizer.model", "params.json", "consolidated.00.pth"])
def test_links_among_the_files_of_a_model(folder, name):
    settings = {CONFIG: {"model_type": "llama"}, "params.json": {"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5}}
    for other, content in settings.items():
        if (name in ("params.json", "consolidated.00.pth")) == (other == "params.json"):
            (folder / other).write_text(json.dumps(content))
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "secret")
    with pytest.raises(CheckpointError, match=f"{name} lies outside of the folder: it leads to"):
        carried(folder) if name.startswith("tokenizer") else weight_files(folder) if name == SINGLE else load_pretrained(folder)


@pytest.mark.parametrize("option", ["../evil", "../" * 12 + "tmp/evil", "/tmp/evil", "../experiment/shakespeare"])
@pytest.mark.parametrize("group", ["experiment", "model"])
def test_the_name_of_an_option(group, option):
    with pytest.raises(ConfigError, match=f"{group} has no option"):
        load_config(f"{group}={option}")


@pytest.mark.parametrize("name", [".writer", "log.txt", "metrics.jsonl", ".config.yaml.unfinished", "wandb/about.json"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_a_run_directory(folder, typed, name, there):
    """A run would write what it leads to."""
    to, run_dir = folder.parent / ("secret" if there else "new"), folder.parent / "run"
    (run_dir / name).parent.mkdir(parents=True)
    (run_dir / name).symlink_to(to)
    with pytest.raises(ConfigError, match="a link that leads out of the run directory"), held(run_dir):
        pass
    code, _, said = typed("train", f"run_dir={run_dir}", job=lambda config, overrides: None)
    assert (code, said.splitlines()[1]) == (2, f"where: {run_dir / name}")
    assert to.exists() == there
    assert (folder.parent / "secret").stat().st_size == len("secret")


def test_links_that_a_run_directory_may_have(folder):
    """To a folder on a larger disk, and those that W&B makes."""
    (folder / "a" / "debug.log").symlink_to("../own")
    (folder / "own").write_text("")
    (folder / "checkpoints").symlink_to(folder.parent)
    (folder / "link").unlink()
    (folder / "loop").unlink()
    (folder / "linked").unlink()
    with held(folder):
        pass


@pytest.mark.parametrize("known", ["../../evil", "/tmp/evil", "a b", ""])
def test_the_id_of_a_wandb_run(tmp_path, known):
    (tmp_path / "wandb_id").write_text(known)
    assert _id(tmp_path / "wandb_id").isalnum()


@pytest.mark.parametrize("name", ["../secret", "a/b", "/nowhere/x"])
def test_the_picture_of_a_metric_in_a_report(folder, name):
    """`metrics.jsonl` and `prereg.yaml` name what is drawn."""
    before = {*folder.parent.rglob("*")}
    page = Page("title")
    page.figure(name, Figure(), "picture")
    page.write(folder / "a", "report")
    picture = re.sub(r"\W+", "_", name) + ".png"
    assert {path.name for path in {*folder.parent.rglob("*")} - before} == {"report.md", "report.html", picture}
    assert (folder / "a" / picture).exists()
    assert f"({picture})" in (folder / "a" / "report.md").read_text()
