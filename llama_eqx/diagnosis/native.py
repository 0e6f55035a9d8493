"""What is wrong with a run directory, or with a folder of the same shape that holds weights alone."""

import math
import pathlib
from collections.abc import Mapping

import equinox as eqx
import jax
import numpy as np
from tqdm import tqdm

from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.native import CHECKPOINTS, CONFIG, TOKENIZER, read_config
from llama_eqx.config import load
from llama_eqx.data.tokenizer import load_tokenizer
from llama_eqx.diagnosis.files import check_files
from llama_eqx.diagnosis.report import Finding, Report
from llama_eqx.diagnosis.settings import check_settings
from llama_eqx.diagnosis.vocabulary import Vocabulary, check_vocabulary
from llama_eqx.errors import UserError
from llama_eqx.model.llama import LlamaConfig
from llama_eqx.sharding import parameter_names


def examine_native(folder: pathlib.Path, step: int | None, presets: Mapping[str, LlamaConfig], weights: bool) -> Report:
    """Config, tokenizer and the weights of one step, the newest unless it is given."""
    findings, facts = check_files(folder), []
    config = mean_square = None
    try:
        config = load(read_config(folder).get("model"), "model")
        if not isinstance(config, LlamaConfig):
            config = findings.append(Finding("error", CONFIG, "it describes no Llama under the key `model`"))
    except UserError as error:
        findings.append(finding(error, CONFIG))
    saved = restore.steps(folder / CHECKPOINTS)
    if not saved:
        findings.append(Finding("error", CHECKPOINTS, "no checkpoint has been saved", "let the run reach its first save: see checkpoint.every"))
    elif step is not None and step not in saved:
        findings.append(Finding("error", CHECKPOINTS, f"step {step} is not saved", f"saved steps: {', '.join(map(str, saved))}"))
    else:
        step = saved[-1] if step is None else step
        facts.append(f"steps {', '.join(map(str, saved))}; this is of {step}")
        mean_square, said, wrong = _examine_weights(folder / CHECKPOINTS / str(step), config, weights)
        facts += said
        findings += wrong
    if config is not None:
        said, wrong = check_settings(config, presets, where=CONFIG, mean_square=mean_square)
        facts += said
        findings += wrong
        findings += _check_tokenizer(folder / TOKENIZER, config, facts)
    return Report(f"{folder}: a run directory", tuple(facts), tuple(findings))


def finding(error: UserError, where: str) -> Finding:
    """What a reader raised."""
    return Finding("error", error.where or where, "; ".join(error.what.splitlines()), error.next)


def _examine_weights(path: pathlib.Path, config: LlamaConfig | None, weights: bool) -> tuple[float | None, list[str], list[Finding]]:
    """The mean square of the embedding, facts and findings."""
    where, findings, mean_square = f"{CHECKPOINTS}/{path.name}", [], None
    try:
        found = restore.filed(path, "model")
        dtypes = sorted({str(leaf.dtype) for leaf in found.values()})
        total = sum(math.prod(leaf.shape) for leaf in found.values())
        facts = [f"{total:,} parameters in {len(found)} arrays, {' and '.join(dtypes)}" + ("" if weights else ", not read")]
        if config is not None:
            model = eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0))
            wanted = dict(zip(parameter_names(model), (leaf.shape for leaf in jax.tree.leaves(model)), strict=True))
            for name in sorted(wanted.keys() | found.keys()):
                here, there = wanted.get(name, "nothing"), found[name].shape if name in found else "nothing"
                if here != there:
                    what = f"{name} is {here} by {CONFIG} and {there} in the checkpoint"
                    findings.append(Finding("error", where, what, f"the {CONFIG} of this run"))
        if weights:
            with tqdm(total=total, desc="reading", unit=" numbers", unit_scale=True, disable=None) as progress:
                for name, array in restore.read_each(path, "model"):
                    values = np.asarray(array)
                    finite = np.isfinite(values)
                    if not finite.all():
                        nan = int(np.isnan(values).sum())
                        at = tuple(int(i) for i in np.unravel_index(int((~finite).argmax()), values.shape))
                        what = f"{name} has {nan:,} NaN and {int((~finite).sum()) - nan:,} infinite of {values.size:,} numbers, the first at {at}"
                        findings.append(Finding("error", where, what, "an earlier step: checkpoints/STEP"))
                    elif name == "embed":
                        mean_square = float(np.square(values, dtype=np.float32).mean())
                    progress.update(values.size)
    except UserError as error:
        return mean_square, [], [*findings, finding(error, where)]
    return mean_square, facts, findings


def _check_tokenizer(folder: pathlib.Path, config: LlamaConfig, facts: list[str]) -> list[Finding]:
    if not folder.is_dir():
        facts.append("no tokenizer beside the weights")
        return []
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        return [finding(error, TOKENIZER)]
    facts.append(f"tokenizer: {tokenizer.kind}, {tokenizer.vocab:,} ids")
    return check_vocabulary(config.dims.vocab or 0, Vocabulary(TOKENIZER, tokenizer.vocab, {}))
