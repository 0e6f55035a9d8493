"""Every published size, against the exact counts of Meta's and Hugging Face's own files."""

import pathlib

import equinox as eqx
import jax
import pytest

from llama_eqx import load_config

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


def test_no_preset_is_left_out():
    files = (pathlib.Path(__file__).parents[2] / "conf" / "model").glob("llama*_*.yaml")
    assert {path.stem for path in files} == {*PARAMETERS, "llama3_1m"}


@pytest.mark.parametrize("preset", PARAMETERS)
def test_parameters(preset):
    config = load_config(f"model={preset}").model
    model = eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == PARAMETERS[preset]


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
