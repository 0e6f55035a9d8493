"""Nothing starts a backend before the mesh has said how many devices a CPU is to be."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_the_lock_of_a_run_directory_starts_no_backend(tmp_path):
    program = """
import sys, types, jax
from llama_eqx.writer import sole_writer
sole_writer(lambda config: jax.config.update("jax_num_cpu_devices", 8))(types.SimpleNamespace(run_dir=sys.argv[1]))
assert len(jax.devices()) == 8
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
