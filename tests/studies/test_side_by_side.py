"""Any runs beside each other, whether or not they belong to an experiment."""

import json

import pytest

from llama_eqx import compose, load_config
from llama_eqx.checkpoint.native import read_config, write_config
from llama_eqx.errors import DataError
from llama_eqx.studies.report import report


def test_any_two_runs_side_by_side(tmp_path, monkeypatch):
    """What differs in their settings, where their losses part, and by how much the second is worse."""
    monkeypatch.chdir(tmp_path)
    for name, b2, extra in (("a", 0.95, 0.0), ("b", 0.9, 0.25), ("other", 0.95, 0.0)):
        folder = tmp_path / "outputs" / name
        folder.mkdir(parents=True)
        write_config({"seed": 0, "optimizer": {"b2": b2}, "run_dir": str(folder), "train": {"steps": 8}}, folder)
        ledger = 5.0 if name == "other" else 4.0
        records = [{"step": step, "train/loss": 9.0 - step + extra * (step > 2), "data/ledger": ledger} for step in range(1, 9)]
        records[0] |= {"perf/tokens_per_second": 5.0, "optim/grad_norm": 1.0, "optim/lr": 0.1}
        records.append({"step": 8, "val/loss": 3.0 + extra})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "sample.txt").write_text(f"written by {name} <b>\n")
        (folder / "provenance.jsonl").write_text(json.dumps({"step": 0, "code": {"llama_eqx": "c2" if name == "b" else "c1"}}) + "\n")

    def of(*names):
        return report(load_config(f"runs=[{','.join(f'outputs/{name}' for name in names)}]", name="report"))

    written = of("a", "b")
    assert "a -> b: 1 setting differs. Their training losses differ from step 3 on." in written.words
    assert "On the same batches the second is 0.2500 nats per token worse over the last 2 of 8 records" in written.words
    assert "Validation at step 8: the second is 0.2500 nats per token worse" in written.words
    markdown, page = (path.read_text() for path in written.files)
    assert "optimizer.b2: 0.95 -> 0.9" in markdown
    assert "written by b &lt;b&gt;" in page
    assert "learning rate" in page
    assert "optim/lr" not in page
    assert "They were made by other code of llama_eqx (c1 and c2)." in written.words
    assert "other code" not in of("a", "other").words
    assert "Their schedules" not in written.words
    write_config({"seed": 0, "optimizer": {"b2": 0.95}, "train": {"steps": 16}}, tmp_path / "outputs/other")
    assert "Their schedules are of 8 and 16 steps: at the same step, one is nearer to its end." in of("a", "other").words
    assert "different data by step 1" in of("a", "other").words
    assert "equal to the last bit" in of("a", "other").words
    assert "The starts" not in of("a", "other").words
    with (tmp_path / "outputs/other/provenance.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, "code": {"llama_eqx": "c3"}}) + "\n")
    written = of("a", "other")
    for said in (written.words, written.files[0].read_text()):
        assert "The starts of other differ: code.llama_eqx: c1 -> c3 after step 5." in said
    with (tmp_path / "outputs/other/provenance.jsonl").open("a") as file:
        file.write('{"a": 1')
    with pytest.raises(DataError, match=r"no record of a start\nwhere: .*other/provenance\.jsonl:3\nnext: remove the line"):
        of("a", "other")


def test_the_runs_of_a_sweep_side_by_side(tmp_path, monkeypatch):
    """In the order of their numbers, with those that ended without finite numbers, did not finish, or recorded nothing."""
    monkeypatch.chdir(tmp_path)
    sweep = tmp_path / "multirun" / compose.sweep_name(["seed=1,2", "model/norm=rms,layer"])
    for name in ("2", "10", "3", "4"):
        (folder := sweep / name).mkdir(parents=True)
        (folder / "console.txt").touch()
        if name == "4":
            continue
        write_config({"seed": int(name), "train": {"steps": 30}}, folder)
        rates = [5.0, 70.0, 90.0]
        records = [
            {"step": step, "train/loss": "NaN" if (name, step) == ("10", 20) else 9.0, "data/ledger": step, "perf/tokens_per_second": rate}
            for step, rate in zip((1, 10, 20), rates, strict=True)
        ]
        records += [{"step": 20, "val/loss": 4.9 if name == "3" else 5.0}, {"step": 30, "train/loss": 8.0, "val/loss": 4.0}][
            : 2 if name == "2" else 1
        ]
        if name == "10":
            records[-1] |= {"tokens": 5120.0, "flops": 4.5e9}
            (folder / "provenance.jsonl").write_text('{"step": 0, "parameters": null}\n{"step": 10, "parameters": 1234}\n{"step": 20}\n')
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, step in (("2", 10), ("3", 20)):  # the first went on after it
        (sweep / name / "replay").mkdir()
        (sweep / name / "replay" / f"step-{step}.json").touch()
    written = report(load_config(f"runs=[{sweep.relative_to(tmp_path)}]", name="report"))
    assert written.words.splitlines()[:4] == [
        "2: validation loss 4.0000 at step 30",
        "3: ended at step 20, as its numbers were not finite; validation loss 4.9000 at step 20",
        "10: validation loss 5.0000 at step 20; its record goes to step 20 of 30",
        f"Nothing was recorded in {sweep.relative_to(tmp_path) / '4'}: its console.txt says why.",
    ]
    worse = [line for line in written.words.splitlines() if line.startswith("2 -> 3")]
    assert "The second ended without finite numbers, which counts as worse than any loss." in worse[0]
    assert "better" not in worse[0]
    assert "the second is not comparable (a loss is not finite) over the last 1 of 3 records" in written.words
    page = written.files[0].read_text()
    assert "| validation loss 5.0000 at step 20; its record goes to step 20 of 30 | 1,234 | 5,120 | 4.5e+09 | 80 |" in page
    assert (
        "| 3 | seed: 2 -> 3 | ended at step 20, as its numbers were not finite; validation loss 4.9000 at step 20 |  |  |  | 80 |" in page
    )


def test_the_arms_of_a_sweep_are_paired_by_seed(tmp_path, monkeypatch):
    """Runs have the names that the sweep gave them. A pair has read the same batches, and one that diverged is none."""
    monkeypatch.chdir(tmp_path)
    ends = {
        ("adamw", 0): 3.0,
        ("adamw", 1): 3.2,
        ("adamw", 2): 3.1,
        ("muon", 0): 2.9,
        ("muon", 1): 3.0,
        ("muon", 2): "NaN",
        ("lion", 0): 3.0,
    }
    for number, ((optimizer, seed), loss) in enumerate(ends.items()):
        (folder := tmp_path / "sweep" / str(number)).mkdir(parents=True)
        named = {"wandb": {"name": f"seed={seed} optimizer={optimizer}"}}
        write_config({"seed": seed, "optimizer": optimizer, "train": {"steps": 9}, "tracking": named}, folder)
        record = {"step": 9, "train/loss": 3.0, "data/ledger": seed + 1, "val/loss": loss}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")

    def said():
        written = report(load_config("runs=[sweep]", name="report"))
        return written.words.splitlines(), written.files[0].read_text()

    lines, page = said()
    assert lines[0] == "seed=0 optimizer=adamw: validation loss 3.0000 at step 9"
    paired = (
        "optimizer=muon minus optimizer=adamw, validation loss by seed: -0.1000, -0.2000; mean -0.1500 nats per token, 95% interval "
        "-0.7853 to +0.4853 over 2 pairs, without 1 that diverged, is not finished or read other batches. This is a hint and no verdict: "
        "nothing was registered."
    )
    assert [line for line in lines if " pairs" in line] == [paired]
    assert paired in page
    assert any(line.startswith("seed=1 optimizer=adamw -> seed=1 optimizer=muon: 1 setting differs.") for line in lines)
    for folder in (tmp_path / "sweep").iterdir():
        write_config({**read_config(folder), "study": {"question": "norm"}}, folder)
    assert "no verdict: python -m llama_eqx.report experiment=norm gives the verdict, when all registered runs are there." in said()[1]
    other = {"step": 9, "train/loss": 3.0, "data/ledger": 7, "val/loss": 3.0}
    (tmp_path / "sweep" / "4" / "metrics.jsonl").write_text(json.dumps(other) + "\n")
    assert not any(" pairs" in line for line in said()[0])
