"""Everything that is wrong with a Hugging Face folder, where a reader would stop at the first file that it cannot use."""

import pathlib
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llama_eqx.diagnosis.files import check_files, read_json
from llama_eqx.diagnosis.numbers import Tensor, check_numbers, condensed, said_size
from llama_eqx.diagnosis.report import Finding, Report, finding_of
from llama_eqx.diagnosis.settings import Published, check_settings
from llama_eqx.diagnosis.vocabulary import check_ends, check_vocabulary
from llama_eqx.errors import CheckpointError
from llama_eqx.files import mistaken
from llama_eqx.interop.files import inside, refuse_code
from llama_eqx.interop.huggingface import CONFIG, DTYPES, EMBED, HEAD, INDEX, SINGLE, Filed, config_from_huggingface, filed_tensors
from llama_eqx.interop.table import TABLE, torch_shape
from llama_eqx.interop.weights import require_tensors, tensor_axes, tensor_shapes
from llama_eqx.model.llama import LlamaConfig

CONFIG_KEYS = {
    "vocab": "vocab_size",
    "embed": "hidden_size",
    "heads head_dim": "num_attention_heads x head_dim",
    "kv_heads head_dim": "num_key_value_heads x head_dim",
    "mlp": "intermediate_size",
}
READABLE = {dtype.name for dtype in DTYPES.values()}
AGAIN = "download it again"

Files = dict[str, dict[str, Filed]]  # the tensors of every file that could be opened


def examine_huggingface(folder: pathlib.Path, published: Published, weights: bool) -> Report:
    findings, facts = check_files(folder), []
    try:
        refuse_code(folder, CONFIG, "tokenizer_config.json")
    except CheckpointError as error:
        # A file that is not JSON is reported below.
        findings += [finding_of(error, folder, CONFIG)] if "code" in error.what else []
    config, tree = _check_config(folder, findings)
    files = _open(folder, findings)
    names = {name: (file, filed) for file, tensors in files.items() for name, filed in tensors.items()}
    if names and config is not None:
        findings += _check_names(config, names)
    if names and tree is not None:
        findings += _check_dtype(tree, {filed.kind for _, filed in names.values()})
    tensors, mean_square = {name: _tensor(file, filed) for name, (file, filed) in names.items() if filed.kind in DTYPES}, None
    if tensors:
        facts.append(said_size(tensors, weights))
    if weights:
        mean_square, wrong = check_numbers(tensors, EMBED)
        findings += wrong + _check_tie(config, tensors)
    if config is not None:
        said, wrong = check_settings(config, published(config.dims), where=CONFIG, mean_square=mean_square)
        facts += said
        findings += wrong
        tokenizer, wrong = check_vocabulary(folder, config, facts)
        findings += wrong
        check_ends(folder, tree or {}, config.dims.vocab or 0, tokenizer, findings)
    facts.append("the order of rotary pairs cannot be checked without a reference: against=OTHER")
    return Report(f"{folder}: a folder of Hugging Face", tuple(facts), tuple(findings))


def _check_config(folder: pathlib.Path, findings: list[Finding]) -> tuple[LlamaConfig | None, dict[str, Any] | None]:
    """The model that config.json describes, if it can be read, and its tree. Contradictions in it are added to `findings`."""
    tree = read_json(folder, CONFIG, findings)
    if tree is None:
        if not (folder / CONFIG).exists():
            findings.append(Finding("error", CONFIG, "missing: the model's sizes are not known", AGAIN))
        return None, None
    old, new = (found if isinstance(found := tree.get(key), dict) else {} for key in ("rope_scaling", "rope_parameters"))
    if "rope_theta" in tree:
        old = {"rope_theta": tree["rope_theta"], **old}
    for key in sorted(old.keys() & new.keys()):
        if old[key] != new[key]:
            what = f"{key} is {old[key]!r} by the older keys and {new[key]!r} in rope_parameters: which one is used depends on the reader"
            findings.append(Finding("error", CONFIG, what, "leave one of them out"))
    try:
        return config_from_huggingface(tree), tree
    except CheckpointError as error:
        findings += [Finding("error", CONFIG, line) for line in error.what.splitlines()]
    return None, tree


