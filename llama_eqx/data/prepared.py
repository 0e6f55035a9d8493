"""Prepared data, which comes with its tokenizer."""

from collections.abc import Iterator
from pathlib import Path

from llama_eqx.data.corpus import DataConfig, Document, Part, SourceConfig
from llama_eqx.data.shards import OWN
from llama_eqx.data.tokenizer import Tokenizer, TokenizerConfig, load_tokenizer
from llama_eqx.errors import ConfigError, DataError


class PreparedConfig(SourceConfig):
    """A prepared dataset: a folder. `verify` is as in `open_dataset`."""

    path: str | None
    verify: bool | None

    @property
    def folder(self) -> Path:
        if not self.path:
            raise ConfigError("data=prepared needs data.path=FOLDER", where="data.path", next="python -m llama_eqx.prepare makes one")
        return Path(self.path).expanduser()

    def documents(self) -> Iterator[Document]:
        raise self._no_text()

    def parts(self) -> Iterator[Part]:
        raise self._no_text()

    def identity(self) -> str:
        raise self._no_text()

    def _no_text(self) -> ConfigError:
        return ConfigError("data=prepared has only tokens, and no text to train a tokenizer on", where="tokenizer", next=OWN)


class PreparedTokenizerConfig(TokenizerConfig):
    """The tokenizer that the data was prepared with."""

    def build(self, data: DataConfig) -> Tokenizer:
        folder = next((source.folder for _, source in data.sources().values() if isinstance(source, PreparedConfig)), None)
        if folder is None:
            theirs = "with prepared eval_data, that in its folder: tokenizer=sentencepiece tokenizer.path=FOLDER/tokenizer/tokenizer.model"
            advice = f"tokenizer=sentencepiece, or data=prepared; {theirs}"
            raise ConfigError("only data=prepared comes with a tokenizer", where="tokenizer", next=advice)
        if not (folder / "index.json").is_file():
            raise DataError("no prepared data here", where=str(folder), next="data.path=FOLDER, as python -m llama_eqx.prepare wrote it")
        return load_tokenizer(folder / "tokenizer")
