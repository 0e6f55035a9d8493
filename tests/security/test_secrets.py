"""What the environment keeps secret is in no file that a run writes, and on no line that it prints."""

import os
import pathlib
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TEXT = ROOT / "tests" / "golden" / "text.md"
NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
NAMES += ("GOOGLE_API_KEY", "GITHUB_TOKEN", "OPENAI_API_KEY", "SSH_PRIVATE_KEY", "DATABASE_PASSWORD")
SMALL = ["model.dims.layers=1", "model.dims.embed=32", "model.dims.mlp=32", "train.steps=2", "train.batch_size=8", "train.seq_len=32"]
SMALL += ["data=text", f"data.path={TEXT}", "tokenizer=bytes", "train.sample_tokens=4", "train.log_every=1"]


@pytest.mark.parametrize(
    "more", [[], pytest.param(["schedule.peak=1e38", "optimizer.clip_norm=1e30", "train.steps=9"], marks=pytest.mark.faults)]
)
def test_no_secret_is_written(tmp_path, more):
    """Of a run that ends well, and of one that fails and leaves what is needed to find out why."""

    secrets = {name: f"{i:02}canary{'c0ffee' * 5}" for i, name in enumerate(NAMES)}
    secrets["WANDB_API_KEY"] = "ca9a47" * 6 + "c0de"
    environment = {
        **os.environ,
        **secrets,
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path / "home"),
        "LLAMA_EQX_CACHE": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    for folder in ("home", "tmp"):
        (tmp_path / folder).mkdir()
    command = [sys.executable, "-m", "llama_eqx.train", *SMALL, *more, f"run_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=environment, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == (5 if more else 0), done.stderr.decode()
    for _ in range(300):  # a slow W&B is not waited for by the run
        if list(tmp_path.rglob("*.wandb")):
            break
        time.sleep(0.1)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl", "provenance.jsonl"} <= {path.name for path in written}
    assert any(path.suffix == ".wandb" for path in written)
    for name, secret in secrets.items():
        assert secret.encode() not in done.stdout + done.stderr, name
        assert not [path for path in written if secret.encode() in path.read_bytes()], name
