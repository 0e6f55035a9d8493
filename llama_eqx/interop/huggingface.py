"""Hugging Face's Llama folders, read and written without torch or transformers."""

import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open

from llama_eqx.config import Config
from llama_eqx.dims import Dims
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.files import json_object, mistaken, write_json
from llama_eqx.interop.files import carried, inside, refuse_code
from llama_eqx.interop.rope import KINDS, rope_parameters, rotary_settings
from llama_eqx.interop.table import TABLE, from_torch, torch_shape
from llama_eqx.interop.weights import Key, Tensor, Weights, compare, pieces, require_tensors, rows_of, tensor_shapes
from llama_eqx.model.attention import GroupedQueryAttentionConfig
from llama_eqx.model.block import PreNormBlockConfig
from llama_eqx.model.feed_forward import GatedFeedForwardConfig
from llama_eqx.model.init import FanInInitConfig
from llama_eqx.model.llama import LlamaConfig, SpecialTokens
from llama_eqx.model.norm import RMSNormConfig
from llama_eqx.model.rotary import RotaryConfig

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_HEADER = 2**24  # bytes; that of Llama 3.1 405B has some 200,000
SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": np.dtype(jnp.float32), "BF16": np.dtype(jnp.bfloat16), "F16": np.dtype(jnp.float16)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
R = TypeVar("R", bound=RotaryConfig)
HEAD, EMBED = TABLE["lm_head"].huggingface, TABLE["embed"].huggingface


def read_huggingface(folder: pathlib.Path) -> Weights:
    """The Llama in a folder with `config.json` and one or several safetensors files. Tensors are mapped, not read.

    Raises `CheckpointError` when the folder is not a complete Llama that this package can express; all differences are listed.
    """
    refuse_code(folder, CONFIG, "tokenizer_config.json")
    config = config_from_huggingface(json_object(inside(folder, CONFIG), CheckpointError))
    filed = {file: filed_tensors(file) for file in weight_files(folder)}
    found = {name: tensor for tensors in filed.values() for name, tensor in tensors.items()}
    if twice := [name for name in found if sum(name in tensors for tensors in filed.values()) > 1]:
        raise CheckpointError("\n".join(f"in more than one file: {name}" for name in twice), where=str(folder))
    require_tensors(config, len(found), where=str(folder))
    shapes = tensor_shapes(config)
    names = {key: TABLE[key[0]].huggingface.format(layer=key[1]) for key in shapes}
    expected = {names[key]: torch_shape(shape, TABLE[key[0]].inputs) for key, shape in shapes.items()}
    compare(expected, {name: tensor.shape for name, tensor in found.items() if _counts(name, config)}, where=str(folder))
    if strange := sorted(f"{name} is {found[name].kind}" for name in expected if found[name].kind not in DTYPES):
        raise CheckpointError("\n".join(strange), where=str(folder), next=f"readable are {', '.join(DTYPES)}")
    if config.tied and HEAD in found and not _same(found[HEAD], found[EMBED]):
        raise CheckpointError(f"tie_word_embeddings is true, but {HEAD} is not {EMBED}", where=str(folder))

    def tensor(key: Key, shape: tuple[int, ...]) -> Tensor:
        one, inputs = found[names[key]], TABLE[key[0]].inputs
        return Tensor(shape, DTYPES[one.kind], lambda index: from_torch(one.map(), inputs, shape)[index])

    return Weights(config, {key: tensor(key, shape) for key, shape in shapes.items()}, carried(folder), tuple(_strange_ids(config)))


