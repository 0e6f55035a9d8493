"""Weights alone, as they were filed."""

import gc
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llama_eqx import load_config
from llama_eqx.checkpoint.native import load_native, read_config, save_native, write_config
from llama_eqx.checkpoint.save import Checkpoints
from llama_eqx.config import load
from llama_eqx.errors import CheckpointError, StorageError


@pytest.fixture
def saved(tmp_path, model):
    save_native(model, tmp_path / "saved")
    return tmp_path / "saved"


def equal(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs
    )


def cast(tree, dtype):
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x).astype(dtype)), tree)


def test_half_precision_stays_half_unless_asked(tmp_path, model):
    half = cast(model, jnp.bfloat16)
    half = eqx.tree_at(lambda m: m.final_norm.weight, half, model.final_norm.weight)
    save_native(half, tmp_path / "half")
    loaded = load_native(tmp_path / "half")
    assert loaded.embed.dtype == jnp.bfloat16
    assert loaded.final_norm.weight.dtype == jnp.float32
    assert equal(loaded, half)
    assert loaded.config == model.config
    assert loaded.embed.devices() == {jax.devices()[0]}
    wide = load_native(tmp_path / "half", dtype=jnp.float32)
    assert equal(wide, cast(half, jnp.float32))


def test_zeros_are_weights_too(tmp_path, model):
    """As a bias begins, or the second factor of an update of low rank."""
    projection = model.blocks.attention.o_proj
    zeroed = eqx.tree_at(lambda m: m.blocks.attention.o_proj, model, jnp.asarray(projection).at[0].set(0))
    zeroed = eqx.tree_at(lambda m: m.final_norm.weight, zeroed, jnp.zeros_like(jnp.asarray(model.final_norm.weight)))
    save_native(zeroed, tmp_path / "zeroed")
    assert equal(load_native(tmp_path / "zeroed"), zeroed)


def test_narrowing_rounds_as_jax_does(saved, model):
    assert equal(load_native(saved, dtype="bfloat16"), cast(model, jnp.bfloat16))


def test_shardings_one_or_a_tree(saved, model):
    mesh = Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, PartitionSpec())
    loaded = load_native(saved, shardings=replicated)
    assert {x.sharding for x in jax.tree.leaves(loaded)} == {replicated}
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    tree = eqx.tree_at(lambda m: m.embed, jax.tree.map(lambda _: replicated, model), split)
    loaded = load_native(saved, shardings=tree)
    assert loaded.embed.sharding == split
    assert loaded.blocks.attention.q_proj.sharding == replicated
    assert equal(loaded, model)


def test_a_run_directory_by_step(tmp_path, model):
    write_config({"model": model.config, "seed": 1}, tmp_path)
    with Checkpoints(tmp_path / "checkpoints", load_config("checkpoint.every=1").checkpoint) as checkpoints:
        checkpoints.save(10, jax.tree.map(jnp.zeros_like, model), {"step": jnp.int32(10)})
        checkpoints.save(20, model, {"step": jnp.int32(20)})
    assert equal(load_native(tmp_path), model)
    assert float(jnp.abs(load_native(tmp_path, step=10).embed).max()) == 0
    with pytest.raises(CheckpointError, match="saved steps: 10, 20"):
        load_native(tmp_path, step=15)


def test_the_folder_is_that_of_a_run(tmp_path, saved, model):
    assert sorted(path.name for path in saved.iterdir()) == ["checkpoints", "config.yaml", "manifest.json"]
    assert list(read_config(saved)) == ["model"]
    assert load(read_config(saved)["model"]) == model.config
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    tokenizer = tmp_path / "a_tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    save_native(model, tmp_path / "more" / "with", tokenizer)
    assert (tmp_path / "more" / "with" / "tokenizer" / "tokenizer.json").read_text() == "{}"


def test_never_overwrites_and_leaves_no_half(tmp_path, saved, model):
    with pytest.raises(StorageError, match="exists"):
        save_native(model, saved)
    with pytest.raises(StorageError, match="could not be saved"):
        save_native(model, tmp_path / "new", tmp_path / "no_tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_a_model_that_is_not_of_its_config_is_refused(tmp_path, model):
    """It would be a folder that nothing reads."""
    narrow = eqx.tree_at(lambda m: m.final_norm.weight, model, jnp.ones(5))
    blocks = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks) for i in range(model.config.dims.layers))
    for edited in (narrow, eqx.tree_at(lambda m: m.blocks, model, blocks)):
        with pytest.raises(CheckpointError, match="not those of the model's config"):
            save_native(edited, tmp_path / "edited")
    assert not list(tmp_path.iterdir())


def test_an_escaped_interpolation_is_refused(saved):
    with (saved / "config.yaml").open("a") as file:
        file.write('note: "\\x24{oc.env:HOME}"\n')
    with pytest.raises(CheckpointError, match="interpolation"):
        load_native(saved)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {_target_: os.system}", "not a config class"),
        ("model: 3", "model in config.yaml is not a mapping"),
        ("seed: 3", "no Llama"),
        ("model: [", "not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("- 1", "not a mapping"),
        ("a: &a [1]\nmodel: [*a, *a]", "line 2 has the alias"),  # ten lines of ten would be 10^10 ones
        ("[" * 9000, "not YAML"),
        ("a: 2026-02-30", "not YAML"),
        (f"a: {'1' * 5000}", "not YAML"),
    ],
    ids=lambda text: text[:30],
)
def test_other_configs_are_refused(saved, text, said):
    (saved / "config.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=said):
        load_native(saved)


def test_a_config_of_another_shape_is_refused(saved):
    tree = read_config(saved)
    tree["model"]["dims"]["mlp"] = 128
    (saved / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(CheckpointError, match=r"model.blocks.feed_forward.up_proj +float32\[2,32,128\] +float32\[2,32,64\]"):
        load_native(saved)


def test_what_is_missing_is_said(tmp_path, saved, model):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_native(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not a run directory"):
        load_native(tmp_path)
    (saved / "manifest.json").rename(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match="no manifest shows that the save of checkpoint 0 was completed"):
        load_native(saved)
    shutil.rmtree(saved / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint has been saved yet"):
        load_native(saved)


DAMAGE = {
    "empty": lambda step: (shutil.rmtree(step), step.mkdir()),
    "no model": lambda step: shutil.rmtree(step / "model"),
    "no metadata": lambda step: (step / "model" / "_METADATA").unlink(),
    "garbage metadata": lambda step: (step / "model" / "_METADATA").write_bytes(b"\0garbage"),
    "truncated": lambda step: [path.write_bytes(path.read_bytes()[:100]) for path in (step / "model" / "d").iterdir()],
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax abandons the reads beside the failed one
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_said_in_one_block(saved, damage):
    DAMAGE[damage](saved / "checkpoints" / "0")
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        load_native(saved)
    error = caught.value
    assert len(str(error).splitlines()) <= 4
    assert str(saved) in error.where
    error.__cause__, error.__traceback__ = None, None
    del caught
    gc.collect()
