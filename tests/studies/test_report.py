"""Of an experiment whose outcome is known: which runs the report refuses, and what it writes."""

import contextlib
import html
import os
import pathlib
import re
import shutil
import signal
import subprocess

import matplotlib.image
import pytest
import yaml

from llama_eqx import load_config
from llama_eqx.errors import DataError
from llama_eqx.studies.plots import VERDICTS
from llama_eqx.studies.registration import load_registration
from llama_eqx.studies.report import report
from llama_eqx.studies.runs import kept

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def the(*overrides):
    return report(load_config("experiment=known", *overrides, name="report"))


def test_nobody_looks_before_all_runs_are_there(experiment):
    folder, _ = experiment
    (folder / "runs/final/1m/less/0.002_3.jsonl.gz").unlink()
    with pytest.raises(DataError) as found:
        the()
    assert "1 of its 40 registered runs is missing" in str(found.value)
    assert "less seed 3" in str(found.value)
    assert str(pathlib.Path("runs/final/1m")) in str(found.value)
    assert not list(folder.glob("report*"))


def test_runs_that_nobody_registered_count_for_nothing_and_are_named(experiment):
    folder, add = experiment
    before = the()
    for seed in (8, 9):
        add("worse", seed, 1.0)
        add("base", seed, 9.0)
    add("spare", 0, 1.0, registration="0000", residual=0.5)
    after = the()
    said = "\nLeft out, as the registration does not ask for them: base (seeds 8, 9), spare (seed 0), worse (seeds 8, 9)."
    assert after.words == before.words + said
    assert said.strip() in after.files[0].read_text()
    assert "| base | 8 |" in after.files[0].read_text()
    shutil.rmtree(folder / "runs")
    add("spare", 0, 1.0)
    with pytest.raises(DataError, match="40 of its 40 registered runs are missing"):
        the()


@pytest.mark.parametrize("loss", [3.0, 4.0])
def test_of_two_records_of_a_run_neither_is_chosen(loss, experiment):
    folder, add = experiment
    other = add("worse", 3, loss)
    other = other.rename(other.with_name("zz.jsonl.gz"))
    path = add("worse", 3, 3.0)
    with pytest.raises(DataError) as found:
        the()
    told, there = (str(each.relative_to(pathlib.Path.cwd())) for each in (other, path))
    assert f"{told}: worse (seed 3) has a record already: {there}" in str(found.value)
    assert not list(folder.glob("report*"))


