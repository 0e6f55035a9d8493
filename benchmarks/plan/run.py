"""Plans of many models and slices: `python -m benchmarks.plan.run [group…]` compiles every row that `results.jsonl` lacks.

Each row is one `python -m llama_eqx.plan`. They run one at a time: a compile takes minutes of one core and some GiB. No TPU is needed.
`python -m benchmarks.plan.tables` makes tables and plots from `results.jsonl`.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from tqdm import tqdm

FOLDER = pathlib.Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"

FAST = ["precision=mixed", "kernel.fused_backward=true", "kernel.q_block=1024", "kernel.kv_block=1024"]


def sizes(layers: int, embed: int, heads: int, head_dim: int, mlp: int) -> list[str]:
    dims = {"layers": layers, "embed": embed, "heads": heads, "kv_heads": heads, "head_dim": head_dim, "mlp": mlp, "vocab": 32000}
    return [f"model.dims.{name}={size}" for name, size in dims.items()]


def row(model: str, mesh: str, tokens_per_chip: int, chips: int, length: int, *more: str) -> list[str]:
    kind, size = mesh.split("-")
    # Over a whole torus with a ring along each of three axes, the compiler turns a gather into a reduction. Over half of it, it does not.
    # So mesh.data=2 keeps the weights twice.
    twice = ["mesh.data=2"] if kind in ("v4", "v5p") and int(size) >= 128 else []
    return [
        f"model={model}",
        f"mesh={mesh}",
        *FAST,
        *twice,
        f"train.seq_len={length}",
        f"train.batch_size={tokens_per_chip * chips // length}",
        "train.microbatch_size=null",  # overrides a plan in conf/
        *more,
    ]


# Published runs of MaxText, from its scripts configs/v4/22b.sh, v5e/16b.sh and v5p/32b.sh: its sizes, its batch, its remat.
SHORT = ["model=llama2_7b", "model.context=2048", "train.seq_len=2048", *FAST]
CALIBRATION = {
    "22B on v4-128": [
        *SHORT,
        "mesh=v4-128",
        *sizes(48, 6144, 24, 256, 24576),
        "model/feed_forward=plain",
        "train.batch_size=832",
        "remat=full",
        *("kernel.q_block=512", "kernel.kv_block=512"),  # larger blocks do not fit the chip with heads of 256
    ],
    "16B on v5e-256": [*SHORT, "mesh=v5e-256", *sizes(32, 4096, 64, 128, 28672), "train.batch_size=1536", "remat=full"],
    "32B on v5p-128": [  # keeps all that its remat policy keeps except v, which does not fit here
        *SHORT,
        *("mesh=v5p-128", "mesh.tensor=4", "sharding=fsdp_tensor", "+sharding.axes.residual=[tensor]"),
        *sizes(32, 8192, 64, 128, 28672),
        *("train.batch_size=448", "remat=names", "remat.names=[q,k,attention_out,gate,up]"),
    ],
}

# One mesh for every size of model. The meshes with a plan in conf/plan/ take its settings.
PRESETS = {
    "llama1_7b": row("llama1_7b", "v4-32", 8192, 16, 2048, "remat=full"),
    "llama1_13b": ["model=llama1_13b", "mesh=v5e-256"],
    "llama1_33b": row("llama1_33b", "v4-256", 8192, 128, 2048, "remat=full"),
    "llama1_65b": row("llama1_65b", "v5p-128", 8192, 64, 2048, "remat=full"),
    "llama2_7b": ["model=llama2_7b", "mesh=v4-32"],
    "llama2_13b": row("llama2_13b", "v4-64", 8192, 32, 4096, "remat=full"),
    "llama2_34b": row("llama2_34b", "v5p-64", 8192, 32, 4096, "remat=full"),
    "llama2_70b": ["model=llama2_70b", "mesh=v5p-256"],
    "llama3_8b": ["model=llama3_8b", "mesh=v6e-64"],
    "llama3_70b": row("llama3_70b", "v5p-256", 8192, 128, 8192, "remat=full"),
    "llama3_1_405b": ["model=llama3_1_405b", "mesh=v5p-1024"],
    "llama3_2_1b": ["model=llama3_2_1b", "mesh=v5e-16"],
    "llama3_2_3b": row("llama3_2_3b", "v6e-16", 24576, 16, 8192, "remat=names", "kernel.fused_backward=false"),
}

# The same settings on more and more chips, and on longer and longer rows. The options are those of the plan for v4-32 in conf/plan/.
OPTIONS = [
    "+mesh.compiler_options.xla_tpu_scheduler_percent_shared_memory_limit=100",
    "+mesh.compiler_options.xla_tpu_enable_collective_pipeliner=false",
]
CHIPS = {f"v4-{2 * n}": row("llama2_7b", f"v4-{2 * n}", 8192, n, 4096, "remat=full", *OPTIONS) for n in (4, 8, 16, 32, 64, 128, 256)}
CONTEXT = {
    f"{length // 1024}k": row("llama3_1_8b", "v5p-128", 16384, 64, length, "remat=full", *split)
    for length, split in {
        **{length: [] for length in (2048, 4096, 8192, 16384)},
        **{length: ["sharding=sequence", f"mesh.sequence={length // 16384}"] for length in (32768, 65536, 131072)},
    }.items()
}

# Seconds to compile, by depth.
THIN = ["model=llama2_7b", "mesh=v5e-4", *FAST, "remat=full", "train.seq_len=2048", "train.batch_size=4"]
DEPTH = {f"{layers} layers": [*THIN, *sizes(layers, 512, 4, 128, 1408)] for layers in (8, 16, 32, 80)}

GROUPS = {"calibration": CALIBRATION, "presets": PRESETS, "chips": CHIPS, "context": CONTEXT, "depth": DEPTH}


def done() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=[], choices=[*GROUPS, []], help="without any: all")
    parser.add_argument("--limit", type=int, help="rows to add at most")
    arguments = parser.parse_args()
    groups = arguments.groups or [*GROUPS]
    known = {(each["group"], each["name"]) for each in done()}
    missing = [(group, name) for group in groups for name in GROUPS[group] if (group, name) not in known][: arguments.limit]
    for group, name in (bar := tqdm(missing, unit="plan")):
        bar.set_postfix_str(f"{group} {name}")
        overrides = GROUPS[group][name]
        with tempfile.TemporaryDirectory() as folder:
            run = subprocess.run([sys.executable, "-m", "llama_eqx.plan", *overrides, f"run_dir={folder}"], capture_output=True, text=True)
            if run.returncode:
                sys.exit(f"{group} {name}: exit {run.returncode}\n{run.stdout}{run.stderr}")
            figures = json.loads(pathlib.Path(folder, "plan.json").read_text())
        with RESULTS.open("a") as file:
            file.write(json.dumps({"group": group, "name": name, "overrides": overrides, **figures}) + "\n")


if __name__ == "__main__":
    main()
