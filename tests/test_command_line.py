"""What a user types, and what they are told when it is wrong: one block and an exit code, never a traceback."""

import pathlib
import pickle
import re
import shlex
import signal
import subprocess
import sys

import pytest
import yaml

from llama_eqx import compose, load_config
from llama_eqx.compose import quoted

TEXT = pathlib.Path(__file__).parent / "golden" / "text.md"


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (2, "did you mean train.steps?", ["train.step=3"]),
        (2, "did you mean schedule.peak?", ["schedule.peek=3"]),
        (2, "did you mean llama2_7b?", ["model=lama2_7b"]),
        (2, "did you mean llama2_34b? There are llama1_13b, llama1_33b,", ["model=llama4"]),
        (2, "did you mean v4-32?", ["mesh=v4_32"]),
        (2, "did you mean finetune?", ["recipe=fintune"]),
        (2, "did you mean finetune?", ["-m", "recipe=llama3_8b,fintune"]),
        (2, "did you mean silu?", ["model.feed_forward.activation=sliu"]),
        (2, "wanted int", ["train.steps=many"]),
        (2, "kv_heads may be one of 1, 2, 4", ["model.dims.kv_heads=3"]),
        (2, "only these are built", ["model.norm._target_=os.system"]),
        (2, "did you mean steps?", ["+train.stepz=3"]),
        (2, "did you mean schedule.peak?", ["optimizer.lr=3e-4"]),
        (2, "did you mean train.batch_size?", ["batch_size=3"]),
        (2, "did you mean train.steps?", ["trian.steps=3"]),
        (2, "did you mean model/feed_forward?", ["model/ffn=plain"]),
        (2, "one of: mesh.compiler_options, mesh.data,", ["mesh.foo=3"]),
        (2, "one of: auto, blocked, cudnn", ["kernel.name=flash"]),
        (2, "next: one of: cpu-8, h100x1, h100x8, ", ["mesh=cpu-16"]),
        (2, "next: +sharding.axes.mlp=[tensor] adds it; there are batch, embed\n", ["sharding.axes.mlp=[tensor]"]),
        (2, "next: +mesh.compiler_options.xla_foo=1 adds it\n", ["mesh.compiler_options.xla_foo=1"]),
        (2, "next: mesh.devices=9, or other mesh.hosts\n", ["mesh=cpu-8", "mesh.hosts=3"]),
        (2, "next: model=NAME mesh=NAME, whose", ["plan=llama2_7b_v4-32"]),
        (2, "next: experiment=NAME rung=10m:", ["rung=10m"]),
        (2, "next: experiment=norm experiment/norm=layer:", ["experiment/norm=layer"]),
        (2, "first: data=prepared, data=sft, data=shakespeare, data=test, data=text\n", ["data.path=notes/"]),
        (2, "next: model/norm=layer\n", ["model.norm=layer"]),
        (2, "next: model/norm=layer\n", ["model.norm=layer", "--cfg=job"]),
        (2, "next: --cfg job with the values of one job\n", ["-m", "seed=0,1", "--cfg", "job"]),
        (2, "wanted int, 1000\n", ["train.steps=1e3"]),
        (2, "next: train.steps=1 or more", ["train.steps=-5"]),
        (2, "next: data=text data.path=notes/\n", ["data=notes/"]),
        (2, "next: data=text data.path=/notes\n", ["data=/notes"]),
        (2, "one of: layer, rms, ", ["model/norm=a/b"]),
        (2, "next: train.steps=5\n", ["train.steps", "5"]),
        (2, "next: KEY=VALUE, or --help\n", ["help"]),
        (2, "quotes: 'data.prompt=SEVERAL WORDS'\n", ["data.prompt=To", "be", "or"]),
        (2, "next: train.steps=5\n", ["--steps", "5"]),
        (2, "next: train.steps=5\n", ["--train.steps=5"]),
        (2, "next: schedule.peak=VALUE\n", ["--lr"]),
        (2, "data.path=FOLDER", ["data=text"]),
        (2, "longer than the model's context", ["train.seq_len=512"]),
        (2, "16 tpu devices", ["mesh=v4-32", "data=text", f"data.path={TEXT}", "tokenizer=bytes"]),
        (
            2,
            "next: python -m llama_eqx.plan compiles for them; mesh=local",
            ["mesh=v4-8", "data=text", f"data.path={TEXT}", "tokenizer=bytes"],
        ),
        (2, "next: train.batch_size=16\n", ["mesh=cpu-8", "train.batch_size=12", "data=text", f"data.path={TEXT}", "tokenizer=bytes"]),
        (2, "does not divide", ["data=text", f"data.path={TEXT}", "tokenizer=bytes", "train.batch_size=3", "train.seq_len=32"]),
        # 258 ids do not divide by the 4 that 4 heads do
        (
            2,
            "mesh.fsdp=4 mesh.sequence=1 mesh.tensor=2 is",
            ["mesh=cpu-8", "mesh.tensor=8", "sharding=tensor", "data=text", f"data.path={TEXT}", "tokenizer=bytes"],
        ),
        (
            2,
            "mesh.fsdp=2 mesh.sequence=1 mesh.tensor=4 is",
            ["mesh=cpu-8", "mesh.tensor=8", "sharding=tensor", "tokenizer=chars", "data=text", "data.path=no"],
        ),
        (2, "the tokenizer has 258 ids", ["data=text", f"data.path={TEXT}", "tokenizer=bytes", "model.dims.vocab=100"]),
        (2, "is not a seed", ["seed=-1"]),
        (2, "4294967296 is not a seed: from 0 to 4294967295", ["seed=4294967296"]),
        (2, "'train.only=[a,b]' if it is a list, -m for a sweep", ["train.only=a,b"]),
        (3, "nothing matches", ["data=text", "data.path=no/such/folder"]),
        (3, "hf download a/b --repo-type dataset --include '*.parquet' --local-dir a/b\n", ["data=text", "data.path=a/b"]),
        (
            3,
            "hf download a/b --exclude 'original/*' --local-dir a/b\n",
            ["data=text", f"data.path={TEXT}", "tokenizer=hf", "tokenizer.path=a/b"],
        ),
        (3, "a row needs", ["data=text", f"data.path={TEXT}", "tokenizer=bytes", "train.seq_len=250"]),
        (6, "cannot write", ["run_dir=/proc/nowhere"]),
    ],
)
def test_bad_input_to_train(code, said, arguments, tmp_path, typed):
    where = [] if any(argument.startswith("run_dir") for argument in arguments) else [f"run_dir={tmp_path / 'run'}"]
    found, _, err = typed("train", *arguments, *where, "tracking.wandb.mode=disabled")
    assert said in err
    assert found == code
    assert "Traceback" not in err
    assert len(err.splitlines()) <= 6