@pytest.mark.parametrize(
    ("stage", "next"), [("final", "llama_eqx.report experiment=known rung=1m"), ("tune", "train -m experiment=known stage=tune")]
)
def test_where_there_is_no_run_it_is_said_where_there_are(stage, next, experiment):
    with pytest.raises(DataError, match="no run of known has been kept at 10m") as refused:
        kept("known", stage, "10m")
    assert refused.value.next.endswith(next)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"registration": "0000"}, "another registration"),
        ({"tensors": "float32[4] cc"}, "began with other values than base of seed 3: embed"),
        ({"ledger": 8.0}, "saw other data than base of seed 3"),
        ({"ledger": None}, "no data/ledger says whether it saw the data of base of seed 3"),
        ({"residual": 0.02}, "not matched: +2.00% of the reference's parameters"),
        ({"residual": float("nan")}, "not matched: +nan% of the reference's parameters"),
        ({"residual": None}, "what is left of the reference's parameters was not recorded"),
        ({"settings": {"model": {"dims": {"mlp": 9, "kv_heads": 2}}}}, "other settings than"),
        ({"settings": {"schedule": {"peak": 0.5}}}, "schedule.peak: 0.002 -> 0.5"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(options, said, experiment):
    _, add = experiment
    path = add("worse", 3, 3.0, **options)
    with pytest.raises(DataError) as found:
        the()
    assert said in str(found.value)
    assert str(path.relative_to(pathlib.Path.cwd())) in str(found.value)


@pytest.mark.parametrize(("arm", "match", "refused"), [("worse", "none", True), ("base", "flops", True), ("less", "none", False)])
def test_arms_of_a_contrast_are_matched_alike_and_a_control_may_be_of_another_size(arm, match, refused, experiment):
    _, add = experiment
    for seed in range(8):
        add(arm, seed, 3.0 + seed / 10, match=match, residual=None if match == "none" else 0.0)
    said = rf"worse/.*: study\.match is {'none' if arm == 'worse' else 'parameters'}, and "
    with pytest.raises(DataError, match=said) if refused else contextlib.nullcontext():
        the()


def test_runs_without_a_ledger_are_told_from_those_logged_at_other_steps(experiment):
    """Which run of a group comes first does not matter, and of data that no run recorded nothing is said."""
    _, add = experiment
    path = add("base", 3, 3.0, ledger=None)
    with pytest.raises(DataError, match=rf"base/{path.name}: no data/ledger says whether it saw the data of worse of seed 3") as found:
        the()
    assert str(found.value).count("data/ledger") == 1
    for arm in ("worse", "same", "noisy", "less"):
        add(arm, 3, 3.0, ledger=None)
    the()
    for arm in ("base", "same", "noisy", "less"):
        add(arm, 3, 3.0)
    add("worse", 3, 3.0, ledger=8.0, logged=40)
    the()


@pytest.mark.parametrize(
    ("of", "options", "refused"),
    [("worse", {"tensors": "float32[4] cc"}, True), ("worse", {"ledger": 8.0}, False), ("same", {"ledger": 8.0}, True)],
)
def test_arms_of_other_data_begin_with_the_same_values_all_the_same(of, options, refused, experiment):
    """Groups are of data: a contrast over two of them still has the values at step 0 in common."""
    folder, add = experiment
    known = yaml.safe_load((folder / "prereg.yaml").read_text())
    (folder / "prereg.yaml").write_text(yaml.safe_dump({**known, "same_data": [["worse"], ["base", "same", "noisy", "less"]]}))
    shutil.rmtree(folder / "runs")
    for arm in known["arms"]:
        changed = options if arm == of else {}
        for seed in range(8):
            add(arm, seed, 3 + seed / 10, **{"registration": load_registration("known").hash(), **changed})
    with pytest.raises(DataError, match="these runs do not belong together") if refused else contextlib.nullcontext():
        the()


def test_other_data_may_come_of_a_file_with_another_name(experiment):
    _, add = experiment
    add("base", 3, 3.0, settings={"data_fingerprint": "f"})
    for fingerprint, said in (("f", "\n"), ("g", "; the text, the names of its files or the tokenizer differ\n")):
        path = add("worse", 3, 3.0, ledger=8.0, settings={"data_fingerprint": fingerprint})
        with pytest.raises(DataError, match=rf"{path.name}: saw other data than base of seed 3, from step 50 on or before{said}"):
            the()


def test_arms_that_differ_in_how_they_begin_share_their_data_alone(experiment):
    _, add = experiment
    model = {"dims": {"mlp": 8, "kv_heads": 2}, "init": {"std": 0.02}}
    for seed in range(8):
        path = add("noisy", seed, 3.0, tensors="float32[4] cc", settings={"model": model})
    the()
    add("noisy", 7, 3.0, tensors="float32[4] cc", ledger=8.0, settings={"model": model})
    with pytest.raises(DataError, match=re.escape(f"{path.name}: saw other data than base of seed 7, from step 50")):
        the()


def test_an_arm_whose_settings_are_not_those_of_the_others(experiment):
    """A learning rate that was not found by tuning is refused, even if all runs of the arm have it; what else differs is on the page."""
    _, add = experiment
    settings = {"train": {"steps": 200}, "optimizer": {"weight_decay": 9}}
    for seed in range(8):
        add("worse", seed, 3.0 + seed / 10, steps=200, settings=settings)
    page = the().files[0].read_text()
    assert "| worse | train.steps: 100 -> 200; optimizer: None -> {'weight_decay': 9} |\n| same |  |" in page
    for seed in range(8):
        path = add("worse", seed, 3.0 + seed / 10, settings={"schedule": {"peak": 0.0005}})
    with pytest.raises(DataError, match=f"{path.name}: its learning rate is 0.0005, and 0.002 was found for its arm"):
        the()


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        ([0], [0]),  # the first is no measure
        ([5, 7], [5, 7]),
        ([0, 1, 2, 3], range(8)),
    ],
)
def test_of_an_arm_those_are_named_that_are_not_as_most_are(odd, named, experiment):
    _, add = experiment
    for seed in odd:
        add("worse", seed, 3.0 + seed / 10, settings={"model": {"dims": {"mlp": 9, "kv_heads": 2}}})
    with pytest.raises(DataError, match="other settings than") as found:
        the()
    lines = [line for line in str(found.value).splitlines() if "other settings" in line]
    assert [re.findall(r"_(\d)\.jsonl.*model\.dims\.mlp: (.*)", line)[0] for line in lines] == [
        (str(seed), "8 -> 9" if seed in odd else "9 -> 8") for seed in named
    ]


def test_data_and_tokenizer_of_an_arm_may_lie_elsewhere_if_a_fingerprint_says_that_they_are_the_same(experiment):
    _, add = experiment

    def settings(place, **data):
        components = {"a": {"path": f"{place}/a", "verify": None}}
        return {"data": {"path": place, "components": components}, "tokenizer": {"path": f"{place}/tokenizer"}, **data}

    for seed in range(8):
        add("worse", seed, 3.0 + seed / 10, settings=settings("there" if seed > 4 else "here", data_fingerprint="f"))
    the()
    add("worse", 7, 3.7, settings=settings("here", data_fingerprint="g"))
    with pytest.raises(DataError, match=r"other settings than most .*: data_fingerprint: f -> g"):
        the()
    for seed in range(8):
        add("worse", seed, 3.0 + seed / 10, settings=settings("there" if seed > 4 else "here"))
    with pytest.raises(DataError, match=r"data\.path: here -> there; data\.components\.a\.path: here/a -> .*; tokenizer\.path"):
        the()


