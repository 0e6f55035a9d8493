"""Llama folders of Hugging Face, read and written without torch or transformers."""

import contextlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.table import TABLE, from_torch, to_torch, torch_shape
from llama_eqx.model.attention import GroupedQueryAttentionConfig
from llama_eqx.model.block import PreNormBlockConfig
from llama_eqx.model.feed_forward import GatedFeedForwardConfig
from llama_eqx.model.init import FanInInitConfig
from llama_eqx.model.llama import Llama, LlamaConfig
from llama_eqx.model.norm import RMSNormConfig
from llama_eqx.model.rotary import Llama3RotaryConfig, PlainRotaryConfig, RotaryConfig
from llama_eqx.sharding import parameter_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


def load_huggingface(path: str | os.PathLike, dtype: DTypeLike | None = None) -> Llama:
    """The Llama in a folder with `config.json` and safetensors, one file or several, in the dtype of the files unless one is given.

    At most one parameter is in host memory twice: tensors are read layer by layer into the stacked array.

    Raises `CheckpointError` when the folder is not a complete Llama that this package can express; differences are all listed.
    """
    folder = pathlib.Path(path)
    config = config_from_huggingface(_read_json(folder / "config.json"))
    expected = _tensors(config)
    with contextlib.ExitStack() as stack:
        found = {name: file for file in _open(folder, stack) for name in file.keys()}  # noqa: SIM118
        kinds = {name: found[name].get_slice(name) for name in expected if name in found}
        _compare(
            {name: tensor.shape for name, tensor in expected.items()},
            {name: tuple(kinds[name].get_shape()) if name in kinds else () for name in found if _counts(name, config)},
            where=str(folder),
        )
        if strange := sorted(f"{name} is {kind.get_dtype()}" for name, kind in kinds.items() if kind.get_dtype() not in DTYPES):
            raise CheckpointError("\n".join(strange), where=str(folder), next=f"readable are {', '.join(DTYPES)}")
        head, embed = TABLE["lm_head"].huggingface, TABLE["embed"].huggingface
        if config.tied and head in found and not np.array_equal(found[head].get_tensor(head), found[embed].get_tensor(embed)):
            raise CheckpointError(f"tie_word_embeddings is true, but {head} is not {embed}", where=str(folder))

        def parameter(tensors: list[tuple[str, Tensor]], shape: tuple[int, ...]) -> jax.Array:
            filed = [DTYPES[kinds[name].get_dtype()] for name, _ in tensors]
            out = np.empty(shape, jnp.result_type(*filed) if dtype is None else dtype)
            for name, tensor in tensors:
                out[tensor.index] = from_torch(found[name].get_tensor(name), TABLE[tensor.parameter].inputs, out[tensor.index].shape)
            return jnp.asarray(out)

        # Modules are never constructed from stacked arrays: their constructors describe a single layer.
        leaves, structure = jax.tree.flatten(_abstract(config))
        groups = [list(group) for _, group in itertools.groupby(expected.items(), key=lambda item: item[1].parameter)]
        return structure.unflatten([parameter(group, leaf.shape) for group, leaf in zip(groups, leaves, strict=True)])


