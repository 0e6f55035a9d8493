"""Tokenizers of Hugging Face folders."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llama_eqx.data.corpus import DataConfig
from llama_eqx.data.tokenizer.base import MARK, Tokenizer, TokenizerConfig, utf8
from llama_eqx.data.tokenizer.files import native_model, refuse_stand_in, settings_in
from llama_eqx.data.tokenizer.tiktoken import special_tokens, turn_ends
from llama_eqx.errors import ConfigError, DataError, hub_download

SAVED = {"bos": "bos", "eos": "stop", "pad": "pad"}  # `stop` begins with `eos`
LLAMA = {"<s>", "</s>", *special_tokens("llama3_1", 0)}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, read by the `tokenizers` library.

    That file does not say which ids begin and end a text; files beside it do. Special are the added tokens that it calls so, those that
    begin, end or fill texts, and those that Llama has. With `ordinary`, other added tokens are found in text, as `transformers` finds them.
    Without it none is, as in tokenizers that were saved before there was this choice; `decode` writes them all the same.

    Raises `DataError` when the file is damaged or an id is not in it.
    """

    kind, file = "hf", "tokenizer.json"
    foreign = False  # whether it lies beside a model that was not trained here

    def __init__(self, definition: bytes, *, ordinary: bool = False, **settings: Any):
        from tokenizers import Tokenizer as Library

        self.definition = definition
        try:
            self.library = Library.from_str(definition.decode())
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"a damaged tokenizer.json: {error}", next="download it again") from error
        self.added = {token.content: (i, token) for i, token in self.library.get_added_tokens_decoder().items()}
        self.ordinary = ordinary and not all(token.special for _, token in self.added.values())
        self.library.encode_special_tokens = True
        self.library.no_truncation()
        self.library.no_padding()
        self.vocab = 1 + max(self.library.get_vocab().values(), default=-1)
        unknown = getattr(self.library.model, "unk_token", None)
        self.unknown = None if unknown is None else self.library.token_to_id(unknown)
        self.mark(**settings)

    def mark(
        self,
        *,
        bos: int | None = None,
        eos: int | None = None,
        stop: Sequence[int] = (),
        pad: int | None = None,
        chat: str | None = None,
    ) -> None:
        """Sets the ids that begin and end a text. Raises `DataError` when one is not in the vocabulary."""
        if wrong := [i for i in (bos, eos, pad, *stop) if i is not None and not 0 <= i < self.vocab]:
            raise DataError(f"a special id is {wrong[0]}, but tokenizer.json has {self.vocab} ids", next="take all files from one model")
        self.bos, self.eos, self.pad = bos, eos, pad
        names = {name: i for name, (i, _) in self.added.items()}
        self.stop = tuple(dict.fromkeys([*([] if eos is None else [eos]), *stop, *turn_ends(names)]))
        self.chat = chat or _chat(names)
        roles = {bos, eos, pad, *self.stop}
        special = {name: i for name, (i, token) in self.added.items() if token.special or i in roles or name in LLAMA}
        self.special, self.unspoken = special if self.ordinary else names, frozenset(special.values())
        # In text the library leaves alone only tokens that it calls special.
        self.library.add_special_tokens([self.added[name][1] for name in self.special])

    @property
    def prefix(self) -> tuple[int, ...]:
        """BOS, as for documents in training. For a foreign model, what the file puts before a text, as `transformers` does."""
        if not self.foreign:
            return super().prefix
        found = self.library.encode("a", add_special_tokens=True)
        marked = itertools.takewhile(lambda pair: pair[1], zip(found.ids, found.special_tokens_mask, strict=True))
        return tuple(i for i, _ in marked)

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        for text in texts:
            utf8(text)
        return [np.array(row.ids, np.int32) for row in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self.library.decode(ids, skip_special_tokens=False)

    def _silent(self) -> frozenset[int]:
        return self.unspoken

    def _definition(self) -> bytes:
        return self.definition

    def _settings(self) -> dict[str, Any]:
        marks = {"bos": self.bos, "eos": self.eos, "stop": self.stop, "pad": self.pad, "chat": self.chat}
        return marks | ({"ordinary": True} if self.ordinary else {})


class HuggingFaceTokenizerConfig(TokenizerConfig):
    """The `tokenizer.json` in the folder `path`. Without `chat`, its special tokens decide the chat format."""

    path: str | None
    chat: Literal["llama2", "llama3", "llama3_1"] | None

    def check(self) -> None:
        if self.path is None:
            raise ConfigError("tokenizer=hf needs a folder", where="path", next="tokenizer.path=FOLDER with a tokenizer.json")

    def build(self, data: DataConfig) -> HuggingFaceTokenizer:
        assert self.path is not None
        return read_huggingface(Path(self.path).expanduser(), self.chat)


def read_huggingface(folder: Path, chat: str | None = None) -> HuggingFaceTokenizer:
    """Returns the tokenizer in a Hugging Face folder.

    Raises `DataError` naming the file that is missing or damaged.
    """
    file = folder / "tokenizer.json"
    try:
        content = file.read_bytes()
    except OSError as error:
        advice = "tokenizer.path=FOLDER with a tokenizer.json" + hub_download(str(folder)) * (not folder.exists())
        if folder.is_file():
            advice = f"tokenizer.path={folder.parent}"
        elif (folder / "tokenizer.model").is_file():
            advice = f"tokenizer=sentencepiece (Llama 1, 2) or tiktoken (Llama 3) with tokenizer.path={folder / 'tokenizer.model'}"
        raise DataError(f"cannot read: {error.strerror}", where=str(file), next=advice) from error
    refuse_stand_in(content, str(file))
    try:
        saved = settings_in(folder / MARK).get("settings")
        tokenizer = HuggingFaceTokenizer(content, ordinary=saved.get("ordinary", False) if isinstance(saved, dict) else True)
        tokenizer.mark(**special_ids(folder, {name: i for name, (i, _) in tokenizer.added.items()}), chat=chat)
    except DataError as error:
        raise DataError(error.what, where=error.where or str(file), next=error.next) from error
    return tokenizer


def special_ids(folder: Path, names: Mapping[str, int]) -> dict[str, Any]:
    """Returns `bos`, `eos`, `pad` and `stop` as the files of a folder say.

    What `Tokenizer.save` wrote comes first, then generation_config.json, config.json, tokenizer_config.json (in older folders, first
    special_tokens_map.json) and config.yaml; for `stop`, config.yaml comes before tokenizer_config.json. The first of several EOS ids ends
    documents; all of them end generation. `names` are the ids of special tokens. If no file says anything, `bos`, `eos` and `pad` are found
    by Llama's names.
    """
    generation, config, words = [settings_in(folder / name) for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
    if "added_tokens_decoder" not in words:  # an older folder, of which transformers reads this file too
        words |= settings_in(folder / "special_tokens_map.json")
    settings = settings_in(folder / MARK).get("settings")
    saved = {f"{which}_token_id": settings.get(of) for which, of in SAVED.items()} if isinstance(settings, dict) else {}
    tokens = native_model(folder).get("tokens")
    native = {f"{name}_token_id": i for name, i in tokens.items() if i != []} if isinstance(tokens, dict) else {}
    named = {}
    for which in ("bos", "eos", "pad"):
        token = words.get(f"{which}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in names:
            named[f"{which}_token_id"] = names[token]

    def said(which: str, *last: Mapping[str, Any]) -> list[int]:
        for tree in (saved, generation, config, *last):
            if (ids := tree.get(f"{which}_token_id")) is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not all(type(i) is int for i in ids):
                    raise DataError(f"{which}_token_id is {ids}, not an id", where=str(folder))
                return [i for i in ids if i != -1]  # -1 means none in older files
        return []

    bos = said("bos", named, native) or [names[name] for name in ("<|begin_of_text|>", "<s>") if name in names]
    eos = said("eos", named, native) or [names[name] for name in ("<|end_of_text|>", "</s>") if name in names]
    pad = said("pad", named, native) or [names[name] for name in ("<|finetune_right_pad_id|>",) if name in names]
    stop = said("eos", native, named) or eos
    bos, eos, pad = (next(iter(ids), None) for ids in (bos, eos, pad))
    return {"bos": bos, "eos": eos, "stop": tuple(stop), "pad": pad}


def _chat(special: Mapping[str, int]) -> str | None:
    for name, chat in {"<|python_tag|>": "llama3_1", "<|start_header_id|>": "llama3", "<s>": "llama2"}.items():
        if name in special:
            return chat
    return None
