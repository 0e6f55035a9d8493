"""What a run sets up before it touches its files: the same for the loop and for a replay of one of its steps."""

import contextlib
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding
from jaxtyping import PRNGKeyArray

from llama_eqx.data.dataset import Dataset, open_data
from llama_eqx.data.pipeline import Parts, process_rows
from llama_eqx.data.tokenizer import Tokenizer
from llama_eqx.errors import ConfigError, UserError
from llama_eqx.interop.weights import Weights
from llama_eqx.model.init import named
from llama_eqx.sharding import Layout
from llama_eqx.studies.matching import matched
from llama_eqx.training.ends import start
from llama_eqx.training.program import Program, make_program
from llama_eqx.training.run import RunConfig, with_vocab
from llama_eqx.training.state import TrainState


class Setup(NamedTuple):
    """`config` has the tokenizer's vocabulary. `parts` are this process's share of every batch, `key` is the dropout key of all steps."""

    config: RunConfig
    layout: Layout
    batch_sharding: NamedSharding
    tokenizer: Tokenizer
    data: Dataset
    parts: Parts
    program: Program
    key: PRNGKeyArray


def set_up(config: RunConfig) -> Setup:
    """Sets up a run and allocates no weights. Raises `ConfigError` and `DataError`."""
    # Where arrays live: first, since it is the cheapest check and may fail.
    size, length = config.train.batch_size, config.train.seq_len
    layout = Layout(config.mesh.build(), config.sharding)
    sizes = {"batch": size, "seq": length, **{axis: n for axis, n in vars(config.model.dims).items() if n is not None}}
    try:
        layout.check(sizes)
    except ConfigError:
        if "vocab" in sizes:
            raise
        with contextlib.suppress(UserError):  # a mesh that fits divides the vocabulary too
            sizes["vocab"] = config.tokenizer.build(config.data).vocab
        layout.check(sizes)
    batch_sharding = layout.sharding(("batch", "seq"), (size, length))

    # Text to tokens, and the sizes that follow from it.
    tokenizer = config.tokenizer.build(config.data)
    data = open_data(config.data, tokenizer, seq_len=length, seed=config.seed, distinct_rows=config.train.distinct_rows)
    parts = Parts(data.train, data.order, size, *process_rows(batch_sharding, size, length), data.fingerprint)
    config = matched(with_vocab(config, tokenizer))

    # What the devices compute.
    program = make_program(config, layout)
    key = jax.jit(lambda key: named(key, "dropout"), out_shardings=layout.sharding((), ()))(jax.random.key(config.seed))
    return Setup(config, layout, batch_sharding, tokenizer, data, parts, program, key)


def fresh_state(setup: Setup, weights: Weights | None) -> TrainState:
    """The state before the first step: from `weights`, or drawn with the seed."""
    initial, shardings = setup.program.initial, setup.program.shardings
    key = named(jax.random.key(setup.config.seed), "init")
    if weights is not None:
        return start(weights, setup.config, shardings, key)
    # This runs once. The CPU's compiler would take seconds to optimise it, and the bits are the same without.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return jax.jit(initial, out_shardings=shardings, compiler_options=options)(key)