def save_huggingface(model: Llama, path: str | os.PathLike) -> None:
    """Writes `config.json` and safetensors (with an index above 5 GB) that `transformers` reads. The folder appears when it is complete.

    Raises `CheckpointError` naming the slot when `LlamaForCausalLM` has no such model, and when there is something at `path` already.
    """
    path = pathlib.Path(path).absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError("there is something here already", where=str(path), kept="it was not touched", next="choose another path")
    config = config_to_huggingface(model.config)
    leaves = dict(zip(parameter_names(model), jax.tree.leaves(model), strict=True))
    _compare(_shapes(_abstract(model.config)), _shapes(model), where="a model that is no longer that of its config")
    config["dtype"] = config["torch_dtype"] = leaves["embed"].dtype.name

    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        _write_json(partial / "config.json", config)
        _write_shards(partial, _tensors(model.config), leaves)
        partial.replace(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def config_from_huggingface(config: Mapping[str, Any]) -> LlamaConfig:
    """The model that a `config.json` describes, where a missing key means what it means to `transformers`.

    Raises `CheckpointError` naming every key that is missing or asks for what this package does not have.
    """
    wrong = []
    for key in ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        if key not in config:
            wrong.append(f"{key} is missing")
        elif type(config[key]) is not int or config[key] < 1:
            wrong.append(f"{key} is {config[key]!r}, wanted a size")
    for key, value in {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if (found := config.get(key, None if key == "model_type" else value)) != value:
            wrong.append(f"{key} is {found!r}, and only {value!r} can be read")
    if config.get("quantization_config") is not None:
        wrong.append("quantization_config: quantised weights cannot be read")
    rope = _rope(config, wrong)
    if wrong:
        raise CheckpointError("\n".join(wrong), where="config.json")
    embed, heads = config["hidden_size"], config["num_attention_heads"]
    kv_heads, head_dim = config.get("num_key_value_heads"), config.get("head_dim")
    try:
        return LlamaConfig(
            dims=Dims(
                vocab=config["vocab_size"],
                layers=config["num_hidden_layers"],
                embed=embed,
                heads=heads,
                kv_heads=heads if kv_heads is None else kv_heads,
                head_dim=embed // heads if head_dim is None else head_dim,
                mlp=config["intermediate_size"],
            ),
            attention=GroupedQueryAttentionConfig(),
            feed_forward=GatedFeedForwardConfig(activation="silu"),
            norm=RMSNormConfig(eps=config.get("rms_norm_eps", 1e-6)),
            rotary=_rotary(rope),
            block=PreNormBlockConfig(dropout=0.0),
            init=FanInInitConfig(gain=1.0),
            dropout=0.0,
            tied=config.get("tie_word_embeddings", False),
            context=config.get("max_position_embeddings", 2048),
        )
    except ConfigError as error:
        raise CheckpointError(f"{error.where}: {error.what}", where="config.json") from None


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """A `config.json`, with the rotary settings under today's key and under those of older readers. Dropout is not part of it.

    Raises `CheckpointError` naming the slot when `LlamaForCausalLM` has no such model.
    """
    dims, rotary = config.dims, config.rotary
    _require("attention", config.attention, GroupedQueryAttentionConfig)
    _require("feed_forward", config.feed_forward, GatedFeedForwardConfig, activation="silu")
    _require("norm", config.norm, RMSNormConfig)
    _require("block", config.block, PreNormBlockConfig)
    _require("rotary", rotary, PlainRotaryConfig, Llama3RotaryConfig, round_at="none")
    assert isinstance(rotary, PlainRotaryConfig | Llama3RotaryConfig)
    assert isinstance(config.norm, RMSNormConfig)
    if dims.embed % dims.heads:
        raise CheckpointError(f"transformers refuses embed={dims.embed} that is not a multiple of heads={dims.heads}", where="dims.heads")
    scaling = None
    if isinstance(rotary, Llama3RotaryConfig):
        scaling = {
            "rope_type": "llama3",
            "factor": rotary.factor,
            "low_freq_factor": rotary.low_freq_factor,
            "high_freq_factor": rotary.high_freq_factor,
            "original_max_position_embeddings": rotary.original_context,
        }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": dims.vocab,
        "hidden_size": dims.embed,
        "intermediate_size": dims.mlp,
        "num_hidden_layers": dims.layers,
        "num_attention_heads": dims.heads,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm.eps,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": {"rope_theta": rotary.theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": rotary.theta,
        "rope_scaling": scaling,
        # These are the tokenizer's to say; left out they would become 1 and 2.
        "bos_token_id": None,
        "eos_token_id": None,
    }


def huggingface_tensors(model: Llama) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in `transformers`, one at a time on the host. Serves any tree of the model's structure: gradients too."""
    leaves = dict(zip(parameter_names(model), jax.tree.leaves(model), strict=True))
    for name, tensor in _tensors(model.config).items():
        yield name, _to_host(tensor, leaves)


class Tensor(NamedTuple):
    """A tensor in a file: its shape there, and of which parameter it is all (`index` ...) or one layer."""

    shape: tuple[int, ...]
    parameter: str
    index: Any


def _tensors(config: LlamaConfig) -> dict[str, Tensor]:
    """By name in the files, every tensor of the model, in the order of its parameters."""
    tensors = {}
    for parameter, shape in _shapes(_abstract(config)).items():
        inputs, name = TABLE[parameter]
        if "{layer}" in name:
            tensors |= {name.format(layer=i): Tensor(torch_shape(shape[1:], inputs), parameter, i) for i in range(shape[0])}
        else:
            tensors[name] = Tensor(torch_shape(shape, inputs), parameter, ...)
    return tensors


def _abstract(config: LlamaConfig) -> Llama:
    return eqx.filter_eval_shape(lambda key: config.build(key=key), jax.random.key(0))


def _shapes(model: Llama) -> dict[str, tuple[int, ...]]:
    return dict(zip(parameter_names(model), (leaf.shape for leaf in jax.tree.leaves(model)), strict=True))


def _compare(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Raises `CheckpointError` with a line for every tensor that is missing, of another shape, or too many."""
    lines = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in found]
    lines += [f"shape: {name} is {found[name]}, wanted {shape}" for name, shape in expected.items() if found.get(name, shape) != shape]
    lines += [f"not part of this model: {name}" for name in found if name not in expected]
    if lines:
        raise CheckpointError("\n".join(lines), where=where)


def _counts(name: str, config: LlamaConfig) -> bool:
    """False for what old files hold in excess: rotary frequencies, and a second copy of a tied table."""
    return not name.endswith("rotary_emb.inv_freq") and not (config.tied and name == TABLE["lm_head"].huggingface)


def _to_host(tensor: Tensor, leaves: Mapping[str, jax.Array]) -> np.ndarray:
    return to_torch(np.asarray(leaves[tensor.parameter][tensor.index]), TABLE[tensor.parameter].inputs)


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> Iterator[Any]:
    """The safetensors files of a folder, as `transformers` would choose them."""
    names = [SINGLE]
    if not (folder / SINGLE).is_file():
        if not (folder / INDEX).is_file():
            raise CheckpointError(
                f"neither {SINGLE} nor {INDEX}", where=str(folder), next="pickled weights (.bin, .pth) are not read: convert them"
            )
        weight_map = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError("weight_map is not a map of names to files", where=str(folder / INDEX))
        names = sorted(set(weight_map.values()))
    for name in names:
        # Compared by name and not by `resolve`: in Hugging Face's own cache every file is a link to a folder of blobs.
        file = pathlib.Path(os.path.abspath(folder / name))
        if not file.is_relative_to(os.path.abspath(folder)):
            raise CheckpointError(f"{name} lies outside of the folder", where=str(folder / INDEX))
        try:
            yield stack.enter_context(safe_open(file, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_mistaken(file, error), where=str(file)) from None


def _mistaken(file: pathlib.Path, error: Exception) -> str:
    """What a file is that should have been safetensors."""
    if not file.is_file():
        return "no such file"
    with file.open("rb") as stream:
        start = stream.read(512).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the weights: they were not downloaded (git lfs pull)"
    if start.startswith(b"<"):
        return "a web page (HTML), not the weights: the download was refused or redirected"
    return f"not a complete safetensors file: {error}"


def _rope(config: Mapping[str, Any], wrong: list[str]) -> dict[str, Any]:
    """The rotary settings under the names of `rope_parameters`, from there or from the older keys; adds to `wrong`."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get(key) or {})}
    kind = rope.setdefault("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        wrong.append(f"{key}.rope_type is {kind!r}, and only 'default' and 'llama3' can be read")
    if kind == "llama3":
        wanted = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        wrong.extend(f"{key}.{name} is missing" for name in wanted if rope.get(name) is None)
    if (part := rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))) != 1:
        wrong.append(f"partial_rotary_factor is {part!r}, and only whole heads can be turned")
    return rope


def _rotary(rope: Mapping[str, Any]) -> RotaryConfig:
    if rope["rope_type"] == "default":
        return PlainRotaryConfig(theta=rope["rope_theta"], round_at="none")
    return Llama3RotaryConfig(
        theta=rope["rope_theta"],
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
        round_at="none",
    )


def _require(slot: str, found: Config, *classes: type[Config], **fields: str) -> None:
    """Raises `CheckpointError` unless the slot holds one of the classes with these values."""
    if not isinstance(found, classes):
        raise CheckpointError(f"Hugging Face's Llama has no {type(found).__name__}", where=slot)
    for name, value in fields.items():
        if getattr(found, name) != value:
            raise CheckpointError(f"Hugging Face's Llama has {name}={value}, not {getattr(found, name)}", where=f"{slot}.{name}")


def _write_shards(folder: pathlib.Path, tensors: Mapping[str, Tensor], leaves: Mapping[str, jax.Array]) -> None:
    shards, room, total = [], 0, 0
    for name, tensor in tensors.items():
        size = int(np.prod(tensor.shape)) * leaves[tensor.parameter].dtype.itemsize
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room, total = room - size, total + size
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
        save_file({name: _to_host(tensors[name], leaves) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_json(file: pathlib.Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("no such file", where=str(file)) from None
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=str(file)) from None
    if not isinstance(tree, dict):
        raise CheckpointError("not a JSON object", where=str(file))
    return tree


def _write_json(file: pathlib.Path, tree: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
