"""What the README shows runs as it stands."""

import pathlib
import re
import sys
import types

import pytest

from llama_eqx.model import feed_forward
from llama_eqx.model.init import FanInInitConfig

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_the_python_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(PYTHON[0], names)
    assert names["logits"].shape == (2, 16, 300)
    assert names["model"].embed.dtype == "bfloat16"


def test_the_variant_of_the_readme(tiny, monkeypatch):
    import jax

    module = types.ModuleType("readme_variant")
    vars(module).update(vars(feed_forward), __name__="readme_variant")
    monkeypatch.setitem(sys.modules, "readme_variant", module)
    exec(PYTHON[1], vars(module))
    config = module.LowRankGateConfig(rank=16)
    variant = config.build(tiny().dims, FanInInitConfig(gain=1.0), key=jax.random.key(0))
    assert variant.gate_out.shape == (16, 48)
    assert variant(jax.numpy.ones((2, 3, 32))).shape == (2, 3, 32)


def test_the_two_commands_are_there():
    assert "pip install -e . && python -m llama_eqx.train\n" in README
    assert "pip install -e '.[test]' && pytest\n" in README


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_links_lead_somewhere(link):
    assert (pathlib.Path(__file__).parents[1] / link).exists()