@pytest.mark.parametrize(("content", "said"), [(b"", "no text here"), (b"\x00\x01\x02", "not UTF-8 text")])
def test_a_corpus_without_text(content, said, tmp_path, typed):
    (tmp_path / "a.txt").write_bytes(content)
    code, _, err = typed("train", "data=text", f"data.path={tmp_path}", f"run_dir={tmp_path / 'run'}")
    assert (code, said in err) == (3, True)


@pytest.mark.parametrize(
    ("code", "said", "arguments"),
    [
        (2, "checkpoint=RUN_DIR", ["prompt=a"]),
        (2, "prompt=", ["checkpoint=somewhere"]),
        (2, "did you mean prompt?", ["promt=a"]),
        (4, "does not exist", ["checkpoint=no/such/run", "prompt=a"]),
    ],
)
def test_bad_input_to_generate(code, said, arguments, typed):
    found, _, err = typed("generate", *arguments)
    assert said in err
    assert found == code


def test_from_training_to_text(tmp_path, typed):
    """Both verbs as a user types them, and the commands that the first prints for going on."""
    text = ["data=text", f"data.path={TEXT}", "tokenizer=bytes", "model.dims.layers=1", "model.dims.embed=32", "model.dims.mlp=32"]
    small = ["train.steps=3", "train.batch_size=8", "train.seq_len=32", "train.log_every=1", "train.sample_tokens=4", "data.prompt=it's"]
    code, out, _ = typed("train", *text, *small, f"run_dir={tmp_path / 'a run'}", "tracking.wandb.mode=disabled")
    assert code == 0
    assert {"validation", "speed", "curve", "checkpoint", "resume", "sample"} <= {line.split(" ")[0] for line in out.splitlines()}
    assert "view" not in out  # there is nothing to view
    for verb, steps in (("train", "step 6/6"), ("generate", "it's")):
        (command,) = (line for line in out.splitlines() if f"llama_eqx.{verb} " in line)
        code, again, err = typed(verb, *shlex.split(command)[4:])
        assert code == 0
        assert steps in err + again


