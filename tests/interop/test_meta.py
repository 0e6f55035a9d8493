"""Meta's folders against an implementation of Meta's own forward, which computes on every file's part of the model as Meta's does."""

import dataclasses
import json
import math
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from llama_eqx import load_config
from llama_eqx.errors import CheckpointError
from llama_eqx.interop.conversion import ConvertConfig, convert, require_expressible, save_pretrained
from llama_eqx.interop.params import config_to_meta, ffn_parameters, ffn_size
from llama_eqx.interop.pretrained import load_pretrained, open_pretrained
from llama_eqx.precision import cast
from llama_eqx.sharding import MESH_AXES, Layout

# As each generation is made, in small: 16 heads, so that they divide over as many files.
GENERATIONS = {
    "llama1": {"preset": "llama1_7b", "kv_heads": 16},
    "llama2": {"preset": "llama2_70b", "kv_heads": 8},
    "llama3": {"preset": "llama3_8b", "kv_heads": 8},
    "llama3_1": {"preset": "llama3_1_8b", "kv_heads": 8},
    "llama3_2": {"preset": "llama3_2_1b", "kv_heads": 8},
}
SIZES = {"vocab": 64, "layers": 2, "embed": 256, "heads": 16, "head_dim": 16, "mlp": 512}
CASES = [("llama1", 1), ("llama1", 2), ("llama2", 4), ("llama2", 8), ("llama3", 1), ("llama3", 8), ("llama3_1", 16), ("llama3_2", 2)]
TOKENS = np.random.default_rng(0).integers(0, 64, (2, 12))


def config_of(generation: str):
    preset, kv_heads = GENERATIONS[generation].values()
    sizes = {**SIZES, "kv_heads": kv_heads}
    return load_config(f"model={preset}", *(f"model.dims.{axis}={size}" for axis, size in sizes.items())).model


def build(config, dtype="float32"):
    """Random weights, norms included."""
    leaves, structure = jax.tree.flatten(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)))
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(1.0 if x.ndim < 3 and x.shape[0] < 60 else 0.0, 0.1, x.shape)  # noqa: E731
    return cast(structure.unflatten([jnp.asarray(draw(x), jnp.float32) for x in leaves]), dtype)


