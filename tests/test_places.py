"""Disks that are full and places that cannot be written: code 6 and the path, or a run that goes on without what is not needed."""

import contextlib
import errno
import logging
import os
import pathlib
import subprocess
import sys

import pytest

from llama_eqx import load_config
from llama_eqx.errors import StorageError
from llama_eqx.tracking.tracker import Tracker
from llama_eqx.writer import held

ROOT = pathlib.Path(__file__).parents[1]
TEXT = ROOT / "tests" / "golden" / "text.md"
FULL = pathlib.Path("/dev/full")
SMALL = ["model.dims.layers=1", "model.dims.embed=32", "model.dims.mlp=32", "train.steps=4", "train.batch_size=8", "train.seq_len=32"]
SMALL += ["data=text", f"data.path={TEXT}", "tokenizer=bytes", "train.sample_tokens=4", "train.log_every=1", "checkpoint.every=2"]
needs_full = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


@needs_full
def test_a_log_that_cannot_be_written_is_given_up_with_one_line(tmp_path, typed):
    (tmp_path / "log.txt").symlink_to(FULL)

    def job(config, overrides):
        for _ in range(3):
            logging.getLogger("llama_eqx").warning("something")

    code, _, said = typed("train", f"run_dir={tmp_path}", job=job)
    assert code == 0
    assert said.splitlines() == [f"warning: {tmp_path}/log.txt cannot be written: No space left on device; the run goes on without it"]


def test_a_log_that_was_opened_again_is_closed_by_the_next_run(tmp_path, typed):
    """A library may say something when the run is over: pytest makes an error of a file that is left open."""
    for name in ("first", "second"):
        assert typed("train", f"run_dir={tmp_path / name}", job=lambda config, overrides: None) == (0, "", "")
        (log,) = logging.getLogger("asyncio").handlers
        logging.getLogger("asyncio").warning("late")
        assert "late" in (tmp_path / name / "log.txt").read_text()
        if name == "first":
            first = log
    assert first.stream is None
    log.close()


@needs_full
def test_a_sample_that_cannot_be_written_ends_the_run(tmp_path):
    (tmp_path / "sample.txt").symlink_to(FULL)
    config = load_config("tracking.wandb.mode=disabled").tracking
    with Tracker(config, tmp_path, settings={}, steps=2, start=0) as told, pytest.raises(StorageError, match="No space left") as error:
        told.sample(1, "text")
    assert error.value.where == str(tmp_path / "sample.txt")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_whatever_says_so_it_is_the_place(tmp_path, number, typed):
    def job(config, overrides):
        raise OSError(number, os.strerror(number), "some/file")

    code, _, said = typed("train", f"run_dir={tmp_path}", job=job)
    assert code == 6
    assert said.startswith(f"error: cannot write: {os.strerror(number)}\nwhere: some/file\nnext: ")


def test_another_error_of_the_system_is_unexpected(tmp_path, typed):
    def job(config, overrides):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")

    assert typed("train", f"run_dir={tmp_path}", job=job)[0] == 1


@contextlib.contextmanager
def stranger():
    """As somebody who owns nothing, where that can be done."""
    if os.geteuid():
        yield
        return
    os.setegid(65533)
    os.seteuid(65533)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.fixture
def public(tmp_path_factory):
    """A folder whose parents anybody may enter."""
    folder = tmp_path_factory.mktemp("public")
    for path in (folder, *folder.parents):
        if "pytest" in path.name:
            path.chmod(0o755)
    return folder


@pytest.mark.parametrize("place", ["a folder that may not be written", "a file in its place", "a run that is another's", "/proc/nowhere"])
def test_places_that_cannot_be_written(public, place):
    run_dir = public / "closed" / "run"
    if place == "a file in its place":
        (public / "closed").write_text("")
    elif place == "/proc/nowhere":
        run_dir = pathlib.Path(place)
    else:
        run_dir.mkdir(parents=True) if "another" in place else run_dir.parent.mkdir()
        (run_dir if "another" in place else run_dir.parent).chmod(0o555)
    with (
        stranger(),
        pytest.raises(StorageError, match=r"cannot write: (Permission denied|Not a directory|No such file)") as error,
        held(run_dir),
    ):
        pass
    assert error.value.where.startswith(str(run_dir))
    assert error.value.code == 6


@pytest.mark.faults
def test_no_home(tmp_path):
    """What is kept between runs goes to the folder for temporary files, and a run needs no other."""
    kept = ("XDG_CACHE_HOME", "LLAMA_EQX_CACHE", "JAX_COMPILATION_CACHE_DIR")
    variables = {name: value for name, value in os.environ.items() if name not in kept}
    done = subprocess.run(
        [sys.executable, "-m", "llama_eqx.train", *SMALL, f"run_dir={tmp_path / 'run'}"],
        env={**variables, "PYTHONPATH": str(ROOT), "HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").is_file()
    assert list(tmp_path.glob("llama_eqx-*"))


@pytest.mark.parametrize("size", [0, *(pytest.param(size, marks=pytest.mark.faults) for size in (1, 4, 16, 64, 256, 1024))])
def test_a_full_disk_in_every_phase(tmp_path, size):
    """No file may grow beyond `size` blocks of 512 bytes. Where the run ends depends on the size; how it ends does not."""
    run_dir = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LLAMA_EQX_CACHE": str(tmp_path / "cache")}
    train = [sys.executable, "-m", "llama_eqx.train", *SMALL, f"run_dir={run_dir}", "compile_cache=false"]
    done = subprocess.run(
        ["sh", "-c", f'ulimit -f {size}; exec "$@"', "sh", *train], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode in ((0, 6) if size >= 64 else (6,)), done.stderr
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert str(tmp_path) in done.stderr
    if size:
        done = subprocess.run(train, env=environment, capture_output=True, text=True, check=False)  # with room again
        assert done.returncode == 0, done.stderr
