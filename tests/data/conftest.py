import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMA_EQX_CACHE", str(folder))
    return folder


@pytest.fixture
def write(tmp_path):
    """Writes files into a folder of text, and gives the folder."""

    def write(**files):
        for name, content in files.items():
            path = tmp_path / "text" / name.replace("__", "/").replace("_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / "text"

    return write


@pytest.fixture
def text():
    """The config of data=text."""
    from llama_eqx.data.corpus import TextConfig

    return lambda path, fraction=0.1, holdout="validation": TextConfig(
        prompt="", validation_fraction=fraction, holdout=holdout, path=None if path is None else str(path)
    )
