import numpy as np
import pytest

from llama_eqx import load_config
from llama_eqx.data.dataset import open_data
from llama_eqx.data.prepare import prepare
from llama_eqx.data.rows import Joined
from llama_eqx.data.tokenizer import BytesTokenizer
from llama_eqx.errors import ConfigError, DataError

NAMES = {"code": "a", "prose": "b"}


@pytest.fixture
def mixture(write, tmp_path):
    """The config of a mixture of many documents of the letter a and fewer of b."""
    folder = write(**{f"{letter}__{i:02}_txt": letter * 100 for letter, count in (("a", 70), ("b", 60)) for i in range(count)})

    def mixture(*overrides):
        paths = [f"data.components.{name}.path={folder / letter}" for name, letter in NAMES.items()]
        return load_config("data=mixture", "data@data.components.code=text", *paths, *overrides).data

    return mixture


def opened(config, **settings):
    return open_data(config, BytesTokenizer(), **{"seq_len": 32, "seed": 0, **settings})


def test_rows_come_in_the_proportions_of_the_weights(mixture):
    data = opened(mixture("data.weights.code=0.7", "data.weights.prose=0.3"))
    assert data.names == ["code", "prose"]
    sources = [data.train.source(int(row)) for row in data.order(np.arange(1000))]
    for count in (10, 333, 1000):
        assert abs(sum(source == 1 for source in sources[:count]) - 0.3 * count) < 1
    letters = data.train.read(data.order(np.arange(100))).tokens
    for source, tokens in zip(sources, letters, strict=False):
        assert set(tokens.tolist()) <= {ord("ab"[source]), 256, 257}
    sizes = [len(rows) for rows in data.train.sources]
    assert data.epochs(1000) == {"data/epoch/code": 700 / sizes[0], "data/epoch/prose": 300 / sizes[1]}


def test_components_keep_their_own_rows_and_are_held_out_on_their_own(mixture):
    data = opened(mixture("data.components.prose.rows=packed", "data.components.prose.long_documents=cut"))
    assert [rows.segmented for rows in data.train.sources] == [False, True]
    assert isinstance(data.val, Joined)
    assert data.train.read(np.arange(4)).segment_ids.tolist() == [[1] * 32] * 4
    assert {chr(t) for t in data.val.read(np.arange(len(data.val))).tokens.ravel() if 0 < t < 256} == {"a", "b"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.weights.code=0", "data.weights.prose=1"], "the weight of code is 0"),
        (["data.weights.code=-0.5", "data.weights.prose=1.5"], "the weight of code is -0.5"),
        (["data.weights.code=0.33333", "data.weights.prose=0.66667"], "the weight of code is 0.33333, not a multiple of 0.0001"),
        (["+data.weights.poems=0.1"], "poems has a weight but is not a component"),
        (["~data.weights.code", "data.weights.prose=1"], "code has no weight"),
        (["data@data.components.code=mixture"], "a mixture cannot be part of a mixture"),
        (["data.components.code.position_offset=8"], "the rows of a mixture share one offset"),
        (["data.position_offset=-1"], "-1 is not at least 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(overrides, said):
    with pytest.raises(ConfigError, match=said):
        load_config("data=mixture", *overrides)


def test_a_component_with_another_tokenizer_is_to_be_prepared_again(mixture, tmp_path):
    options = [f"input={tmp_path}", f"output={tmp_path / 'out'}", "tokenizer=chars", "validation_fraction=0", "prepare.workers=1"]
    prepare(load_config(*options, name="prepare"))
    prose = ["data@data.components.prose=prepared", f"data.components.prose.path={tmp_path / 'out'}"]
    with pytest.raises(DataError, match="the component prose: this data was prepared with the tokenizer") as error:
        opened(mixture(*prose))
    assert error.value.next.startswith("python -m llama_eqx.prepare again, with the tokenizer of the other data")


def test_a_component_is_added_and_taken_away_on_the_command_line():
    data = load_config(
        *("data=mixture", "~data@data.components.code", "~data.weights.code", "data.weights.prose=0.9"),
        *("+data@data.components.poems=shakespeare", "+data.weights.poems=0.1"),
    ).data
    assert {name: weight for name, (weight, _) in data.sources().items()} == {"prose": 0.9, "poems": 0.1}


def test_a_tokenizer_can_be_trained_on_all_components(mixture):
    data = mixture()
    assert {document.name.split("/")[0] for document in data.documents()} == {"code", "prose"}
    assert {document.name[0] for split, document in data.parts() if split == "val"} == {"c", "p"}
    assert data.identity() == mixture().identity() != mixture("data.components.prose.validation_fraction=0.2").identity()
