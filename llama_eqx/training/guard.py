"""Numbers that stay numbers: which updates are withheld, and what may be saved."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, PyTree

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError, NonFiniteError

DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations


class History(eqx.Module):
    """The losses of the last steps, in nats per token, in a ring of which `count` places have been written."""

    losses: Float32[Array, "window"]
    count: Int[Array, ""]


class GuardConfig(Config):
    """An update is withheld when loss, gradient or update is not finite; a run is given up after `max_withheld` of these in a row.

    With `spike`, the update of a finite loss is withheld too if that lies more than so many standard deviations above the median of the
    last `window` losses. The deviation is estimated by the median absolute one, which spikes hardly move; losses that were spikes count
    for the next, so that a change that lasts is accepted after half a window.
    """

    max_withheld: int
    spike: float | None
    window: int

    def check(self) -> None:
        for name in ("max_withheld", "window", "spike"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"{value} is too small", where=name)

    def history(self) -> History | None:
        """Before the first step. None if spikes are not looked for."""
        return None if self.spike is None else History(jnp.zeros(self.window, jnp.float32), jnp.zeros((), jnp.int32))

    def judged(self, loss: Float32[Array, ""], history: History) -> tuple[Bool[Array, ""], History]:
        """Whether a loss is a spike, which none is before a whole window, and the history with it. A loss that is not finite is neither."""
        assert self.spike is not None
        median = jnp.median(history.losses)
        deviation = DEVIATION * jnp.median(jnp.abs(history.losses - median))
        spike = jnp.isfinite(loss) & (history.count >= self.window) & (loss > median + self.spike * deviation)
        new = History(history.losses.at[history.count % self.window].set(loss), history.count + 1)
        return spike, jax.tree.map(lambda new, old: jnp.where(jnp.isfinite(loss), new, old), new, history)


@jax.jit
def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every float of every array is a finite number."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))


def require_finite(state: PyTree[Array], step: int) -> None:
    """Raises `NonFiniteError` when not every number of a state that is to be saved is finite."""
    if not all_finite(state):
        raise NonFiniteError(
            "weights or the state of the optimizer are not finite: they are not saved",
            where=f"step {step}",
            kept="the checkpoints before, all of whose numbers are finite",
            next="look at the weights that the run started from: init_from",
        )
