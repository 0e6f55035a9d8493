"""The results of `python -m llama_eqx.evaluate`, for people and as JSON."""

import math
from typing import Any

from llama_eqx.config import dump
from llama_eqx.evaluation.perplexity import Document, EvaluateConfig, Evaluated, Result
from llama_eqx.tracking.provenance import software

SHOWN = 3  # documents at either end


def said(config: EvaluateConfig, found: Evaluated) -> str:
    """The results as lines."""
    step = "" if found.step is None else f", step {found.step[0]:,}" + (f" of {found.step[1]:,}" if found.step[1] else "")
    lines = [f"model       {config.checkpoint}{step}, {found.parameters:,} parameters"]
    for name, result in found.results.items():
        lines += ["", f"[{name}]"] if name else []
        lines += _lines(result, found)
    return "\n".join(lines)


def saved(config: EvaluateConfig, found: Evaluated) -> dict[str, Any]:
    """The results as plain containers. NaN, for an interval that cannot be computed, becomes None."""

    def of(result: Result) -> dict[str, Any]:
        interval = None if math.isnan(result.low) else [result.low, result.high]
        return {
            "loss": result.loss,
            "loss_interval_95": interval,
            "interval_over": result.clusters,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "accuracy": result.accuracy,
            "tokens": result.tokens,
            "bytes": result.bytes,
            "windows": result.windows,
            "by_position": [{"from": first, "loss": loss, "tokens": tokens} for first, (loss, tokens) in result.by_position.items()],
            "documents": [document._asdict() for document in result.documents],
        }

    results = {name or "all": of(result) for name, result in found.results.items()}
    settings = {"length": found.length, "stride": found.stride, "parameters": found.parameters, "step": found.step and found.step[0]}
    return {**settings, "results": results, "config": dump(config), **software(), "notes": found.notes}


def _lines(result: Result, found: Evaluated) -> list[str]:
    windows = f"{result.windows:,} windows of up to {found.length:,}"
    if found.stride < found.length:
        windows += f", a new one every {found.stride:,}"
    interval = perplexity = "too few for an interval"
    if not math.isnan(result.low):
        interval = f"{result.low:.4f} to {result.high:.4f}, 95% over {result.clusters}"
        perplexity = f"{math.exp(result.low):,.3f} to {math.exp(result.high):,.3f}"
    lines = [
        f"text        {result.tokens:,} tokens predicted, {result.bytes:,} bytes in {len(result.documents):,} documents; {windows}",
        f"loss        {result.loss:.4f} nats per token ({interval})",
        f"perplexity  {result.perplexity:,.3f} ({perplexity})",
        f"bits        {result.bits_per_byte:.4f} per byte",
        f"accuracy    {result.accuracy:.2%} of the tokens are the most probable one",
        "",
        "position         loss  tokens",
    ]
    for first, (loss, tokens) in result.by_position.items():
        span = f"{first:,}" if first < 2 else f"{first:,}-{2 * first - 1:,}"
        lines.append(f"{span:<14}{loss:>7.4f}  {tokens:,}")
    if len(result.documents) > 1:
        ranked = sorted(result.documents, key=lambda document: document.loss)
        easy, hard = ranked[:SHOWN], ranked[SHOWN:][-SHOWN:]
        lines += ["", "document         loss  tokens", *map(_document, easy)]
        lines += ["…"] * (len(ranked) > len(easy) + len(hard)) + [_document(document) for document in hard]
    return lines


def _document(document: Document) -> str:
    return f"{'':<14}{document.loss:>7.4f}  {document.tokens:<8,} {document.name}"
