"""Pictures of what happens in the model while it trains."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

from llama_eqx.batch import Batch
from llama_eqx.errors import ConfigError
from llama_eqx.model.llama import Llama
from llama_eqx.tracing import trace
from llama_eqx.training.setup import Setup

SHOWN = 32  # tokens: as many as can be read in a picture


def make_draw(setup: Setup) -> Callable[[Llama], dict[str, Any]]:
    """Returns a function that draws a figure of each trace in `train.traces`, by name, for the first held-out text.

    Activations are in the dtype of the parameters.

    Raises `ConfigError` for a trace that the model has nothing of.
    """
    names, whole = setup.config.train.traces, setup.layout.sharding((), ())
    if not names:
        return lambda model: {}
    try:
        eqx.filter_eval_shape(trace, setup.program.shapes.model, jax.ShapeDtypeStruct((1, 1), np.int32), names)
    except ConfigError as error:
        raise ConfigError(error.what, where="train.traces", next="leave it out") from None
    from llama_eqx.tracking.pictures import plot_traces  # matplotlib takes a third of a second to import

    @eqx.filter_jit
    def look(model: Llama, row: Batch) -> dict[str, Any]:
        seen = trace(model, row.tokens, names, positions=row.positions, segment_ids=row.segment_ids)
        return jax.lax.with_sharding_constraint(seen, whole)  # whole in every process

    def draw(model: Llama) -> dict[str, Any]:
        row = jax.tree.map(lambda x: x[:, :SHOWN].astype(np.int32), setup.data.val.read(np.zeros(1, np.int64)))
        return plot_traces(jax.device_get(look(model, row)), row.tokens[0].tolist(), setup.tokenizer.decode)

    return draw
