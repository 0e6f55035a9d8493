"""From encoded units to token shards."""

import collections
import contextlib
import itertools
import os
import shlex
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llama_eqx.data.shard import token_dtype
from llama_eqx.data.shards import SPLITS, ShardWriter
from llama_eqx.data.sources import LINES, kind_of
from llama_eqx.data.units import NAMED, Task, Unit, held_out
from llama_eqx.errors import DataError
from llama_eqx.files import whole, write_json

BLOCK = 2**23  # ids moved at once


@dataclass(frozen=True)
class Group:
    """Consecutive units whose documents form the shards with this number.

    A unit is its number, the index of its first document among all, and for some sources the number of records that come before the unit.
    """

    number: int
    units: tuple[tuple[int, int, dict[int, int]], ...]


def plan(task: Task, units: list[Unit], dedup: bool, shard_tokens: int) -> tuple[list[Group], dict[str, Any]]:
    """Returns the groups of units that form the shards, and a summary of what is left out.

    Raises `DataError` when the train split is empty, or the validation split although a fraction is held out.
    """
    kept = None
    if dedup:
        kept = _first_of_each(_hashes(task, units))
        with whole(task.folder / "kept.npy") as file:
            np.save(file, kept)

    groups, members, before, tokens = [], [], collections.Counter(), 0
    first, empty, refused, named, documents_of = 0, 0, 0, [], dict.fromkeys(SPLITS, 0)
    for unit in units:
        documents, (counted, blank, wrong, some) = task.documents(unit.number), task.summary(unit.number)
        apart = held_out(documents["hash"], task.validation_fraction)
        stays = np.ones(len(documents), bool) if kept is None else kept[first : first + len(documents)]
        documents_of["val"] += int((stays & apart).sum())
        documents_of["train"] += int((stays & ~apart).sum())
        cut = {piece.number: before[piece.number] for piece in unit.pieces if before[piece.number]}
        members.append((unit.number, first, cut))
        first += len(documents)
        empty += blank
        refused += wrong
        for number, record, problem in some[: NAMED - len(named)]:
            name = next(piece.source.name for piece in unit.pieces if piece.number == number)
            named.append(f"{name}:{record + before[number]}: {problem}" if record else f"{name}: {problem}")
        for piece, (number, lines) in zip(unit.pieces, counted, strict=True):
            before[number] += lines if kind_of(piece.source) == LINES else 0  # other sources are not cut, or their pieces know it
        tokens += int(documents["tokens"][stays & ~apart].sum())
        if tokens >= shard_tokens or unit is units[-1]:
            groups.append(Group(len(groups), tuple(members)))
            members, tokens = [], 0
    if not documents_of["train"] or not (documents_of["val"] or not task.validation_fraction):
        split = "val" if documents_of["train"] else "train"
        raise DataError(
            f"the {split} split is empty: {sum(documents_of.values())} documents with text, {empty} empty and {refused} refused",
            where="validation_fraction",
            kept="what is encoded, for the same tokenizer",
            next=_another_fraction(task, units),
        )
    duplicates = 0 if kept is None else len(kept) - int(kept.sum())
    return groups, {"duplicates": duplicates, "empty": empty, "refused": refused, "named": named}


def _another_fraction(task: Task, units: list[Unit]) -> str:
    """Advice for an empty split: the smallest round fraction that leaves neither split empty; without one, how to train all the same."""
    hashes = _hashes(task, units)
    for fraction in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9):
        if 0 < held_out(hashes, fraction).sum() < len(hashes):
            return f"validation_fraction={fraction} (0 holds nothing out), or more text"
    if not len(hashes):
        return "more text"
    path = shlex.quote(next(piece.source.path for unit in units for piece in unit.pieces))
    text = f"python -m llama_eqx.train data=text data.path={path}, which holds out the end of a document"
    return f"{text}; or more documents, or validation_fraction=0, which holds nothing out and leaves nothing to evaluate on"


def _hashes(task: Task, units: list[Unit]) -> np.ndarray:
    """[documents, 2] uint64: those of all units, in order."""
    return np.concatenate([np.empty((0, 2), "<u8"), *(task.documents(unit.number)["hash"] for unit in units)])


def run_shards(task: Task, group: Group, vocab: int, dedup: bool) -> None:
    """Writes the shards of a group into the dataset, and their index entries into the task's folder."""
    kept = np.load(task.folder / "kept.npy", mmap_mode="r") if dedup else None
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=task.folder)))
        writers = {split: stack.enter_context(ShardWriter(folder / f"{split}-{group.number:05}", vocab)) for split in SPLITS}
        for number, first, before in group.units:
            if not len(documents := task.documents(number)):
                continue
            apart = held_out(documents["hash"], task.validation_fraction)
            origins = np.stack([documents["source"], documents["record"] + _before(documents, before)], 1)
            ends = np.cumsum(documents["tokens"])
            ids = task.ids(number, token_dtype(vocab), int(ends[-1]))
            cuts = np.unique([*np.searchsorted(ends, np.arange(0, ends[-1], BLOCK)), len(documents)])
            for begin, end in itertools.pairwise(cuts.tolist()):
                part = slice(begin, end)
                lengths = documents["tokens"][part]
                here = ids[ends[begin] - lengths[0] : ends[end - 1]]
                for split, chosen in (("train", ~apart[part]), ("val", apart[part])):
                    if kept is not None:
                        chosen &= kept[first + begin : first + end]
                    if chosen.any():
                        row = here if chosen.all() else here[np.repeat(chosen, lengths)]
                        writers[split].add(row, lengths[chosen], int(documents["bytes"][part][chosen].sum()), origins[part][chosen])
        entries = [(split, writer.finish()) for split, writer in writers.items() if writer.documents]
        for _, entry in entries:
            for kind in entry["sha256"]:
                name = f"{entry['name']}.{kind}.npy"
                os.replace(folder / name, task.folder.parent / name)
    write_json(task.folder / f"group-{group.number:05}.json", entries)
    for number, _, _ in group.units:
        task.path(number, "ids").unlink(missing_ok=True)


def _first_of_each(hashes: np.ndarray) -> np.ndarray:
    """[documents] bool: whether each hash occurs for the first time."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable
    again = (hashes[order[1:]] == hashes[order[:-1]]).all(1)
    first = np.ones(len(hashes), bool)
    first[order[1:][again]] = False
    return first


def _before(documents: np.ndarray, before: dict[int, int]) -> np.ndarray:
    """[documents] int64: for each document, the number of records of its source before the unit."""
    count = np.zeros(len(documents), np.int64)
    for source, lines in before.items():
        count[documents["source"] == source] = lines
    return count
