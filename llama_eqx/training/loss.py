"""What training minimises."""

from collections.abc import Callable

import equinox as eqx
import optax
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.model.kernel import KernelConfig
from llama_eqx.model.llama import Llama
from llama_eqx.precision import PrecisionConfig
from llama_eqx.remat import Remat
from llama_eqx.sharding import Layout
from llama_eqx.wrapped import Wrapped


def token_losses(model: Llama, batch: Batch, key: PRNGKeyArray | None) -> Float32[Array, "batch seq"]:
    """Cross-entropy of each target in nats."""
    logits = model(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids, key=key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)


def cross_entropy(model: Llama, batch: Batch, key: PRNGKeyArray | None) -> Float[Array, ""]:
    """Mean cross-entropy in nats per token over the targets that the mask counts."""
    return (token_losses(model, batch, key) * batch.loss_mask).sum() / batch.loss_mask.sum()


def policy_view(
    precision: PrecisionConfig, remat: Remat, layout: Layout, kernel: KernelConfig | None = None, unroll: int = 1
) -> Callable[[Llama], Llama]:
    """The model as the loss is to see it under the policies. Gradients through it have the structure of the model itself.

    Without a `kernel` attention is the plain one. `unroll` layers make one turn of the loop over layers.
    """

    def view(model: Llama) -> Llama:
        model = layout.gathered(precision.apply(model))  # cast first: half the bytes to gather
        alone = unroll >= model.config.dims.layers

        def wrap(block: Callable) -> Callable:
            block = layout.constrain_residual(precision.block(block))
            return remat.block(block if kernel is None else kernel.block(block, layout.mesh, layout.spec), alone=alone)

        return eqx.tree_at(lambda m: m.blocks, model, Wrapped(model.blocks, wrap, unroll))

    return view
