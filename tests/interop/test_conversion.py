"""From every format to every other: the same bytes, in little memory, complete or not there."""

import errno
import fcntl
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from llama_eqx import load_config
from llama_eqx.checkpoint.manifest import appearing, find_damage, read_manifest, verify
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.data.tokenizer import BytesTokenizer, find_tokenizer
from llama_eqx.errors import CheckpointError, ConfigError, StorageError
from llama_eqx.interop import conversion, huggingface, meta
from llama_eqx.interop.conversion import ConvertConfig, convert, save_pretrained
from llama_eqx.interop.pretrained import load_pretrained, open_pretrained
from llama_eqx.model.llama import build_model
from llama_eqx.precision import cast
from llama_eqx.sharding import parameter_names

transformers.utils.logging.disable_progress_bar()
ROOT = pathlib.Path(__file__).parents[2]
FORMATS = ("hf", "meta", "native")


@pytest.fixture(scope="module")
def models(tiny):
    """In bfloat16, tied, and with other numbers of heads."""
    config = tiny("model/rotary=llama3_1", "model.tied=false")
    tied = tiny("model/rotary=llama3_2", "model.tied=true", "model.dims.kv_heads=1")
    return {
        "plain": build_model(config, key=jax.random.key(0)),
        "tied": cast(build_model(tied, key=jax.random.key(1)), "bfloat16"),
    }


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def job(source, target, format, dtype=None, shards=None):
    return ConvertConfig(from_=str(source), to=str(target), format=format, dtype=dtype, shards=shards)


@pytest.mark.parametrize("model", ["plain", "tied"])
def test_all_directions(tmp_path, models, model):
    for format in FORMATS:
        save_pretrained(models[model], tmp_path / format, format=format)
    for source, target in itertools.product(FORMATS, FORMATS):
        convert(job(tmp_path / source, tmp_path / f"{source}-{target}", target))
        assert same(load_pretrained(tmp_path / f"{source}-{target}"), models[model]), (source, target)
        assert verify(tmp_path / f"{source}-{target}") == ()
        if source == target:  # and of the files, whatever can be
            for file in (tmp_path / source).glob("*.safetensors"):
                assert file.read_bytes() == (tmp_path / f"{source}-{target}" / file.name).read_bytes()


@pytest.mark.parametrize("format", FORMATS)
def test_dtypes(tmp_path, models, format):
    """Rounded as jax rounds; the config says what the files hold."""
    save_pretrained(models["plain"], tmp_path / "wide", format="hf")
    convert(job(tmp_path / "wide", tmp_path / "narrow", format, dtype="bfloat16"))
    assert same(load_pretrained(tmp_path / "narrow"), cast(models["plain"], "bfloat16"))
    convert(job(tmp_path / "narrow", tmp_path / "half", "hf", dtype="float16"))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert load_pretrained(tmp_path / "half", dtype="float32").embed.dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "said"), [("int8", "one of: bfloat16, float16, float32"), ("bfloat", "did you mean bfloat16?")])
def test_a_dtype_that_is_not_known(tmp_path, models, dtype, said):
    for call in (
        lambda: load_pretrained(tmp_path, dtype),
        lambda: save_pretrained(models["plain"], tmp_path / "x", format="hf", dtype=dtype),
    ):
        with pytest.raises(ConfigError, match=f"kept in {dtype}") as error:
            call()
        assert (error.value.where, error.value.next) == ("dtype", said)


def test_a_run_and_one_of_its_steps(tmp_path, models):
    """A run files all layers of a parameter in one piece, of which each layer is read in turn."""
    from llama_eqx.checkpoint.native import write_config

    model = models["plain"]
    write_config({"model": model.config, "seed": 1}, tmp_path)
    BytesTokenizer().save(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.model").write_text("pieces")
    with Checkpoints(tmp_path / "checkpoints", load_config("checkpoint.every=1").checkpoint) as checkpoints:
        checkpoints.save(1, jax.tree.map(jnp.zeros_like, model), {"step": jnp.int32(1)})
        checkpoints.save(2, model, {"step": jnp.int32(2)})
    convert(job(tmp_path, tmp_path / "newest", "hf"))
    assert same(load_pretrained(tmp_path / "newest"), model)
    assert find_tokenizer(tmp_path / "newest").kind == "bytes"
    assert (tmp_path / "newest" / "tokenizer.model").read_text() == "pieces"
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "newest")("é").input_ids == [256, *"é".encode()]
    convert(job(tmp_path / "checkpoints" / "1", tmp_path / "older", "meta"))
    assert float(jnp.abs(load_pretrained(tmp_path / "older").embed).max()) == 0


