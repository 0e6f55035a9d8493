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

# Code Llama (Rozière et al., 2023, arXiv 2308.12950) was trained on from Llama 2, with its sizes, at this theta.
CODE_LLAMA_THETA = 1e6


def check_settings(
    config: LlamaConfig, presets: Mapping[str, LlamaConfig], *, where: str, mean_square: float | None = None
) -> tuple[list[str], list[Finding]]:
    """Facts and findings about eps, rotary embedding, tie and context. `mean_square` is that of the embedding, if it was read.

    The nearest of `presets` with these sizes is the measure; a vocabulary up to a tenth larger or smaller is taken for an edited one.
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
            hint += f"; all would be right for {' or '.join(others)}, but for the context of {config.context:,}"
        if field == "rotary" and getattr(config.rotary, "theta", None) == CODE_LLAMA_THETA:
            findings.append(Finding("note", where, f"{what}. This theta is Code Llama's, which has the sizes of Llama 2"))
        else:
            findings.append(Finding("warning", where, f"{field}: {what}", hint))
    if config.context != preset.context:
        findings.append(Finding("note", where, f"the context is {config.context:,}, and {nearest} was trained for {preset.context:,}"))
    if config.dims.vocab != preset.dims.vocab:
        findings.append(Finding("note", where, f"the vocabulary has {config.dims.vocab:,} ids, and {nearest}'s {preset.dims.vocab:,}"))
    return facts, findings


def phase_error(a: LlamaConfig, b: LlamaConfig) -> tuple[float, int]:
    """By how much the angles of the two rotary embeddings drift apart, in radians per position, and in how many pairs they do."""
    apart = np.abs(frequencies(a) - frequencies(b))
    return float(apart.max()), int((apart > 1e-6 * frequencies(b)).sum())


def said_phase_error(a: LlamaConfig, b: LlamaConfig) -> str:
    """Where a difference of rotary embeddings shows, in words."""
    drift, pairs = phase_error(a, b)
    if pairs == 0:
        return "the angles are the same"
    first, second = (math.ceil(radians / drift) for radians in (0.1, 1.0))
    return (
        f"{pairs} of {a.dims.head_dim // 2} frequencies differ, "
        f"the error of phase passes 0.1 rad at position {first:,} and 1 rad at position {second:,}"
    )


def said_rotary(rotary: RotaryConfig) -> str:
    """`theta 500,000, factor 32` of a rotary config."""
    values = {field.name: getattr(rotary, field.name) for field in dataclasses.fields(rotary)}
    said = [f"{name} {value:,g}" for name, value in values.items() if isinstance(value, int | float)]
    return ", ".join(said if "factor" in values else [*said, "no scaling"])


def _sizes(dims: Dims, near: int | None = None) -> dict[str, int | None]:
    """Sizes to compare by; a vocabulary that is near enough counts as `near` itself."""
    sizes = {field.name: getattr(dims, field.name) for field in dataclasses.fields(dims)}
    if near is not None and dims.vocab is not None and abs(near - dims.vocab) <= dims.vocab / 10:
        sizes["vocab"] = near
    return sizes


def _differences(config: LlamaConfig, preset: LlamaConfig, mean_square: float | None) -> list[tuple[str, str, str]]:
    """Field, what is wrong with it, and the right value."""
    rows = []
    if said_rotary(config.rotary) != said_rotary(preset.rotary):
        here, there = said_rotary(config.rotary), said_rotary(preset.rotary)
        rows.append(("rotary", f"{here}, where {there} is expected: {said_phase_error(config, preset)}", there))
    here, there = getattr(config.norm, "eps", math.nan), getattr(preset.norm, "eps", math.nan)
    if here != there:
        shows = "it shows at every position"
        if mean_square:
            off = abs(math.sqrt((mean_square + there) / (mean_square + here)) - 1)
            shows += f", from the first norm on, which it puts off by {off:.2g} of its value"
        rows.append(("eps", f"{here:g}, where {there:g} is expected: {shows}", f"{there:g}"))
    if config.tied != preset.tied:
        here, there = ("", "not ") if config.tied else ("not ", "")
        what = f"the head is {here}tied to the embedding, where it is expected {there}to be: it shows at every position"
        rows.append(("tie", what, str(preset.tied).lower()))
    return rows


def frequencies(config: LlamaConfig) -> np.ndarray:
    """Radians per position of each pair, as the model computes them."""
    return np.asarray(config.rotary.build(config.dims).frequencies(), np.float64)
