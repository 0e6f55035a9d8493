"""What is wrong with a folder of token ids."""

import pathlib

import numpy as np
from tqdm import tqdm

from llama_eqx.data.shard import Shard
from llama_eqx.data.shards import HOLD_OUT, open_dataset
from llama_eqx.data.tokenizer import load_tokenizer
from llama_eqx.diagnosis.files import check_files
from llama_eqx.diagnosis.report import Finding, Report
from llama_eqx.errors import UserError

NUMBERS = 2**24  # ids that are read at once
REMEDY = "prepare the data again, or restore these files"


def examine_dataset(folder: pathlib.Path, read: bool) -> Report:
    """Checks the files and the tokenizer against `index.json` and, with `read`, every id against the vocabulary."""
    title = f"{folder}: a dataset of tokens"
    findings, facts = check_files(folder), []
    try:
        data = open_dataset(folder, remedy=REMEDY, verify=read)
    except UserError as error:
        lines = error.what.splitlines()
        wrong = [Finding("error", line.partition(": ")[0], line.partition(": ")[2], error.next) for line in lines[1:]]
        return Report(title, (), (*findings, *(wrong or [Finding("error", "index.json", lines[0], error.next)])))
    shards = [*data.train.shards, *data.val.shards]
    for split in (data.train, data.val):
        facts.append(f"{split.name}: {split.tokens:,} tokens in {split.documents:,} documents, {split.bytes:,} bytes of text")
        if not split.tokens:
            findings.append(Finding("warning", "index.json", f"the {split.name} split is empty", HOLD_OUT))
    try:
        tokenizer = load_tokenizer(folder / "tokenizer")
        open_dataset(folder, remedy=REMEDY, tokenizer=tokenizer, verify=False)
        facts.append(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab:,} ids, the one that the ids were made with")
    except UserError as error:
        findings.append(Finding("error", "tokenizer", error.what, "restore the tokenizer of this dataset"))
    if read:
        with tqdm(total=sum(shard.tokens for shard in shards), desc="reading", unit=" tokens", unit_scale=True, disable=None) as progress:
            for shard in shards:
                findings += _check_ids(shard, progress)
    return Report(title, tuple(facts), tuple(findings))


def _check_ids(shard: Shard, progress: tqdm) -> list[Finding]:
    ids, offsets, findings = shard.ids(), shard.offsets(), []
    if offsets[0] != 0 or offsets[-1] != shard.tokens or (np.diff(offsets) < 1).any():
        what = "offsets of documents do not rise from 0 to the number of ids"
        findings.append(Finding("error", shard.file("offsets").name, what, REMEDY))
    count, first = 0, None
    for start in range(0, shard.tokens, NUMBERS):
        wrong = np.flatnonzero(ids[start : start + NUMBERS] >= shard.vocab)
        first = start + int(wrong[0]) if first is None and len(wrong) else first
        count += len(wrong)
        progress.update(min(NUMBERS, shard.tokens - start))
    if first is not None:
        what = f"{count:,} ids are not in the vocabulary of {shard.vocab:,}; the first is {ids[first]:,} at token {first:,}"
        findings.append(Finding("error", shard.file("ids").name, what, REMEDY))
    return findings