def test_files_that_go_with_a_model(tmp_path, models):
    """The tokenizer's and the settings of generation, byte for byte; nothing else, and nothing that is not what its name says."""
    save_pretrained(models["plain"], tmp_path / "hf", format="hf")
    (tmp_path / "hf" / "manifest.json").unlink()
    carried = {
        "tokenizer.json": '{"a": 1}',
        "tokenizer_config.json": '{"b": 2}',
        "special_tokens_map.json": "{}",
        "chat_template.jinja": "<|start|>{{ bos_token }}",
        "generation_config.json": '{"eos_token_id": [1, 8, 9]}',
    }
    left = {"tokenizer.model": "version https://git-lfs.github.com/spec/v1\n", "README.md": "read me", "run.sh": "echo"}
    for name, text in {**carried, **left}.items():
        (tmp_path / "hf" / name).write_text(text)
    notes = convert(job(tmp_path / "hf", tmp_path / "meta", "meta"))
    assert any("tokenizer.model was left behind: a Git LFS pointer" in note for note in notes)
    notes = convert(job(tmp_path / "meta", tmp_path / "native", "native"))
    assert [note.endswith("taken: a context of 4096") for note in notes if "does not say" in note] == [True], notes
    convert(job(tmp_path / "native", tmp_path / "back", "hf"))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [1, 8, 9]
    for folder in ("meta", "native", "back"):
        assert {name: (tmp_path / folder / name).read_text() for name in carried} == carried
        assert not any((tmp_path / folder / name).exists() for name in left)


def test_special_ids_go_along(tmp_path, tiny):
    config = tiny("model.tokens={tokenizer: null, bos: 3, eos: [4, 5], pad: 6}")
    save_pretrained(build_model(config, key=jax.random.key(0)), tmp_path / "hf", format="hf")
    assert open_pretrained(tmp_path / "hf").config.tokens == config.tokens
    found = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (3, [4, 5], 6)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (3, [4, 5], 6)