def _open(folder: pathlib.Path, findings: list[Finding]) -> Files:
    """The headers of the files that a reader would open. What is wrong with the files is added to `findings`."""
    present = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated"))
    weight_map, total = None, None
    if (folder / SINGLE).exists():
        names = [SINGLE]
        if (folder / INDEX).exists():
            findings.append(Finding("warning", INDEX, f"beside {SINGLE}, which is read instead", "delete the one that is out of date"))
    elif (folder / INDEX).exists():
        index, names = read_json(folder, INDEX, findings) or {}, present
        weight_map = index.get("weight_map")
        if isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values()):
            names = sorted(set(weight_map.values()))
        else:
            weight_map = None
            findings.append(Finding("error", INDEX, "weight_map is not a map of names to files", AGAIN))
        total = index["metadata"].get("total_size") if isinstance(index.get("metadata"), dict) else None
    elif present:
        findings.append(Finding("error", INDEX, f"missing, so no reader knows of {', '.join(present)}", AGAIN))
        names = present
    else:
        pickled = sorted(path.name for pattern in ("*.bin", "*.pth", "*.pt") for path in folder.glob(pattern))
        what = f"weights are pickled ({', '.join(pickled)})" if pickled else "there are no weights here"
        findings.append(Finding("error", SINGLE, what, "save them as safetensors where they came from" if pickled else "download them"))
        return {}
    for name in present:
        if name not in names:
            hint = "delete it, or download the index again"
            findings.append(Finding("warning", name, "a shard too many: no tensor is read from it", hint))
    files: Files = {}
    for name in names:
        try:
            file = inside(folder, name)
        except CheckpointError as error:
            findings.append(Finding("error", INDEX, error.what, error.next))
            continue
        if not file.is_file():
            findings.append(Finding("error", name, "a missing shard: the index names it", AGAIN))
        elif not mistaken(file, ""):
            try:
                files[name] = filed_tensors(file)
            except CheckpointError as error:
                findings.append(Finding("error", name, error.what, error.next or AGAIN))
    if weight_map is not None:
        findings += _check_index(weight_map, total, files)
    return files


def _check_index(weight_map: Mapping[str, str], total: Any, files: Files) -> list[Finding]:
    findings, hint = [], "download the index and the shards again, from one revision"
    if lost := [name for name, file in weight_map.items() if file in files and name not in files[file]]:
        what = f"{len(lost)} tensors are not in the file that the index names for them: {condensed(lost)}"
        findings.append(Finding("error", INDEX, what, hint))
    if unknown := [name for tensors in files.values() for name in tensors if name not in weight_map]:
        findings.append(Finding("error", INDEX, f"{len(unknown)} tensors of the shards are not in the index: {condensed(unknown)}", hint))
    kinds = [filed for tensors in files.values() for filed in tensors.values()]
    if files.keys() == set(weight_map.values()) and isinstance(total, int) and all(filed.kind in DTYPES for filed in kinds):
        size = sum(int(np.prod(filed.shape)) * DTYPES[filed.kind].itemsize for filed in kinds)
        if size != total:
            findings.append(Finding("note", INDEX, f"total_size is {total:,} bytes, and the shards hold {size:,}"))
    return findings


