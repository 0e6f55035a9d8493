"""Every published size: the exact counts of Meta's and Hugging Face's own files, and a table of its parameters that is kept.

python -m tests.model.test_presets   writes the tables anew
"""

import math
import pathlib

import equinox as eqx
import jax
import jaxtyping
import pytest
import yaml
from jax.sharding import AxisType

from llama_eqx import build_model, load_config
from llama_eqx.errors import ConfigError
from llama_eqx.sharding import MESH_AXES, Layout, axis_names, parameter_names

ROOT = pathlib.Path(__file__).parents[2]
TABLES = ROOT / "tests" / "golden" / "presets"
PARAMETERS = {
    "llama1_7b": 6_738_415_616,
    "llama1_13b": 13_015_864_320,
    "llama1_33b": 32_528_943_616,
    "llama1_65b": 65_285_660_672,
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_34b": 33_743_970_304,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_3_70b": 70_553_706_496,
}
# Peak learning rate, tokens a batch, tokens a sequence.
RECIPES = {
    "llama1_7b": (3e-4, 2**22, 2048),
    "llama1_13b": (3e-4, 2**22, 2048),
    "llama1_33b": (1.5e-4, 2**22, 2048),
    "llama1_65b": (1.5e-4, 2**22, 2048),
    "llama2_7b": (3e-4, 2**22, 4096),
    "llama2_13b": (3e-4, 2**22, 4096),
    "llama2_34b": (1.5e-4, 2**22, 4096),
    "llama2_70b": (1.5e-4, 2**22, 4096),
    "llama3_8b": (3e-4, 2**22, 8192),
    "llama3_70b": (1.5e-4, 2**22, 8192),
    "llama3_1_8b": (3e-4, 2**22, 8192),
    "llama3_1_70b": (1.5e-4, 2**22, 8192),
    "llama3_1_405b": (8e-5, 2**24, 8192),
    "llama3_2_1b": (3e-4, 2**22, 8192),
    "llama3_2_3b": (3e-4, 2**22, 8192),
    "llama3_3_70b": (1.5e-4, 2**22, 8192),
}
BASE, INSTRUCT = (128001,), (128001, 128008, 128009)
TOKENS = {
    "llama1": ("sentencepiece", 1, (2,), None),
    "llama2": ("sentencepiece", 1, (2,), None),
    "llama3": ("tiktoken", 128000, BASE, None),
    "llama3_1": ("tiktoken", 128000, BASE, 128004),
    "llama3_2": ("tiktoken", 128000, BASE, 128004),
    "llama3_3": ("tiktoken", 128000, INSTRUCT, 128004),
}


def table(preset: str) -> str:
    """Path, shape, axes, and specs under sharding=fsdp_tensor on a mesh of 4 x 2, of every parameter."""
    config = load_config(f"model={preset}").model
    model = eqx.filter_eval_shape(lambda key: config.build(key=key), jax.eval_shape(lambda: jax.random.key(0)))
    mesh = jax.make_mesh((1, 4, 1, 2), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
    layout = Layout(mesh, load_config("sharding=fsdp_tensor").sharding)
    rows = [("parameter", "shape", "axes", "fsdp=4 tensor=2")]
    leaves = jax.tree.leaves(model)
    for name, axes, leaf in zip(parameter_names(model), axis_names(model), leaves, strict=True):
        parts = [(part,) if isinstance(part, str) else part or ("-",) for part in layout.spec(axes, leaf.shape)]
        spec = ", ".join("+".join(part) for part in parts)
        rows.append((name, " x ".join(map(str, leaf.shape)), " ".join(axes), spec))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"{sum(math.prod(leaf.shape) for leaf in leaves):,} parameters", ""])


def test_no_preset_is_left_out():
    files = (ROOT / "conf" / "model").glob("llama*_*.yaml")
    assert {path.stem for path in files} == {*PARAMETERS, "llama3_1m"}
    assert {path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml")} - {"finetune"} == set(PARAMETERS) == set(RECIPES)
    assert {path.stem for path in TABLES.iterdir()} == set(PARAMETERS)


@pytest.mark.parametrize("preset", PARAMETERS)
def test_the_table_is_the_one_that_was_kept(preset):
    kept = (TABLES / f"{preset}.txt").read_text()
    assert table(preset) == kept
    assert f"\n{PARAMETERS[preset]:,} parameters\n" in kept


@pytest.mark.parametrize("preset", PARAMETERS)
def test_recipe_and_special_ids(preset):
    config = load_config(f"model={preset}")
    peak, tokens, length = RECIPES[preset]
    assert (config.schedule.peak, config.schedule.warmup_steps, config.schedule.final_fraction) == (peak, 2000, 0.1)
    adamw = config.optimizer
    assert (adamw.b1, adamw.b2, adamw.weight_decay, adamw.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (config.train.batch_size * config.train.seq_len, config.train.seq_len) == (tokens, length)
    ids = config.model.tokens
    assert (ids.tokenizer, ids.bos, ids.eos, ids.pad) == TOKENS[preset.rpartition("_")[0]]
    assert max(ids.bos, *ids.eos, ids.pad or 0) < config.model.dims.vocab


@pytest.mark.parametrize("preset", PARAMETERS)
def test_any_size_is_fine_tuned_by_the_recipe_for_that(preset):
    config = load_config(f"model={preset}", "recipe=finetune", "train.batch_size=16")
    assert (config.schedule.peak, config.train.batch_size, config.train.seq_len) == (2e-5, 16, 2048)
    assert config.schedule.warmup_steps < config.train.steps / 10


def test_the_command_line_has_the_last_word():
    config = load_config("model=llama3_2_1b", "train.steps=7", "train.batch_size=1", "train.seq_len=64", "schedule=constant")
    assert (config.train.steps, config.train.batch_size, config.train.seq_len) == (7, 1, 64)
    assert type(config.schedule).__name__ == "ConstantConfig"
    assert load_config("model=llama3_1m").train.steps == load_config().train.steps  # no recipe of its own


def test_a_recipe_sets_what_every_variant_has():
    """So that it goes with another optimizer or schedule."""
    for file in (ROOT / "conf" / "recipe").glob("*.yaml"):
        tree = yaml.safe_load(file.read_text())
        assert set(tree) == {"schedule", "train"}
        assert set(tree["schedule"]) == {"peak", "warmup_steps"}


def test_the_size_that_was_never_released_says_so():
    for folder in ("model", "recipe"):
        assert "never released" in (ROOT / "conf" / folder / "llama2_34b.yaml").read_text().lower()


def test_the_config_of_a_run_is_no_model(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which checks types in tests only
    with pytest.raises(ConfigError, match="this is the config of a run") as error:
        build_model(load_config("model=llama3_1m"), key=jax.random.key(0))
    assert error.value.next.startswith("build_model(config.model")


@pytest.mark.parametrize(
    ("preset", "eps", "theta", "factor"),
    [
        ("llama1_33b", 1e-6, 1e4, None),
        ("llama1_65b", 1e-5, 1e4, None),
        ("llama2_34b", 1e-5, 1e4, None),
        ("llama3_8b", 1e-5, 5e5, None),
        ("llama3_1_405b", 1e-5, 5e5, 8),
        ("llama3_2_3b", 1e-5, 5e5, 32),
    ],
)
def test_what_differs_between_generations(preset, eps, theta, factor):
    config = load_config(f"model={preset}").model
    assert (config.norm.eps, config.rotary.theta, getattr(config.rotary, "factor", None)) == (eps, theta, factor)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    for name in PARAMETERS:
        (TABLES / f"{name}.txt").write_text(table(name))
