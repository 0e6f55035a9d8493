"""What one step of training sees."""

import equinox as eqx
from jaxtyping import Array, Float, Int


class Batch(eqx.Module):
    """Rows of tokens and the tokens that follow them.

    `loss_mask` weighs each target (0 leaves it out). `segment_ids` None means that a row is one segment, `positions` None that it
    starts at position 0; segment 0 is padding.
    """

    tokens: Int[Array, "batch seq"]
    targets: Int[Array, "batch seq"]
    loss_mask: Float[Array, "batch seq"]
    segment_ids: Int[Array, "batch seq"] | None = None
    positions: Int[Array, "batch seq"] | None = None
