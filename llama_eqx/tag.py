"""Names for activations, so that policies and observers outside the model can refer to them."""

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

Seen = dict[str, list[Array]]  # what was tagged, by name, in the order of computation


class Probe:
    """Collects what is tagged with one of `names` while a model is traced in `probing`.

    `layer(seen)` is called in the loop over layers with what each layer tagged. Its results are stacked over layers in `layers`;
    `outside` has what was tagged outside the layers.
    """

    def __init__(self, names: Iterable[str], layer: Callable[[Seen], Any]):
        self.names, self.layer = tuple(names), layer
        self.outside: Seen = {name: [] for name in self.names}
        self.layers: Any = None


_PROBE: contextvars.ContextVar[Probe | None] = contextvars.ContextVar("probe", default=None)
_SEEN: contextvars.ContextVar[Seen | None] = contextvars.ContextVar("seen", default=None)


def tag(x: Array, name: str) -> Array:
    """`x` itself, known as `name` to a rematerialisation policy and to a probe; costs nothing when none asks."""
    show(x, name)
    return checkpoint_name(x, name)


def show(x: Array, name: str) -> None:
    """Makes `x` known as `name` to a probe alone."""
    seen = _SEEN.get()
    if seen is not None and name in seen:
        seen[name].append(x)


def probed() -> bool:
    """Whether a probe sees the current trace."""
    return _PROBE.get() is not None


def scan_layers(fold: Callable, carry: Any, layers: Any, unroll: int) -> Any:
    """Runs `jax.lax.scan` over the layers and returns the final carry. An active probe also collects, per layer, what was tagged."""
    probe = _PROBE.get()
    if probe is None:
        return jax.lax.scan(fold, carry, layers, unroll=unroll)[0]

    def watched(carry: Any, layer: Any) -> tuple[Any, Any]:
        seen = {name: [] for name in probe.names}
        with setting(_SEEN, seen):
            carry, _ = fold(carry, layer)
        return carry, probe.layer(seen)

    carry, probe.layers = jax.lax.scan(watched, carry, layers, unroll=unroll)
    return carry


@contextlib.contextmanager
def probing(probe: Probe) -> Iterator[None]:
    """A context in which `probe` sees the models that are traced. What it sees is valid only within the traced function."""
    with setting(_PROBE, probe), setting(_SEEN, probe.outside):
        yield


@contextlib.contextmanager
def setting(variable: contextvars.ContextVar, value: Any) -> Iterator[None]:
    """A context in which the variable has the value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
