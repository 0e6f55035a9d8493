import pytest

from llama_eqx.config import Config, dump, load, nearest
from llama_eqx.dims import Dims
from llama_eqx.errors import ConfigError

DIMS = {"_target_": "llama_eqx.dims.Dims", "vocab": 64, "layers": 2, "embed": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "mlp": 12}


class Example(Config):
    rate: float
    betas: tuple[float, ...]
    name: str | None


def test_lists_become_tuples_and_ints_floats_where_declared():
    example = Example(rate=1, betas=[0.9, 1], name=None)
    assert (example.rate, example.betas) == (1.0, (0.9, 1))
    assert type(example.rate) is float
    assert hash(example) == hash(Example(rate=1.0, betas=(0.9, 1), name=None))


@pytest.mark.parametrize("wrong", [{"rate": "fast"}, {"rate": True}, {"rate": 10**400}, {"betas": ["a"]}, {"name": 3}])
def test_a_value_of_another_type_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Example(**({"rate": 1.0, "betas": (), "name": None} | wrong))


def test_dump_is_the_inverse_of_load():
    assert isinstance(load(DIMS), Dims)
    assert dump(load(DIMS)) == DIMS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mlpp": 3}, "did you mean mlp"),
        ({"mlp": "big"}, "mlp"),
        ({"layers": 2.0}, "layers"),
        ({"kv_heads": 3}, "kv_heads may be one of 1, 2, 4"),
        ({"head_dim": 3}, "odd"),
        ({"embed": 0}, "not a size"),
        ({"head_dim": 10**400}, "not a size"),
    ],
)
def test_load_names_the_place(change, said):
    with pytest.raises(ConfigError) as error:
        load({"model": {"dims": DIMS | change}})
    assert said in str(error.value)
    assert "model.dims" in error.value.where


def test_missing_keys_are_listed():
    with pytest.raises(ConfigError, match="missing: heads, mlp"):
        load({key: value for key, value in DIMS.items() if key not in ("heads", "mlp")})


def test_nearest_lists_all_when_none_is_near():
    assert nearest("mlpp", ["mlp", "embed"]) == "did you mean mlp?"
    assert nearest("zzz", ["mlp", "embed"]) == "one of: embed, mlp"
    assert nearest("off", ["offline", "disabled"]) == "one of: disabled, offline"
