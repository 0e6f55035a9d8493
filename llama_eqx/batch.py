"""What one step of training sees."""

from typing import Any

import equinox as eqx
from jaxtyping import Float, Integer


class Batch(eqx.Module):
    """Rows of tokens and the tokens that follow them. As they are read, the arrays are NumPy's in the dtype on disk; in a step, they are
    int32 on the devices.

    `loss_mask` weighs each target. 0 leaves it out, and nothing else does: a target outside of the vocabulary, such as -100, makes the
    loss NaN if it counts. `segment_ids` None means that a row is one segment, `positions` None that it starts at position 0; segment 0
    is padding.
    """

    tokens: Integer[Any, "batch seq"]
    targets: Integer[Any, "batch seq"]
    loss_mask: Float[Any, "batch seq"]
    segment_ids: Integer[Any, "batch seq"] | None = None
    positions: Integer[Any, "batch seq"] | None = None
