"""`python tests/data/two_processes.py FOLDER PROCESS PORT`: one of two processes of a run, which share eight devices.

Writes what lies on its devices of each batch, by the rows of the batch.
"""

import itertools
import pathlib
import sys

import elastic
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama_eqx.data.pipeline import Parts, process_rows, training_batches

if __name__ == "__main__":
    folder, process, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    data = elastic.opened(elastic.config(folder))
    shard = process_rows(sharding, elastic.BATCH, elastic.SEQ)
    parts = Parts(data.train, data.order, elastic.BATCH, *shard, data.fingerprint)
    with training_batches(parts, sharding, elastic.BATCH, parts.after(3)) as batches:
        for batch, progress in itertools.islice(batches, 4):
            shards = sorted(batch.tokens.addressable_shards, key=lambda shard: shard.index[0].start)
            rows = np.concatenate([shard.data for shard in shards])
            np.savez(folder / f"two-{progress.step}-{process}.npz", rows=rows, first=shards[0].index[0].start, ledger=progress.ledger)
