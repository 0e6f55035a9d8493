import json

import pytest

from llama_eqx.doctor import published


@pytest.fixture(scope="session")
def presets():
    return published()


@pytest.fixture(scope="session")
def change_json():
    def change(file, **changes):
        """A key is taken away by `...`."""
        tree = {**(json.loads(file.read_text()) if file.exists() else {}), **changes}
        file.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))

    return change
