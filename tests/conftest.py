"""Eight virtual devices, shapes checked by jaxtyping and beartype, and one compile cache for all tests."""

import importlib
import logging
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ |= {  # of the processes that tests start too: all compile much and compute little
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",  # which take half of the time that a step needs
    "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "llama_eqx-test-compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
os.environ.pop("JAX_NUM_CPU_DEVICES", None)

import absl.logging
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 8)

absl.logging.get_absl_handler().python_handler.stream = sys.__stderr__  # otherwise Hydra's logging closes pytest's capture stream

install_import_hook("llama_eqx", "beartype.beartype")


@pytest.fixture(autouse=True)
def no_log_of_another_test():
    """Restores the loggers: a verb that ends in a test's process leaves its log on them, and the next test would write there."""
    before = {name: logging.getLogger(name).handlers for name in ("llama_eqx", "jax", "absl", "asyncio")}
    yield
    for name, handlers in before.items():
        logging.getLogger(name).handlers = handlers


@pytest.fixture(autouse=True, scope="module")
def programs_of_one_file():
    """Clears JAX's caches after each file. A compiled program takes memory maps, and Linux gives a process 65,530 of them. With the
    programs of all files XLA runs out of maps and dies of a segmentation fault.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def typed(monkeypatch, capsys):
    """`typed("train", "train.steps=3")` runs a verb in this process. Returns its exit code, standard output and standard error."""
    from llama_eqx.verb import run_verb

    def typed(name: str, *arguments: object, job: Callable[..., None] | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            run_verb(name, job or importlib.import_module(f"llama_eqx.{name}").main)
        return ended.value.code or 0, *capsys.readouterr()

    return typed


@pytest.fixture(scope="session")
def test_data() -> pathlib.Path:
    """Returns the folder with the real tokenizer files and Tiny Shakespeare, which are not part of the project."""
    root = pathlib.Path(__file__).resolve().parent.parent
    folder = pathlib.Path(os.environ.get("LLAMA_EQX_TEST_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder}: set LLAMA_EQX_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """Returns a function: `tiny("model/norm=layer")` is the config of a small model."""
    from llama_eqx import load_config

    sizes = {"vocab": 64, "layers": 3, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}

    def config(*overrides: str):
        return load_config(*(f"model.dims.{axis}={size}" for axis, size in sizes.items()), *overrides).model

    return config
