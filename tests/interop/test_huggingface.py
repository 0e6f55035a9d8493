"""Hugging Face folders: what is written is read back bit for bit, and what cannot be read or written is named."""

import dataclasses
import json
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_configs import SIZES, TIED
from safetensors.numpy import load_file, save_file

from llama_eqx.errors import CheckpointError, StorageError
from llama_eqx.generation.layout import for_decoding
from llama_eqx.interop import huggingface
from llama_eqx.interop.conversion import ConvertConfig, convert, save_pretrained
from llama_eqx.interop.huggingface import config_from_huggingface
from llama_eqx.interop.pretrained import load_pretrained, open_pretrained
from llama_eqx.interop.table import TABLE, from_torch, to_torch, torch_shape
from llama_eqx.model.block import PreNormBlockConfig
from llama_eqx.precision import cast
from llama_eqx.sharding import check_shapes, parameter_names


def build(config, dtype="float32"):
    """Random weights, norms included."""
    config = config_from_huggingface(config)
    leaves, structure = jax.tree.flatten(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    return cast(structure.unflatten([jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves]), dtype)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.fixture
def folder(tmp_path):
    """A complete folder of an untied model, to be damaged."""
    save_pretrained(build(SIZES), tmp_path / "hf", format="hf")
    (tmp_path / "hf" / "manifest.json").unlink()  # most folders have none
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 20_000)
    save_pretrained(build(SIZES), tmp_path / "hf", format="hf")
    (tmp_path / "hf" / "manifest.json").unlink()  # most folders have none
    return tmp_path / "hf"


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("config", [SIZES, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("shard_bytes", [5 * 10**9, 20_000])
def test_round_trip(tmp_path, monkeypatch, config, dtype, shard_bytes):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", shard_bytes)
    model = build(config, dtype)
    save_pretrained(model, tmp_path / "a" / "hf", format="hf")
    assert (tmp_path / "a" / "hf" / "model.safetensors.index.json").exists() is (shard_bytes == 20_000)
    read = load_pretrained(tmp_path / "a" / "hf")
    assert_same(read, model)
    check_shapes(read, model.config.dims)
    save_pretrained(read, tmp_path / "b", format="hf")
    for file in (tmp_path / "a" / "hf").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_index_is_complete(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in sharded.glob("*.safetensors") for name in load_file(file)}
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(x.nbytes for file in sharded.glob("*.safetensors") for x in load_file(file).values())
    assert len(set(held.values())) > 2


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16])
def test_dtype_on_request(folder, dtype):
    assert_same(load_pretrained(folder, dtype), cast(build(SIZES), jnp.dtype(dtype).name))


@pytest.mark.parametrize("layer", [0, SIZES["num_hidden_layers"] - 1])
def test_layers_filed_in_two_dtypes(folder, tmp_path, layer):
    tensors = load_file(folder / "model.safetensors")
    up = f"model.layers.{layer}.mlp.up_proj.weight"
    tensors[up] = tensors[up].astype(jnp.bfloat16)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(jnp.bfloat16)
    save_file(tensors, folder / "model.safetensors")
    model = load_pretrained(folder)
    assert model.blocks.feed_forward.up_proj.dtype == jnp.float32
    assert model.final_norm.weight.dtype == jnp.bfloat16
    notes = convert(ConvertConfig(from_=str(folder), to=str(tmp_path / "native"), format="native", dtype=None, shards=None))
    assert notes[0].endswith("in one that holds them all: blocks.feed_forward.up_proj in float32")
    assert_same(load_pretrained(tmp_path / "native"), model)
    notes = convert(ConvertConfig(from_=str(folder), to=str(tmp_path / "half"), format="native", dtype="float16", shards=None))
    assert not any("holds them all" in note for note in notes)


def test_table_has_every_parameter():
    assert set(parameter_names(build(SIZES))) == set(TABLE)


@pytest.mark.parametrize(("shape", "inputs"), [((6, 2, 4), 1), ((2, 4, 6), 2), ((6, 5), 1), ((7, 6), 0), ((6,), 0)])
def test_rearrangement(shape, inputs):
    x = np.random.default_rng(0).normal(size=shape)
    y = to_torch(x, inputs)
    assert y.shape == torch_shape(shape, inputs)
    assert y.flags.c_contiguous
    assert np.array_equal(from_torch(y, inputs, shape), x)
    if inputs:
        a = np.random.default_rng(1).normal(size=shape[:inputs])
        assert np.allclose(y @ a.ravel(), np.tensordot(a, x, inputs).ravel())


def test_extra_tensors_of_old_files(tmp_path):
    model = build(TIED)
    save_pretrained(model, tmp_path / "hf", format="hf")
    (tmp_path / "hf" / "manifest.json").unlink()
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert_same(load_pretrained(tmp_path / "hf"), model)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_pretrained(tmp_path / "hf")


