"""What training minimises, and the policies under which the loss sees the model."""

import abc
from collections.abc import Callable, Mapping
from typing import NamedTuple

import equinox as eqx
from jaxtyping import Array, Float32, PRNGKeyArray

from llama_eqx.batch import Batch
from llama_eqx.config import Config
from llama_eqx.errors import ConfigError
from llama_eqx.model.kernel import KernelConfig
from llama_eqx.model.llama import Llama
from llama_eqx.precision import PrecisionConfig
from llama_eqx.remat import Remat
from llama_eqx.sharding import Layout
from llama_eqx.training.cross_entropy import head_losses
from llama_eqx.wrapped import Wrapped


class LossSums(NamedTuple):
    """Sums over the targets of a batch: their cross-entropy in nats and their weight, the sum of the mask.

    `terms` are other sums over them, by name. Each is recorded as `train/NAME`, divided by the weight.
    """

    cross_entropy: Float32[Array, ""]
    weight: Float32[Array, ""]
    terms: Mapping[str, Float32[Array, ""]] = {}


# Maps a model, a batch and an optional key for dropout to the sum over the targets to minimise, and the sums to report.
Loss = Callable[[Llama, Batch, PRNGKeyArray | None], tuple[Float32[Array, ""], LossSums]]


class Objective(Config):
    """What is minimised.

    `chunk` is how many tokens a device takes through the head at a time, None for all, both in `head_losses` and where held-out text is
    scored.
    """

    chunk: int | None

    def check(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ConfigError(f"{self.chunk} is not a number of tokens", where="chunk", next="loss.chunk=null takes all at once")

    @abc.abstractmethod
    def build(self, view: Callable[[Llama], Llama], layout: Layout) -> Loss:
        """A loss of `view(model)`, which is the model under the run's policies."""


class LossConfig(Objective):
    """Cross-entropy in nats over the targets that the mask counts; the logits of a device are chunk × vocab.

    `z_loss` adds that multiple of log² Z, which keeps logits from drifting; PaLM uses 1e-4.
    """

    z_loss: float

    def check(self) -> None:
        super().check()
        if self.z_loss < 0:
            raise ConfigError(
                f"{self.z_loss} is negative, and would reward what it should prevent", where="z_loss", next="loss.z_loss=1e-4, or 0"
            )

    def build(self, view: Callable[[Llama], Llama], layout: Layout) -> Loss:
        def loss(model: Llama, batch: Batch, key: PRNGKeyArray | None) -> tuple[Float32[Array, ""], LossSums]:
            model = view(model)
            x, _ = model.hidden(batch.tokens, positions=batch.positions, segment_ids=batch.segment_ids, key=key)
            objective, cross_entropy = head_losses(
                x,
                model.unembed,
                batch.targets,
                batch.loss_mask,
                chunk=self.chunk,
                z_loss=self.z_loss,
                layout=layout,
                as_logits=model.logits,
            )
            return objective, LossSums(cross_entropy, batch.loss_mask.sum())

        return loss


def policy_view(
    precision: PrecisionConfig, remat: Remat, layout: Layout, kernel: KernelConfig | None = None, unroll: int = 1
) -> Callable[[Llama], Llama]:
    """Returns a function from a model to what the loss sees of it under the policies. Gradients have the structure of the model itself.

    Without a `kernel`, attention is plain. Each iteration of the loop over layers runs `unroll` of them.
    """

    def view(model: Llama) -> Llama:
        model = layout.gathered(precision.apply(model))  # cast first: half the bytes of norm and head to gather
        layers = model.config.dims.layers
        alone = layers < 2 * unroll or layers % unroll > 0  # some layers are outside of any loop, where XLA would undo remat

        def wrap(block: Callable) -> Callable:
            block = layout.constrain_residual(precision.block(block))
            return remat.block(block if kernel is None else kernel.block(block, layout.mesh, layout.spec), alone=alone)

        return eqx.tree_at(lambda m: m.blocks, model, Wrapped(model.blocks, wrap, unroll))

    return view
