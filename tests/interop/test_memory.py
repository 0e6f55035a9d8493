"""Converting and loading take little memory: a child process is watched from outside while it works on a model of many layers."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LAYERS, TENSOR, PIECE = 4, 16 * 2**20, 2 * 2**20  # the largest tensor of a layer, and what goes from file to file at a time
CONSTANT = 20 * 2**20  # of the threads, their buffers, and what is loaded on first use
CONVERSIONS = (
    "hf to hf in bfloat16",
    "hf to meta",
    "meta to hf",
    "hf to native",
    "native to hf",
    "model to hf",
    "model to meta",
    "model to native",
)

CHILD = """
import ctypes, sys, gc, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from llama_eqx import load_config, load_pretrained, save_pretrained
from llama_eqx.checkpoint import native, restore
from llama_eqx.interop import weights
from llama_eqx.interop.conversion import ConvertConfig, convert
from llama_eqx.interop.pretrained import open_pretrained
from llama_eqx.sharding import MESH_AXES, Layout

work, layers, piece = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
weights.PIECE_BYTES = native.CHUNK_BYTES = restore.IN_FLIGHT = piece
sizes = {"vocab": 512, "embed": 512, "mlp": 8192, "heads": 4, "kv_heads": 2, "head_dim": 128}

def config(layers):
    return load_config("model=llama2_7b", *(f"model.dims.{k}={v}" for k, v in {**sizes, "layers": layers}.items())).model

def make(layers, path):
    model = weights.abstract(config(layers))
    rng = np.random.default_rng(0)
    random = lambda x: jax.numpy.asarray(rng.standard_normal(x.shape, np.float32))
    save_pretrained(jax.tree.map(random, model), path, format="hf")

def run(source, target, format, dtype=None, shards=None):
    convert(ConvertConfig(from_=source, to=target, format=format, dtype=dtype, shards=shards))

mesh = jax.make_mesh((1, 4, 1, 2), MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
layout = Layout(mesh, load_config("sharding=fsdp_tensor").sharding)
def places(path):
    return layout.shardings(weights.abstract(open_pretrained(path).config))

give_back = getattr(ctypes.CDLL(None), "malloc_trim", lambda unused: None)

def jobs(name):
    yield "hf to hf in bfloat16", lambda: run(f"{name}", f"{name}-16", "hf", "bfloat16")
    yield "hf to meta", lambda: run(f"{name}", f"{name}-meta", "meta", shards=2)
    yield "meta to hf", lambda: run(f"{name}-meta", f"{name}-hf", "hf")
    yield "hf to native", lambda: run(f"{name}", f"{name}-native", "native")
    yield "native to hf", lambda: run(f"{name}-native", f"{name}-back", "hf")
    model = jax.block_until_ready(load_pretrained(name))
    for format in ("hf", "meta", "native"):
        yield f"model to {format}", lambda: save_pretrained(model, f"{name}-from-model-{format}", format=format)
    del model
    yield "hf to devices", lambda: load_pretrained(name, shardings=places(name))
    yield "meta to devices", lambda: load_pretrained(f"{name}-meta", shardings=places(f"{name}-meta"))
    yield "native to devices", lambda: load_pretrained(f"{name}-native", shardings=places(f"{name}-native"))
    yield "everything at once", lambda: [tensor.whole().copy() for tensor in open_pretrained(name).tensors.values()] and None

for _, job in jobs(make(2, f"{work}/small") or f"{work}/small"):  # what is loaded and compiled once is not counted
    job()
make(layers, f"{work}/large")
for name, job in jobs(f"{work}/large"):
    gc.collect()
    give_back(0)
    print("begin", name, flush=True)
    sys.stdin.readline()
    kept = job()
    gc.collect()
    print("end", name, flush=True)
    sys.stdin.readline()
    del kept
"""


def anonymous(pid: int) -> int:
    """Bytes of memory that are not the pages of a file: those of a mapped file the system takes back when it needs them."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.fixture(scope="module")
def extra(tmp_path_factory):
    """By job, how much more memory it took at its peak than before it began, and how much of that it kept."""
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is read from /proc")
    found = {}
    arguments = [sys.executable, "-c", CHILD, str(tmp_path_factory.mktemp("memory")), str(LAYERS), str(PIECE)]
    # What is held is to be measured, not what malloc keeps for later: larger pieces are mapped, and given back at once.
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(2**17), "MALLOC_ARENA_MAX": "2"}
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, **malloc}
    ) as child:
        assert child.stdin
        assert child.stdout
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.extend(iter(child.stdout.readline, "")), daemon=True)
        reader.start()
        seen, before, peak = 0, 0, 0
        while reader.is_alive():
            if seen < len(said):
                word, _, name = said[seen].strip().partition(" ")
                seen += 1
                now = anonymous(child.pid)
                if word == "begin":
                    before = peak = now
                else:
                    found[name] = peak - before, now - before
                child.stdin.write("\n")
                child.stdin.flush()
            if child.poll() is None:
                try:
                    peak = max(peak, anonymous(child.pid))
                except (OSError, IndexError):
                    break
            time.sleep(0.001)
        assert child.wait() == 0
    return found


@pytest.mark.parametrize("job", [*CONVERSIONS])
def test_a_conversion_holds_less_than_one_tensor_and_a_constant(extra, job):
    peak, _ = extra[job]
    assert peak < 1.2 * TENSOR + CONSTANT, f"{peak / 2**20:.0f} MiB"


@pytest.mark.parametrize("job", ["hf to devices", "meta to devices", "native to devices"])
def test_loading_holds_one_tensor_more_than_the_model(extra, job):
    """Of a native folder, that is a parameter with all its layers."""
    peak, kept = extra[job]
    tensor = LAYERS * TENSOR if job == "native to devices" else TENSOR
    assert peak - kept < 1.2 * tensor + CONSTANT, f"{(peak - kept) / 2**20:.0f} MiB"


def test_the_measure_sees_a_model_that_is_read_at_once(extra):
    peak, _ = extra["everything at once"]
    assert peak > 3 * LAYERS * TENSOR  # all of the feed-forwards, and far more than the limit above
