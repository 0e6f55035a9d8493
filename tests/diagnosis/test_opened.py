"""Run directories and folders of Meta, good and broken, and what a manifest knows."""

import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
import torch
import yaml

from llama_eqx import save_pretrained
from llama_eqx.checkpoint.manifest import write_manifest
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.diagnosis.examination import examine
from llama_eqx.doctor import published
from llama_eqx.errors import CheckpointError
from llama_eqx.model.llama import build_model


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny):
    """One model in every format."""
    root = tmp_path_factory.mktemp("opened")
    model = build_model(tiny("model.dims.vocab=258"), key=jax.random.key(0))
    for format in ("native", "meta", "hf"):
        save_pretrained(model, root / format, format=format)
    BytesTokenizer().save(root / "native" / "tokenizer")
    broken = eqx.tree_at(lambda m: m.blocks.attention.k_proj, model, model.blocks.attention.k_proj.at[1, 3, 0, 2].set(jnp.nan))
    save_pretrained(broken, root / "nan", format="native")
    return root


@pytest.fixture
def folder(made, tmp_path):
    def copy(name, manifest=False):
        """Without a manifest of the folder; in a run directory each step has its own, or it would not count as saved."""
        shutil.copytree(made / name, tmp_path / name)
        if not manifest:
            (tmp_path / name / "manifest.json").unlink()
            if (step := tmp_path / name / "checkpoints" / "0").is_dir():
                write_manifest(step, {}, show=False)
        return tmp_path / name

    return copy


def test_a_damaged_step_of_a_run_is_named(folder):
    run = folder("native")
    file = max((run / "checkpoints" / "0").rglob("*"), key=lambda f: f.stat().st_size if f.is_file() else 0)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    found = examine(str(run), published, weights=True).findings
    assert [(f.severity, f.where) for f in found] == [("error", str(file.relative_to(run)))]
    assert "SHA-256" in found[0].what
    assert "copy or convert it again" in found[0].next
    (run / "checkpoints" / "0").rename(run / "checkpoints" / "2")
    shutil.copytree(run / "checkpoints" / "2", run / "checkpoints" / "1")
    found = examine(str(run), published, weights=True).findings
    assert found[0].next.startswith("the same train command falls back to step 1")


def edit_pickle(folder, change):
    file = folder / "consolidated.00.pth"
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def edit_yaml(folder, change):
    tree = yaml.safe_load((folder / "config.yaml").read_text())
    change(tree["model"])
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))


WQ = "layers.1.attention.wq.weight"
BROKEN = {
    "meta": {
        "NaN": (
            lambda f, _: edit_pickle(f, lambda s: s[WQ].view(-1)[5:7].fill_(torch.nan)),
            "params.json",
            "blocks.attention.q_proj of layer 1 has 2 NaN",
        ),
        "missing tensor": (lambda f, _: edit_pickle(f, lambda s: s.pop(WQ)), "params.json", f"missing: {WQ}"),
        "sizes": (lambda f, change: change(f / "params.json", n_kv_heads=4), "params.json", "layers.0.attention.wk.weight"),
        "vocabulary": (lambda f, change: change(f / "params.json", vocab_size=32000), "params.json", "vocab_size is 32000, and the table"),
        "pointer": (
            lambda f, _: (f / "consolidated.00.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1\n"),
            "consolidated.00.pth",
            "Git LFS pointer",
        ),
        "no weights": (lambda f, _: (f / "consolidated.00.pth").unlink(), "params.json", "missing: consolidated.00.pth"),
        "no params": (lambda f, _: (f / "params.json").unlink(), "params.json", "none of"),
    },
    "native": {
        "sizes": (lambda f, _: edit_yaml(f, lambda m: m["dims"].update(mlp=56)), "checkpoints/0", "blocks.feed_forward.down_proj"),
        "unknown key": (
            lambda f, _: edit_yaml(f, lambda m: m["norm"].update(epsilon=1)),
            "config.yaml: model.norm",
            "no such key: epsilon",
        ),
        "no steps": (lambda f, _: shutil.rmtree(f / "checkpoints" / "0"), "checkpoints", "no checkpoint has been saved"),
        "tokenizer": (
            lambda f, _: (f / "tokenizer" / "tokenizer.bytes").write_bytes(b"x"),
            "tokenizer/tokenizer.bytes",
            "its sha256 differs",
        ),
    },
}


@pytest.mark.parametrize("manifest", [False, True])
@pytest.mark.parametrize("format", ["native", "meta", "hf"])
def test_good_folders_give_no_finding(folder, format, manifest):
    path = folder(format, manifest)
    if manifest:
        shutil.rmtree(path / "tokenizer", ignore_errors=True)  # it was put there later
    report = examine(str(path), published, weights=True)
    assert report.findings == (), str(report)


@pytest.mark.parametrize(("format", "broken"), [(format, name) for format, table in BROKEN.items() for name in table])
def test_broken_folders(folder, change_json, format, broken):
    break_, where, words = BROKEN[format][broken]
    path = folder(format)
    break_(path, change_json)
    report = examine(str(path), published, weights=True)
    assert [finding.severity for finding in report.findings if finding.where == where and words in finding.what] == ["error"], str(report)


def test_numbers_of_a_run(folder):
    path = folder("nan")
    report = examine(str(path), published, weights=True)
    assert [str(finding) for finding in report.findings] == [
        "error    checkpoints: blocks.attention.k_proj of layer 1 has 1 NaN and 0 infinite of 512 numbers, the first at (3, 0, 2). "
        "Next: an earlier checkpoint, or download or convert it again"
    ]
    assert examine(str(path), published, weights=False).findings == ()
    assert not examine(str(path / "checkpoints" / "0"), published, weights=False).wrong


@pytest.mark.parametrize("format", ["native", "meta", "hf"])
def test_a_manifest_tells_what_nothing_else_can(folder, format):
    path = folder(format, manifest=True)
    files = [file for file in path.rglob("*") if file.is_file() and file.name != "manifest.json"]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[-3] ^= 1
    largest.write_bytes(content)
    report = examine(str(path), published, weights=True)
    damaged = [finding for finding in report.findings if "its SHA-256 is not that of manifest.json" in finding.what]
    assert [finding.where for finding in damaged] == [largest.relative_to(path).as_posix()]


@pytest.mark.parametrize("name", ["nowhere", "empty", "file"])
def test_nothing_to_examine(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError):
        examine(str(tmp_path / name), published, weights=True)
