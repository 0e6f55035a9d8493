"""A model's settings against those of the published model that has its sizes."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from llama_eqx.diagnosis.report import Finding
from llama_eqx.dims import Dims
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.model.rotary import RotaryConfig

Published = Callable[[Dims], Mapping[str, LlamaConfig]]  # the published models of about these sizes, by name

# Code Llama (Rozière et al., 2023, arXiv 2308.12950) was trained further from Llama 2, with its sizes, at this theta.
CODE_LLAMA_THETA = 1e6


def check_settings(
    config: LlamaConfig, presets: Mapping[str, LlamaConfig], *, where: str, mean_square: float | None = None
) -> tuple[list[str], list[Finding]]:
    """Facts and findings about eps, rotary embedding, tie and context. `mean_square` is that of the embedding, if it was read.

    Settings are compared with the nearest of `presets` of these sizes. A vocabulary up to a tenth larger or smaller counts as edited.
    """
    alike = {name: preset for name, preset in presets.items() if _sizes(preset.dims, config.dims.vocab) == _sizes(config.dims)}
    if not alike:
        return ["no published Llama has these sizes: its settings cannot be checked"], []
    same_context = {name: preset for name, preset in alike.items() if preset.context == config.context}
    wrong = {name: _differences(config, preset, mean_square) for name, preset in alike.items()}
    nearest = min(same_context or alike, key=lambda name: len(wrong[name]))
    preset, facts, findings = alike[nearest], [], []
    if not wrong[nearest]:
        facts.append(f"eps, rotary embedding and tie are those of {nearest}")
    for field, what, value in wrong[nearest]:
        hint = f"set {field} to {value}, if this is to be {nearest}"
        if others := [name for name in alike if name not in same_context and not wrong[name]]:
            hint += f"; apart from the context of {config.context:,}, all settings are those of {' or '.join(others)}"
        if field == "rotary theta" and getattr(config.rotary, "theta", None) == CODE_LLAMA_THETA:
            findings.append(Finding("note", where, f"{what}. This theta is Code Llama's, which has the sizes of Llama 2"))
        else:
            findings.append(Finding("warning", where, f"{field}: {what}", hint))
    if config.context != preset.context:
        findings.append(Finding("note", where, f"the context is {config.context:,}, and {nearest} was trained for {preset.context:,}"))
    if config.dims.vocab != preset.dims.vocab:
        findings.append(Finding("note", where, f"the vocabulary has {config.dims.vocab:,} ids, and {nearest}'s {preset.dims.vocab:,}"))
    return facts, findings


def phase_error(a: LlamaConfig, b: LlamaConfig) -> tuple[float, int]:
    """How far the angles of the two rotary embeddings drift apart, in radians per position, and the number of pairs that do."""
    apart = np.abs(frequencies(a) - frequencies(b))
    return float(apart.max()), int((apart > 1e-6 * frequencies(b)).sum())


def said_phase_error(a: LlamaConfig, b: LlamaConfig) -> str:
    """Says where a difference of rotary embeddings shows."""
    drift, pairs = phase_error(a, b)
    if pairs == 0:
        return "the angles are the same"
    first, second = (math.ceil(radians / drift) for radians in (0.1, 1.0))
    return (
        f"{pairs} of {a.dims.head_dim // 2} frequencies differ, "
        f"the phase error passes 0.1 rad at position {first:,} and 1 rad at position {second:,}"
    )


def rotary_differences(a: RotaryConfig, b: RotaryConfig) -> list[tuple[str, str, str]]:
    """The settings that decide the angles and differ: the name of each, and both values in words."""
    here, there = (
        {field.name: getattr(rotary, field.name) for field in dataclasses.fields(rotary) if field.name != "round_at"} for rotary in (a, b)
    )
    if ("factor" in here) != ("factor" in there):
        scaling = [f"factor {values['factor']:g}" if "factor" in values else "none" for values in (here, there)]
        here, there = ({"theta": x.get("theta"), "scaling": said} for x, said in zip((here, there), scaling, strict=True))
    said = [{name: f"{value:,g}" if isinstance(value, int | float) else str(value) for name, value in x.items()} for x in (here, there)]
    names = [name for name in said[0] | said[1] if said[0].get(name) != said[1].get(name)]
    return [(name, said[0].get(name, "not set"), said[1].get(name, "not set")) for name in names]


def _sizes(dims: Dims, near: int | None = None) -> dict[str, int | None]:
    """Sizes to compare by; a vocabulary that is near enough counts as `near` itself."""
    sizes = {field.name: getattr(dims, field.name) for field in dataclasses.fields(dims)}
    if near is not None and dims.vocab is not None and abs(near - dims.vocab) <= dims.vocab / 10:
        sizes["vocab"] = near
    return sizes


def _differences(config: LlamaConfig, preset: LlamaConfig, mean_square: float | None) -> list[tuple[str, str, str]]:
    """Each field that differs, what is wrong with it, and the right value."""
    rows = []
    for name, here, there in rotary_differences(config.rotary, preset.rotary):
        rows.append((f"rotary {name}", f"{here}, where {there} is expected: {said_phase_error(config, preset)}", there))
    here, there = getattr(config.norm, "eps", math.nan), getattr(preset.norm, "eps", math.nan)
    if here != there:
        shows = "every position is affected"
        if mean_square:
            off = abs(math.sqrt((mean_square + there) / (mean_square + here)) - 1)
            shows += f", from the first norm on, whose output is off by {off:.2g} of its value"
        rows.append(("eps", f"{here:g}, where {there:g} is expected: {shows}", f"{there:g}"))
    if config.tied != preset.tied:
        here, there = ("", "not ") if config.tied else ("not ", "")
        what = f"the head is {here}tied to the embedding, but is expected {there}to be: every position is affected"
        rows.append(("tie", what, str(preset.tied).lower()))
    return rows


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair, as the model computes them."""
    return np.asarray(config.rotary.build(config.dims).frequencies(), np.float64)
