"""What is wrong with a model whose folder is read as a whole: a run directory, or a folder of Meta."""

import pathlib

from llama_eqx.checkpoint import restore
from llama_eqx.checkpoint.native import CHECKPOINTS
from llama_eqx.diagnosis.files import check_files
from llama_eqx.diagnosis.numbers import check_numbers, said_size, tensors_of
from llama_eqx.diagnosis.report import Report, finding_of
from llama_eqx.diagnosis.settings import Published, check_settings
from llama_eqx.diagnosis.vocabulary import check_vocabulary
from llama_eqx.errors import UserError
from llama_eqx.interop.meta import PARAMS
from llama_eqx.interop.pretrained import located, open_pretrained


def examine_native(path: pathlib.Path, published: Published, weights: bool) -> Report:
    """Examines the newest step, or the one that the path names."""
    folder, step = located(path)
    saved = restore.steps(folder / CHECKPOINTS)
    facts = [f"steps {', '.join(map(str, saved))}; this is {saved[-1] if step is None else step}"] if saved else []
    return _examine(path, folder, "a run directory", facts, CHECKPOINTS, published, weights)


def examine_meta(folder: pathlib.Path, published: Published, weights: bool) -> Report:
    return _examine(folder, folder, "a folder of Meta", [], PARAMS, published, weights)


def _examine(
    path: pathlib.Path,
    folder: pathlib.Path,
    kind: str,
    facts: list[str],
    where: str,
    published: Published,
    weights: bool,
) -> Report:
    title, findings = f"{path}: {kind}", check_files(folder)
    try:
        opened = open_pretrained(path)
    except UserError as error:
        if pathlib.Path(error.where).name not in {found.where for found in findings}:  # else it has been reported
            findings.append(finding_of(error, folder, where))
        return Report(title, tuple(facts), tuple(findings))
    tensors, mean_square = tensors_of(opened, where), None
    facts += [said_size(tensors, weights), *opened.notes]
    if weights:
        mean_square, wrong = check_numbers(tensors, "embed")
        findings += wrong
    said, wrong = check_settings(opened.config, published(opened.config.dims), where=where, mean_square=mean_square)
    facts += said
    findings += wrong + check_vocabulary(folder, opened.config, facts)[1]
    return Report(title, tuple(facts), tuple(findings))
