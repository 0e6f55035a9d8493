"""One of two processes with four devices each: `train` under every kind of parallelism, `evaluate`, `generate`. The test beside it
starts them.

python two_processes.py FOLDER
"""

import contextlib
import io
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


GENERATED = {
    "streamed": ["prompt=It is a truth", "temperature=0", "max_new_tokens=20"],
    "drawn": ["prompts={folder}/prompts.txt", "samples=2", "temperature=1", "seed=5", "output={folder}/drawn.{process}.jsonl"],
    "searched": ["prompt=It is a truth", "beams=2", "temperature=0"],
}


def generation(name, folder, process):
    options = (option.format(folder=folder, process=process) for option in GENERATED[name])
    return f"checkpoint={folder}/tensor", "max_new_tokens=10", *options


def generated(folder, process, *mesh):
    """What `generate` says of each, on the terminal and beside it. The cache begins small, and grows in the midst of the first."""
    from llama_eqx import load_config
    from llama_eqx.generation import decode
    from llama_eqx.generation.run import generate

    said, decode.FEWEST = {}, 32
    for name in GENERATED:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            generate(load_config(*generation(name, folder, process), *mesh, name="generate"))
        said[name] = out.getvalue(), err.getvalue()
    return said


def refused(folder, *mesh):
    """What two processes do not do."""
    from llama_eqx import load_config
    from llama_eqx.errors import ConfigError
    from llama_eqx.generation.run import generate

    said = []
    for options in (["chat=true", *mesh], ["prompt=It is"]):
        try:
            generate(load_config(f"checkpoint={folder}/tensor", *options, name="generate"))
        except ConfigError as error:
            said.append(error.what)
    return said


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
        mesh += ["mesh.fsdp=4", "mesh.tensor=2"]
        found = {"said": generated(folder, jax.process_index(), *mesh), "refused": refused(folder, *mesh)}
        pathlib.Path(folder, f"generated.{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
