"""What one step of training sees."""

from typing import Any

import equinox as eqx
from jaxtyping import Float, Int


class Batch(eqx.Module):
    """Rows of tokens and the tokens that follow them; arrays of numpy as they are read, of JAX when a step sees them.

    `loss_mask` weighs each target (0 leaves it out). `segment_ids` None means that a row is one segment, `positions` None that it
    starts at position 0; segment 0 is padding.
    """

    tokens: Int[Any, "batch seq"]
    targets: Int[Any, "batch seq"]
    loss_mask: Float[Any, "batch seq"]
    segment_ids: Int[Any, "batch seq"] | None = None
    positions: Int[Any, "batch seq"] | None = None
