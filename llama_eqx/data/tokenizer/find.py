"""Finds the tokenizer beside a model."""

import json
import shlex
from pathlib import Path

from llama_eqx.data.tokenizer.base import MARK, Tokenizer, fingerprint
from llama_eqx.data.tokenizer.files import is_tiktoken, native_model, read, settings_in
from llama_eqx.data.tokenizer.huggingface import HuggingFaceTokenizer, read_huggingface, special_ids
from llama_eqx.data.tokenizer.plain import BytesTokenizer, CharsTokenizer
from llama_eqx.data.tokenizer.sentencepiece import SentencePieceTokenizer
from llama_eqx.data.tokenizer.tiktoken import TiktokenTokenizer
from llama_eqx.errors import DataError
from llama_eqx.files import reading

KINDS = (SentencePieceTokenizer, TiktokenTokenizer, HuggingFaceTokenizer, BytesTokenizer, CharsTokenizer)

ANEW = "bring back a copy of this folder; for that of a run, the command that trains it writes it anew"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer that `Tokenizer.save` wrote.

    Raises `DataError` when it is missing or has changed.
    """
    with reading(folder, DataError, "no tokenizer here", next=ANEW):
        said = json.loads((folder / MARK).read_bytes())
        kind = {kind.kind: kind for kind in KINDS}[said["kind"]]
        definition, settings = (folder / kind.file).read_bytes(), said.get("settings", {})
        if fingerprint(kind.kind, definition, settings) == said["fingerprint"]:
            return kind(definition, **settings)
    raise DataError(f"not the file that was saved here: its sha256 differs from that in {MARK}", where=str(folder / kind.file), next=ANEW)


def find_tokenizer(folder: str | Path) -> Tokenizer:
    """Returns the tokenizer of the model in `folder`: a run directory, a `checkpoints/<step>` of one, or a folder of Hugging Face or Meta.

    Raises `DataError` when there is none, or it is damaged.
    """
    folder = Path(folder).expanduser()
    if folder.parent.name == "checkpoints" and folder.name.isdecimal():
        folder = folder.parents[1]
    if (folder / "tokenizer" / MARK).is_file():
        return load_tokenizer(folder / "tokenizer")
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_huggingface(folder)
        tokenizer.foreign = True
        return tokenizer
    # Meta's own downloads keep one file beside the folders of all sizes of a generation.
    beside = [folder.parent] if (folder / "params.json").is_file() else []
    file = next((place / "tokenizer.model" for place in (folder, *beside) if (place / "tokenizer.model").is_file()), None)
    if file is None:
        raise DataError(
            "no tokenizer beside this model: neither tokenizer/, tokenizer.json nor tokenizer.model",
            where=str(folder),
            next="copy the tokenizer's files into that folder",
        )
    content = read(str(file), "a tokenizer", "sentencepiece")
    try:
        if is_tiktoken(content):
            tokenizer = TiktokenTokenizer(content, chat=_generation(folder))
        else:
            tokenizer = SentencePieceTokenizer(content)
    except DataError as error:
        raise DataError(error.what, where=str(file), next="download it again") from error
    tokenizer.stop = tuple(dict.fromkeys((*tokenizer.stop, *special_ids(folder, tokenizer.special)["stop"])))
    return tokenizer


def options(tokenizer: Tokenizer, folder: str | Path) -> str:
    """What to type for the `tokenizer` that `find_tokenizer` found in `folder`."""
    if isinstance(tokenizer, BytesTokenizer | CharsTokenizer):
        return f"tokenizer={tokenizer.kind}"
    folder = Path(folder).expanduser()
    file = next(file for place in (folder / "tokenizer", folder, folder.parent) if (file := place / tokenizer.file).is_file())
    path, chat = (file, f" tokenizer.chat={tokenizer.chat}") if tokenizer.kind != "hf" else (file.parent, "")
    return f"tokenizer={tokenizer.kind} tokenizer.path={shlex.quote(str(path))}{chat if tokenizer.kind == 'tiktoken' else ''}"


def _generation(folder: Path) -> str:
    """The chat format. Llama 3 and later have the same file of ranks, but only later models scale their rotary frequencies."""
    params, config, model = settings_in(folder / "params.json"), settings_in(folder / "config.json"), native_model(folder)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if params:
        scaled = params.get("use_scaled_rope")
    elif config:
        scaled = isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "llama3"
    else:
        scaled = not model or str(model.get("rotary")).count("Llama3RotaryConfig")
    return "llama3_1" if scaled else "llama3"