def meta_logits(params: dict, shards: list[dict], tokens: torch.Tensor, factor: float) -> torch.Tensor:
    """What Meta's model-parallel code computes from its files: each shard its own heads and columns, then a sum or a concatenation."""
    count, dim, heads, eps = len(shards), params["dim"], params["n_heads"], params["norm_eps"]
    kv_heads, head_dim = params.get("n_kv_heads") or heads, dim // heads
    tables = [shard["tok_embeddings.weight"].float() for shard in shards]
    if tables[0].shape[1] == dim:  # rows are dealt out
        rows = tables[0].shape[0]
        h = 0
        for i, table in enumerate(tables):
            own = (tokens >= i * rows) & (tokens < (i + 1) * rows)
            h = h + torch.nn.functional.embedding(torch.where(own, tokens - i * rows, 0), table) * own[..., None]
    else:
        h = torch.cat([torch.nn.functional.embedding(tokens, table) for table in tables], -1)

    frequencies = 1.0 / (params.get("rope_theta", 10000.0) ** (torch.arange(0, head_dim, 2).float() / head_dim))
    if params.get("use_scaled_rope"):
        scaled = []
        for frequency in frequencies:
            wavelength = 2 * math.pi / frequency
            if wavelength < 8192 / 4:
                scaled.append(frequency)
            elif wavelength > 8192:
                scaled.append(frequency / factor)
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
        frequencies = torch.stack(scaled)
    angles = torch.outer(torch.arange(tokens.shape[1]).float(), frequencies)
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def norm(x, weight):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.float()

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(3)

    batch, length = tokens.shape
    mask = torch.full((length, length), float("-inf")).triu(1)
    for layer in range(params["n_layers"]):
        attended, fed = 0, 0
        x = norm(h, shards[0][f"layers.{layer}.attention_norm.weight"])
        for shard in shards:
            wq, wk, wv, wo = (shard[f"layers.{layer}.attention.{name}.weight"].float() for name in ("wq", "wk", "wv", "wo"))
            q = rotate((x @ wq.T).view(batch, length, heads // count, head_dim))
            k = rotate((x @ wk.T).view(batch, length, kv_heads // count, head_dim))
            v = (x @ wv.T).view(batch, length, kv_heads // count, head_dim)
            k, v = (y.repeat_interleave(heads // kv_heads, 2).transpose(1, 2) for y in (k, v))
            scores = q.transpose(1, 2) @ k.transpose(2, 3) / math.sqrt(head_dim) + mask
            y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, -1)
            attended = attended + y @ wo.T
        h = h + attended
        x = norm(h, shards[0][f"layers.{layer}.ffn_norm.weight"])
        for shard in shards:
            w1, w2, w3 = (shard[f"layers.{layer}.feed_forward.{name}.weight"].float() for name in ("w1", "w2", "w3"))
            fed = fed + (torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
        h = h + fed
    h = norm(h, shards[0]["norm.weight"])
    return torch.cat([h @ shard["output.weight"].float().T for shard in shards], -1)


def read(folder):
    files = sorted(folder.glob("*.pth"))
    return json.loads((folder / "params.json").read_text()), [torch.load(file, weights_only=True) for file in files]


@eqx.filter_jit
def our_logits(model, tokens):
    return model(tokens)


def assert_agrees(model, folder):
    params, shards = read(folder)
    theirs = meta_logits(params, shards, torch.tensor(TOKENS), getattr(model.config.rotary, "factor", 8)).numpy()
    np.testing.assert_allclose(our_logits(model, jnp.asarray(TOKENS)), theirs, rtol=0, atol=2e-5)
    assert theirs.std() > 0.1


@pytest.fixture(scope="module")
def models():
    return {generation: build(config_of(generation)) for generation in GENERATIONS}


@pytest.mark.parametrize(("generation", "shards"), CASES)
def test_what_is_written_computes_the_same_in_metas_way(tmp_path, models, generation, shards):
    save_pretrained(models[generation], tmp_path / "meta", format="meta", shards=shards)
    params, parts = read(tmp_path / "meta")
    assert len(parts) == shards
    assert_agrees(models[generation], tmp_path / "meta")
    split = "vocab" if generation.startswith("llama3") else "embed"
    assert parts[0]["tok_embeddings.weight"].shape == ((64 // shards, 256) if split == "vocab" else (64, 256 // shards))
    if shards == 16 and generation != "llama1":
        assert params["n_kv_heads"] == 16
        assert torch.equal(parts[2]["layers.1.attention.wk.weight"], parts[3]["layers.1.attention.wk.weight"])
        assert not torch.equal(parts[1]["layers.1.attention.wk.weight"], parts[2]["layers.1.attention.wk.weight"])


def theirs(folder, generation, shards):
    """A folder as Meta would have written it, made here without this package."""
    llama3 = generation.startswith("llama3")
    kv_heads = GENERATIONS[generation]["kv_heads"]
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: (torch.randn(*shape, generator=rng) * 0.1).bfloat16()  # noqa: E731
    params = {"dim": 256, "multiple_of": 512, "ffn_dim_multiplier": 0.7, "n_heads": 16, "n_layers": 2, "norm_eps": 1e-5, "vocab_size": -1}
    if kv_heads != 16:
        params["n_kv_heads"] = max(kv_heads, shards)
    if llama3:
        params |= {"rope_theta": 500000.0}
    if generation in ("llama3_1", "llama3_2"):
        params |= {"use_scaled_rope": True}
    full = {"norm.weight": 1 + draw(256), "rope.freqs": torch.ones(8)}
    parts = [dict(full) for _ in range(shards)]
    embed = draw(64, 256)
    for i, part in enumerate(parts):
        part["tok_embeddings.weight"] = (embed.chunk(shards, 0) if llama3 else embed.chunk(shards, 1))[i].clone()
        part["output.weight"] = embed.chunk(shards, 0)[i].clone() if generation == "llama3_2" else draw(64 // shards, 256)
    for layer in range(2):
        keys, values = draw(kv_heads, 16, 256), draw(kv_heads, 16, 256)
        for i, part in enumerate(parts):
            own = slice(i * kv_heads // shards, max((i + 1) * kv_heads // shards, i * kv_heads // shards + 1))
            part[f"layers.{layer}.attention.wk.weight"] = keys[own].reshape(-1, 256).clone()
            part[f"layers.{layer}.attention.wv.weight"] = values[own].reshape(-1, 256).clone()
            part[f"layers.{layer}.attention.wq.weight"] = draw(256 // shards, 256)
            part[f"layers.{layer}.attention.wo.weight"] = draw(256, 256 // shards)
            part[f"layers.{layer}.feed_forward.w1.weight"] = draw(512 // shards, 256)
            part[f"layers.{layer}.feed_forward.w3.weight"] = draw(512 // shards, 256)
            part[f"layers.{layer}.feed_forward.w2.weight"] = draw(256, 512 // shards)
        for name in ("attention_norm", "ffn_norm"):
            weight = 1 + draw(256)
            for part in parts:
                part[f"layers.{layer}.{name}.weight"] = weight.clone()
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for i, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{i:02d}.pth")


@pytest.mark.parametrize(("generation", "shards"), CASES)
def test_what_is_read_computes_the_same_and_returns_byte_for_byte(tmp_path, generation, shards):
    theirs(tmp_path / "meta", generation, shards)
    weights = open_pretrained(tmp_path / "meta")
    assert weights.config.dims.kv_heads == GENERATIONS[generation]["kv_heads"]
    assert weights.config.tied is (generation == "llama3_2")
    assert any("one tied table is taken" in note for note in weights.notes) is weights.config.tied
    assert_agrees(cast(load_pretrained(tmp_path / "meta"), "float32"), tmp_path / "meta")
    convert(ConvertConfig(from_=str(tmp_path / "meta"), to=str(tmp_path / "hf"), format="hf", dtype=None, shards=None))
    if generation.startswith("llama3"):  # in such small sizes nothing else tells
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, "bos_token_id": 128000}))
        (tmp_path / "hf" / "manifest.json").unlink()
    convert(ConvertConfig(from_=str(tmp_path / "hf"), to=str(tmp_path / "back"), format="meta", dtype=None, shards=shards))
    params, parts = read(tmp_path / "meta")
    again, parts_again = read(tmp_path / "back")
    for part, part_again in zip(parts, parts_again, strict=True):
        assert part.keys() - {"rope.freqs"} == part_again.keys()
        for name, x in part_again.items():
            assert x.dtype == part[name].dtype
            assert torch.equal(x.view(torch.int16), part[name].view(torch.int16)), name
            assert x.is_contiguous()
            assert x.untyped_storage().nbytes() == x.nbytes  # no file holds more than its tensors
    for key in ("dim", "n_heads", "n_kv_heads", "n_layers", "norm_eps", "rope_theta", "use_scaled_rope"):
        assert params.get(key) == again.get(key)


@pytest.mark.parametrize(
    "preset", ["llama1_7b", "llama1_65b", "llama2_34b", "llama2_70b", "llama3_8b", "llama3_1_405b", "llama3_2_1b", "llama3_2_3b"]
)
def test_params_of_the_published_sizes(preset):
    config = load_config(f"model={preset}").model
    params = config_to_meta(config, 1)
    assert ffn_size(params["dim"], params["multiple_of"], params.get("ffn_dim_multiplier")) == config.dims.mlp
    assert params.get("ffn_dim_multiplier") in (None, 1.0, 1.2, 1.3, 1.5)
    assert params.get("use_scaled_rope", False) is preset.startswith(("llama3_1", "llama3_2"))
    assert ("rope_theta" in params) is preset.startswith("llama3")


@given(st.integers(1, 20_000), st.integers(1, 200_000))
def test_every_width_can_be_said(dim, mlp):
    assert ffn_size(dim, *ffn_parameters(dim, mlp)) == mlp


def test_what_meta_has_no_words_for(tmp_path, models):
    model = models["llama3_1"]
    rotary = dataclasses.replace(model.config.rotary, factor=16.0)
    for changes, where in (({"rotary": rotary}, "rotary"), ({"dims": dataclasses.replace(model.config.dims, head_dim=8)}, "dims.head_dim")):
        with pytest.raises(CheckpointError) as error:
            config_to_meta(dataclasses.replace(model.config, **changes), 1)
        assert error.value.where == where
    with pytest.raises(CheckpointError, match="would mean") as error:
        require_expressible(dataclasses.replace(model.config, rotary=rotary), "meta")
    assert error.value.next == "format=native, which has every model"
    with pytest.raises(CheckpointError, match=r"heads=16 does not divide over 3 files\s+kv_heads=8 [\s\S]*mlp=512 [\s\S]*vocab=64"):
        save_pretrained(model, tmp_path / "meta", format="meta", shards=3)
    assert not list(tmp_path.iterdir())


def test_all_differences_are_listed(tmp_path):
    theirs(tmp_path / "meta", "llama2", 2)
    file = tmp_path / "meta" / "consolidated.01.pth"
    part = torch.load(file, weights_only=True)
    del part["layers.0.attention.wq.weight"]
    part["layers.1.feed_forward.w2.weight"] = torch.zeros(256, 128)
    part["layers.2.attention.wq.weight"] = torch.zeros(2, 2)
    torch.save(part, file)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(tmp_path / "meta")
    assert error.value.what.splitlines() == [
        "not part of this model: layers.2.attention.wq.weight in consolidated.01.pth",
        "missing: layers.0.attention.wq.weight (128, 256) in consolidated.01.pth",
        "shape: layers.1.feed_forward.w2.weight is (256, 128), wanted (256, 256), in consolidated.01.pth",
    ]


def test_parts_of_a_tensor_in_two_dtypes(tmp_path):
    theirs(tmp_path / "meta", "llama2", 2)
    file, name = tmp_path / "meta" / "consolidated.01.pth", "layers.1.feed_forward.w1.weight"
    part = torch.load(file, weights_only=True)
    part[name] = part[name].float() + 1e-6
    torch.save(part, file)
    convert(ConvertConfig(from_=str(tmp_path / "meta"), to=str(tmp_path / "again"), format="meta", dtype=None, shards=1))
    (_, (whole,)) = read(tmp_path / "again")
    assert torch.equal(whole[name][256:], part[name])


def test_a_table_with_more_rows_than_are_said(tmp_path):
    theirs(tmp_path / "meta", "llama2", 2)
    for said, notes in ((60, 1), (64, 0), (None, 0), (-1, 0)):
        params(tmp_path / "meta", vocab_size=said)
        weights = open_pretrained(tmp_path / "meta")
        assert weights.config.dims.vocab == 64
        assert len([note for note in weights.notes if "says vocab_size=60, and the table of embeddings has 64 rows" in note]) == notes


def test_special_ids_are_those_that_are_said_of_generation(tmp_path):
    theirs(tmp_path / "meta", "llama2", 2)
    file = tmp_path / "meta" / "generation_config.json"
    for said, ids in (
        ({"bos_token_id": 3, "eos_token_id": [4, 63], "pad_token_id": 0}, (3, (4, 63), 0)),
        ({"bos_token_id": None, "eos_token_id": None, "pad_token_id": -1}, (1, (2,), None)),
    ):
        file.write_text(json.dumps(said))
        tokens = open_pretrained(tmp_path / "meta").config.tokens
        assert (tokens.bos, tokens.eos, tokens.pad) == ids
    file.write_text('{"bos_token_id": "a", "eos_token_id": [4, 64], "pad_token_id": -2}')
    with pytest.raises(CheckpointError, match=r"bos_token_id is 'a'[\s\S]*eos_token_id is \[4, 64\][\s\S]*pad_token_id is -2, ") as error:
        open_pretrained(tmp_path / "meta")
    assert error.value.where == "generation_config.json"
    for unread in ("", "[]", "{"):
        file.write_text(unread)
        weights = open_pretrained(tmp_path / "meta")
        assert "generation_config.json was left behind: " in weights.notes[0]
        assert (weights.config.tokens.eos, "generation_config.json" in weights.files) == ((2,), False)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_however_many_copies_of_a_head_are_recognised(tmp_path, kv_heads):
    sizes = {"vocab": 48, "layers": 1, "embed": 96, "heads": 12, "kv_heads": kv_heads, "head_dim": 8, "mlp": 48}
    model = build(load_config("model=llama2_70b", *(f"model.dims.{axis}={size}" for axis, size in sizes.items())).model)
    save_pretrained(model, tmp_path / "meta", format="meta", shards=12)
    assert json.loads((tmp_path / "meta" / "params.json").read_text())["n_kv_heads"] == 12
    for x, y in zip(*map(jax.tree.leaves, (load_pretrained(tmp_path / "meta"), model)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_copies_of_a_head_that_differ(tmp_path):
    theirs(tmp_path / "meta", "llama3", 16)
    file = tmp_path / "meta" / "consolidated.05.pth"
    part = torch.load(file, weights_only=True)
    part["layers.1.attention.wk.weight"][0, 0] += 1
    torch.save(part, file)
    with pytest.raises(CheckpointError, match=r"layers.1.attention.wk.weight stands in several files, and they do not agree"):
        load_pretrained(tmp_path / "meta")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "consolidated.01.pth").unlink(), "shape: .* in consolidated.00.pth"),
        (lambda folder: (folder / "consolidated.00.pth").unlink(), "missing: consolidated.00.pth"),
        (lambda folder: (folder / "consolidated.01.pth").rename(folder / "consolidated.02.pth"), "missing: consolidated.01.pth"),
        (lambda folder: [file.unlink() for file in folder.glob("*.pth")], "missing: consolidated.00.pth"),
        (lambda folder: (folder / "params.json").write_text("{}"), "dim is missing[\\s\\S]*norm_eps is missing"),
        (lambda folder: (folder / "params.json").write_text("<html>"), "a web page"),
        (lambda folder: params(folder, n_heads="many"), "n_heads is 'many', wanted a size"),
        (
            lambda folder: params(folder, dim=None, n_heads=None, n_layers=2**31),
            "dim is None, .*\\s+n_layers is 2147.*\\s+n_heads is None, ",
        ),
        (lambda folder: params(folder, n_layers=1000), "^error: the settings ask for 1,000 layers, and there are 22 tensors\nwhere"),
        (lambda folder: params(folder, vocab_size=65), "vocab_size is 65, and the table of embeddings has 64 rows"),
        (lambda folder: params(folder, vocab_size="64"), "vocab_size is '64', "),
        (lambda folder: params(folder, n_heads=48), "is not a multiple of n_heads"),
        (lambda folder: params(folder, n_kv_heads=5), "kv_heads"),
        (lambda folder: params(folder, quantization_args={"scheme": "int4"}), "quantization_args"),
        (lambda folder: params(folder, multiple_of=2), "shape: layers.0.feed_forward.w1.weight"),
        (lambda folder: params(folder, multiple_of=1), "mlp=477 does not divide over 2 files"),
        (lambda folder: params(folder, n_layers=3), "missing: layers.2.attention_norm.weight"),
        (lambda folder: torch.save([1, 2], folder / "consolidated.00.pth"), "holds a list"),
        (lambda folder: torch.save({"a": torch.ones(1, dtype=torch.int8)}, folder / "consolidated.00.pth"), "a is torch.int8"),
        (lambda folder: torch.save({"a": 3}, folder / "consolidated.00.pth"), "a is int"),
        (lambda folder: torch.save({}, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False), "since its version 1.6"),
    ],
)
def test_damaged_folders(tmp_path, change, said):
    theirs(tmp_path / "meta", "llama2", 2)
    change(tmp_path / "meta")
    with pytest.raises(CheckpointError, match=said):
        load_pretrained(tmp_path / "meta")


@pytest.mark.parametrize(("version", "said"), [("2.9.1+cpu", "torch 2.9.1"), (None, "need torch")])
def test_torch_that_is_missing_or_can_be_made_to_run_code(tmp_path, models, monkeypatch, version, said):
    theirs(tmp_path / "meta", "llama2", 2)
    if version is None:
        monkeypatch.setitem(sys.modules, "torch", None)
    else:
        monkeypatch.setattr(torch, "__version__", version)
    for use in (lambda: load_pretrained(tmp_path / "meta"), lambda: save_pretrained(models["llama2"], tmp_path / "new", format="meta")):
        with pytest.raises(CheckpointError, match=said):
            use()
    assert not (tmp_path / "new").exists()


def params(folder, **changes):
    file = folder / "params.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_sharded_over_devices(tmp_path, models):
    model = models["llama3_2"]
    save_pretrained(model, tmp_path / "meta", format="meta", shards=4)
    layout = Layout(jax.make_mesh((1, 4, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4), load_config("sharding=fsdp_tensor").sharding)
    config = open_pretrained(tmp_path / "meta").config
    shardings = layout.shardings(eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0)))
    loaded = load_pretrained(tmp_path / "meta", shardings=shardings)
    for x, y, place in zip(*map(jax.tree.leaves, (loaded, model, shardings)), strict=True):
        assert x.sharding == place
        assert np.array_equal(x, y)
