"""The verb: what is printed, and the exit code that a script goes by."""

import subprocess
import sys

import jax
import pytest

from llama_eqx import save_pretrained
from llama_eqx.model.llama import build_model


def test_of_a_model(tmp_path, tiny, typed):
    folder = tmp_path / "a, {b}"
    save_pretrained(build_model(tiny(), key=jax.random.key(0)), folder, format="native")
    code, out, _ = typed("doctor", f"path={folder}")
    assert (code, out.splitlines()[0], out.splitlines()[-1]) == (0, f"{folder}: a run directory", "nothing wrong found")
    code, out, _ = typed("doctor", f"path={folder}", f"against={folder}")
    assert (code, out.splitlines()[-1]) == (0, "nothing wrong found")
    (folder / "config.yaml").write_text("model: ${oc.env:HOME}")
    code, out, err = typed("doctor", f"path={folder}", "weights=false")
    assert (code, out.splitlines()[-1], err) == (4, "1 error", "")
    assert "error    config.yaml: config.yaml holds an interpolation" in out


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (4, "does not exist", ["path=no/such/folder"]),
        (4, "neither a model nor a dataset", ["path=tests"]),
        (2, "did you mean against?", ["agains=x"]),
        (2, "path=FOLDER against=OTHER", ["against=transformers"]),
        (2, "not above 0", ["path=x", "tolerance=0"]),
        (2, "wanted", ["path=x", "weights=some"]),
    ],
)
def test_bad_input(code, said, arguments, typed):
    found, out, err = typed("doctor", *arguments)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err


def test_of_this_machine(typed):
    code, out, _ = typed("doctor")
    assert code in (0, 4)
    assert out.startswith("this machine\n")
    assert f"jax {jax.__version__}" in out


def test_a_typo_is_answered_without_jax():
    code = """
import sys
from llama_eqx import doctor
from llama_eqx.verb import run_verb
sys.argv = ["doctor", "pth=3"]
try:
    run_verb("doctor", doctor.main)
finally:
    print(sorted({"jax", "torch", "orbax"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (2, "[]")