PLAN = ["precision=mixed", "train.batch_size=48", "train.microbatch_size=48", "kernel.q_block=1024"]


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """A plan for the default model on the mesh of eight."""
    (tmp_path / "llama3_1m_cpu-8.yaml").write_text(f"overrides: [{', '.join(PLAN)}]")
    place = compose.plan_file
    monkeypatch.setattr(compose, "plan_file", lambda overrides: tmp_path / place(overrides).name)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--cfg", "job", "mesh=cpu-8", "profile=true", "data.prompt=it's"],
        ["mesh=cpu-8", "--cfg", "job", "profile=true", "data.prompt=it's"],
        ["mesh=cpu-8", "profile=true", "data.prompt=it's", "--cfg=job"],
    ],
)
def test_flags_go_with_a_plan_and_with_what_needs_quotes(arguments, planned, typed):
    code, out, err = typed("train", *arguments)
    assert code == 0
    assert f"note: the plan for this model on this mesh sets {' '.join(PLAN)}" in err
    shown = yaml.safe_load(out)
    assert (shown["train"]["batch_size"], shown["precision"]["compute"]) == (48, "bfloat16")
    assert (shown["profile"]["steps"], shown["data"]["prompt"]) == ([10, 13], "it's")


@pytest.mark.parametrize(("flag", "prompt"), [("--config-dir=.", "it's"), ("--run", '"it\'s"')])
def test_a_job_hears_what_was_said_and_not_what_was_planned(flag, prompt, planned, tmp_path, typed):
    """A job of a sweep, which is told to --run, in Hydra's own grammar."""
    heard = []
    words = ["mesh=cpu-8", f"run_dir={tmp_path / 'run'}", f"data.prompt={prompt}"]
    code, _, _ = typed("train", flag, *words, job=lambda *both: heard.append(both))
    assert code == 0
    ((config, overrides),) = heard
    assert overrides == words  # which the command to go on with is made of
    assert (config.train.batch_size, config.data.prompt) == (48, "it's")


def test_an_experiment_takes_no_plan(planned, typed):
    _, out, err = typed("train", "--cfg", "job", "mesh=cpu-8", "experiment=shakespeare")
    assert "note: an experiment does not use the plan" in err
    shown = yaml.safe_load(out)
    assert (shown["train"]["batch_size"], shown["precision"]["compute"]) == (12, "float32")


@pytest.mark.parametrize(
    ("said", "sizes"),
    [
        (["train.batch_size=96"], (96, 48)),
        (["train.batch_size=32"], (32, None)),
        (["recipe=finetune", "train.seq_len=128"], (64, None)),
        (["train.microbatch_size=16"], (48, 16)),
        (["train.microbatch_size=null"], (48, None)),
        (["train.microbatch_size=4"], (48, 4)),
        (["train.microbatch_size=7"], (48, 7)),  # which a start refuses, naming those that divide
        (["train.microbatch_size=2", "train.batch_size=6"], (6, 2)),
    ],
)
def test_a_plans_sizes_go_with_those_that_are_said(said, sizes, planned):
    train = load_config("mesh=cpu-8", *said).train
    assert (train.batch_size, train.microbatch_size) == sizes


def test_what_a_plan_adds_can_be_taken_away(planned, tmp_path):
    (tmp_path / "llama3_1m_cpu-8.yaml").write_text("overrides: [+mesh.compiler_options.xla_foo=1]")
    assert load_config("mesh=cpu-8").mesh.compiler_options == {"xla_foo": 1}
    assert load_config("mesh=cpu-8", "~mesh.compiler_options.xla_foo").mesh.compiler_options == {}


ODD = """# @package _global_
defaults:
  - _study
  - override /tokenizer: bytes
  - /experiment/norm: rms
"""


@pytest.mark.parametrize(
    ("name", "words", "where", "advice"),
    [
        ("train", ["experiment=odd"], "experiment=odd", "next: in a list of defaults, entries that override a group come last"),
        ("train", ["train.steps=a{b"], "train.steps=a{b", "next: values with commas, braces or = need quotes"),
        ("train", ["hydra.run.dir=${nowhere}"], "hydra.run.dir=", ""),
        ("train", ["schedule.warmup_steps=5", "schedule=triangle"], "schedule=triangle\n", "next: one of: constant"),
        ("train", ["train.steps_=5", "train.steps=3"], "train.steps_=5\n", "next: did you mean train.steps?"),
        ("generate", ["promts=a"], "promts=a\n", "next: did you mean prompts?"),
        ("generate", ["model/norm=rms"], "model/norm=rms\n", "next: --cfg job shows all of them"),
    ],
)
def test_what_hydra_says_has_the_place_and_the_advice_of_its_own(name, words, where, advice, tmp_path, typed):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "odd.yaml").write_text(ODD)
    code, _, err = typed(name, *words, "--config-dir", tmp_path)
    assert code == 2
    assert f"where: {where}" in err
    assert advice in err
    assert advice or "next:" not in err


