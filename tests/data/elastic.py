"""`python tests/data/elastic.py FOLDER`: a run in parts on 1, 2, 3, 4 and 8 processes, with what each of them read written into FOLDER.

Only the data layer runs. Processes are forked once everything is imported, to be quick.
"""

import itertools
import json
import os
import pathlib
import sys

import grain  # noqa: F401 to have it imported before the processes are forked
import jax
import numpy as np

from llama_eqx import load_config
from llama_eqx.data.dataset import open_data
from llama_eqx.data.pipeline import Parts, Progress, chained, read

BATCH, SEQ = 24, 64
PARTS = [(1, 0, 4), (2, 4, 7), (3, 7, 12), (4, 12, 14), (8, 14, 19), (1, 19, 25)]  # processes, first step, last step


def settings(folder, *overrides):
    """Three sources by weight, two of them with a segment for each document, and one packed."""
    return [
        *("data=mixture", "tokenizer=bytes", "data.components.prose.rows=packed", "data.components.prose.long_documents=cut"),
        *(f"data.components.prose.path={folder}/prose", "~data@data.components.code", "~data.weights.code"),
        *("+data@data.components.notes=text", f"data.components.notes.path={folder}/notes", "data.components.notes.rows=documents"),
        *("+data@data.components.answers=sft", f"data.components.answers.path={folder}/answers.jsonl"),
        *("data.weights.prose=0.5", "+data.weights.notes=0.3", "+data.weights.answers=0.2", "seed=7"),
        *overrides,
    ]


def config(folder, *overrides):
    return load_config(*settings(folder, *overrides))


def opened(config):
    tokenizer = config.tokenizer.build(config.data)
    return open_data(config.data, tokenizer, seq_len=SEQ, seed=config.seed)


def run(folder: pathlib.Path, config, shard: int, n_shards: int, first: int, last: int) -> None:
    """One process: reads its part of some batches, and continues the ledger that the processes before it left."""
    data = opened(config)
    parts = Parts(data.train, data.order, BATCH, shard, n_shards, data.fingerprint)
    progress = Progress(*json.loads((folder / f"{first}.json").read_text())) if first else parts.after(0)
    with read(parts, first) as drawn:
        for part in itertools.islice(drawn, last - first):
            np.savez(folder / f"{progress.step}-{shard}.npz", *jax.tree.leaves(part.batch))
            progress = Progress(progress.step + 1, chained(progress.ledger, part.digest), progress.tokens + part.counted)
    (folder / f"{last}-{shard}.json").write_text(json.dumps(progress))


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    chosen = config(folder)
    for count, first, last in PARTS:
        children = []
        for shard in range(count):
            if not (child := os.fork()):
                run(folder, chosen, shard, count, first, last)
                os._exit(0)
            children.append(child)
        for child in children:
            assert os.waitpid(child, 0)[1] == 0
        said = {(folder / f"{last}-{shard}.json").read_text() for shard in range(count)}
        assert len(said) == 1, said
        (folder / f"{last}.json").write_text(said.pop())
