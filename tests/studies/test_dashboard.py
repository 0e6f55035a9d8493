"""The view and the report on W&B are built without a network, and name what runs record."""

import json
import pathlib

import pytest

from llama_eqx import load_config
from llama_eqx.errors import ConfigError
from llama_eqx.studies.dashboard import PANELS, build_report, build_view, dashboard
from llama_eqx.studies.registration import load_registration

pytest.importorskip("wandb_workspaces", reason="the extra `dashboard` is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries of W&B

RECORD = pathlib.Path(__file__).parents[2] / "benchmarks/learning/default/seed0.jsonl"
QUESTION = "rotary_precision"


def spec(built):
    return json.loads(built._to_model().model_dump_json(by_alias=True))  # the only way to see it without an account


def test_panels_draw_what_a_run_records():
    recorded = {name for line in RECORD.read_text().splitlines() for name in json.loads(line)}
    drawn = {metric for metrics in PANELS.values() for metric in metrics}
    assert drawn - recorded == {"perf/mfu"}  # of chips whose peak is known


def test_the_view_has_the_runs_of_the_question_by_arm():
    built = spec(build_view(QUESTION, "me", "llama_eqx"))
    text = json.dumps(built)
    assert (built["entity"], built["project"]) == ("me", "llama_eqx")
    assert '"name": "group"' in text
    assert f'"value": "{QUESTION}"' in text
    assert '"name": "jobType"' in text
    sections = built["spec"]["section"]["panelBankConfig"]["sections"]
    drawn = {section["name"]: [panel["config"]["metrics"] for panel in section["panels"]] for section in sections}
    assert drawn == {name: [[metric] for metric in metrics] for name, metrics in PANELS.items()}
    assert all(panel["config"]["xAxis"] == "tokens" for section in sections for panel in section["panels"])


def test_the_report_says_what_was_registered():
    registration = load_registration(QUESTION)
    text = json.dumps(spec(build_report(QUESTION, registration, "me", "llama_eqx", runs=False)))
    for said in (registration.hash(), str(registration.margin), str(registration.rule), *registration.contrasts):
        assert said in text


def test_the_verb_without_push_needs_no_account():
    lines = dashboard(load_config(f"experiment={QUESTION}", name="dashboard"))
    assert QUESTION in lines[0]
    assert "push=true" in lines[-1]


def test_what_is_missing_is_said():
    with pytest.raises(ConfigError, match="which question"):
        load_config(name="dashboard")
    with pytest.raises(ConfigError, match="a user or a team"):
        load_config(f"experiment={QUESTION}", "push=true", name="dashboard")
