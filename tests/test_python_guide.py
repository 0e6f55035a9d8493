"""What the guide to Python shows runs as it stands, and gives the numbers of other implementations."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
import torch
import transformers

from llama_eqx import build_model, find_tokenizer, generate_tokens, load_config, load_pretrained, save_pretrained
from llama_eqx.errors import CheckpointError
from llama_eqx.generation.layout import for_decoding
from llama_eqx.generation.speculative import generate_speculatively
from llama_eqx.interop.conversion import ConvertConfig, convert
from llama_eqx.sharding import Layout
from llama_eqx.tracking.jsonl import read_metrics
from llama_eqx.training.loop import train
from llama_eqx.training.loss import policy_view

GUIDE = (pathlib.Path(__file__).parents[1] / "docs/python.md").read_text(encoding="utf-8")
LOOP, SAVED, AVERAGED, OWN, INSIDE, HOOK = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
SMALL = {"layers": 2, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}


def test_the_loop(tmp_path, monkeypatch):
    """It has the losses of a run, resumes as a run does, and its model is exported with its tokenizer."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "text.txt").write_text("To be, or not to be, that is the question.\n" * 400)
    small = [f"model.dims.{axis}={size}" for axis, size in SMALL.items()]
    small += ["train.steps=4", "train.seq_len=32", "schedule.warmup_steps=1"]
    loop = LOOP.replace('"train.steps=200"', ", ".join(map(repr, small)))
    exec(loop.replace("range(done, config.train.steps)", "range(done, 2)").replace("save(config.train.steps", "save(2"), first := {})
    exec(loop, names := {})
    assert (first["done"], names["done"]) == (0, 2)

    silent = ["tracking.wandb.mode=disabled", "train.log_every=1", "train.sample_tokens=0", "train.eval_every=4", "run_dir=run"]
    silent += ["checkpoint.every=1", "checkpoint.keep=3"]
    train(load_config("data=text", "data.path=notes", "tokenizer=bytes", *small, *silent))
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    wanted = [record["train/loss"] for record in records if "train/loss" in record]
    assert [float(loss) for loss in first["losses"] + names["losses"]] == wanted
    held_out = names["evaluate"](
        names["state"].model,
        names["validation_batches"](names["rows"], names["setup"].batch_sharding, batch_size=names["size"]),
        names["rows"],
    )
    assert held_out.metrics([""])["val/bits_per_byte"] == records[-1]["val/bits_per_byte"]

    exec(AVERAGED.replace("RUN_DIR", "run").replace("160, 180, 200", "2, 3, 4"), {})
    found, *parts = (jax.tree.leaves(load_pretrained(path)) for path in ("averaged", *(f"run/checkpoints/{n}" for n in (2, 3, 4))))
    for mean, *each in zip(found, *parts, strict=True):
        np.testing.assert_allclose(mean, np.mean(each, axis=0), rtol=1e-6, atol=1e-8)
    assert find_tokenizer("averaged").fingerprint == find_tokenizer("run").fingerprint

    exec(SAVED, names)
    convert(ConvertConfig(from_="mine", to="mine-hf", format="hf", dtype=None, shards=None))
    theirs = transformers.AutoModelForCausalLM.from_pretrained("mine-hf").eval()
    words = "To be, or"
    ids = transformers.AutoTokenizer.from_pretrained("mine-hf")(words, add_special_tokens=False)["input_ids"]
    assert ids == find_tokenizer("mine").encode(words)
    assert json.loads(pathlib.Path("mine-hf/config.json").read_text())["eos_token_id"] == find_tokenizer("mine").eos
    with torch.no_grad():
        logits = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(load_pretrained("mine")(jax.numpy.asarray([ids])), logits, atol=1e-5)


