"""Runs a kernel on every device's part of the batch, the queries and the heads."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from llama_eqx.model.kernel.blocked import blocked
from llama_eqx.model.kernel.cudnn import cudnn
from llama_eqx.model.kernel.plain import Window
from llama_eqx.model.kernel.splash import dealt, make_splash, splash

Spec = Callable[[tuple[str, ...], tuple[int, ...]], PartitionSpec]


class Blocks(NamedTuple):
    """Sizes in tokens; see `KernelConfig`."""

    q: int
    kv: int
    fused_backward: bool


def on_shards(
    name: str,
    blocks: Blocks,
    mesh: Mesh,
    spec: Spec,
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch slots kv_heads head_dim"],
    v: Float[Array, "batch slots kv_heads head_dim"],
    start: Int[Array, ""] | int,
    segment_ids: tuple[Int[Array, "batch seq"], Int[Array, "batch slots"]] | None,
    window: Window | None = None,
) -> Float[Array, "batch seq heads head_dim"]:
    """Like `attend`, with a kernel that XLA cannot partition. Every device has all slots; queries may be split."""
    if name == "splash" and window is not None and not isinstance(window.applies, bool):  # its mask is fixed when it is made
        with_window, without = (functools.partial(on_shards, name, blocks, mesh, spec, window=w) for w in (Window(window.size), None))
        return jax.lax.cond(window.applies, with_window, without, q, k, v, start, segment_ids)
    batch, seq, heads, _ = spec(("batch", "seq", "heads", "head_dim"), q.shape)
    kv_heads = spec(("batch", "slots", "kv_heads", "head_dim"), k.shape)[2]
    if heads != kv_heads:  # the key heads do not divide over the devices: repeat them until they do
        k, v = (_repeated(x, q.shape[2], ways(mesh, heads)) for x in (k, v))
    # Mesh axes of size 1 join the batch: gradients would be summed over axes that are not named.
    batch = (*_axes(batch), *(axis for axis, size in mesh.shape.items() if size == 1))
    q_spec, kv_spec = PartitionSpec(batch, seq, heads, None), PartitionSpec(batch, None, heads, None)

    kernel, kernel_spec = None, None
    if name == "splash":
        shards, local_heads = ways(mesh, seq), q.shape[2] // ways(mesh, heads)
        interpret = mesh.devices.flat[0].platform != "tpu"
        size = window.size if window is not None and window.applies else None
        kernel = make_splash(local_heads, q.shape[1], k.shape[1], shards, *blocks, interpret, size)
        kernel_spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, seq)))

    def local(kernel: Any, q: Array, k: Array, v: Array, start: Array, segment_ids: tuple[Array, Array] | None, applies: Any) -> Array:
        here = None if window is None else Window(window.size, applies)
        if name == "splash":
            to, back = exchange(seq, ways(mesh, seq))
            ids = None if segment_ids is None else (to(segment_ids[0]), segment_ids[1])
            return back(splash(kernel, to(q), k, v, ids))
        first = start + jax.lax.axis_index(seq) * q.shape[1] if seq else start
        if name == "cudnn":
            return cudnn(q, k, v, first if seq or not from_zero else 0, segment_ids, here)
        return blocked(q, k, v, first, segment_ids, blocks.q, blocks.kv, here)

    from_zero = isinstance(start, int) and start == 0
    ids_spec = None if segment_ids is None else (PartitionSpec(batch, seq), PartitionSpec(batch, None))
    in_specs = (kernel_spec, q_spec, kv_spec, kv_spec, PartitionSpec(), ids_spec, PartitionSpec())
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=q_spec, check_vma=False)
    return mapped(kernel, q, k, v, jnp.asarray(start, jnp.int32), segment_ids, None if window is None else jnp.asarray(window.applies))


def exchange(axis: Any, shards: int) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Functions from a device's part of "batch seq …" to the two halves of parts that it is `dealt`, and back."""
    if shards == 1:
        return (lambda x: x), (lambda x: x)
    owner = {half: place // 2 for place, half in enumerate(dealt(shards))}
    even, odd = ([(i, owner[2 * i + which]) for i in range(shards)] for which in (0, 1))
    send = lambda x, pairs: jax.lax.ppermute(x, axis, pairs)  # noqa: E731
    turned = lambda pairs: [(b, a) for a, b in pairs]  # noqa: E731

    def in_order(a: Array, b: Array) -> tuple[Array, Array]:
        """Of the two parts that a device is dealt, one has an even number. It is the first one where the device's own is even."""
        first = jax.lax.axis_index(axis) % 2 == 0
        return jnp.where(first, a, b), jnp.where(first, b, a)

    def to(x: Array) -> Array:
        a, b = jnp.split(x, 2, axis=1)
        return jnp.concatenate(in_order(send(a, even), send(b, odd)), axis=1)

    def back(x: Array) -> Array:
        a, b = in_order(*jnp.split(x, 2, axis=1))
        return jnp.concatenate([send(a, turned(even)), send(b, turned(odd))], axis=1)

    return to, back


def ways(mesh: Mesh, part: Any) -> int:
    """The number of parts into which the mesh splits an axis; `part` is the axis's entry in a PartitionSpec."""
    return math.prod(mesh.shape[axis] for axis in _axes(part))


def _axes(part: Any) -> tuple[str, ...]:
    return (part,) if isinstance(part, str) else tuple(part or ())


def _repeated(x: Array, heads: int, ways: int) -> Array:
    """Repeats each key head until each of `ways` devices can hold exactly the key heads of its query heads."""
    kv_heads = x.shape[2]
    enough = next(n for n in range(kv_heads, heads + 1, kv_heads) if n % ways == 0 and heads % n == 0)
    return jnp.repeat(x, enough // kv_heads, axis=2)
