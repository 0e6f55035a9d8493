"""Weights from strangers: nothing in a file is run, whatever it is, and one block says what was found."""

import bdb
import code
import collections
import functools
import io
import json
import operator
import os
import pathlib
import pickle
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import tarfile
import time
import timeit
import zipfile

import jax
import numpy as np
import pytest
import torch

from llama_eqx.checkpoint.manifest import verify
from llama_eqx.errors import CheckpointError
from llama_eqx.interop.conversion import ConvertConfig, convert, save_pretrained
from llama_eqx.interop.pretrained import load_pretrained
from llama_eqx.model.llama import build_model


class Calls:
    """Pickled, it is the call of a function: `pickle.loads` makes it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Remembers:
    """Pickled with a state that is given to `__setstate__` of another class."""

    def __init__(self, function, arguments, state):
        self.parts = function, arguments, state

    def __reduce__(self):
        return self.parts


def source(canary: str) -> str:
    return f"open({canary!r}, 'w').close()"


def opcodes(module: str, name: str, argument: str) -> bytes:
    """A pickle written by hand, of the oldest protocol."""
    return f"c{module}\n{name}\n(S{argument!r}\ntR.".encode()


def stacked(canary: str) -> bytes:
    """By STACK_GLOBAL, whose names are put together on the stack."""

    def text(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    return b"\x80\x04" + text("posix") + text("system") + b"\x93" + text(f"touch {canary}") + b"\x85R."


def arrays(canary: str) -> Calls:
    """An array of objects in numpy's format, as which torch loads it."""
    stream = io.BytesIO()
    np.save(stream, np.array([Calls(os.system, f"touch {canary}")], dtype=object), allow_pickle=True)
    return Calls(np.load, Calls(io.BytesIO, stream.getvalue()), None, True)


def touch(canary: str) -> Calls:
    return Calls(os.system, f"touch {canary}")


ATTACKS = {
    "os.system": touch,
    "posix.system": lambda canary: opcodes("posix", "system", f"touch {canary}"),
    "eval": lambda canary: Calls(eval, source(canary)),
    "exec": lambda canary: Calls(exec, source(canary)),
    "subprocess": lambda canary: Calls(subprocess.check_output, ["touch", canary]),
    "popen": lambda canary: Calls(os.popen, f"touch {canary}"),
    "runpy": lambda canary: Calls(runpy._run_code, source(canary), {}),
    "timeit": lambda canary: Calls(timeit.timeit, source(canary), "pass", timeit.default_timer, 1),
    "bdb": lambda canary: Calls(bdb.Bdb.run, Calls(bdb.Bdb), source(canary)),
    "console": lambda canary: Calls(code.InteractiveInterpreter.runcode, Calls(code.InteractiveInterpreter), source(canary)),
    "getattr": lambda canary: f"cbuiltins\ngetattr\n(cimportlib\nimport_module\n(S'os'\ntRS'system'\ntR(S'touch {canary}'\ntR.".encode(),
    "open": lambda canary: Calls(open, canary, "w"),
    "pathlib": lambda canary: Calls(pathlib.Path.write_text, pathlib.Path(canary), ""),
    "shutil": lambda canary: Calls(shutil.copyfile, __file__, canary),
    "numpy": arrays,
    "functools": lambda canary: Calls(functools.partial(os.system, f"touch {canary}")),
    "operator": lambda canary: Calls(operator.methodcaller("write_text", ""), pathlib.Path(canary)),
    "map": lambda canary: Calls(list, Calls(map, exec, [source(canary)])),
    "torch's rebuilding": lambda canary: Calls(torch._utils._rebuild_tensor_v2, touch(canary), 0, (1,), (1,), False, None),
    "torch's parameters": lambda canary: Calls(torch._utils._rebuild_parameter, Calls(eval, source(canary)), False, None),
    "a dictionary's items": lambda canary: Calls(collections.OrderedDict, Calls(eval, f"[({source(canary)}, 1)]")),
    "torch.load itself": lambda canary: Calls(torch.load, Calls(io.BytesIO, archive(pickle.dumps(touch(canary), 2))), None, None),
    "pickle in pickle": lambda canary: Calls(pickle.loads, pickle.dumps(touch(canary), 2)),
    "among tensors": lambda canary: {"norm.weight": torch.ones(3), "more": [{"deep": (1, touch(canary))}]},
    "as a name": lambda canary: {touch(canary): torch.ones(3)},
    "__setstate__": lambda canary: Remembers(Calls, (print,), {"call": (eval, (source(canary),))}),
    "INST": lambda canary: f"(S'touch {canary}'\nios\nsystem\n.".encode(),
    "STACK_GLOBAL": stacked,
}


