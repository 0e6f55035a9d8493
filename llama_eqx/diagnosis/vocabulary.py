"""A model's vocabulary against the tokenizer beside it, and the ids that end a text."""

import pathlib
from typing import Any, NamedTuple

from llama_eqx.diagnosis.files import mistaken, read_json
from llama_eqx.diagnosis.report import Finding

# What ends a text, a message to a tool or a turn in Llama 3; an instruct model may end on any of them.
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
# The special tokens that follow the ranks in a tiktoken file of Llama 3, which does not list them.
TIKTOKEN_SPECIAL = 256
TIKTOKEN_ENDS = {"<|end_of_text|>": 1, "<|eom_id|>": 8, "<|eot_id|>": 9}


class Vocabulary(NamedTuple):
    """`size` is one more than the largest id; `ends` the ids of those of `ENDS` that are there."""

    file: str
    size: int
    ids: dict[str, int]


def read_vocabulary(folder: pathlib.Path, findings: list[Finding]) -> Vocabulary | None:
    """That of tokenizer.json or of tokenizer.model, SentencePiece's or tiktoken's; None if there is none that can be read."""
    if (tree := read_json(folder / "tokenizer.json", findings)) is not None:
        model = tree.get("model")
        listed = model.get("vocab") if isinstance(model, dict) else None
        pieces = listed if isinstance(listed, dict) else {str(row[0]): i for i, row in enumerate(listed or [])}
        added = [token for token in tree.get("added_tokens") or [] if isinstance(token, dict)]
        ids = {**pieces, **{str(token.get("content")): token.get("id") for token in added}}
        ids = {token: i for token, i in ids.items() if isinstance(i, int)}
        if not ids:
            findings.append(Finding("error", "tokenizer.json", "holds no vocabulary", "download it again"))
            return None
        return Vocabulary("tokenizer.json", 1 + max(ids.values()), ids)
    file = folder / "tokenizer.model"
    if not file.is_file() or mistaken(file):
        return None
    content = file.read_bytes()
    try:
        ranks = [int(line.split()[1]) for line in content.splitlines() if line]
        size = max(ranks) + 1
        return Vocabulary(file.name, size + TIKTOKEN_SPECIAL, {token: size + i for token, i in TIKTOKEN_ENDS.items()})
    except (IndexError, ValueError):
        pass
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor()
    try:
        pieces.LoadFromSerializedProto(content)
    except RuntimeError:
        findings.append(Finding("error", file.name, "neither a SentencePiece model nor a tiktoken file", "download it again"))
        return None
    return Vocabulary(file.name, pieces.vocab_size(), {pieces.id_to_piece(i): i for i in (pieces.bos_id(), pieces.eos_id()) if i >= 0})


def check_vocabulary(size: int, vocabulary: Vocabulary) -> list[Finding]:
    """Whether every id of the tokenizer has a row in the embedding, and how many rows have no id."""
    if vocabulary.size > size:
        what = f"has {vocabulary.size:,} ids, and the embedding {size:,} rows: the ids from {size:,} on have no embedding"
        return [Finding("error", vocabulary.file, what, "the tokenizer of this model, or a model whose embedding was enlarged")]
    if vocabulary.size < size:
        what = f"has {vocabulary.size:,} ids, and the embedding {size:,} rows: the last {size - vocabulary.size:,} are never read"
        return [Finding("note" if size - vocabulary.size < 1024 else "warning", vocabulary.file, what, "check that it is this model's")]
    return []


def check_ends(
    folder: pathlib.Path, config: dict[str, Any], size: int, vocabulary: Vocabulary | None, findings: list[Finding]
) -> list[Finding]:
    """EOS of `generation_config.json` and `config.json` against the tokenizer's tokens and its chat template."""
    generation = read_json(folder / "generation_config.json", findings)
    tokenizer = read_json(folder / "tokenizer_config.json", findings) or {}
    found = []
    for name, tree in {"config.json": config, "generation_config.json": generation or {}}.items():
        for key in ("bos_token_id", "eos_token_id"):
            if wrong := [i for i in _ids(tree.get(key)) if not 0 <= i < size]:
                found.append(Finding("error", name, f"{key} is {wrong[0]:,}, outside of the vocabulary of {size:,}", f"mend {key}"))
    where = "config.json" if not generation or generation.get("eos_token_id") is None else "generation_config.json"
    eos = _ids(config.get("eos_token_id") if where == "config.json" else (generation or {}).get("eos_token_id"))
    if vocabulary is None:
        return found
    chat = "chat_template" in tokenizer or (folder / "chat_template.jinja").is_file()
    ends = {token: vocabulary.ids[token] for token in ENDS if token in vocabulary.ids}
    said = tokenizer.get("eos_token")
    said = said.get("content") if isinstance(said, dict) else said
    if not eos:
        what = "eos_token_id is not set: generation ends at the limit of tokens alone"
        hint = f'"eos_token_id": {sorted(ends.values()) if chat and ends else vocabulary.ids.get(str(said), "ID")}'
        found.append(Finding("warning", where, what, hint))
    elif chat and "<|eot_id|>" in ends and (missing := [token for token, i in ends.items() if i not in eos]):
        what = f"a chat model (it has a chat template) whose eos_token_id {_said(eos)} lacks {', '.join(missing)}"
        if "<|eot_id|>" in missing:
            what += ": answers run past the end of the turn"
        found.append(Finding("warning", where, what, f'"eos_token_id": {sorted(ends.values())}'))
    elif said in vocabulary.ids and vocabulary.ids[said] not in eos:
        what = f"eos_token is {said} ({vocabulary.ids[said]}), and {where} says eos_token_id {_said(eos)}"
        found.append(Finding("warning", "tokenizer_config.json", what, "make them the same"))
    return found


def _ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _said(ids: list[int]) -> str:
    return str(ids[0]) if len(ids) == 1 else str(ids)