def write_huggingface(
    weights: Weights, folder: pathlib.Path, dtype: np.dtype | None, advance: Callable[[int], object] = lambda size: None
) -> None:
    """Writes `config.json`, `generation_config.json` and safetensors (with an index above 5 GB) into an empty folder.

    `advance` is called with the bytes of each piece written. Raises `CheckpointError` naming the slot when `LlamaForCausalLM` has no
    such model.
    """
    config, tokens = config_to_huggingface(weights.config), weights.config.tokens
    kinds = {key: tensor.dtype if dtype is None else dtype for key, tensor in weights.tensors.items()}
    config["dtype"] = config["torch_dtype"] = kinds["embed", None].name
    write_json(folder / CONFIG, config, indent=2)
    if GENERATION not in weights.files and tokens.bos is not None:
        write_json(folder / GENERATION, token_ids(tokens), indent=2)

    shards, room, total = [], 0, 0
    for key, tensor in weights.tensors.items():
        size = tensor.nbytes // tensor.dtype.itemsize * kinds[key].itemsize
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(key)
        room, total = room - size, total + size
    weight_map = {}
    for i, keys in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE
        header: dict[str, Any]
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for key in keys:
            tensor, (inputs, name, *_) = weights.tensors[key], TABLE[key[0]]
            begin, end = end, end + tensor.nbytes // tensor.dtype.itemsize * kinds[key].itemsize
            name = name.format(layer=key[1])
            header[name] = {"dtype": NAMES[kinds[key]], "shape": torch_shape(tensor.shape, inputs), "data_offsets": (begin, end)}
            weight_map[name] = file
        with (folder / file).open("wb") as stream:
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            stream.write(len(text).to_bytes(8, "little") + text)
            for key in keys:
                for rows in rows_of(weights.tensors[key], TABLE[key[0]].inputs, kinds[key]):
                    stream.write(rows.data)
                    advance(rows.nbytes)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)


class Filed(NamedTuple):
    """A tensor in a safetensors file, with its shape and dtype as filed. `map()` returns a view, which keeps the file mapped."""

    shape: tuple[int, ...]
    kind: str
    map: Callable[[], np.ndarray]


def weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files of a folder, as `transformers` would choose them.

    Raises `CheckpointError` when there are none, or when one would lie outside of the folder.
    """
    if (folder / SINGLE).is_file() or (folder / SINGLE).is_symlink():
        return [inside(folder, SINGLE)]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        raise CheckpointError(
            f"neither {SINGLE} nor {INDEX}" + (f", but {', '.join(pickled)}" if pickled else ""),
            where=str(folder),
            next="pickled .bin files are not read: save the model again as safetensors where it came from",
        )
    weight_map = json_object(inside(folder, INDEX), CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("weight_map is not a map of names to files", where=str(folder / INDEX))
    return [inside(folder, name) for name in sorted(set(weight_map.values()))]


def filed_tensors(file: pathlib.Path) -> dict[str, Filed]:
    """The tensors in a safetensors file, by name. Only its header is read.

    Raises `CheckpointError` saying what the file is if it is not a complete safetensors file.
    """
    try:
        with file.open("rb") as stream:
            if (length := int.from_bytes(stream.read(8), "little")) > LARGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
        with safe_open(file, framework="numpy"):  # checks the header against the file's length
            pass
        with file.open("rb") as stream:
            stream.seek(8)
            header = json.loads(stream.read(length), object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError) as error:
        what, advice = mistaken(file, f"not a complete safetensors file: {error}"), "download or copy this file again"
        raise CheckpointError(what, where=str(file), next=advice) from None
    header.pop("__metadata__", None)

    def filed(kind: str, shape: list[int], begin: int) -> Filed:
        return Filed(tuple(shape), kind, lambda: np.memmap(file, DTYPES[kind], "r", 8 + length + begin, tuple(shape)))

    return {name: filed(entry["dtype"], entry["shape"], entry["data_offsets"][0]) for name, entry in header.items()}


def config_from_huggingface(config: Mapping[str, Any]) -> LlamaConfig:
    """The model that a `config.json` describes. A missing key means what it means to `transformers`.

    Raises `CheckpointError` naming every key that is missing or asks for what this package does not have.
    """
    wrong = []
    for key in ("vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size"):
        if key not in config:
            wrong.append(f"{key} is missing")
        elif not is_size(config[key]):
            wrong.append(f"{key} is {config[key]!r}, wanted a size")
    for key, value in {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}.items():
        if (found := config.get(key, None if key == "model_type" else value)) != value:
            wrong.append(f"{key} is {found!r}, and only {value!r} can be read")
    ends = config.get("eos_token_id", 2)
    tokens = {"bos": config.get("bos_token_id", 1), "eos": [] if ends is None else ends if isinstance(ends, list) else [ends]}
    if config.get("quantization_config") is not None:
        wrong.append("quantization_config: quantised weights cannot be read")
    rotary, settings = rotary_settings(config, wrong)
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
            rotary=rotary(**settings),
            block=PreNormBlockConfig(dropout=0.0),
            init=FanInInitConfig(gain=1.0),
            dropout=0.0,
            tied=config.get("tie_word_embeddings", False),
            context=config.get("max_position_embeddings", 2048),
            tokens=SpecialTokens(tokenizer=_family(config), pad=config.get("pad_token_id"), **tokens),
        )
    except ConfigError as error:
        raise CheckpointError(f"{error.where}: {error.what}", where="config.json") from None


def is_size(value: object) -> bool:
    """Whether a JSON value can be the size of an axis."""
    return type(value) is int and 0 < value < 2**31


def config_to_huggingface(config: LlamaConfig) -> dict[str, Any]:
    """The `config.json` of a model, with the rotary settings under today's key and those of older readers. Dropout is not part of it.

    Raises `CheckpointError` naming the slot when `LlamaForCausalLM` has no such model.
    """
    norm, rotary = require_llama(config, "Hugging Face's", KINDS.values())
    dims = config.dims
    if dims.embed % dims.heads:
        raise CheckpointError(f"transformers refuses embed={dims.embed} that is not a multiple of heads={dims.heads}", where="dims.heads")
    rope = rope_parameters(rotary)
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
        "rms_norm_eps": norm.eps,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else {name: value for name, value in rope.items() if name != "rope_theta"},
        # If left out, they would default to 1 and 2.
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None},
        **token_ids(config.tokens),
    }


def token_ids(tokens: SpecialTokens) -> dict[str, Any]:
    """The special ids that are set, by their names in `config.json` and `generation_config.json`."""
    eos = list(tokens.eos) if len(tokens.eos) > 1 else next(iter(tokens.eos), None)
    ids = {"bos_token_id": tokens.bos, "eos_token_id": eos, "pad_token_id": tokens.pad}
    return {name: value for name, value in ids.items() if value is not None}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _strange_ids(config: LlamaConfig) -> Iterator[str]:
    """Yields notes on special ids outside of the vocabulary: models tuned by others do have such padding ids. -1 means none."""
    tokens, vocab = config.tokens, config.dims.vocab or 0
    for which, ids in {"bos": (tokens.bos,), "eos": tokens.eos, "pad": (tokens.pad,)}.items():
        if strange := [i for i in ids if i is not None and not -1 <= i < vocab]:
            yield f"{CONFIG}: {which}_token_id is {strange[0]}, outside of the vocabulary of {vocab}"


def _counts(name: str, config: LlamaConfig) -> bool:
    """False for what old files hold in addition: rotary frequencies, and a second copy of a tied table."""
    return not name.endswith("rotary_emb.inv_freq") and not (config.tied and name == HEAD)


def _same(a: Filed, b: Filed) -> bool:
    if (a.shape, a.kind) != (b.shape, b.kind):
        return False
    x, y = a.map(), b.map()
    return all(x[index].tobytes() == y[index].tobytes() for index in pieces(a.shape, x.itemsize, axis=0))


def _family(config: Mapping[str, Any]) -> Literal["sentencepiece", "tiktoken"] | None:
    """The kind of tokenizer that the ids belong to, where BOS and the number of ids leave no doubt."""
    if config.get("bos_token_id") == 128000:
        return "tiktoken"
    return "sentencepiece" if config.get("bos_token_id", 1) == 1 and 32000 <= config["vocab_size"] < 128000 else None


def require_llama(config: LlamaConfig, whose: str, rotary: Iterable[type[R]]) -> tuple[RMSNormConfig, R]:
    """The norm and the settings of one of the kinds of `rotary`.

    Raises `CheckpointError` naming the slot in which a model differs from the original Llama.
    """

    def require(slot: str, *classes: type[Config], **fields: str) -> None:
        found = getattr(config, slot)
        if type(found) not in classes:  # a subclass computes something else
            raise CheckpointError(f"{whose} Llama has no {type(found).__name__}", where=slot)
        for name, value in fields.items():
            if getattr(found, name) != value:
                raise CheckpointError(f"{whose} Llama has {name}={value}, not {getattr(found, name)}", where=f"{slot}.{name}")

    if type(config) is not LlamaConfig:  # a custom model may compute anything with Llama's slots
        raise CheckpointError(f"{whose} Llama has no {type(config).__name__}", where="model")
    require("attention", GroupedQueryAttentionConfig)
    require("feed_forward", GatedFeedForwardConfig, activation="silu")
    require("norm", RMSNormConfig)
    require("block", PreNormBlockConfig)
    require("rotary", *rotary, round_at="none")
    assert isinstance(config.norm, RMSNormConfig)
    return config.norm, config.rotary  # pyright: ignore[reportReturnType]
