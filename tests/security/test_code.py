"""Nothing that is read can name code that is run: not in the sources of this package, and not in anybody's settings."""

import ast
import json
import os
import pathlib
import pickle
import subprocess
import sys

import jax
import pytest
import yaml

from llama_eqx.checkpoint.native import CONFIG, read_config
from llama_eqx.config import load
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.conversion import save_pretrained
from llama_eqx.interop.pretrained import load_pretrained
from llama_eqx.model.llama import build_model

PACKAGE = pathlib.Path(__file__).parents[2] / "llama_eqx"
FORBIDDEN = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "pickle.load",
    "pickle.loads",
    "os.system",
    "os.popen",
    "yaml.load",
    "yaml.unsafe_load",
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def calls(path: pathlib.Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_sources_call_nothing_that_runs_what_it_reads(path):
    for call in calls(path):
        name, given = ast.unparse(call.func), {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in FORBIDDEN, f"line {call.lineno}: {name}"
        assert not name.endswith(("instantiate", "torch.jit.load")), f"line {call.lineno}: {name}"
        assert given.get("shell", "False") == "False"
        assert given.get("allow_pickle", "False") == "False"
        assert "trust_remote_code" not in given
        if name == "torch.load":
            assert given.get("weights_only") == "True", f"line {call.lineno}"


TARGETS = [
    "os.system",
    "builtins.eval",
    "pathlib.Path.write_text",
    "subprocess.Popen",
    "llama_eqx.config.importlib.import_module",
    "llama_eqx.interop.meta.torch.load",
    "llama_eqx.supervise.subprocess.Popen",
    "llama_eqx.train.main",
    "llama_eqx..os.system",
    "hydra.utils.instantiate",
    "torch.load",
    "llama_eqx.model.norm.RMSNorm",
    "llama_eqx_evil.Config",
    "llama_eqx.config.Config",
    "llama_eqx.nowhere.X",
    "Dims",
    "",
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("place", [["model"], ["model", "norm"], ["data", "components", "x"], ["more", 0]])
def test_a_foreign_target(target, place, tmp_path):
    tree = {"_target_": target, "_args_": ["touch canary"], "_partial_": False}
    for key in reversed(place):
        tree = {key: tree} if isinstance(key, str) else [tree]
    with pytest.raises(ConfigError, match="only these are built"):
        load(tree)


@pytest.mark.parametrize("value", ["${oc.env:HF_TOKEN}", "${oc.env:HOME,x}", "a ${seed}", "${oc.create:{_target_: os.system}}"])
@pytest.mark.parametrize("place", ["value", "key", "list"])
def test_an_interpolation_in_a_config_that_came_with_a_checkpoint(tmp_path, value, place):
    tree = {"value": {"run_dir": value}, "key": {value: 1}, "list": {"a": [{"b": [value]}]}}[place]
    (tmp_path / CONFIG).write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match="never resolved"):
        read_config(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny):
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_pretrained(build_model(tiny(), key=jax.random.key(0)), folder, format="hf")
    (folder / "manifest.json").unlink()
    return folder, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    "more",
    [
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel"},
        {"trust_remote_code": True},
        {"_target_": "os.system"},
        {"custom_pipelines": {"x": {"impl": "evil.Pipeline"}}},
        {"quantization_config": {"quant_method": "evil"}},
        {"auto_map": {"AutoConfig": "evil.Config"}},
        {"architectures": ["Evil"], "transformers_version": "9"},
    ],
    ids=lambda more: next(iter(more)),
)
def test_settings_of_a_repository_name_no_code(saved, more, monkeypatch):
    folder, config = saved
    (folder / "config.json").write_text(json.dumps({**config, **more}))
    monkeypatch.syspath_prepend(folder)
    refused = "auto_map" in more or "quantization_config" in more
    before = set(sys.modules)
    try:
        load_pretrained(folder)
        assert not refused
    except CheckpointError:
        assert refused
    assert not [name for name in set(sys.modules) - before if "evil" in name or name.startswith(("torch", "transformers"))]


def typed_in(folder: pathlib.Path, *words: str) -> str:
    """What a verb says that is run in a folder that somebody else filled."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize("module", ["typing", "shlex", "yaml", "jax", "safetensors"])
def test_a_module_in_the_folder_of_a_model(tmp_path, module):
    """`python -m` would import it in place of the real one."""
    (tmp_path / f"{module}.py").write_text("import pathlib\npathlib.Path('canary').touch()\n")
    said = typed_in(tmp_path, "llama_eqx.generate", "checkpoint=.", "prompt=a")
    assert not (tmp_path / "canary").exists()
    assert "no model here" in said


def test_a_module_in_the_folder_where_a_sweep_is_started(tmp_path):
    """Submitit's processes are started by `python -m`, too."""
    for module in ("json", "typing", "numpy", "cloudpickle", "submitit", "jax"):
        (tmp_path / f"{module}.py").write_text(f"import pathlib\npathlib.Path('canary of {module}').touch()\n")
    said = typed_in(tmp_path, "llama_eqx.train", "-m", "data=text", "data.path=nowhere", "tokenizer=bytes", "hydra.sweep.dir=sweep")
    assert not [*tmp_path.glob("canary*")]
    assert "1 failed (job 0: exit code 3, its data cannot be used)" in said


def test_a_pickle_of_hydra(tmp_path):
    class Canary:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "canary",)

    (tmp_path / "config.pickle").write_bytes(pickle.dumps(Canary()))
    said = typed_in(tmp_path, "llama_eqx.train", "--experimental-rerun", "config.pickle")
    assert not (tmp_path / "canary").exists()
    assert "no such flag: --experimental-rerun" in said
    assert "next: the command of that run again; its settings are in the config.yaml of its run_dir" in said
