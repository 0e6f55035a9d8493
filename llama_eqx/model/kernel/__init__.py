"""Attention proper, softmax(q k^T / sqrt(head_dim)) v, and the choice of its kernel.

The model calls `attend` and knows no more. The kernel is set from outside, by `KernelConfig.block` or, in generation, by `prompts`, and
applies while a block is traced; the default is the plain kernel. Within the model, only this package may know of a mesh, and only this
package and `rotary` of a platform.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from llama_eqx.config import Config
from llama_eqx.errors import ConfigError
from llama_eqx.model.kernel.cudnn import cudnn, unfit_for_cudnn
from llama_eqx.model.kernel.plain import Window, plain
from llama_eqx.model.kernel.shards import Blocks, Spec, on_shards, ways
from llama_eqx.model.kernel.splash import unfit_for_splash
from llama_eqx.model.kernel.tokenwise import ONE_ROW, PLATFORM
from llama_eqx.tag import setting, show

Name = Literal["plain", "blocked", "splash", "cudnn"]
SHORT = 128  # tokens up to which computing all scores at once is as fast
_KERNEL: contextvars.ContextVar[Callable] = contextvars.ContextVar("kernel", default=plain)


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    *,
    start: Int[Array, ""] | int = 0,
    segment_ids: tuple[Int[Array, "batch seq"], Int[Array, "batch slots"]] | None = None,
    window: Window | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Causal attention: query i is in slot `start + i` and sees the slots of its segment up to its own, in a `window` the last of them.

    `segment_ids` are those of the queries and of the slots; None means a single segment.

    Scores and softmax are in float32. Query head n reads key head n // (heads / kv_heads) (Ainslie et al., 2023, arXiv 2305.13245).
    The result, and whatever else a kernel keeps for its backward pass, is tagged "attention".

    Raises `ConfigError` for a window without a slot.
    """
    if window is not None and window.size < 1:
        raise ConfigError(f"a window of {window.size} slots leaves nothing to see", where="window", next="1 sees the token itself alone")
    show(q, "attending")
    show(k, "attended")
    show(jnp.asarray(k.shape[1] if window is None else window.reach(k.shape[1])), "reach")
    return _KERNEL.get()(q, k, v, start, segment_ids, window)


def keeps_no_scores(dtype: Any, head_dim: int) -> bool:
    """Whether cuDNN can compute the attention of `prompts`: on a single NVIDIA GPU (over several, arrays may be split), Ampere or newer."""
    device, *others = jax.devices()
    able = device.platform == "gpu" and "cuda" in device.client.platform_version and float(device.compute_capability) >= 8
    return able and not others and not unfit_for_cudnn(jnp.dtype(dtype), 2, 2, head_dim)


def prompts() -> contextlib.AbstractContextManager[None]:
    """A context for tracing a model: cuDNN attends over whole rows where `keeps_no_scores`, and the plain kernel over the rest."""

    def kernel(q: Array, k: Array, v: Array, start: Any, segment_ids: Any, window: Window | None) -> Array:
        (_, seq, _, head_dim), whole = q.shape, segment_ids is None and isinstance(start, int) and start == 0
        by = functools.partial(plain, start=start, segment_ids=segment_ids, window=window)
        if whole and seq > SHORT and seq == k.shape[1] and seq % 2 == 0 and keeps_no_scores(q.dtype, head_dim):
            of_cudnn = functools.partial(cudnn, start=start, segment_ids=segment_ids, window=window)
            return jax.lax.platform_dependent(q, k, v, cuda=of_cudnn, default=by)  # arrays may still be on a CPU
        return by(q, k, v)

    return setting(_KERNEL, kernel)


class Choice(NamedTuple):
    """A kernel's name, and the reason where `auto` could not choose the platform's own kernel."""

    name: Name
    reason: str


class KernelConfig(Config):
    """Which kernel computes attention. `auto` is splash on TPUs and cuDNN on GPUs, elsewhere blocked, or plain for short rows.

    `q_block` and `kv_block` are the largest block sizes in tokens; None leaves the choice to the kernel. cuDNN always chooses its own.
    `fused_backward` makes splash compute the gradients of q, k and v in one pass: fewer FLOPs and more memory.
    """

    name: Literal["auto", "plain", "blocked", "splash", "cudnn"]
    q_block: int | None
    kv_block: int | None
    fused_backward: bool

    def check(self) -> None:
        for field in ("q_block", "kv_block"):
            value = getattr(self, field)
            if value is not None and (value < 128 or value % 128):
                raise ConfigError(f"{value} is not a multiple of 128", where=field)

    def choose(self, platform: str, *, dtype: Any, seq: int, slots: int, head_dim: int, start: Any = 0, shards: int = 1) -> Choice:
        """The kernel for `seq` queries, split over `shards` devices, and `slots` keys on a platform as JAX calls it.

        Raises `ConfigError` when a kernel that is asked for by name cannot compute this.
        """
        unfit = {
            "splash": "it is for TPUs" if platform != "tpu" else unfit_for_splash(seq // shards, slots, start),
            "cudnn": "it is for NVIDIA GPUs" if platform != "gpu" else unfit_for_cudnn(jnp.dtype(dtype), seq, slots, head_dim),
        }
        if reason := unfit.get(self.name):
            raise ConfigError(f"attention cannot be computed by {self.name}: {reason}", where="kernel.name", next="kernel.name=auto")
        if self.name != "auto":
            return Choice(self.name, "")
        own: Name | None = "splash" if platform == "tpu" else "cudnn" if platform == "gpu" else None
        if own and not unfit[own]:
            return Choice(own, "")
        return Choice("blocked" if seq > SHORT else "plain", f"not {own}: {unfit[own]}" if own else "")

    def block(self, block: Callable, mesh: Mesh, spec: Spec) -> Callable:
        """Wraps a block so that this kernel computes its attention, on arrays split over `mesh` as `spec(axes, shape)` says."""
        platform = mesh.devices.flat[0].platform

        def kernel(q: Array, k: Array, v: Array, start: Any, segment_ids: Any, window: Window | None) -> Array:
            seq, slots, head_dim = q.shape[1], k.shape[1], q.shape[3]
            shards = ways(mesh, spec(("batch", "seq"), q.shape[:2])[1])
            name, _ = self.choose(platform, dtype=q.dtype, seq=seq, slots=slots, head_dim=head_dim, start=start, shards=shards)
            if name == "plain":  # XLA partitions it by itself
                return plain(q, k, v, start, segment_ids, window)
            own = 512 if name == "splash" else 256
            blocks = Blocks(self.q_block or own, self.kv_block or own, self.fused_backward)
            return on_shards(name, blocks, mesh, spec, q, k, v, start, segment_ids, window)

        def wrapped(*args: Any) -> Any:
            with setting(_KERNEL, kernel), setting(PLATFORM, platform), setting(ONE_ROW, platform == "cpu" and mesh.size == 1):
                return block(*args)

        return wrapped
