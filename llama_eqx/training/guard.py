"""Guards against numbers that are not finite and against spikes: which updates are withheld, and what may be saved."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int, PyTree

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError, NonFiniteError

DEVIATION = 1.4826  # the standard deviation of a normal distribution, in median absolute deviations


class History(eqx.Module):
    """Ring buffers of the losses, in nats per token, and log gradient norms of the last steps, after `count` writes."""

    losses: Float32[Array, "window"]
    log_norms: Float32[Array, "window"]
    count: Int[Array, ""]


class GuardConfig(Config):
    """An update is withheld when its loss or gradient is not finite. Otherwise only those of its numbers are withheld that are not finite
    themselves. A run ends after `max_withheld` of these in a row; the second kind counts only if `train.meters` has `update_norm`.

    With `spike`, a finite update is also withheld if its loss, or the logarithm of its gradient norm, lies more than `spike` standard
    deviations above the median of the last `window`. The deviation is estimated by the median absolute deviation, which spikes hardly
    move. Spikes enter the window, so a change that lasts is accepted after half a window.
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
        """The history before the first step. None without `spike`."""
        if self.spike is None:
            return None
        return History(jnp.zeros(self.window, jnp.float32), jnp.zeros(self.window, jnp.float32), jnp.zeros((), jnp.int32))

    def judged(self, loss: Float32[Array, ""], norm: Float32[Array, ""], history: History) -> tuple[Bool[Array, ""], History]:
        """Whether a step with this loss and gradient norm is a spike, and the history with the step added.

        Before a whole window, no step is a spike. A step that is not finite is no spike and is not added.
        """
        log_norm = jnp.log(norm)
        finite = jnp.isfinite(loss) & jnp.isfinite(log_norm)
        above = self._above(loss, history.losses) | self._above(log_norm, history.log_norms)
        place = history.count % self.window
        new = History(history.losses.at[place].set(loss), history.log_norms.at[place].set(log_norm), history.count + 1)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, history)
        return finite & (history.count >= self.window) & above, kept

    def _above(self, value: Float32[Array, ""], window: Float32[Array, "window"]) -> Bool[Array, ""]:
        assert self.spike is not None
        median = jnp.median(window)
        return value > median + self.spike * DEVIATION * jnp.median(jnp.abs(window - median))


@jax.jit
def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every float of every array is a finite number."""
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))


def require_finite(state: PyTree[Array], step: int) -> None:
    """Raises `NonFiniteError` unless every number of a state to be saved is finite."""
    if not all_finite(state):
        raise NonFiniteError(
            "weights or optimizer state are not finite: they are not saved",
            where=f"step {step}",
            kept="the checkpoints before, all of whose numbers are finite",
            next="look at the weights that the run started from: init_from",
        )
