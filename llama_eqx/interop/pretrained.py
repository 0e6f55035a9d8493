"""Loads weights of any format, recognised by what lies in the folder."""

import concurrent.futures
import contextlib
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Literal

import jax
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from llama_eqx.checkpoint.fetch import copy_of
from llama_eqx.checkpoint.manifest import MANIFEST, verify
from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, load_native, open_native
from llama_eqx.checkpoint.restore import steps
from llama_eqx.checkpoint.store import SCHEME
from llama_eqx.data.tokenizer import Tokenizer, find
from llama_eqx.errors import CheckpointError, hub_download
from llama_eqx.interop import huggingface, meta
from llama_eqx.interop.files import carried
from llama_eqx.interop.params import PARAMS
from llama_eqx.interop.weights import Key, Weights, fetched, tensor_shapes, to_model
from llama_eqx.model.llama import Llama
from llama_eqx.precision import stored

Format = Literal["hf", "meta", "native"]
MARKS: dict[Format, str] = {"hf": huggingface.CONFIG, "meta": PARAMS, "native": CONFIG}


def load_pretrained(path: str | pathlib.Path, dtype: DTypeLike | None = None, shardings: PyTree[Sharding] | None = None) -> Llama:
    """Loads the model in a folder of Hugging Face or of Meta, in a run directory (its newest step), or in a `checkpoints/<step>` of one.

    Weights keep the dtype of the files unless `dtype` is given. `shardings` is one for all arrays or a tree of them in the model's
    structure, and each process reads what its own devices hold; without it everything goes to the first device. A folder with a
    `manifest.json` is checked against it meanwhile.

    Raises `CheckpointError` when there is no model, or it is damaged or of another kind, `ConfigError` for a dtype that is not known.
    """
    dtype = None if dtype is None else stored(dtype)
    folder, step = located(path)
    with verified(path):
        if format_of(path) == "native":
            return load_native(folder, dtype=dtype, step=step, shardings=shardings)
        return to_model(open_pretrained(path), dtype, shardings)


def find_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of the model at `path`, which is as in `load_pretrained`.

    Raises `DataError` when there is none, or it is damaged.
    """
    return find.find_tokenizer(located(path)[0])


def open_pretrained(path: str | pathlib.Path) -> Weights:
    """The config and tensors of what `load_pretrained` would load. It reads no weights yet and does not check the manifest.

    Raises `CheckpointError` when there is no model, or its files do not fit its config; all differences are listed.
    """
    folder, step = located(path)
    match format_of(path):
        case "hf":
            return huggingface.read_huggingface(folder)
        case "meta":
            return meta.read_meta(folder)
        case "native":
            return _read_native(folder, step)


def format_of(path: str | pathlib.Path) -> Format:
    """The format of the model at `path`. Raises `CheckpointError` when there is none."""
    folder, _ = located(path)
    for format in ("hf", "meta", "native"):
        if (folder / MARKS[format]).is_file():
            return format
    if folder.is_dir():
        what, advice = f"no model here: none of {', '.join(MARKS.values())}", "the folder of a run, of Hugging Face or of Meta"
    elif folder.exists():
        what, advice = "a file, not the folder of a model", f"{MARKS['hf']} or {MARKS['meta']} must lie beside it: give their folder"
    else:
        what, advice = "the folder does not exist", "check the path" + hub_download(str(path))
    raise CheckpointError(what, where=str(path), next=advice)


def located(path: str | pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """The folder that `path` means, and the step if it is `RUN_DIR/checkpoints/<step>`. A path in a store is copied to this disk."""
    path = copy_of(str(path)) if str(path).startswith(SCHEME) else pathlib.Path(os.path.expanduser(path))
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parents[1], int(path.name)
    return path, None


def manifested(path: str | pathlib.Path) -> pathlib.Path | None:
    """The folder whose manifest lists what `load_pretrained` would read: for a run, that of the step. None without a manifest."""
    folder, step = located(path)
    saved = [] if (folder / MANIFEST).is_file() else steps(folder / CHECKPOINTS)
    if saved:
        folder = folder / CHECKPOINTS / str(saved[-1] if step is None else step)
    return folder if (folder / MANIFEST).is_file() else None


@contextlib.contextmanager
def verified(path: str | pathlib.Path) -> Iterator[None]:
    """Checks what `load_pretrained` reads at `path` against its manifest, if it has one, while the block runs; processes share the work.

    Raises `CheckpointError` naming every file that is damaged or missing, also in place of an error that the damage led to.
    """
    folder = manifested(path)
    if folder is None:
        yield
        return
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        found = pool.submit(verify, folder, (jax.process_index(), jax.process_count()), stop, without="training")
        try:
            yield
        except CheckpointError:
            found.result()
            raise
        except BaseException:
            stop.set()
            raise
        found.result()


def _read_native(folder: pathlib.Path, step: int | None) -> Weights:
    config, arrays = open_native(folder, step)

    def fetch(key: Key) -> np.ndarray:
        name, layer = key
        if layer is None:
            return arrays[name].read((slice(None),) * len(arrays[name].shape))
        return arrays[name].read((slice(layer, layer + 1), *[slice(None)] * (len(arrays[name].shape) - 1)))[0]

    tensors = fetched(tensor_shapes(config), {name: array.dtype for name, array in arrays.items()}, fetch)
    return Weights(config, tensors, carried(folder), ())
