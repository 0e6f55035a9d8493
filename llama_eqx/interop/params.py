"""Meta's `params.json`: sizes and settings of a Llama, some of which it leaves out."""

from collections.abc import Mapping
from typing import Any

from llama_eqx.dims import Dims
from llama_eqx.errors import CheckpointError, ConfigError
from llama_eqx.interop.huggingface import GENERATION, is_size, require_llama
from llama_eqx.model.attention import GroupedQueryAttentionConfig
from llama_eqx.model.block import PreNormBlockConfig
from llama_eqx.model.feed_forward import GatedFeedForwardConfig
from llama_eqx.model.init import FanInInitConfig
from llama_eqx.model.llama import LlamaConfig, SpecialTokens
from llama_eqx.model.norm import RMSNormConfig
from llama_eqx.model.rotary import Llama3RotaryConfig, PlainRotaryConfig

PARAMS = "params.json"
LLAMA3_VOCAB = 128_000  # the ranks of its tokenizer: no earlier Llama has as many ids
LLAMA3_2 = ((2048, 16), (3072, 28))  # width and depth of the 1B and the 3B


def config_from_meta(params: Mapping[str, Any], vocab: int, copies: int, generation: Mapping[str, Any]) -> tuple[LlamaConfig, list[str]]:
    """The untied model that a `params.json` describes, without its rotary scaling, and what was assumed. Special ids are those of a
    `generation_config.json` where it has them; null and -1 mean none.

    Every key and value head stands in `copies` files, and counts that often in `n_kv_heads`.

    Raises `CheckpointError` naming every key that is missing, asks for what this package does not have, or is not an id of the model.
    """
    wrong, sizes = [], ("dim", "n_layers", "n_heads", "multiple_of")
    wrong += [f"{key} is missing" for key in (*sizes, "norm_eps") if key not in params]
    wrong += [
        f"{key} is {params[key]!r}, wanted a size"
        for key in (*sizes, "n_kv_heads")
        if key in params and not is_size(params[key]) and (key, params[key]) != ("n_kv_heads", None)
    ]
    multiplier = params.get("ffn_dim_multiplier")
    for key in ("ffn_dim_multiplier", "norm_eps", "rope_theta"):
        if params.get(key) is not None and (type(params[key]) not in (int, float) or not 0 < params[key] < 1e30):
            wrong.append(f"{key} is {params[key]!r}, wanted a positive number")
    for key in ("quantization_args", "lora_args", "vision_chunk_size", "moe_args"):
        if params.get(key):
            wrong.append(f"{key}: only plain text models can be read")
    if not wrong and params["dim"] % params["n_heads"]:
        wrong.append(f"dim={params['dim']} is not a multiple of n_heads={params['n_heads']}")
    if wrong:
        raise CheckpointError("\n".join(wrong), where=PARAMS)
    dim, heads, theta, eps = params["dim"], params["n_heads"], float(params.get("rope_theta") or 1e4), params["norm_eps"]
    llama3 = vocab >= LLAMA3_VOCAB
    # Nothing in the file tells the contexts of Llama 1 and 2 apart; only Llama 1 has this eps, or 65B parameters.
    llama1 = not llama3 and (eps == 1e-6 or (dim, params["n_layers"], params.get("n_kv_heads")) == (8192, 80, None))
    context = (131072 if params.get("use_scaled_rope") else 8192) if llama3 else 2048 if llama1 else 4096
    given = {which: generation.get(f"{which}_token_id") for which in ("bos", "eos", "pad")}
    ids = {
        which: [i for i in (said if which == "eos" and isinstance(said, list) else [said]) if i not in (None, -1)]
        for which, said in given.items()
    }
    wrong = [f"{which}_token_id is {given[which]!r}" for which in ids if not all(type(i) is int and 0 <= i < vocab for i in ids[which])]
    if wrong:
        raise CheckpointError("\n".join(f"{line}, wanted ids below {vocab}" for line in wrong), where=GENERATION)
    try:
        config = LlamaConfig(
            dims=Dims(
                vocab=vocab,
                layers=params["n_layers"],
                embed=dim,
                heads=heads,
                kv_heads=(params.get("n_kv_heads") or heads) // copies,
                head_dim=dim // heads,
                mlp=ffn_size(dim, params["multiple_of"], multiplier),
            ),
            attention=GroupedQueryAttentionConfig(),
            feed_forward=GatedFeedForwardConfig(activation="silu"),
            norm=RMSNormConfig(eps=eps),
            rotary=PlainRotaryConfig(theta=theta, round_at="none"),
            block=PreNormBlockConfig(dropout=0.0),
            init=FanInInitConfig(gain=1.0),
            dropout=0.0,
            tied=False,
            context=context,
            tokens=SpecialTokens(
                tokenizer="tiktoken" if llama3 else "sentencepiece",
                bos=next(iter(ids["bos"]), 128000 if llama3 else 1),
                eos=tuple(ids["eos"]) or (128001 if llama3 else 2,),
                pad=next(iter(ids["pad"]), None),
            ),
        )
    except ConfigError as error:
        raise CheckpointError(f"{error.where}: {error.what}", where=PARAMS) from None
    taken = [f"a context of {context}"]
    if not ids["eos"]:
        taken.append(f"end-of-text id {config.tokens.eos[0]}")
        taken += ["a base model's (an instruct model has 128008 and 128009 too)"] if llama3 else []
    return config, [f"{PARAMS} does not say, so this is taken: {', '.join(taken)}"]


