"""Settings of real sizes against the published models: what is right gives no finding, what is wrong says from which position."""

import dataclasses
import json

import numpy as np
import pytest

from llama_eqx.diagnosis.examination import examine
from llama_eqx.diagnosis.settings import check_settings, said_phase_error
from llama_eqx.doctor import published
from llama_eqx.interop.huggingface import config_to_huggingface
from llama_eqx.model.norm import RMSNormConfig


def changed(config, **changes):
    """`rotary=...` a dict changes fields of the slot, anything else takes the place of the field."""
    values = {key: dataclasses.replace(getattr(config, key), **new) if isinstance(new, dict) else new for key, new in changes.items()}
    return dataclasses.replace(config, **values)


def test_every_preset_is_right(presets):
    assert len(presets) == 16
    for name, config in presets.items():
        facts, findings = check_settings(config, presets, where="config.json")
        assert findings == []
        assert name in facts[0] or name == "llama3_3_70b"  # which is llama3_1_70b in all its settings


def test_published_models_are_found_by_their_sizes(presets):
    assert published(presets["llama3_2_1b"].dims) == {"llama3_2_1b": presets["llama3_2_1b"]}
    assert published(presets["llama2_7b"].dims).keys() == {"llama1_7b", "llama2_7b", "llama3_8b", "llama3_1_8b"}


# The preset, what is changed in it, the severity, and what is said: all of it, so that a number is seen to move.
EPS_1E6 = RMSNormConfig(eps=1e-6)
WRONG = {
    "3.2 with the factor of 3.1": (
        "llama3_2_1b",
        lambda c, p: changed(c, rotary={"factor": 8.0}),
        "warning",
        [
            "rotary factor: 8, where 32 is expected",
            "17 of 32 frequencies differ",
            "passes 0.1 rad at position 1,050 and 1 rad at position 10,495",
            "if this is to be llama3_2_1b",
        ],
    ),
    "3.1 without scaling": (
        "llama3_1_8b",
        lambda c, p: changed(c, rotary=p["llama3_8b"].rotary),
        "warning",
        [
            "rotary scaling: none, where factor 8 is expected",
            "35 of 64 frequencies differ",
            "0.1 rad at position 113 and 1 rad at position 1,125",
            "apart from the context of 131,072, all settings are those of llama3_8b",
        ],
    ),
    "theta of Llama 2 in Llama 3": (
        "llama3_8b",
        lambda c, p: changed(c, rotary={"theta": 1e4}),
        "warning",
        [
            "rotary theta: 10,000, where 500,000 is expected",
            "63 of 64 frequencies differ",
            "1 rad at position 8",
        ],
    ),
    "theta of Llama 3 in Llama 2": (
        "llama2_70b",
        lambda c, p: changed(c, rotary={"theta": 5e5}),
        "warning",
        ["if this is to be llama2_70b"],
    ),
    "Code Llama": ("llama2_13b", lambda c, p: changed(c, rotary={"theta": 1e6}, context=16384), "note", ["This theta is Code Llama's"]),
    "eps of Llama 1 in Llama 2": (
        "llama2_70b",
        lambda c, p: changed(c, norm=EPS_1E6),
        "warning",
        ["eps: 1e-06, where 1e-05 is expected: every position is affected"],
    ),
    "eps of Llama 2 in Llama 1": (
        "llama1_7b",
        lambda c, p: changed(c, norm={"eps": 1e-5}),
        "warning",
        ["eps: 1e-05, where 1e-06", "apart from the context of 2,048"],
    ),
    "untied": (
        "llama3_2_3b",
        lambda c, p: changed(c, tied=False),
        "warning",
        ["the head is not tied to the embedding, but is expected to be"],
    ),
    "tied": (
        "llama3_8b",
        lambda c, p: changed(c, tied=True),
        "warning",
        ["the head is tied to the embedding, but is expected not to be"],
    ),
    "context": (
        "llama3_2_1b",
        lambda c, p: changed(c, context=8192),
        "note",
        ["the context is 8,192, and llama3_2_1b was trained for 131,072"],
    ),
    "vocabulary": (
        "llama2_7b",
        lambda c, p: changed(c, dims={"vocab": 32016}),
        "note",
        ["the vocabulary has 32,016 ids, and llama2_7b's 32,000"],
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_said(presets, wrong):
    name, change, severity, words = WRONG[wrong]
    _, findings = check_settings(change(presets[name], presets), presets, where="config.json")
    said = [finding for finding in findings if all(word in str(finding) for word in words)]
    assert [finding.severity for finding in said] == [severity], "\n".join(map(str, findings))
    assert not [finding for finding in findings if finding not in said and finding.severity != "note"]


def test_of_other_sizes_nothing_is_claimed(presets):
    config = changed(presets["llama2_7b"], dims={"mlp": 11000}, rotary={"theta": 7.0})
    assert check_settings(config, presets, where="") == (["no published Llama has these sizes: its settings cannot be checked"], [])
    other_vocabulary = changed(presets["llama3_8b"], dims={"vocab": 64000})
    assert check_settings(other_vocabulary, presets, where="")[1] == []


def test_the_weight_of_eps(presets):
    """The first norm of rows with this mean square, by numpy."""
    config, square = changed(presets["llama2_70b"], norm={"eps": 1e-6}), 1e-4
    right, wrong = (1 / np.sqrt(square + eps) for eps in (1e-5, 1e-6))
    _, (finding,) = check_settings(config, presets, where="", mean_square=square)
    assert f"off by {wrong / right - 1:.2g} of its value" in finding.what


def test_positions_are_where_angles_part(presets):
    """The positions said are the first at which angles in float64 are 0.1 and 1 rad apart."""
    config = presets["llama3_2_1b"]
    other = changed(config, rotary={"factor": 8.0})
    pairs = np.arange(0, 64, 2) / 64
    frequency = 500_000.0**-pairs
    kept = np.clip((8192 * frequency / (2 * np.pi) - 1) / 3, 0, 1)
    here, there = (kept * frequency + (1 - kept) * frequency / factor for factor in (32, 8))
    positions = np.arange(20_000)[:, None]
    apart = np.abs(positions * here - positions * there).max(axis=1)
    first, second = (int((apart >= radians).argmax()) for radians in (0.1, 1))
    assert (first, second) == (1050, 10495)
    assert f"0.1 rad at position {first:,} and 1 rad at position {second:,}" in said_phase_error(other, config)


def test_in_a_folder_without_weights(presets, tmp_path):
    config = config_to_huggingface(presets["llama3_2_1b"])
    config["rope_scaling"]["factor"] = config["rope_parameters"]["factor"] = 8.0
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = examine(str(tmp_path), published, weights=True)
    assert "position 1,050" in str(report)
    assert "no weights here" in str(report)
