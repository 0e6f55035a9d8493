import json

import pytest

from llama_eqx.compose import compose, conf_dir, resolve


@pytest.fixture(scope="session")
def presets():
    """Returns the config of every preset by name, except the one that takes its vocabulary from the tokenizer."""
    names = sorted(path.stem for path in (conf_dir() / "model").glob("llama*.yaml"))
    return {name: resolve(compose(f"model/{name}", []))["model"] for name in names if name != "llama3_1m"}


@pytest.fixture(scope="session")
def change_json():
    def change(file, **changes):
        """Changes keys of a JSON file. The value `...` removes a key."""
        tree = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
        file.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return change
