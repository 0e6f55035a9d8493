"""One of several processes that add up numbers together until they are ended; the test beside it does them harm.

python harmed.py OVERRIDES…
"""

import os
import pathlib
import time

from llama_eqx.verb import run_verb


def job(config, overrides):
    import jax
    import numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    from llama_eqx.processes import watched

    run_dir, process = pathlib.Path(config.run_dir), jax.process_index()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    ones = jax.make_array_from_callback((mesh.size,), NamedSharding(mesh, PartitionSpec("data")), lambda index: np.ones(1))
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    for step in watched(range(10**6), config.distributed.stall):
        assert float(add(ones)) == mesh.size
        (run_dir / f"at.{process}").write_text(f"{os.getpid()} {step}")
        while (run_dir / f"stuck.{process}").exists():
            time.sleep(0.1)
        time.sleep(0.02)


if __name__ == "__main__":
    run_verb("train", job)
