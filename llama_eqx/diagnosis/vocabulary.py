"""A model's vocabulary against the tokenizer beside it, and the ids that end a text."""

import pathlib
from collections.abc import Mapping
from typing import Any

from llama_eqx.data.tokenizer import Tokenizer, find_tokenizer
from llama_eqx.diagnosis.files import check_files, read_json
from llama_eqx.diagnosis.report import Finding, finding_of
from llama_eqx.errors import DataError
from llama_eqx.model.llama import LlamaConfig

TOKENIZERS = ("tokenizer", "tokenizer.json", "tokenizer.model")
# What ends a text, a message to a tool or a turn in Llama 3; an instruct model may end on any of them.
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")
PADDING = 1024  # fewer rows without an id than this are taken for padding of the table


def check_vocabulary(folder: pathlib.Path, config: LlamaConfig, facts: list[str]) -> tuple[Tokenizer | None, list[Finding]]:
    """The tokenizer beside a model, and findings: whether each of its ids has a row in the embedding, and how many rows have no id."""
    name = next((name for name in TOKENIZERS if (folder / name).exists()), None)
    try:
        tokenizer = find_tokenizer(folder)
    except DataError as error:
        if name is None:
            facts.append("no tokenizer beside the weights")
        if name is None or name in {finding.where for finding in check_files(folder)}:
            return None, []
        return None, [finding_of(error, folder, name)]
    rows, ids, name = config.dims.vocab or 0, tokenizer.vocab, name or "tokenizer.model"
    facts.append(f"tokenizer: {tokenizer.kind}, {ids:,} ids")
    if ids > rows:
        what = f"has {ids:,} ids, and the embedding {rows:,} rows: the ids from {rows:,} on have no embedding"
        return tokenizer, [Finding("error", name, what, "the tokenizer of this model, or a model whose embedding was enlarged")]
    if ids < rows:
        what = f"has {ids:,} ids, and the embedding {rows:,} rows: the last {rows - ids:,} are never read"
        return tokenizer, [Finding("note" if rows - ids < PADDING else "warning", name, what, "check that it is this model's")]
    return tokenizer, []


def check_ends(folder: pathlib.Path, config: Mapping[str, Any], size: int, tokenizer: Tokenizer | None, findings: list[Finding]) -> None:
    """Checks EOS of `generation_config.json`, else `config.json`, against the tokenizer's tokens and chat template; adds to `findings`."""
    generation = read_json(folder, "generation_config.json", findings) or {}
    settings = read_json(folder, "tokenizer_config.json", findings) or {}
    for name, tree in {"config.json": config, "generation_config.json": generation}.items():
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if wrong := [i for i in _ids(tree.get(key)) if not -1 <= i < size]:
                findings.append(Finding("error", name, f"{key} is {wrong[0]:,}, outside of the vocabulary of {size:,}", f"mend {key}"))
    where, tree = ("config.json", config) if generation.get("eos_token_id") is None else ("generation_config.json", generation)
    eos = _ids(tree.get("eos_token_id"))
    if tokenizer is None:
        return
    chat = "chat_template" in settings or (folder / "chat_template.jinja").is_file()
    ends = {token: tokenizer.special[token] for token in ENDS if token in tokenizer.special}
    said = settings.get("eos_token")
    said = said.get("content") if isinstance(said, dict) else said
    if not eos:
        wanted = sorted(ends.values()) if chat and ends else tokenizer.special.get(str(said), "ID")
        what = "eos_token_id is not set: generation ends only at the limit of tokens"
        findings.append(Finding("warning", where, what, f'"eos_token_id": {wanted}'))
    elif chat and "<|eot_id|>" in ends and (missing := [token for token, i in ends.items() if i not in eos]):
        what = f"a chat model (it has a chat template) whose eos_token_id {_said(eos)} lacks {', '.join(missing)}"
        if "<|eot_id|>" in missing:
            what += ": answers run past the end of the turn"
        findings.append(Finding("warning", where, what, f'"eos_token_id": {sorted(ends.values())}'))
    elif str(said) in tokenizer.special and tokenizer.special[str(said)] not in eos:
        what = f"eos_token is {said} ({tokenizer.special[str(said)]}), and {where} says eos_token_id {_said(eos)}"
        findings.append(Finding("warning", "tokenizer_config.json", what, "make them the same"))


def _ids(value: Any) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]


def _said(ids: list[int]) -> str:
    return str(ids[0]) if len(ids) == 1 else str(ids)