def test_other_verbs_take_flags_too(monkeypatch, tmp_path, typed):
    monkeypatch.chdir(tmp_path)
    (place := tmp_path / "a=b").mkdir()
    code, _, err = typed("generate", "--config-dir", place, "checkpoint=no/such/run", "prompt=it's")
    assert code == 4
    assert err.startswith("error: the folder does not exist")  # and nothing of Hydra's before it
    code, _, err = typed("generate", "-m", "checkpoint=no/such/run", "seed=0,1")
    assert (code, "only train and plan have sweeps" in err) == (2, True)


def test_a_recipe_may_be_taken_out():
    assert load_config("model=llama2_7b", "~recipe").train.batch_size == load_config().train.batch_size


def test_an_interruption_says_how_to_go_on(monkeypatch, tmp_path, typed):
    from llama_eqx.errors import Stopped
    from llama_eqx.training import loop

    def interrupted(config, preemption):
        raise preemption._stopped(signal.SIGINT, "step 7 is saved")

    monkeypatch.setattr(loop, "train", interrupted)
    code, _, err = typed("train", f"run_dir={tmp_path}", "train.seq_len=64")
    assert code == 130
    assert err.startswith("SIGINT: step 7 is saved; exit code 130\nnext: ")
    assert f"train.seq_len=64 run_dir={tmp_path}" in err
    copied = pickle.loads(pickle.dumps(Stopped("a", code=75, next="b")))  # as it goes between processes
    assert str(copied) == "a; exit code 75 (start me again)\nnext: b"


def test_what_is_unexpected_exits_with_1(tmp_path, typed):
    def job(config, overrides):
        raise RuntimeError("surprise")

    code, _, err = typed("train", f"run_dir={tmp_path}", job=job)
    assert code == 1
    assert "surprise" in err
    assert "RuntimeError" in (tmp_path / "log.txt").read_text()


def test_the_package_itself_names_its_verbs():
    done = subprocess.run([sys.executable, "-m", "llama_eqx"], capture_output=True, text=True)
    package = pathlib.Path(compose.__file__).parent
    assert done.returncode == 2
    assert {*re.findall(r"\w+", done.stderr.split("one of: ")[1].splitlines()[0])} == {
        path.stem for path in package.glob("[!_]*.py") if '__name__ == "__main__"' in path.read_text()
    }


@pytest.mark.parametrize(
    "text",
    [
        "it's",
        'say "hi"',
        "a, b",
        "{x: [1",
        "a=b",
        "100%",
        "${seed}",
        "\\${oc.env:HOME}",
        "\\\\${oc.env:HOME}",
        "$HOME",
        "\\n",
        "back\\",
        '\\"',
        "",
        " spaced ",
        "naïve 你好",
        "#",
        "true",
        "1e3",
        "(",
        "~",
    ],
)
def test_text_arrives_as_it_was_typed(text):
    found = compose.compose("generate", [quoted(f"prompt={text}"), quoted("checkpoint=a,b {c}")])
    assert found.prompt == text
    assert found.checkpoint == "a,b {c}"


def test_a_tilde_is_the_home_folder_of_a_run(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    assert compose.compose("train", [quoted("run_dir=~/runs/~a")]).run_dir == "/home/ann/runs/~a"


def test_help_and_typos_are_quick_and_import_no_jax():
    """A fresh process that composes, finds the typo and leaves has not imported the heavy libraries."""
    code = """
import sys
from llama_eqx import train
from llama_eqx.verb import run_verb
sys.argv = ["train", "train.step=3"]
try:
    run_verb("train", train.main)
finally:
    print(sorted({"jax", "torch", "wandb", "orbax"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "did you mean train.steps?" in done.stderr
    assert done.stdout.strip() == "[]"


def test_what_a_verb_imports_is_not_looked_through_for_garbage():
    code = """
import gc, sys
from llama_eqx.verb import run_verb
searches = []
gc.callbacks.append(lambda phase, _: searches.append(phase))
def job(config, overrides):
    import llama_eqx.training.loop
    print(searches.count("stop"))
sys.argv = ["train"]
run_verb("train", job, log=False)
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60).stdout
    assert int(said) < 50  # left alone, Python looks 400 times


def test_a_config_in_python():
    config = load_config("model=llama3_2_1b", "train.steps=7")
    assert (config.model.dims.layers, config.train.steps) == (16, 7)
    with pytest.raises(AttributeError):
        config.seed = 1