def check_vocab(params: Mapping[str, Any], rows: int) -> list[str]:
    """A note when the table has more rows than `vocab_size`. Values of -1 and null, as in Llama 2's files, say nothing.

    Raises `CheckpointError` when it has fewer.
    """
    said = params.get("vocab_size")
    if said in (None, -1, rows):
        return []
    if not is_size(said) or said > rows:
        advice = f"set vocab_size to {rows}, or find the weights of this file"
        raise CheckpointError(f"vocab_size is {said!r}, and the table of embeddings has {rows} rows", where=PARAMS, next=advice)
    return [f"{PARAMS} says vocab_size={said}, and the table of embeddings has {rows} rows, which are all kept"]


def config_to_meta(config: LlamaConfig, shards: int) -> dict[str, Any]:
    """The `params.json` of a model in that many files.

    Raises `CheckpointError` naming the slot, or listing the sizes that do not divide, when Meta's Llama has no such model.
    """
    norm, rotary = require_llama(config, "Meta's", (PlainRotaryConfig, Llama3RotaryConfig))
    dims = config.dims
    if dims.head_dim * dims.heads != dims.embed:
        raise CheckpointError(
            f"in Meta's Llama heads x head_dim is embed: not {dims.heads} x {dims.head_dim} = {dims.embed}", where="dims.head_dim"
        )
    if rotary != (
        implied := rotary_from_meta({"rope_theta": rotary.theta, "use_scaled_rope": isinstance(rotary, Llama3RotaryConfig)}, config)[0]
    ):
        raise CheckpointError(
            f"{PARAMS} says whether frequencies are scaled and not how: it would mean {implied}, not {rotary}", where="rotary"
        )
    wrong = []
    for name, split in {"heads": dims.heads, "kv_heads": dims.kv_heads, "mlp": dims.mlp, "vocab": dims.vocab, "embed": dims.embed}.items():
        assert split is not None
        if split % shards and not (name == "kv_heads" and shards % split == 0):
            wrong.append(f"{name}={split} does not divide over {shards} files")
    if shards < 1 or wrong:
        raise CheckpointError("\n".join(wrong) or f"{shards} is not a number of files", where="shards", next="another number: shards=N")
    multiple_of, multiplier = ffn_parameters(dims.embed, dims.mlp)
    return {
        "dim": dims.embed,
        **({} if multiplier is None else {"ffn_dim_multiplier": multiplier}),
        "multiple_of": multiple_of,
        "n_heads": dims.heads,
        **({} if dims.kv_heads == dims.heads else {"n_kv_heads": max(dims.kv_heads, shards)}),
        "n_layers": dims.layers,
        "norm_eps": norm.eps,
        # Llama 2's code does not know these keys, and its values are the defaults.
        **({} if rotary.theta == 1e4 else {"rope_theta": rotary.theta}),
        **({"use_scaled_rope": True} if isinstance(rotary, Llama3RotaryConfig) else {}),
        "vocab_size": dims.vocab,
    }


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The feed-forward width by the formula in Meta's code."""
    size = int(2 * 4 * dim / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple_of * ((size + multiple_of - 1) // multiple_of)


def ffn_parameters(dim: int, mlp: int) -> tuple[int, float | None]:
    """The `multiple_of` and `ffn_dim_multiplier` that give `mlp` by the formula: round numbers like Meta's where there are some."""
    round_ones = [(multiple, multiplier) for multiplier in (None, 1.0, 1.2, 1.3, 1.5) for multiple in (256, 1024, 4096)]
    exact = (1, (mlp + 0.5) / int(2 * 4 * dim / 3))
    return next(found for found in [*round_ones, exact] if ffn_size(dim, *found) == mlp)


def rotary_from_meta(params: Mapping[str, Any], config: LlamaConfig) -> tuple[PlainRotaryConfig | Llama3RotaryConfig, list[str]]:
    """The rotary settings, and what was assumed: the file says that frequencies are scaled, but not by which factor."""
    theta = float(params.get("rope_theta") or 1e4)
    if not params.get("use_scaled_rope"):
        return PlainRotaryConfig(theta=theta, round_at="none"), []
    llama3_2 = config.tied or (config.dims.embed, config.dims.layers) in LLAMA3_2
    factor = 32 if llama3_2 else 8
    said = f"{PARAMS} asks for scaled frequencies without the factor: {factor} is taken, that of Llama {'3.2' if llama3_2 else '3.1'}"
    scaled = Llama3RotaryConfig(theta=theta, factor=factor, low_freq_factor=1, high_freq_factor=4, original_context=8192, round_at="none")
    return scaled, [said]


def losses(config: LlamaConfig) -> list[str]:
    """Notes on what a `params.json` leaves out."""
    said = (
        f"{PARAMS} has no place for the context ({config.context}) and the ids that end a text ({', '.join(map(str, config.tokens.eos))})"
    )
    if not isinstance(config.rotary, Llama3RotaryConfig) or config.rotary.factor == 8:
        return [said]
    factor = f"{config.rotary.factor:g}: Meta's own code takes 8, this package knows Llama 3.2 by its size or a tied table"
    return [said, f"nor for the rotary factor {factor}"]
