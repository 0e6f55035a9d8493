"""What the README and the guide to variants show runs as it stands."""

import dataclasses
import pathlib
import re
import subprocess
import sys
import tomllib
import types

import pytest

from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.model import attention, feed_forward
from llama_eqx.model.init import FanInInitConfig

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VARIANT, *PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)
TEXT = pathlib.Path(__file__).parent / "golden" / "text.md"
VARIANTS = (ROOT / "docs/variants.md").read_text(encoding="utf-8")
SHOWN = re.findall(r"```python\n(.*?)```", VARIANTS, re.S)


def shown(words):
    """The code of the guide that has these words."""
    (code,) = [code for code in SHOWN if words in code]
    return code


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(PYTHON[0], names)
    assert names["logits"].shape == (2, 16, 300)
    assert names["model"].embed.dtype == "bfloat16"
    BytesTokenizer().save(tmp_path / "folder" / "tokenizer")
    (tmp_path / "folder").rename("RUN_DIR")
    exec(PYTHON[1], names)
    assert (type(names["text"]), len(names["new"].tokens[0])) == (str, 20)


def test_the_virtual_devices_of_the_readme(tmp_path):
    """In a process of its own, which splits its CPU itself: that of these tests has eight devices already."""
    (words,) = re.findall(r"^python -m (llama_eqx.train mesh=cpu-8 .*?) +#", README, re.M)
    (tmp_path / "text.txt").write_text("To be, or not to be. " * 200)
    small = ["tokenizer=bytes", "data=text", f"data.path={tmp_path}/text.txt", "train.seq_len=16", "train.batch_size=8", "train.steps=1"]
    small += [f"run_dir={tmp_path}/run", "model.dims.layers=1", "tracking.wandb.mode=disabled"]
    done = subprocess.run([sys.executable, "-m", *words.split(), *small], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert '"devices": 8' in (tmp_path / "run" / "provenance.jsonl").read_text()


def test_the_variant_of_the_readme(tiny, monkeypatch):
    import jax

    module = types.ModuleType("readme_variant")
    vars(module).update(vars(feed_forward), __name__="readme_variant")
    monkeypatch.setitem(sys.modules, "readme_variant", module)
    exec(VARIANT, vars(module))
    config = module.LowRankGateConfig(rank=16)
    variant = config.build(tiny().dims, FanInInitConfig(gain=1.0), key=jax.random.key(0))
    assert variant.gate_out.shape == (16, 48)
    assert variant(jax.numpy.ones((2, 3, 32))).shape == (2, 3, 32)


def test_the_guide_shows_the_same_variant():
    assert SHOWN[0] == VARIANT


def test_the_attention_of_the_guide(tiny, monkeypatch):
    import equinox as eqx
    import jax

    module = types.ModuleType("guide_variant")
    vars(module).update(vars(attention), __name__="guide_variant")
    monkeypatch.setitem(sys.modules, "guide_variant", module)
    exec(shown("class TemperatureAttention"), vars(module))
    plain = tiny()
    config = dataclasses.replace(plain, attention=module.TemperatureAttentionConfig())
    model, reference = (each.build(key=jax.random.key(0)) for each in (config, plain))
    tokens = jax.numpy.arange(12).reshape(1, 12)
    assert jax.numpy.array_equal(model(tokens), reference(tokens))  # at a temperature of 1
    hotter = eqx.tree_at(lambda m: m.blocks.attention.temperature, model, replace_fn=lambda x: 3 * x)
    assert not jax.numpy.allclose(hotter(tokens), reference(tokens), atol=1e-3)


def test_the_windows_of_the_guide(tiny, tmp_path, monkeypatch):
    """Against a model of transformers with the weights of a Llama and a window in every other layer, also where a cache is read."""
    import json

    import jax
    import numpy as np
    import torch
    import transformers

    from llama_eqx import generate_tokens, save_pretrained, trace
    from llama_eqx.flops import flops_per_token
    from llama_eqx.generation.layout import for_decoding

    monkeypatch.setitem(sys.modules, "guide_windows", module := types.ModuleType("guide_windows"))
    vars(module).update(vars(attention), __name__="guide_windows")
    exec(shown("class WindowedAttention"), vars(module))
    plain = tiny("model.dims.layers=4", "model.tied=false")
    save_pretrained(plain.build(key=jax.random.key(0)), tmp_path, format="hf")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings |= {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"], "use_sliding_window": True, "sliding_window": 5}
    settings |= {"no_rope_layers": [1] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs = transformers.SmolLM3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")

    ours = dataclasses.replace(plain, attention=module.WindowedAttentionConfig(size=5, every=2)).build(key=jax.random.key(0))
    tokens = np.random.default_rng(0).integers(1, 64, (2, 20))
    with torch.no_grad():
        seen = theirs(torch.tensor(tokens), output_attentions=True)
        greedy = theirs.generate(torch.tensor(tokens), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    np.testing.assert_allclose(ours(jax.numpy.asarray(tokens)), seen.logits, atol=1e-5)
    assert generate_tokens(ours, tokens.tolist(), max_new_tokens=8).tokens == greedy[:, 20:].tolist()
    short = tokens[1, :9].tolist()  # with padding between it and what follows, which a window does not count
    new = theirs.generate(torch.tensor([short]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 9:]
    assert generate_tokens(for_decoding(ours), [tokens[0].tolist(), short], max_new_tokens=8).tokens[1] == new.tolist()
    weights = trace(ours, tokens.astype(np.int32), "attention_weights")["attention_weights"]
    np.testing.assert_allclose(weights, torch.stack(seen.attentions), atol=1e-6)
    computed = [float((weight > 0).sum()) / tokens.size / plain.dims.heads for weight in seen.attentions]  # scores of a token and head
    fewer = flops_per_token(plain.build(key=jax.random.key(0)), 20).causal - flops_per_token(ours, 20).causal
    expected = 12 * plain.dims.heads * plain.dims.head_dim * (2 * computed[1] - computed[0] - computed[2])
    assert fewer == pytest.approx(expected, rel=0.1)  # the formula leaves out half of a token's score of itself
    # Windows wider than a row leave nothing out.
    assert flops_per_token(ours, 4) == flops_per_token(plain.build(key=jax.random.key(0)), 4)


def test_the_model_of_the_guide(tiny, monkeypatch):
    """Training and scores see its logits, under the policies of a run and on several devices."""
    import equinox as eqx
    import jax
    import numpy as np

    from llama_eqx import load_config
    from llama_eqx.batch import Batch
    from llama_eqx.generation.layout import for_decoding
    from llama_eqx.sharding import Layout
    from llama_eqx.training.evaluation import make_score
    from llama_eqx.training.loss import policy_view

    monkeypatch.setitem(sys.modules, "guide_model", module := types.ModuleType("guide_model"))
    exec(shown("class CappedLlama"), vars(module))
    plain, run = tiny(), load_config("mesh=cpu-8", "mesh.tensor=2", "sharding=fsdp_tensor", "loss.chunk=5")
    model = module.CappedLlamaConfig(**vars(plain), cap=2.0).build(key=jax.random.key(0))
    tokens = jax.numpy.asarray(np.random.default_rng(0).integers(0, 64, (4, 13)))

    def by_hand(model):
        parts = [model.embed * 32**0.5, model.blocks, model.final_norm]
        llama = eqx.tree_at(lambda m: [m.embed, m.blocks, m.final_norm], plain.build(key=jax.random.key(1)), parts)
        x, _ = llama.hidden(tokens[:, :-1])
        return 2 * jax.numpy.tanh(x @ model.unembed / 2)

    def nats(model):
        return -jax.numpy.take_along_axis(jax.nn.log_softmax(by_hand(model)), tokens[:, 1:, None], axis=-1)[..., 0]

    batch, layout = Batch(tokens[:, :-1], tokens[:, 1:], jax.numpy.ones((4, 12))), Layout(run.mesh.build(), run.sharding)
    view = policy_view(run.precision, run.remat, layout, run.kernel)
    loss = run.loss.build(view, layout)
    objective, gradient = jax.jit(jax.value_and_grad(lambda m: loss(m, batch, None)[0]))(model)
    wanted, by_autodiff = jax.value_and_grad(lambda m: nats(m).sum())(model)
    assert float(objective) == pytest.approx(float(wanted), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), gradient, by_autodiff)
    np.testing.assert_allclose(jax.jit(make_score(view, layout, 5))(model, batch).nats, nats(model), atol=1e-5)
    for each in (model, for_decoding(model)):
        np.testing.assert_allclose(each(tokens[:, :-1]), by_hand(model), atol=1e-5)


def test_the_model_of_the_guide_starts_from_a_llama(tiny, monkeypatch, tmp_path):
    import jax
    import numpy as np

    from llama_eqx import load_config, load_pretrained, save_pretrained
    from llama_eqx.errors import CheckpointError
    from llama_eqx.model import llama
    from llama_eqx.training.ends import open_start

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "guide_model", module := types.ModuleType("guide_model"))
    exec(shown("class CappedLlama"), vars(module))
    monkeypatch.setattr(module.CappedLlamaConfig, "__module__", llama.__name__)  # what is built by name must be of this package
    monkeypatch.setattr(llama, "CappedLlamaConfig", module.CappedLlamaConfig, raising=False)
    save_pretrained(tiny().build(key=jax.random.key(0)), "RUN_DIR", format="native")
    BytesTokenizer().save(tmp_path / "RUN_DIR" / "tokenizer")
    run = dataclasses.replace(load_config("init_from=RUN_DIR"), model=module.CappedLlamaConfig(**vars(tiny()), cap=30.0))
    with pytest.raises(CheckpointError, match=r"CappedLlamaConfig here\s+model.cap is None there, 30.0 here") as error:
        open_start(run)
    assert error.value.next.endswith("docs/variants.md makes of a Llama's under A model of your own")
    exec(shown("save_native(CappedLlama"), vars(module))
    assert open_start(dataclasses.replace(run, init_from="capped")).notes == ()
    loaded = load_pretrained("capped")
    assert type(loaded) is module.CappedLlama
    jax.tree.map(np.testing.assert_array_equal, loaded.blocks, load_pretrained("RUN_DIR").blocks)


def test_the_loss_of_the_guide(tiny, monkeypatch):
    """Against PyTorch's own smoothing."""
    import jax
    import numpy as np
    import torch

    from llama_eqx.batch import Batch
    from llama_eqx.training import loss

    module = types.ModuleType("guide_loss")
    vars(module).update(vars(loss), __name__="guide_loss", jax=jax, jnp=jax.numpy)
    monkeypatch.setitem(sys.modules, "guide_loss", module)
    exec(shown("class SmoothedConfig"), vars(module))
    model, rng = tiny().build(key=jax.random.key(0)), np.random.default_rng(0)
    tokens, targets = jax.numpy.asarray(rng.integers(0, 64, (2, 2, 8)), "int32")
    mask = jax.numpy.asarray(rng.random((2, 8)) < 0.7, "float32")
    smoothed = module.SmoothedConfig(chunk=None, share=0.1).build(lambda model: model, None)
    objective, sums = smoothed(model, Batch(tokens, targets, mask), None)
    counted = np.asarray(mask) > 0
    logits, kept = torch.tensor(np.asarray(model(tokens)))[counted], torch.tensor(np.asarray(targets)).long()[counted]
    for smoothing, found in ((0.1, objective), (0.0, sums.cross_entropy), (1.0, sums.terms["uniform"])):
        wanted = torch.nn.functional.cross_entropy(logits, kept, label_smoothing=smoothing, reduction="sum")
        assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    assert sums.weight == mask.sum()


@pytest.mark.parametrize("policy", ["none", "full", "dots"])
def test_the_added_term_of_the_guide(tiny, policy):
    """In a feed-forward of a model under policies: the gradient of the loss and the terms of all layers together."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp
    from jaxtyping import Array, Float32

    from llama_eqx import load_config
    from llama_eqx.remat import RematConfig
    from llama_eqx.sharding import Layout
    from llama_eqx.training.loss import policy_view

    names = {"jax": jax, "jnp": jnp, "Array": Array, "Float32": Float32}
    exec(shown("def minimising"), names)
    told = []

    class Added(feed_forward.GatedFeedForward):
        def __call__(self, x):
            y = super().__call__(x)
            term = jnp.sum(y.astype(jnp.float32) ** 2)
            told.append(term)
            return names["minimising"](y, term)

    plain = tiny().build(key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.blocks.feed_forward, plain, Added(**vars(plain.blocks.feed_forward)))
    tokens, config = jnp.arange(48).reshape(8, 6), load_config()
    view = policy_view(config.precision, RematConfig(policy=policy), Layout(config.mesh.build(), config.sharding))
    found = jax.jit(jax.grad(lambda model: view(model)(tokens).mean()))(model)

    def both(model):  # layer by layer, where the terms can be seen
        blocks = [jax.tree.map(lambda leaf, i=i: leaf[i], model.blocks) for i in range(plain.config.dims.layers)]
        model = eqx.tree_at(lambda m: m.blocks, model, tuple(blocks))
        told.clear()
        return model(tokens).mean() + sum(told)

    names["minimising"] = lambda y, term: y
    wanted = jax.grad(both)(model)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert jnp.allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_the_slow_embedding_of_the_guide(tiny, monkeypatch):
    import jax
    import numpy as np
    from jaxtyping import PyTree

    from llama_eqx.sharding import parameter_names
    from llama_eqx.training import optimizer

    module = types.ModuleType("guide_optimizer")
    vars(module).update(vars(optimizer), __name__="guide_optimizer", parameter_names=parameter_names, PyTree=PyTree)
    monkeypatch.setitem(sys.modules, "guide_optimizer", module)
    exec(shown("class SlowEmbedding"), vars(module))
    model, settings = tiny().build(key=jax.random.key(0)), {"clip_norm": 1.0, "weight_decay": 0.1, "b1": 0.9, "b2": 0.95, "eps": 1e-8}
    gradient, updates = jax.tree.map(jax.numpy.ones_like, model), []
    for kind in (optimizer.AdamWConfig, module.SlowEmbeddingConfig):
        train = kind(**settings).build()
        updates.append(jax.tree.leaves(train.update(gradient, train.init(model), model)[0]))
    for name, plain, slowed in zip(parameter_names(model), *updates, strict=True):
        np.testing.assert_allclose(slowed, plain * (0.1 if name == "embed" else 1), rtol=1e-6, err_msg=name)


def test_the_meter_of_the_guide():
    import jax.numpy as jnp

    from llama_eqx.training import meters

    names = {**vars(meters), "METERS": {}}
    exec(shown("def embedding_gradient"), names)
    gradient = types.SimpleNamespace(embed=jnp.full((2, 8), 0.5))
    assert names["METERS"]["embedding_gradient"](None, gradient, None) == 2.0


def test_the_lora_of_the_guide(tmp_path, monkeypatch, capsys):
    """It starts as the model it is added to, trains itself alone, resumes without the weights, and is an ordinary Llama once merged."""
    import jax
    import numpy as np
    from omegaconf import OmegaConf

    from llama_eqx import build_model, load_config, load_pretrained, save_pretrained
    from llama_eqx.config import load
    from llama_eqx.interop.conversion import ConvertConfig, convert
    from llama_eqx.sharding import parameter_names
    from llama_eqx.tracking.jsonl import read_metrics
    from llama_eqx.training.loop import train

    monkeypatch.chdir(tmp_path)
    exec(shown("class LoraAttention"), names := {**vars(attention)})
    for name in re.findall(r"^class (\w+)", shown("class LoraAttention"), re.M):
        monkeypatch.setattr(attention, name, names[name], raising=False)
    slot = load(OmegaConf.to_container(OmegaConf.create(re.findall(r"```yaml\n(.*?)```", VARIANTS, re.S)[-1])))
    (lora,) = re.findall(r"lora='(.*?)'", VARIANTS)
    new = (f"init_new={lora}", f"train.only={lora}")
    sizes = {"vocab": 258, "layers": 2, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}

    def settings(run_dir, *overrides):
        return load_config(
            *(f"model.dims.{axis}={size}" for axis, size in sizes.items()),
            *("data=text", f"data.path={TEXT}", "tokenizer=bytes", "tracking.wandb.mode=disabled", f"run_dir={run_dir}"),
            *("train.batch_size=8", "train.seq_len=32", "train.log_every=1", "train.sample_tokens=0", "schedule=constant"),
            *("schedule.peak=0.03", "schedule.warmup_steps=1", "init_from=base", "mesh=cpu-8", *overrides),
        )

    def adapted(*overrides):
        config = settings("my-lora", *overrides)
        return dataclasses.replace(config, model=dataclasses.replace(config.model, attention=slot))

    model = build_model(settings("plain").model, key=jax.random.key(1))
    save_pretrained(model, "base", format="hf")
    train(settings("plain", "train.steps=1"))
    train(adapted(*new, "train.steps=3", "checkpoint.every=2"))
    assert "4 parameters that the weights lack start fresh" in capsys.readouterr().err
    losses = [read_metrics(tmp_path / run / "metrics.jsonl")[0]["train/loss"] for run in ("plain", "my-lora")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)

    (tmp_path / "base").rename("gone")
    train(adapted(*new, "train.steps=4"))
    assert "resumed from step 3 of 4" in capsys.readouterr().err
    given = dict(zip(parameter_names(model), jax.tree.leaves(model), strict=True))
    for run, moved in (("my-lora", False), ("plain", True)):
        trained = load_pretrained(run)
        for name, leaf in zip(parameter_names(trained), jax.tree.leaves(trained), strict=True):
            assert name not in given or bool(jax.numpy.array_equal(leaf, given[name])) is not moved, name

    exec(shown("LoraAttention.merged"), names := {})
    convert(ConvertConfig(from_="merged", to="merged-hf", format="hf", dtype=None, shards=None))
    assert (tmp_path / "merged-hf" / "tokenizer.json").is_file()
    tokens = jax.numpy.asarray(np.random.default_rng(0).integers(0, 258, (2, 20)), "int32")
    first, unmerged, merged = (each(tokens) for each in (model, names["model"], load_pretrained("merged-hf")))
    assert abs(unmerged - first).max() > 1e-2
    np.testing.assert_allclose(merged, unmerged, atol=1e-5)


def test_the_commands_are_there():
    assert "pip install -e . && python -m llama_eqx.train\n" in README
    assert "pip install -e '.[test]' && pytest\n" in README
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for text in (README, (ROOT / "docs/index.md").read_text(encoding="utf-8")):
        assert {extra for named in re.findall(r"\.\[(.*?)\]", text) for extra in named.split(",")} <= extras.keys()
        assert "`pip install -e '.[notebooks]' && jupyter lab notebooks`" in text
    assert any(package.startswith("jupyterlab>") for package in extras["notebooks"])


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
