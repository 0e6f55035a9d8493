"""A model as `transformers` computes it."""

import math
import shlex
from typing import Any

import numpy as np
from jaxtyping import Int

from llama_eqx.diagnosis.report import Finding
from llama_eqx.diagnosis.settings import frequencies
from llama_eqx.errors import CheckpointError, ConfigError, first_line
from llama_eqx.interop.pretrained import format_of
from llama_eqx.model.llama import LlamaConfig

FREQUENCIES = 1e-6  # relative: PyTorch's and XLA's float32 powers differ by units in the last place


def transformers_parts(
    path: str, config: LlamaConfig, tokens: Int[np.ndarray, "batch seq"], positions: Int[np.ndarray, "batch seq"]
) -> tuple[list[tuple[str, np.ndarray]], list[str], list[Finding]]:
    """The residual after the embedding and each half of each layer, and the logits; with facts and findings about the reading.

    Raises `CheckpointError` for what `transformers` cannot read, `ConfigError` where it is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed", where="against=transformers", next="pip install torch transformers") from None
    transformers.utils.logging.disable_progress_bar()
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            path, dtype=torch.float32, attn_implementation="eager", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        what = f"transformers cannot read it: {first_line(error)}"
        verb, rest = ("doctor path", "") if format_of(path) == "hf" else ("convert from", " to=FOLDER format=hf makes such a folder")
        advice = f"it reads Hugging Face folders: python -m llama_eqx.{verb}={shlex.quote(path)}{rest}"
        raise CheckpointError(what, where=path, next=advice) from error
    facts, findings = [], [Finding("error", path, f"transformers reports {name}: {what}") for name, what in loaded.items() if what]

    # Frequencies are compared separately. One unit in their last place is a milliradian at 20,000, so the rest is computed with equal ones.
    held, own = model.model.rotary_emb.inv_freq, frequencies(config)
    off = float(np.abs(held.double().numpy() / own - 1).max())
    if off < FREQUENCIES:
        held.copy_(torch.tensor(own))
        facts.append(f"rotary frequencies differ relatively by {off:.1g}; transformers was given this package's")
    else:
        drift = float(np.abs(held.double().numpy() - own).max())
        what = f"rotary frequencies differ: the phase error passes 0.1 rad at position {math.ceil(0.1 / drift):,}"
        findings.append(Finding("error", "rotary", what, "report it with the config.json"))

    parts: list[tuple[str, np.ndarray]] = []

    def keep(name: str) -> Any:
        return lambda module, inputs, output: parts.append((name, (output[0] if isinstance(output, tuple) else output).numpy()))

    def keep_input(name: str) -> Any:
        return lambda module, inputs: parts.append((name, inputs[0].numpy()))

    model.model.embed_tokens.register_forward_hook(keep("embedding"))
    for i, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(keep_input(f"layer {i} attention"))
        layer.register_forward_hook(keep(f"layer {i} feed-forward"))
    model.lm_head.register_forward_hook(keep("logits"))
    with torch.no_grad():
        ids = torch.tensor(tokens).long()
        # With a mask, transformers does not take the gap in the positions for the boundary of two packed texts.
        model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.tensor(positions).long())
    return parts, facts, findings
