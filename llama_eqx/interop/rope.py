"""Rotary settings under the names of this package and under those of Hugging Face."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llama_eqx.model.rotary import LinearRotaryConfig, Llama3RotaryConfig, PlainRotaryConfig, RotaryConfig, YarnRotaryConfig

# By `rope_type`.
KINDS: dict[str, type[RotaryConfig]] = {
    "default": PlainRotaryConfig,
    "linear": LinearRotaryConfig,
    "llama3": Llama3RotaryConfig,
    "yarn": YarnRotaryConfig,
}
# What a file calls a field, where it has another name here.
NAMES = {"theta": "rope_theta", "original_context": "original_max_position_embeddings"}
# What transformers takes for a key that a file leaves out.
DEFAULTS = {"yarn": {"beta_fast": 32, "beta_slow": 1, "attention_factor": None}}
# Keys of YaRN with the one value that is read.
UNREAD = {"mscale": None, "mscale_all_dim": None, "truncate": True}
INSTEAD = "attention_factor can say what mscale does, and a rotary slot of your own the rest: docs/variants.md"


def rope_parameters(rotary: RotaryConfig) -> dict[str, Any]:
    """The settings as in `rope_parameters`. `rotary` is one of `KINDS` itself, and rounds nowhere."""
    kind = next(kind for kind, each in KINDS.items() if type(rotary) is each)
    values = {NAMES.get(name, name): getattr(rotary, name) for name in _fields(type(rotary))}
    return {"rope_type": kind, **{name: value for name, value in values.items() if value is not None}}


def rotary_settings(config: Mapping[str, Any], wrong: list[str]) -> tuple[type[RotaryConfig], dict[str, Any]]:
    """The kind of rotary settings in a `config.json` and its fields. Appends errors to `wrong`.

    They are in `rope_parameters` or, in older files, in `rope_scaling` and beside it.
    """
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    given = config.get(key) or {}
    if not isinstance(given, dict):
        wrong.append(f"{key} is {given!r}, wanted an object")
        given = {}
    given = {each: value for each, value in given.items() if value is not None}
    name = str(given.get("rope_type", given.get("type", "default")))
    kind = KINDS.get(name, PlainRotaryConfig)
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **DEFAULTS.get(name, {}), **given}
    if name not in KINDS:
        wrong.append(f"{key}.rope_type is {name!r}, and only {', '.join(map(repr, KINDS))} can be read")
    fields = {field: NAMES.get(field, field) for field in _fields(kind)}
    wrong += [f"{key}.{each} is missing" for each in fields.values() if rope.get(each) is None and each not in DEFAULTS.get(name, {})]
    if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1:
        wrong.append(f"partial_rotary_factor is {part!r}, and only whole heads can be turned")
    if kind is YarnRotaryConfig:
        unread = [each for each, same in UNREAD.items() if rope.get(each, same) != same]
        wrong += [f"{key}.{each} is {rope[each]!r}, which cannot be read; {INSTEAD}" for each in unread]
    return kind, {"round_at": "none", **{field: rope.get(each) for field, each in fields.items()}}


def _fields(kind: type[RotaryConfig]) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.name != "round_at"]