def _check_names(config: LlamaConfig, found: Mapping[str, tuple[str, Filed]]) -> list[Finding]:
    """Finds tensors that are missing, unexpected, of another shape or of an unreadable dtype. A wrong size is reported once, by its key."""
    findings, sizes, expected = [], defaultdict(list), {}
    try:
        require_tensors(config, len(found), where=CONFIG)
    except CheckpointError as error:
        return [Finding("error", CONFIG, error.what, "mend num_hidden_layers")]
    axes = tensor_axes(config)
    for key, shape in tensor_shapes(config).items():
        inputs, name, *_ = TABLE[key[0]]
        sides = (" ".join(axes[key][inputs:]), " ".join(axes[key][:inputs])) if inputs else axes[key]
        expected[name.format(layer=key[1])] = (sides, torch_shape(shape, inputs))
    for name, (sides, shape) in expected.items():
        if name not in found:
            continue
        file, filed = found[name]
        if len(filed.shape) != len(shape):
            findings.append(Finding("error", file, f"{name} is {filed.shape}, wanted {shape}"))
            continue
        for side, here, there in zip(sides, shape, filed.shape, strict=True):
            if here != there:
                sizes[side, here, there].append(name)
    for (side, here, there), names in sizes.items():
        what = f"{CONFIG_KEYS[side]} is {here:,}, but {there:,} in the weights: {condensed(names)}"
        findings.append(Finding("error", CONFIG, what, f"set {CONFIG_KEYS[side]} to {there}, or find the weights of this config"))
    if missing := [name for name in expected if name not in found]:
        hint = '"tie_word_embeddings": true, if the head is the embedding' if missing == [HEAD] else "download or convert them again"
        findings.append(Finding("error", CONFIG, f"{len(missing)} tensors are missing: {condensed(missing)}", hint))
    # Old files hold the rotary frequencies, and a second copy of a tied table.
    known = expected.keys() | ({HEAD} if config.tied else set())
    if extra := [name for name in found if name not in known and not name.endswith("rotary_emb.inv_freq")]:
        layers = any(name.startswith("model.layers.") for name in extra)
        hint = "num_hidden_layers is too small, or this is not a plain Llama" if layers else "this is not a plain Llama"
        findings.append(Finding("error", CONFIG, f"{len(extra)} tensors are not part of this model: {condensed(extra)}", hint))
    kinds = defaultdict(list)
    for name, (_, filed) in found.items():
        kinds[filed.kind].append(name)
    for kind in kinds.keys() - DTYPES.keys():
        hint = f"the readable dtypes are {', '.join(DTYPES)}: use weights that are not quantised"
        findings.append(Finding("error", CONFIG, f"{len(kinds[kind])} tensors are {kind}: {condensed(kinds[kind])}", hint))
    if len(mixed := kinds.keys() & DTYPES.keys()) > 1:
        rare = min(mixed, key=lambda kind: len(kinds[kind]))
        what = f"the dtypes are mixed: {condensed(kinds[rare])} in {rare}, others in {' and '.join(sorted(mixed - {rare}))}"
        findings.append(Finding("note", CONFIG, what))
    return findings


def _check_dtype(tree: Mapping[str, Any], kinds: set[str]) -> list[Finding]:
    """Warns when transformers, which reads weights in the dtype that the config names, would round them."""
    said = str(tree.get("dtype") or tree.get("torch_dtype")).removeprefix("torch.")
    names = {DTYPES[kind].name for kind in kinds & DTYPES.keys()}
    if finer := sorted(name for name in names if jnp.promote_types(name, said) != said) if said in READABLE else []:
        what = f"dtype is {said}, but the weights are {' and '.join(finer)}: transformers rounds them as it reads"
        return [Finding("warning", CONFIG, what, "set dtype to that of the weights")]
    return []


def _check_tie(config: LlamaConfig | None, tensors: Mapping[str, Tensor]) -> list[Finding]:
    if config is None or not {EMBED, HEAD} <= tensors.keys() or tensors[EMBED].shape != tensors[HEAD].shape:
        return []
    apart = max(float(np.abs(a - b).max()) for a, b in zip(tensors[EMBED].rows(), tensors[HEAD].rows(), strict=True))
    if config.tied and apart != 0:
        what = f"tied, yet stored twice and different: {HEAD} and {EMBED} are up to {apart:.3g} apart, which affects every logit"
        return [Finding("error", CONFIG, what, '"tie_word_embeddings": false if the head was trained apart, else delete it')]
    if not config.tied and apart == 0:
        what = f"not tied, yet {HEAD} is a copy of {EMBED}: they diverge from the first training step on"
        return [Finding("note", CONFIG, what, '"tie_word_embeddings": true, if they are meant to be one')]
    return []


def _tensor(file: str, filed: Filed) -> Tensor:
    return Tensor(file, filed.shape, DTYPES[filed.kind], lambda index: filed.map()[index])
