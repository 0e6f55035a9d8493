"""How far bfloat16 drifts from float32, by position: `python -m benchmarks.drift [CHECKPOINT] [--prompts 16] [--new 128] [--out FILE]`.

Random prompts of 32 tokens are continued greedily in float32, and bfloat16 then reads that text. Reports, by position in the new text, how
far the logits are off, how often another token is the most probable one, and how many of the texts that bfloat16 writes by itself have
diverged.
Without a checkpoint the model has 27M random weights. Its best logits are closer to each other than those of a trained model.
"""

import argparse
import itertools
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from benchmarks.decoding import MODELS
from benchmarks.record import write
from llama_eqx import build_model, generate_tokens, load_config, load_pretrained
from llama_eqx.model.llama import Llama
from llama_eqx.precision import cast

PROMPT = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a run directory, or a folder of Hugging Face or Meta")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--out", type=pathlib.Path)
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        dims = [f"model.dims.{name}={size}" for name, size in MODELS["27m"].items()]
        config = load_config(*dims, f"model.context={PROMPT + arguments.new}", "train.seq_len=16")
        exact = build_model(config.model, key=jax.random.key(0))
    else:
        exact = load_pretrained(arguments.checkpoint, dtype="float32")
    rounded = cast(exact, "bfloat16")
    prompts = np.random.default_rng(0).integers(0, *exact.config.dims.of("vocab"), (arguments.prompts, PROMPT))
    texts, own = (np.asarray(generate_tokens(model, prompts.tolist(), arguments.new).tokens) for model in (exact, rounded))

    @eqx.filter_jit
    def compared(exact: Llama, rounded: Llama, rows: Int[Array, "batch seq"]) -> tuple[Array, Array, Array, Array]:
        def of_row(row: Int[Array, " seq"]) -> tuple[Array, Array, Array, Array]:
            a, b = (model(row[None, :-1])[0, PROMPT - 1 :] for model in (exact, rounded))
            off = jnp.abs(a - b)
            return off.mean(-1), off.max(-1), a.argmax(-1) != b.argmax(-1), a.std(-1)

        return jax.lax.map(of_row, rows)

    off, most, other, spread = map(np.asarray, compared(exact, rounded, jnp.asarray(np.concatenate([prompts, texts], axis=1))))
    parted = np.cumsum(texts != own, axis=1) > 0
    edges = [0, *(1 << i for i in range(32) if 1 << i < arguments.new), arguments.new]
    found = [
        {
            "from": begin,
            "mean": float(off[:, begin:end].mean()),
            "most": float(most[:, begin:end].max()),
            "other": float(other[:, begin:end].mean()),
            "parted": float(parted[:, end - 1].mean()),
        }
        for begin, end in itertools.pairwise(edges)
    ]
    lines = ["| from token | logits off, mean | most | another best token | texts parted |", "|---|---|---|---|---|"]
    lines += [f"| {x['from']} | {x['mean']:.4f} | {x['most']:.4f} | {x['other']:.1%} | {x['parted']:.0%} |" for x in found]
    lines += ["", f"The logits of a token have a standard deviation of {spread.mean():.3f}."]
    settings = {"checkpoint": arguments.checkpoint, "prompts": arguments.prompts, "new": arguments.new}
    write(arguments.out, {"settings": settings, "spread": float(spread.mean()), "by_position": found}, "\n".join(lines), 0.0)


if __name__ == "__main__":
    main()
