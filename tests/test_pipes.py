"""Pipes that break: the reader of an output leaves, which is no error, or something else broke, which is."""

import os
import subprocess
import sys

import pytest

from llama_eqx.verb import guarded


@pytest.mark.parametrize(
    ("name", "flush", "unbuffered"), [("stdout", True, ""), ("stdout", False, ""), ("stdout", False, "1"), ("stderr", True, "")]
)
def test_a_reader_who_leaves(name, flush, unbuffered):
    """As `| head` does: nothing is said, and what is printed afterwards goes nowhere."""
    code = f"""
import sys
from llama_eqx.verb import guarded
code = guarded(lambda: print("a", file=sys.{name}, flush={flush}))
print("b", file=sys.{name}, flush=True)
sys.exit(code)
"""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        places = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, name: stream}
        done = subprocess.run([sys.executable, "-c", code], **places, env={**os.environ, "PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (141, b"", b"")


def test_a_reader_of_the_help_who_leaves():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        done = subprocess.run([sys.executable, "-m", "llama_eqx.train", "--help"], stdout=stream, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")


def test_another_pipe_that_breaks_is_unexpected(capsys):
    def job():
        raise BrokenPipeError("of a worker")

    assert guarded(job) == 1
    assert "unexpected BrokenPipeError: of a worker" in capsys.readouterr().err