def test_the_step(tmp_path):
    """Against a loop over optax alone. Special ids are exported, and ids outside the vocabulary do what the guide says."""
    sizes = [f"model.dims.{axis}={size}" for axis, size in SMALL.items()]
    exec(OWN.replace('"model.dims.layers=2"', ", ".join(map(repr, sizes))), names := {})
    batch, tokenizer = names["batch"], names["tokenizer"]

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(jax.numpy.asarray(batch.tokens)), batch.targets).mean()

    model = build_model(names["config"].model, key=jax.random.key(0))
    optimizer = optax.adam(1e-3)
    moments, gradients = optimizer.init(model), jax.jit(jax.value_and_grad(loss))
    for _ in range(3):
        wanted, gradient = gradients(model)
        update, moments = optimizer.update(gradient, moments)
        model = optax.apply_updates(model, update)
    assert float(names["metrics"]["train/loss"]) == pytest.approx(float(wanted), rel=1e-5)

    save_pretrained(names["state"].model, tmp_path / "with", format="hf")
    save_pretrained(build_model(load_config("model.dims.vocab=64", *sizes).model, key=jax.random.key(0)), tmp_path / "without", format="hf")
    found = [json.loads((tmp_path / name / "config.json").read_text())["eos_token_id"] for name in ("with", "without")]
    assert found == [tokenizer.eos, None]
    assert not list((tmp_path / "with").glob("*tokenizer*"))

    loss_of_run = names["config"].loss.build(names["view"], names["layout"])

    def measured(loss, ignored, weight):
        targets, mask = batch.targets.copy(), np.ones(batch.targets.shape, "float32")
        targets[:, 5:], mask[:, 5:] = ignored, weight
        arrays = map(jax.numpy.asarray, (batch.tokens, targets, mask))
        objective, sums = loss(names["state"].model, names["Batch"](*arrays), None)
        return float(objective / sums.weight)

    masked = measured(names["loss"], 0, 0.0)
    assert measured(loss_of_run, 0, 0.0) == pytest.approx(masked, rel=1e-5)
    assert measured(loss_of_run, -100, 0.0) == pytest.approx(masked, rel=1e-5)
    assert np.isnan(measured(loss_of_run, -100, 1.0))
    assert np.isnan(measured(names["loss"], names["config"].model.dims.vocab, 0.0))


def test_the_patch(tmp_path, monkeypatch):
    """Against a forward hook on the same weights in transformers."""
    monkeypatch.chdir(tmp_path)
    sizes = [f"model.dims.{axis}={size}" for axis, size in {**SMALL, "layers": 3}.items()]
    config = load_config("model.dims.vocab=64", "model.tied=false", *sizes)
    save_pretrained(build_model(config.model, key=jax.random.key(0)), "folder", format="hf")
    exec(INSIDE, names := {})
    theirs = transformers.AutoModelForCausalLM.from_pretrained("folder").eval()
    source, target = (torch.tensor(np.asarray(names[name])) for name in ("source", "target"))
    with torch.no_grad():
        states = theirs(source, output_hidden_states=True).hidden_states
        plain = theirs(target).logits.numpy()

        def hook(module, given, out):
            out[:, 2:3] = states[2][:, 2:3][:, : out.shape[1] - 2]  # the first of these is the embedding
            return out

        theirs.model.layers[1].register_forward_hook(hook)
        wanted = theirs(target, output_hidden_states=True)
        prompts = [target[0].tolist(), [3], [*range(10, 30)], [4, 5]]  # of different lengths; two have no token 2 until it is drawn
        greedy = {"max_new_tokens": 8, "do_sample": False, "use_cache": False, "eos_token_id": None, "pad_token_id": 0}
        continued = [theirs.generate(torch.tensor([prompt]), **greedy)[0, len(prompt) :].tolist() for prompt in prompts]
    np.testing.assert_allclose(names["logits"], wanted.logits.numpy(), atol=1e-5)
    assert abs(plain - wanted.logits.numpy())[:, 2:].max() > 0.05
    np.testing.assert_allclose(names["seen"]["residual"][2], wanted.hidden_states[2].numpy(), atol=1e-5)
    assert names["seen"]["attention_weights"].shape == (3, 1, 4, 4, 4)
    patched, laid_out = names["patched"], for_decoding(names["patched"])
    layout = Layout(config.mesh.build(), config.sharding)  # of eight devices
    view, placed = policy_view(config.precision, config.remat, layout), jax.device_put(patched, layout.shardings(patched))
    under = jax.jit(lambda model, tokens: view(model)(tokens))(placed, target.numpy().repeat(8, axis=0))
    np.testing.assert_allclose(under, names["logits"].repeat(8, axis=0), atol=1e-5)
    assert names["new"].tokens == continued[:1] != generate_tokens(names["model"], target.numpy(), 8).tokens
    assert generate_tokens(patched, prompts, 8, prefill_chunk=4).tokens == generate_tokens(laid_out, prompts, 8).tokens == continued
    assert generate_speculatively(laid_out, names["model"], prompts, 8).generation.tokens == continued
    with pytest.raises(CheckpointError, match="no longer that of its config"):
        save_pretrained(names["patched"], "other", format="hf")


def test_the_hook(tmp_path):
    """In a process of its own: these tests have the hook already."""
    wrong = "import jax\nconfig = load_config('model.dims.vocab=64')\nbuild_model(config.model, key=jax.random.key(0))(jax.numpy.arange(5))"
    done = subprocess.run([sys.executable, "-c", f"{HOOK}\n{wrong}"], capture_output=True, text=True, timeout=300)
    assert "typechecking parameter 'tokens'" in done.stderr
    assert "Actual value: i32[5]" in done.stderr
    assert "'batch seq'" in done.stderr
