"""An experiment with a known outcome: made-up runs with an effect of 0.05, with no effect, and with too much noise to tell."""

import gzip
import json

import numpy as np
import pytest
import yaml

from llama_eqx.studies.registration import load_registration

REGISTRATION = {
    "question": "Is it better?",
    "metric": "val/loss",
    "margin": 0.01,
    "alpha": 0.05,
    "rule": {"equivalence": "tost", "difference": "paired_t", "confirmation": "sign_flip", "adjustment": "holm"},
    "arms": ["base", "worse", "same", "noisy", "less"],
    "same_data": [],
    "tune_arms": ["base", "worse"],
    "rates": [0.001, 0.002, 0.004],
    "tune_seeds": [10, 11],
    "seeds": list(range(8)),
    "contrasts": {"first": {"worse": 1, "base": -1}, "second": {"same": 1, "base": -1}, "third": {"noisy": 1, "base": -1}},
    "negative_controls": {"again": {"same": 1, "base": -1}},
    "positive_controls": {"less data": {"less": 1, "base": -1}},
    "doses": {"dose": {"first": 10, "second": 0}},
    "stopping": "All runs are made.",
    "exclusion": "None is left out.",
}
EFFECTS = {"base": (0, 0), "worse": (0.05, 0.004), "same": (0, 0.004), "noisy": (0, 0.1), "less": (0.1, 0.01)}


def run_of(
    arm,
    seed,
    loss,
    *,
    stage="final",
    peak=0.002,
    registration,
    tensors="float32[4] aa",
    ledger=7.0,
    match="parameters",
    residual=0.0,
    logged=50,
    steps=100,
    settings=(),
    code=None,
    kind=None,
):
    study = {"question": "known", "arm": arm, "stage": stage, "rung": "1m", "registration": registration, "match": match}
    dims = {"mlp": 8, "kv_heads": 2}
    config = {"seed": seed, "study": study, "schedule": {"peak": peak}, "train": {"steps": 100}, "model": {"dims": dims}, **dict(settings)}
    record = {"tensors": {"embed": tensors, "blocks.feed_forward.up_proj": "float32[4,8] bb"}, "parameters": 1000, "flops_per_token": 6000}
    record |= {"position_codes": 128, "residual": residual}
    metrics = [{"step": logged, "train/loss": loss + 1, "data/ledger": ledger, "perf/tokens_per_second": 9.0, "optim/grad_norm": 1.0}]
    if ledger is None:
        del metrics[0]["data/ledger"]
    metrics += [{"step": steps, "val/loss": loss, "val/bits_per_byte": loss / 2, "val/loss_at_1": loss, "val/loss_at_64": loss - 1}]
    origin = {"step": 0, "commit": "0123456789abcdef" + "-dirty" * (seed > 4), "versions": {"python": "3.11.7", "jax": "0.10.2"}}
    origin["extensions"] = {"lab": "fedcba9876543210"} if seed > 4 else {}
    origin["computed"] = {"kind": kind or ("H100" if seed > 4 else "cpu")}
    codes = ["c2" if seed > 4 else "c1"] if code is None else code
    origins = [{**origin, "code": {"llama_eqx": each}} for each in codes] or [origin]
    first = {"config": config, "study": record, "provenance": origins}
    return gzip.compress("\n".join(map(json.dumps, [first, *metrics])).encode() + b"\n")


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Returns the folder of the experiment `known`, with 8 runs of each arm, and `add(arm, seed, loss, ...)`, which keeps a run there."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "known"
    folder.mkdir(parents=True)
    (folder / "prereg.yaml").write_text(yaml.safe_dump(REGISTRATION))
    (folder / "tuned.yaml").write_text(yaml.safe_dump({"1m": {"base": 0.002, "worse": 0.002}}))
    registration = load_registration("known").hash()

    def add(arm, seed, loss, **options):
        stage, peak = options.get("stage", "final"), options.get("peak", 0.002)
        path = folder / "runs" / stage / "1m" / arm / f"{peak}_{seed}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(run_of(arm, seed, loss, **{"registration": registration, **options}))
        return path

    for arm, (effect, spread) in EFFECTS.items():
        for seed in range(8):
            add(arm, seed, 3 + 0.3 * seed + float(np.random.default_rng([seed, 4, len(arm)]).normal(effect, spread)))
    return folder, add
