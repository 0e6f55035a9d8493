"""Which activations of a block are kept for the backward pass and which are computed again."""

from collections.abc import Callable
from typing import Literal

import jax

from llama_eqx.config import Config


class RematConfig(Config):
    """`none` keeps all, `dots` the results of matrix products, `full` only the residual between blocks."""

    policy: Literal["none", "dots", "full"]

    def block(self, block: Callable) -> Callable:
        if self.policy == "none":
            return block
        kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if self.policy == "dots" else None
        return jax.checkpoint(block, prevent_cse=False, policy=kept)  # inside a scan no CSE can undo it
