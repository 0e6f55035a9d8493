"""The first losses of a tiny model: they move only when the numbers of training move, and then on purpose.

`python tests/golden/test_first_losses.py` prints the present ones.
"""

import pathlib
import tempfile

import pytest

from llama_eqx import load_config

HERE = pathlib.Path(__file__).parent
SIZES = {"layers": 2, "embed": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 48}
ARMS = {"plain": [], "dropout": ["model.dropout=0.1"], "mixed": ["precision=mixed"]}
GOLDEN = {
    "plain": [5.882754, 5.949213, 5.599044, 5.372245, 5.084615, 4.974721],
    "dropout": [5.991222, 5.967616, 5.669421, 5.430432, 5.160089, 5.121268],
    "mixed": [5.88098, 5.952012, 5.59655, 5.374741, 5.086272, 4.976111],
}


def first_losses(arm: str, run_dir: pathlib.Path) -> list[float]:
    from llama_eqx.tracking.jsonl import read_metrics
    from llama_eqx.training.loop import train

    sizes = [f"model.dims.{axis}={size}" for axis, size in SIZES.items()]
    steps = [
        "train.steps=6",
        "train.batch_size=8",
        "train.seq_len=32",
        "train.log_every=1",
        "train.sample_tokens=0",
        "schedule.warmup_steps=2",
    ]
    data = ["data=text", f"data.path={HERE / 'text.md'}", "tokenizer=bytes", "tracking.wandb.mode=disabled"]
    train(load_config(*sizes, *steps, *data, f"run_dir={run_dir}", *ARMS[arm]))
    return [record["train/loss"] for record in read_metrics(run_dir / "metrics.jsonl") if "train/loss" in record]


@pytest.mark.parametrize("arm", ARMS)
def test_first_losses(arm, tmp_path):
    tolerance = 1e-3 if arm == "mixed" else 1e-5
    assert first_losses(arm, tmp_path / "run") == pytest.approx(GOLDEN[arm], rel=tolerance)


if __name__ == "__main__":
    for arm in ARMS:
        print(f"{arm!r}: {first_losses(arm, pathlib.Path(tempfile.mkdtemp()) / 'run')},")
