"""Checkpoints in an object store: a process of its own that speaks Google's protocol, without a network."""

import importlib.util
import pathlib
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel

from llama_eqx import find_tokenizer, load_config, load_pretrained
from llama_eqx.checkpoint.manifest import read_manifest
from llama_eqx.checkpoint.restore import steps
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.checkpoint.store import asked, children, content, place, put
from llama_eqx.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from llama_eqx.errors import CheckpointError, ConfigError, StorageError
from llama_eqx.training.identity import file_tokenizer
from llama_eqx.training.loop import train

MISSING = [name for name in ("gcsfs", "gcp_storage_emulator") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install '.[gcs,test]'")
SERVER = """
import http.server, sys, threading
from gcp_storage_emulator import server

def one_at_a_time(handle, lock=threading.Lock()):
    def locked(self, method):
        with lock:
            handle(self, method)
    return locked

http.server.HTTPServer = http.server.ThreadingHTTPServer  # clients keep several connections open
server.Router.handle = one_at_a_time(server.Router.handle)
server.create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""
TEXT = pathlib.Path(__file__).parents[1] / "golden" / "text.md"
ONE = load_config("checkpoint.every=1").checkpoint


@pytest.fixture(scope="module", autouse=True)
def store():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("NO_GCE_CHECK", "true")  # nobody is asked who we are
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.05)
        yield url
    server.kill()
    server.wait()


@pytest.fixture
def folder(request):
    return place(f"gs://bucket/{request.node.name}") / "checkpoints"


def state(step: int):
    return {"w": jnp.arange(step, step + 100.0)}, {"step": jnp.int32(step)}


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def forbidden(path, **options):
    raise OSError(f"Forbidden: {path}")


def save_three(folder, say=print):
    with Checkpoints(folder, ONE, say) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, *state(step))
        checkpoints.finish(3)


def restored(folder, say=print):
    with Checkpoints(folder, ONE, say) as checkpoints:
        return checkpoints.restore(*map(abstract, state(0)))


def test_it_is_as_on_a_disk(folder):
    said = []
    save_three(folder, said.append)
    assert said[-1] == f"final checkpoint verified: step 3, {len(read_manifest(folder / '3')['files'])} files"
    assert steps(folder) == [2, 3] == sorted(map(int, children(folder)))  # keep=2
    found = restored(folder)
    assert (found.step, found.model["w"].tolist(), int(found.training["step"])) == (3, state(3)[0]["w"].tolist(), 3)
    assert {*read_manifest(folder / "3")["files"]["_CHECKPOINT_METADATA"]} == {"size", "md5"}


def test_of_two_runs_the_one_behind_ends(folder):
    """A run directory has a lock; a store has none."""
    behind, said = Checkpoints(folder, ONE), []
    behind.save(1, *state(1))
    behind.wait()
    save_three(folder)
    with asked(folder) as store:
        store.rm(f"{folder}/2", recursive=True)
    behind.say = said.append
    behind.save(2, *state(2))
    behind.wait()
    assert "step 2 could not be saved: another run saves here: step 3 is there" in said[0]
    behind.save(2, *state(2))
    with pytest.raises(StorageError, match="another run saves here") as error:
        behind.close()
    assert error.value.next.startswith("end the other run")
    assert steps(folder) == [3]


def test_what_has_no_manifest_is_cleared(folder):
    save_three(folder)
    with asked(folder) as store:
        store.rm(f"{folder}/3/manifest.json")
    assert steps(folder) == [2]
    assert restored(folder).step == 2
    assert children(folder) == ["2"]


def test_what_is_damaged_or_missing_is_named(folder):
    save_three(folder)
    name = next(name for name in read_manifest(folder / "3")["files"] if name.startswith("model/ocdbt.process_0/d/"))
    damaged = bytearray(content(folder / "3", name))
    damaged[-9] ^= 1
    said = []
    with asked(folder) as store:
        store.pipe_file(f"{folder}/3/{name}", bytes(damaged))
    assert restored(folder, said.append).step == 2
    assert f"step 3 is damaged: {name}: md5 " in said[-1]
    assert said[-1].endswith("step 2 is used")
    assert sorted(children(folder)) == ["2", "3.damaged"]
    with asked(folder) as store:
        store.rm(f"{folder}/2/model/_METADATA")
    with pytest.raises(CheckpointError, match="model/_METADATA: missing"):
        restored(folder)


def run(run_dir, home, *overrides):
    sizes = {"layers": 1, "embed": 16, "heads": 2, "kv_heads": 1, "head_dim": 8, "mlp": 24}
    return load_config(
        *(f"model.dims.{axis}={size}" for axis, size in sizes.items()),
        *("data=text", f"data.path={TEXT}", "tokenizer=bytes", "tracking.wandb.mode=disabled", f"run_dir={run_dir}"),
        *("train.batch_size=8", "train.seq_len=32", "train.log_every=1", "train.eval_every=99", "train.sample_tokens=0"),
        *("checkpoint.every=3", "schedule.warmup_steps=1", f"checkpoint.store={home or 'null'}"),
        *overrides,
    )


def test_a_store_that_says_no_is_not_an_empty_one(monkeypatch):
    with pytest.raises(StorageError, match="there is no bucket elsewhere"):
        put(place("gs://elsewhere/run"), {"config.yaml": b""})
    with asked(place("gs://bucket")) as store:
        monkeypatch.setattr(store, "ls", forbidden)
    with pytest.raises(StorageError, match="the object store says: Forbidden: gs://bucket"):
        steps(place("gs://bucket/run/checkpoints"))


def test_a_run_goes_on_in_an_empty_run_dir(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(tmp_path / "cache"))
    home = "gs://bucket/run"
    train(run(tmp_path / "a", home, "train.steps=3"))
    with asked(place(home)) as store:
        store.pipe_file(f"{home}/checkpoints/5/model/half", b"")  # a save that was killed
    capsys.readouterr()
    result = train(run(tmp_path / "b", home, "train.steps=6"))
    assert "resumed from step 3 of 6" in capsys.readouterr().err
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes().startswith((tmp_path / "a" / "metrics.jsonl").read_bytes())
    assert not (tmp_path / "b" / "checkpoints").exists()
    assert str(result.checkpoint) == f"{home}/checkpoints/6"
    assert content(place(home), "metrics.jsonl") == (tmp_path / "b" / "metrics.jsonl").read_bytes()

    # The same in a run directory, with the same interruption.
    train(run(tmp_path / "local", None, "train.steps=3"))
    train(run(tmp_path / "local", None, "train.steps=6"))
    for path in (home, f"{home}/checkpoints/6"):
        assert jax.tree.all(jax.tree.map(lambda x, y: (x == y).all(), load_pretrained(path), load_pretrained(tmp_path / "local")))
    assert find_tokenizer(home).fingerprint == find_tokenizer(tmp_path / "local").fingerprint
    assert not list((tmp_path / "cache").glob("stores/*/checkpoints/*/training"))

    with pytest.raises(CheckpointError, match="seed: 0 -> 1"):
        train(run(tmp_path / "c", home, "seed=1"))
    with pytest.raises(CheckpointError, match=r"checkpoint.store: None -> gs://bucket/run"):
        train(run(tmp_path / "local", home))


def test_the_tokenizer_of_a_run_that_goes_on_is_the_one_in_the_store(tmp_path):
    home, definition = "gs://bucket/filed", Library(WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a")).to_str().encode()
    for name, stop in (("a", 1), ("b", 2)):
        beside = {"chat_template.jinja": name.encode()}
        file_tokenizer(run(tmp_path / name, home), HuggingFaceTokenizer(definition, eos=0, stop=[stop]), beside)
        put(place(home), {"checkpoints/1/manifest.json": b"{}"})
    assert load_tokenizer(tmp_path / "b" / "tokenizer").stop == (0, 1)
    assert (tmp_path / "b" / "tokenizer" / "chat_template.jinja").read_text() == "a"
    assert content(place(home), "tokenizer/tokenizer_kind.json") == (tmp_path / "a" / "tokenizer" / "tokenizer_kind.json").read_bytes()


@pytest.mark.parametrize("wrong", ["folder", "gs://", "s3://bucket/folder", "gs://bucket//folder"])
def test_config_refuses(wrong):
    with pytest.raises(ConfigError, match="not a folder in an object store"):
        load_config(f"checkpoint.store='{wrong}'")