def test_what_changes_nothing_that_is_computed_may_differ_in_an_arm(experiment):
    _, add = experiment

    def settings(meters=(), microbatch_size=None, max_withheld=3, dropout=0.0):
        train = {"steps": 100, "meters": list(meters), "microbatch_size": microbatch_size}
        model = {"dims": {"mlp": 8, "kv_heads": 2}, "dropout": dropout}
        return {"train": train, "guard": {"max_withheld": max_withheld}, "model": model}

    for seed in range(8):
        add("worse", seed, 3.05 + seed / 10, settings=settings())
        add("noisy", seed, 3.05 + seed / 10, settings=settings(dropout=0.1))
    path = add("worse", 3, 3.95, settings=settings(["update_norm"], 4, 9))
    the()
    add("noisy", 3, 3.95, settings=settings(["update_norm"], 4, 9, dropout=0.1))
    with pytest.raises(DataError, match=r"train\.microbatch_size: None -> 4\n"):  # which activations are dropped depends on it
        the()
    add("noisy", 3, 3.95, settings=settings(dropout=0.1))
    add("worse", 3, float("nan"), settings=settings(max_withheld=9))
    the()  # the others, which came through with 3, would with 9
    add("worse", 3, float("nan"), settings=settings(max_withheld=2))
    with pytest.raises(DataError, match=rf"{path.name}: .*guard\.max_withheld: 3 -> 2"):
        the()


def test_runs_of_older_code_lack_newer_settings_and_are_not_refused_for_it(experiment):
    _, add = experiment
    add("worse", 3, 3.95, settings={"train": {"steps": 100}, "new": {"setting": 1}})
    assert "First: worse" in the().words


def test_a_damaged_run_is_named(experiment):
    folder, _ = experiment
    path = folder / "runs/final/1m/base/0.002_0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"0\.002_0"):
        the()


def test_the_files(experiment):
    """The page stands alone: no address of a script, a picture or a style."""
    folder, _ = experiment
    markdown, page = (path.read_text() for path in the().files)
    for picture in re.findall(r"\]\((.*?)\)", markdown):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert {"differences.png", "dose.png", "positions.png"} <= {path.name for path in folder.iterdir()}
    assert "| first | 8 |" in markdown
    judged = '"no effect" is judged by the 90% interval (Holm: up to 96.7%)'  # of three contrasts
    assert f"Intervals printed and drawn are of 95%; {judged}, which must lie within the margin." in markdown
    assert html.unescape(page).count(judged) == 2  # the picture says so too
    assert "| 0, 1, 2, 3, 4 | cpu | 0123456789ab (code c1) | 3.11.7 | 0.10.2 |\n" in markdown
    assert "| 5, 6, 7 | H100 | 0123456789ab-dirty (code c2), lab fedcba987654 | 3.11.7 | 0.10.2 |\n" in markdown
    assert markdown.count("changed between these runs") == 1
    assert page.count("<svg") == 3
    assert "loss above that of base" in page  # of the picture over a dose
    assert not re.search(r"""(src|href)=["'](?!#)""", page.replace("xlink:", ""))
    used, given = set(re.findall(r'(?:url\(|href=")#([^)"]+)', page)), re.findall(r' id="([^"]+)"', page)
    assert used <= set(given)
    assert len(given) == len(set(given))


def test_a_metric_that_was_not_evaluated_is_no_divergence(experiment):
    folder, add = experiment
    known = yaml.safe_load((folder / "prereg.yaml").read_text())
    (folder / "prereg.yaml").write_text(yaml.safe_dump({**known, "metric": "val/code/loss"}))
    for seed in range(8):
        for arm in known["arms"]:
            path = add(arm, seed, 3.0, registration=load_registration("known").hash())
    said = rf"{path.name}: val/code/loss was not evaluated, only val/loss, val/bits_per_byte, val/loss_at_1, val/loss_at_64\n"
    with pytest.raises(DataError, match=said):
        the()
    (folder / "prereg.yaml").write_text(yaml.safe_dump({**known, "metric": "val/loss_at_64"}))
    for seed in range(8):
        for arm in known["arms"]:
            add(arm, seed, 3.0, registration=load_registration("known").hash())
    assert "Second: no effect" in the().words


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_is_drawn_without_a_network(experiment, tmp_path):
    (_, page) = the().files
    shot, said = tmp_path / "page.png", tmp_path / "said.txt"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-breakpad", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=900,2400", f"--screenshot={shot}", page.resolve().as_uri()]
    with said.open("w") as output:  # not a pipe: helpers that outlive Chromium would keep it open, and be waited for
        browser = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            code = browser.wait(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)
            browser.wait()
    assert code == 0, said.read_text()
    pixels = matplotlib.image.imread(shot)
    colors = {tuple(color) for color in (pixels[::2, ::2, :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {tuple(bytes.fromhex(VERDICTS[verdict][1:])) for verdict in ("worse", "no effect", "undecided")} <= colors