def test_all_differences_are_listed(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.k_proj.weight"] = np.zeros((32, 32), np.float32)
    tensors["model.layers.0.self_attn.k_proj.bias"] = np.zeros(16, np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((48, 32), np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_pretrained(folder)
    assert error.value.what.splitlines() == [
        "missing: model.layers.1.mlp.up_proj.weight (48, 32)",
        "missing: model.norm.weight (32,)",
        "shape: model.layers.0.self_attn.k_proj.weight is (32, 32), wanted (16, 32)",
        "not part of this model: model.layers.0.self_attn.k_proj.bias",
        "not part of this model: model.layers.3.mlp.up_proj.weight",
    ]


def test_of_layers_beyond_all_sense_the_tensors_are_not_listed(folder):
    change_config(folder, num_hidden_layers=1000)
    with pytest.raises(CheckpointError, match=r"^error: the settings ask for 1,000 layers, and there are \d+ tensors\nwhere"):
        load_pretrained(folder)


def test_special_ids_outside_of_the_vocabulary_are_noted(folder):
    assert open_pretrained(folder).notes == ()
    change_config(folder, bos_token_id=10**30, eos_token_id=[2, SIZES["vocab_size"]], pad_token_id=-1)
    assert [note.partition(", outside")[0] for note in open_pretrained(folder).notes] == [
        f"config.json: bos_token_id is {10**30}",
        f"config.json: eos_token_id is {SIZES['vocab_size']}",
    ]


def test_integer_weights_are_refused(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="is I8"):
        load_pretrained(folder)


def test_missing_shard(sharded):
    min(sharded.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_pretrained(sharded)


def test_links_of_the_hub_cache_are_followed_and_no_others(sharded, tmp_path):
    """There a snapshot is a folder of links into the folder of blobs beside it."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.parent.mkdir()
    sharded.rename(snapshot)
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(os.path.join("..", "..", "blobs", str(i)))
    assert_same(load_pretrained(snapshot), build(SIZES))
    blobs.rename(tmp_path / "elsewhere")
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere" / str(i))
    with pytest.raises(CheckpointError, match=r"outside of the folder: it leads to .*elsewhere") as error:
        load_pretrained(snapshot)
    assert "config.json" in error.value.what


@pytest.mark.parametrize("weight_map", [["model.safetensors"], {"model.norm.weight": 1}, None])
def test_bad_index(sharded, weight_map):
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load_pretrained(sharded)


def test_no_model_in_the_folder(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="neither"):
        load_pretrained(folder)
    for text, said in {"<html>": "a web page", "{": "not JSON", "[]": "not a JSON object", "": "an empty file"}.items():
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=said):
            load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of config\.json, params\.json, config\.yaml"):
        load_pretrained(folder)
    with pytest.raises(CheckpointError, match="a file, not the folder"):
        load_pretrained(folder / "pytorch_model.bin")


def test_dropout_does_not_hinder_writing(tmp_path):
    config = dataclasses.replace(config_from_huggingface(SIZES), dropout=0.1, block=PreNormBlockConfig(dropout=0.1))
    structure = jax.tree.structure(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)))
    save_pretrained(structure.unflatten(jax.tree.leaves(build(SIZES))), tmp_path / "hf", format="hf")
    assert_same(load_pretrained(tmp_path / "hf"), build(SIZES))


def test_an_edited_model_is_refused(tmp_path):
    model = eqx.tree_at(lambda m: m.final_norm.weight, build(SIZES), jnp.ones(5))
    with pytest.raises(CheckpointError, match="shape: final_norm"):
        save_pretrained(model, tmp_path / "hf", format="hf")
    with pytest.raises(CheckpointError, match="laid out for decoding and cannot be saved") as error:
        save_pretrained(for_decoding(build(SIZES)), tmp_path / "hf", format="hf")
    assert error.value.next == "save the model that it was made from"


def test_nothing_is_overwritten(folder):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(StorageError, match="already"):
        save_pretrained(build(TIED), folder, format="hf")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    (folder.parent / "empty").mkdir()
    save_pretrained(build(TIED), folder.parent / "empty", format="hf")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["empty", "hf"]


def test_needs_neither_torch_nor_transformers(folder):
    """They cannot be imported, and a folder is read and written all the same."""
    code = """
import sys
sys.modules |= dict.fromkeys(["torch", "transformers", "hydra"])
from llama_eqx import load_pretrained, save_pretrained
save_pretrained(load_pretrained(sys.argv[1]), sys.argv[2], format="hf")
"""
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    subprocess.run([sys.executable, "-c", code, folder, folder.parent / "copy"], check=True, cwd=root)
    for file in folder.iterdir():
        assert file.read_bytes() == (folder.parent / "copy" / file.name).read_bytes()
