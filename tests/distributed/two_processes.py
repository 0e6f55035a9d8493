"""One of two processes with four devices each: `train` under every kind of parallelism, then `evaluate`. The test beside it starts them.

python two_processes.py FOLDER
"""

import json
import pathlib
import sys

STEPS = 20
TEXT = pathlib.Path(__file__).parents[1] / "golden" / "text.md"
SIZES = {"vocab": 264, "layers": 1, "embed": 32, "heads": 8, "kv_heads": 2, "head_dim": 8, "mlp": 48}
PARALLEL = {
    "ddp": ["sharding=ddp"],
    "fsdp": ["sharding=fsdp"],
    "tensor": ["sharding=tensor", "mesh.fsdp=1", "mesh.tensor=8"],  # of both processes
    "sequence": ["sharding=sequence", "mesh.fsdp=1", "mesh.sequence=8"],
}


def overrides(run_dir, *more):
    return [
        *(f"model.dims.{axis}={n}" for axis, n in SIZES.items()),
        *("data=text", f"data.path={TEXT}", "tokenizer=bytes", "tracking.wandb.mode=disabled", f"run_dir={run_dir}"),
        *(f"train.steps={STEPS}", "train.batch_size=8", "train.seq_len=32", "train.log_every=1", f"train.eval_every={STEPS}"),
        *("train.sample_tokens=0", "schedule=constant", "schedule.warmup_steps=2", "schedule.peak=1e-2"),
        *("distributed.timeout=600", "distributed.heartbeat=600"),  # for machines that do much else
        *more,
    ]


def evaluation(folder):
    return f"checkpoint={folder}/tensor", "length=16", "stride=12"


def main(folder):
    import jax

    from llama_eqx import load_config
    from llama_eqx.evaluation.perplexity import evaluate
    from llama_eqx.evaluation.report import saved
    from llama_eqx.processes import together
    from llama_eqx.training.loop import train

    mesh = ["mesh=cpu-8", "mesh.hosts=2"]
    with together(load_config(*overrides(f"{folder}/none"))):
        for name, options in PARALLEL.items():
            steps = [f"train.steps={STEPS // 2}"] if name == "fsdp" else []  # the rest is for one process
            train(load_config(*overrides(f"{folder}/{name}", *mesh, *options, *steps)))
        config = load_config(*evaluation(folder), *mesh, name="evaluate")
        pathlib.Path(folder, f"evaluated.{jax.process_index()}.json").write_text(json.dumps(saved(config, evaluate(config))["results"]))


if __name__ == "__main__":
    main(sys.argv[1])