@pytest.mark.parametrize("source", ["meta", "native"])
def test_written_folders_load_in_transformers(tmp_path, models, source):
    model = models["plain"]
    save_pretrained(model, tmp_path / source, format=source)
    convert(job(tmp_path / source, tmp_path / "hf", "hf"))
    reference, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    tokens = np.arange(12)[None] % 64
    with torch.no_grad():
        theirs = reference(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(eqx.filter_jit(model)(jnp.asarray(tokens)), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("generation", "vocab", "tokens"),
    [
        ("llama2", 32000, "{tokenizer: sentencepiece, bos: 1, eos: [2], pad: null}"),
        ("llama3", 128256, "{tokenizer: tiktoken, bos: 128000, eos: [128001], pad: null}"),
    ],
)
def test_llamas_own_tokenizers_are_read_by_transformers_alone(tmp_path, tiny, test_data, monkeypatch, generation, vocab, tokens):
    """Without the libraries that their files are of, and with BOS before every text."""
    sizes = {"vocab": vocab, "embed": 8, "layers": 1, "mlp": 8, "head_dim": 2}
    config = tiny(f"model.tokens={tokens}", *(f"model.dims.{name}={size}" for name, size in sizes.items()))
    save_pretrained(build_model(config, key=jax.random.key(0)), tmp_path / "native", format="native")
    content = (test_data / f"{generation}_tokenizer.model").read_bytes()
    (tmp_path / "native" / "tokenizer.model").write_bytes(content)
    convert(job(tmp_path / "native", tmp_path / "hf", "hf"))
    text = "Hello world, 你好  x"
    expected = find_tokenizer(tmp_path / "native").encode(text)
    if generation == "llama2":  # a folder with settings, and without a tokenizer.json
        (tmp_path / "native" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"}')
        convert(job(tmp_path / "native", tmp_path / "settled", "hf"))
        assert transformers.AutoTokenizer.from_pretrained(tmp_path / "settled")(text).input_ids == [config.tokens.bos, *expected]
    for library in ("sentencepiece", "tiktoken"):
        monkeypatch.setitem(sys.modules, library, None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    batch = tokenizer(text)
    assert batch.input_ids == [config.tokens.bos, *expected]
    assert batch.keys() == {"input_ids", "attention_mask"}  # `generate` refuses any more
    assert (tokenizer.eos_token_id, tokenizer.decode(batch.input_ids, skip_special_tokens=True)) == (config.tokens.eos[0], text)
    # Others would take a tokenizer.model for SentencePiece's.
    place = tmp_path / "hf" / ("original" if generation == "llama3" else "")
    assert (place / "tokenizer.model").read_bytes() == content
    assert (tmp_path / "hf" / "tokenizer.model").exists() is (generation == "llama2")
    convert(job(tmp_path / "hf", tmp_path / "again", "hf"))
    convert(job(tmp_path / "again", tmp_path / "meta", "meta"))
    assert (tmp_path / "meta" / "tokenizer.model").read_bytes() == content


def failing(function, error):
    """The function, which raises an error when it is called for the sixth time."""
    calls = itertools.count()

    def fails(*arguments, **settings):
        if next(calls) == 5:
            raise error
        return function(*arguments, **settings)

    return fails


def test_interrupted_conversions_leave_nothing(tmp_path, models, monkeypatch):
    save_pretrained(models["plain"], tmp_path / "hf", format="hf")
    before = sorted(os.listdir(tmp_path))
    for format, module, name in (("hf", huggingface, "rows_of"), ("meta", meta, "rows_of"), ("native", conversion, "pieces")):
        for error, seen in ((KeyboardInterrupt, KeyboardInterrupt), (OSError(28, "No space left on device"), StorageError)):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, failing(getattr(module, name), error))
                with pytest.raises(seen):
                    convert(job(tmp_path / "hf", tmp_path / "new", format))
            assert sorted(os.listdir(tmp_path)) == before


def test_what_a_killed_process_left_is_no_model_and_is_cleared_away(tmp_path, models):
    save_pretrained(models["plain"], tmp_path / "hf", format="hf")
    script = """
import os, sys
from llama_eqx.interop import conversion
conversion.write_manifest = lambda *arguments, **facts: os.kill(os.getpid(), 9)
source, target = sys.argv[1:]
conversion.convert(conversion.ConvertConfig(from_=source, to=target, format="hf", dtype=None, shards=None))
"""
    assert subprocess.run([sys.executable, "-c", script, tmp_path / "hf", tmp_path / "new"], cwd=ROOT, check=False).returncode == -9
    assert sorted(os.listdir(tmp_path)) == [".new.lock", ".new.unfinished", "hf"]
    convert(job(tmp_path / "hf", tmp_path / "new", "hf"))
    assert sorted(os.listdir(tmp_path)) == ["hf", "new"]


def test_two_processes_that_write_one_folder(tmp_path, monkeypatch):
    """The second is refused at once, and also one that came as the first removed its lock; where no locks are known, both go on."""
    lock, flock = tmp_path / ".other.lock", fcntl.flock

    def too_late(file, how):
        lock.unlink()
        flock(file, how)

    def unknown(file, how, number=errno.ENOLCK):
        raise OSError(number, os.strerror(number))

    with appearing(tmp_path / "new") as folder:
        (folder / "mine").write_text("whole")
        with pytest.raises(StorageError, match="another process is writing there") as error, appearing(tmp_path / "new", replace=True):
            pass
        assert error.value.next == "wait until it has ended, or name another folder"
    assert [file.relative_to(tmp_path).as_posix() for file in sorted(tmp_path.rglob("*"))] == ["new", "new/mine"]
    monkeypatch.setattr(fcntl, "flock", too_late)
    with pytest.raises(StorageError, match="another process is writing there"), appearing(tmp_path / "other"):
        pass
    monkeypatch.setattr(fcntl, "flock", unknown)
    with appearing(tmp_path / "other") as folder:
        (folder / "mine").write_text("whole")
    monkeypatch.setattr(fcntl, "flock", functools.partial(unknown, number=errno.EIO))
    with pytest.raises(StorageError, match="could not be saved: Input/output error"), appearing(tmp_path / "third"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["new", "other"]


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, models, monkeypatch):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(StorageError, match="GB are free"):
        save_pretrained(models["plain"], tmp_path / "hf", format="hf")
    assert not list(tmp_path.iterdir())


def test_folders_in_the_home_folder(tmp_path, models, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_pretrained(models["plain"], "~/hf", format="hf")
    convert(job("~/hf", "~/new", "native"))
    assert same(load_pretrained("~/new"), models["plain"])
    assert {*os.listdir(tmp_path)} == {"hf", "new"}


def test_the_manifest(tmp_path, models):
    model = models["tied"]
    save_pretrained(model, tmp_path / "hf", format="hf")
    manifest = read_manifest(tmp_path / "hf")
    assert manifest["format"] == "hf"
    assert manifest["files"].keys() == {path.name for path in (tmp_path / "hf").iterdir()} - {"manifest.json"}
    leaves = dict(zip(parameter_names(model), jax.tree.leaves(model), strict=True))
    assert manifest["tree"] == {name: {"shape": list(x.shape), "dtype": "bfloat16"} for name, x in leaves.items()}
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    assert verify(tmp_path / "hf") == ("notes.txt",)  # a file of the user's own does no harm
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "hf" / "model.safetensors").unlink()
    size = manifest["files"]["config.json"]["size"]
    assert find_damage(tmp_path / "hf") == ({"config.json": f"2 bytes, {size:,} expected"}, ("model.safetensors",), ("notes.txt",))
    assert sorted(len(find_damage(tmp_path / "hf", part=(i, 2)).damaged) for i in range(2)) == [0, 1]
    with pytest.raises(CheckpointError, match=r"damaged: config.json \(2 .*\)\s+missing: model.safe\w+\s+not in the manifest: notes.txt"):
        load_pretrained(tmp_path / "hf")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "from=FOLDER"),
        (["from=a"], 2, "to=FOLDER"),
        (["from=a", "to=b"], 2, "hf|meta|native"),
        (["from=a", "to=b", "format=mta"], 2, "did you mean meta?"),
        (["from=a", "to=b", "format=hf", "dtype=bloat16"], 2, "did you mean bfloat16?"),
        (["from=a", "to=b", "format=hf", "shards=2"], 2, "format=meta"),
        (["fom=a"], 2, "did you mean from?"),
        (["from=a", "to=b", "format=hf"], 4, "the folder does not exist"),
        (["from={source}", "to={source}", "format=hf"], 6, "it exists already"),
        (["from={source}", "to={target}, it's=1", "format=meta", "shards=3"], 4, "does not divide over 3 files"),
        (["from={source}", "to={target}, it's=1", "format=meta", "shards=2", "dtype=bfloat16"], 0, "note:"),
    ],
)
def test_the_command_line(tmp_path, models, monkeypatch, arguments, code, said, typed):
    save_pretrained(models["plain"], tmp_path / "a source", format="hf")
    places = {"{source}": str(tmp_path / "a source"), "{target}": str(tmp_path / "target")}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    found, out, err = typed("convert", *arguments)
    assert found == code
    assert said in err
    assert "Traceback" not in err
    if code == 0:
        assert pathlib.Path(out.strip()) == tmp_path / "target, it's=1"
        assert load_pretrained(out.strip()).embed.dtype == jnp.bfloat16


def test_from_is_a_key_like_any_other():
    config = load_config("from=a", "to=b", "format=hf", name="convert")
    assert (config.from_, config.to) == ("a", "b")
