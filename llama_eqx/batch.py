"""What one step of training sees."""

import equinox as eqx
import numpy as np
from jaxtyping import Array, Float, Int


class Batch(eqx.Module):
    """Rows of tokens and the tokens that follow them; in numpy as they are read, on the devices when a step sees them.

    `loss_mask` weighs each target (0 leaves it out). `segment_ids` None means that a row is one segment, `positions` None that it
    starts at position 0; segment 0 is padding.
    """

    tokens: Int[Array | np.ndarray, "batch seq"]
    targets: Int[Array | np.ndarray, "batch seq"]
    loss_mask: Float[Array | np.ndarray, "batch seq"]
    segment_ids: Int[Array | np.ndarray, "batch seq"] | None = None
    positions: Int[Array | np.ndarray, "batch seq"] | None = None