def archive(content: bytes, **more: bytes) -> bytes:
    """A file of torch's format with this pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as file:
        for name, data in {"archive/data.pkl": content, "archive/byteorder": b"little", "archive/version": b"3\n", **more}.items():
            file.writestr(name, data)
    return stream.getvalue()


def tarred(content: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as file:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def pickled(attack) -> bytes:
    return attack if isinstance(attack, bytes) else pickle.dumps(attack, 2)


def meta_folder(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.mkdir()
    (path / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 1, "n_heads": 2, "multiple_of": 8, "norm_eps": 1e-5}))
    (path / "consolidated.00.pth").write_bytes(content)
    return path


def unprotected(content: bytes) -> None:
    """What a careless reader would do."""

    class Reader(pickle.Unpickler):
        def persistent_load(self, pid):
            return torch.UntypedStorage(4)

    try:
        found = Reader(io.BytesIO(content)).load()
        list(found) if isinstance(found, map) else found
        if isinstance(found, os._wrap_close):
            found.close()  # waits for what popen started
    except Exception:
        return


@pytest.mark.filterwarnings("ignore")  # of files that attacks leave open
@pytest.mark.parametrize("name", ATTACKS)
def test_pickles_run_nothing(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    content = pickled(ATTACKS[name](str(canary)))
    if name not in ("torch.load itself", "numpy", "__setstate__"):  # these fail on their own guard, as it should be
        unprotected(content)
        for _ in range(200):  # popen does not wait
            if canary.exists():
                break
            time.sleep(0.01)
        assert canary.exists(), "not an attack: the test would show nothing"
        canary.unlink()
    for kind, data in (("zip", archive(content)), ("bare", content)):
        folder = meta_folder(tmp_path / kind, data)
        with pytest.raises(CheckpointError) as error:
            load_pretrained(folder)
        assert not canary.exists()
        assert "consolidated.00.pth" in error.value.where
        assert len(str(error.value).splitlines()) <= 4


def storage_trick(kind: str) -> bytes:
    """A tensor whose storage is not one."""
    place = {"location": "cpu", "module": "cpu", "traversal": "cpu"}[kind]
    stream = io.BytesIO()

    class Writer(pickle.Pickler):
        def persistent_id(self, x):
            if x == "STORAGE":
                return (
                    "storage",
                    os.system if kind == "module" else torch.FloatStorage,
                    "../../canary" if kind == "traversal" else "0",
                    place,
                    4,
                )
            return None

    Writer(stream, 2).dump({"norm.weight": Calls(torch._utils._rebuild_tensor_v2, "STORAGE", 0, (4,), (1,), False, {})})
    return stream.getvalue()


FILES = {
    "a storage that is a function": lambda canary: archive(storage_trick("module"), **{"archive/data/0": b"touch " + canary.encode()}),
    "a storage that leads out of the archive": lambda canary: archive(storage_trick("traversal"), **{"archive/data/0": bytes(16)}),
    "a storage that is too short": lambda canary: archive(storage_trick("location"), **{"archive/data/0": bytes(4)}),
    "names that lead out of the archive": lambda canary: archive(pickle.dumps({}, 2), **{"../../canary": b"x", canary: b"x"}),
    "two pickles of one name": lambda canary: archive(pickle.dumps({}, 2), **{"other/data.pkl": pickled(ATTACKS["os.system"](canary))}),
    "TorchScript": lambda canary: archive(
        pickle.dumps({}, 2),
        **{"archive/constants.pkl": pickled(ATTACKS["os.system"](canary)), "archive/code/__torch__.py": source(canary).encode()},
    ),
    "a tar of torch's oldest format": lambda canary: tarred(pickled(ATTACKS["os.system"](canary))),
    "empty": lambda canary: b"",
    "HTML": lambda canary: b"<!DOCTYPE html><html>Sign in</html>",
    "LFS": lambda canary: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 13476925163\n",
    "noise": lambda canary: np.random.default_rng(0).bytes(4096),
    "cut short": lambda canary: archive(storage_trick("location"), **{"archive/data/0": bytes(16)})[:-40],
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", FILES)
def test_files_that_are_not_weights(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = meta_folder(tmp_path / "a" / "b" if (tmp_path / "a").mkdir() is None else tmp_path, FILES[name](str(tmp_path / "canary")))
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    assert not list(tmp_path.rglob("canary"))
    if said := {"empty": "an empty file", "HTML": "a web page", "LFS": "Git LFS pointer"}.get(name):
        assert said in error.value.what


@pytest.fixture
def folder(tmp_path, tiny):
    save_pretrained(build_model(tiny(), key=jax.random.key(0)), tmp_path / "model", format="hf")
    return tmp_path / "model"


@pytest.mark.parametrize("format", ["hf", "meta", "native"])
def test_every_flipped_bit_is_noticed(tmp_path, folder, format):
    convert(ConvertConfig(from_=str(folder), to=str(tmp_path / "copy"), format=format, dtype=None, shards=None))
    rng = np.random.default_rng(0)

    def name_of(file):
        return file.relative_to(tmp_path / "copy").as_posix()

    files = [file for file in (tmp_path / "copy").rglob("*") if file.is_file() and file.stat().st_size and file.name != "manifest.json"]
    for file in files:
        content = bytearray(file.read_bytes())
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        whole = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"damaged: {re.escape(name_of(file))} \\("):
            verify(tmp_path / "copy")
        file.write_bytes(whole)
    load_pretrained(tmp_path / "copy")
    largest = max(files, key=lambda file: file.stat().st_size)
    with largest.open("r+b") as stream:
        stream.seek(-1000, 2)
        byte = stream.read(1)[0]
        stream.seek(-1000, 2)
        stream.write(bytes([byte ^ 1]))
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:-1])
    for use in (
        lambda: load_pretrained(tmp_path / "copy"),
        lambda: convert(ConvertConfig(from_=str(tmp_path / "copy"), to=str(tmp_path / "new"), format="hf", dtype=None, shards=None)),
    ):
        with pytest.raises(CheckpointError, match="files are not as they were written") as error:
            use()
        said = [line.partition(" (") for line in error.value.what.splitlines()[1:]]  # what differs is said behind each name
        assert {name for name, *_ in said} == {f"damaged: {name_of(file)}" for file in (largest, *files[:2])}
        assert "if you changed" not in error.value.next
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["hf", "meta", "native"])
def test_a_file_that_its_owner_edited(tmp_path, folder, format):
    """How to keep the change is said where the folder can be read without its manifest."""
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "manifest.json").unlink()
    copy = tmp_path / "a copy"
    convert(ConvertConfig(from_=str(folder), to=str(copy), format=format, dtype=None, shards=None))
    (copy / "generation_config.json").write_text('{"eos_token_id": 3}')
    with pytest.raises(CheckpointError, match=r"damaged: generation_config\.json") as error:
        load_pretrained(copy)
    advice = re.search("if you changed them: (.*), and nothing is checked", error.value.next)
    assert (advice is None) is (format == "native")
    if advice:
        subprocess.run(shlex.split(advice[1]), check=True)
        load_pretrained(copy)


def test_a_repository_with_code_of_its_own(folder):
    (folder / "manifest.json").unlink()
    (folder / "modeling_llama.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling_llama.Llama"}}))
    with pytest.raises(CheckpointError, match=r"code of its own: modeling_llama.py, auto_map in config.json") as error:
        load_pretrained(folder)
    assert "none of it was run" in error.value.kept


@pytest.mark.parametrize("path", ["meta-llama/Llama-2-7b-hf", "../../etc", "/etc/passwd", "hf://a/b", "a/b/c", "https://example.com/model"])
def test_a_model_id_is_no_path_and_nothing_is_fetched(path, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection"))
    with pytest.raises(CheckpointError) as error:
        load_pretrained(path)
    download = "hf download meta-llama/Llama-2-7b-hf --exclude 'original/*' --local-dir meta-llama/Llama-2-7b-hf"
    assert (download in error.value.next) is (path == "meta-llama/Llama-2-7b-hf")
