"""Cross-entropy of a residual through the head, in chunks of tokens, so that batch × seq × vocab logits never exist."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int

from llama_eqx.sharding import Layout, mesh_axes

Sums = tuple[Float32[Array, ""], Float32[Array, ""]]
AsLogits = Callable[[Float32[Array, "tokens vocab"]], Float32[Array, "tokens vocab"]]


def head_losses(
    x: Float[Array, "batch seq embed"],
    table: Float[Array, "embed vocab"],
    targets: Int[Array, "batch seq"],
    weights: Float[Array, "batch seq"],
    *,
    chunk: int | None,
    z_loss: float,
    layout: Layout,
    as_logits: AsLogits = lambda products: products,
) -> Sums:
    """Two weighted sums over all targets, in nats: the objective, `-log p + z_loss log² Z`, and its first term alone.

    Only the objective has a gradient. It is computed along with the value, chunk by chunk, so the logits are not computed again
    (Hsu et al., 2024, "Liger Kernel", arXiv 2410.10989). z_loss is that of PaLM (Chowdhery et al., 2022, arXiv 2204.02311, section 5).
    Each device takes `chunk` of its own tokens at a time, or all. Logits, softmax and sums are in float32. A target outside of the
    vocabulary makes the sums NaN, unless its weight is 0. `as_logits` is the model's `logits`.
    """
    weights = jnp.where(_known(targets, table) | (weights == 0), weights, jnp.nan)
    batch, seq, _ = layout.spec(("batch", "seq", ""), x.shape)
    embed, vocab = layout.spec(("embed", "vocab"), table.shape)
    token_axes = mesh_axes(batch) + mesh_axes(seq)
    vocab_axes = tuple(axis for axis in mesh_axes(vocab) if axis not in token_axes)  # devices with other tokens need the whole vocabulary
    scattered = tuple(axis for axis in mesh_axes(embed) if axis in token_axes)  # the table's gradient is split as the table is
    summed = tuple(axis for axis in token_axes if axis not in scattered)

    def local(x: Array, table: Array, targets: Array, weights: Array) -> tuple[Sums, Array, Array]:
        """The sums and the objective's gradients, from a device's own tokens and its part of the vocabulary."""
        first = jax.lax.axis_index(vocab_axes) * table.shape[1] if vocab_axes else 0

        def of_chunk(so_far: tuple[Array, Array], each: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
            (sums, d_table), (x, targets, weights) = so_far, each
            logits, pull = jax.vjp(as_logits, jnp.einsum("td,dv->tv", x, table, preferred_element_type=jnp.float32))
            hit = first + jnp.arange(table.shape[1])[None, :] == targets[:, None]
            losses, d_logits = _of_logits(logits, hit, z_loss, vocab_axes)
            d_products = pull(weights[:, None] * d_logits)[0].astype(x.dtype)
            d_x = jnp.einsum("tv,dv->td", d_products, table, preferred_element_type=jnp.float32).astype(x.dtype)
            d_table += jnp.einsum("td,tv->dv", x, d_products, preferred_element_type=jnp.float32)
            return (sums + (losses * weights).sum(-1), d_table), d_x

        chunks = _chunked(x, targets.size, chunk), _chunked(targets, targets.size, chunk), _chunked(weights, targets.size, chunk)
        begin = jnp.zeros(2, jnp.float32), jnp.zeros(table.shape, jnp.float32)
        (sums, d_table), d_x = jax.lax.scan(of_chunk, begin, chunks)
        d_x = jax.lax.psum(d_x, vocab_axes).reshape(-1, x.shape[-1])[: targets.size].reshape(x.shape)
        d_table = jax.lax.psum(d_table, summed)
        if scattered:
            d_table = jax.lax.psum_scatter(d_table, scattered, scatter_dimension=0, tiled=True)
        objective, cross_entropy = jax.lax.psum(sums, token_axes)
        return (objective, cross_entropy), d_x, d_table.astype(table.dtype)

    x_spec, ids_spec, whole = PartitionSpec(batch, seq, None), PartitionSpec(batch, seq), PartitionSpec()
    mapped = jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(x_spec, PartitionSpec(None, vocab_axes or None), ids_spec, ids_spec),
        out_specs=((whole, whole), x_spec, PartitionSpec(scattered or None, vocab_axes or None)),
        check_vma=False,
    )

    @jax.custom_vjp
    def losses(x: Array, table: Array, targets: Array, weights: Array) -> Sums:
        return mapped(x, table, targets, weights)[0]  # where no gradient is asked for, XLA drops what only gradients need

    def forward(x: Array, table: Array, targets: Array, weights: Array) -> tuple[Sums, tuple[Array, Array]]:
        sums, d_x, d_table = mapped(x, table, targets, weights)
        return sums, (d_x, d_table)

    def backward(gradients: tuple[Array, Array], cotangents: Sums) -> tuple[Array, Array, None, None]:
        d_x, d_table = (gradient * cotangents[0].astype(gradient.dtype) for gradient in gradients)
        return d_x, d_table, None, None

    losses.defvjp(forward, backward)
    return losses(x, table, targets, weights)


def head_scores(
    x: Float[Array, "batch seq embed"],
    table: Float[Array, "embed vocab"],
    targets: Int[Array, "batch seq"],
    *,
    chunk: int | None,
    layout: Layout,
    as_logits: AsLogits = lambda products: products,
) -> tuple[Float32[Array, "batch seq"], Bool[Array, "batch seq"]]:
    """The cross-entropy of each target in nats, and whether it is the most probable token (the first, if tied). The rest as above.

    That of a target outside of the vocabulary is NaN.
    """
    batch, seq, _ = layout.spec(("batch", "seq", ""), x.shape)
    _, vocab = layout.spec(("embed", "vocab"), table.shape)
    vocab_axes = tuple(axis for axis in mesh_axes(vocab) if axis not in mesh_axes(batch) + mesh_axes(seq))

    def local(x: Array, table: Array, targets: Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index(vocab_axes) * table.shape[1] if vocab_axes else 0

        def of_chunk(each: tuple[Array, Array]) -> tuple[Array, Array]:
            x, targets = each
            logits = as_logits(jnp.einsum("td,dv->tv", x, table, preferred_element_type=jnp.float32))
            hit = first + jnp.arange(table.shape[1])[None, :] == targets[:, None]
            (_, losses), _ = _of_logits(logits, hit, 0.0, vocab_axes)
            top = logits.max(-1)
            best = jnp.where(top == jax.lax.pmax(top, vocab_axes), first + logits.argmax(-1), jnp.iinfo(jnp.int32).max)
            return losses, jax.lax.pmin(best, vocab_axes) == targets

        scores = jax.lax.map(of_chunk, (_chunked(x, targets.size, chunk), _chunked(targets, targets.size, chunk)))
        losses, right = (score.reshape(-1)[: targets.size].reshape(targets.shape) for score in scores)
        return losses, right

    ids_spec = PartitionSpec(batch, seq)
    specs = PartitionSpec(batch, seq, None), PartitionSpec(None, vocab_axes or None), ids_spec
    mapped = jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=(ids_spec, ids_spec), check_vma=False)
    losses, right = mapped(x, table, targets)
    return jnp.where(_known(targets, table), losses, jnp.nan), right


def _known(targets: Int[Array, "batch seq"], table: Float[Array, "embed vocab"]) -> Bool[Array, "batch seq"]:
    return (targets >= 0) & (targets < table.shape[1])


def _of_logits(
    logits: Float32[Array, "tokens vocab"], hit: Bool[Array, "tokens vocab"], z_loss: float, vocab_axes: tuple[str, ...]
) -> tuple[Float32[Array, "2 tokens"], Float32[Array, "tokens vocab"]]:
    """Objective and cross-entropy of each token, and the objective's gradient; the vocabulary may be split over devices."""
    top = jax.lax.pmax(logits.max(-1), vocab_axes)
    p = jnp.exp(logits - top[:, None])
    z = jax.lax.psum(p.sum(-1), vocab_axes)
    log_z = top + jnp.log(z)
    cross_entropy = log_z - jax.lax.psum(jnp.where(hit, logits, 0).sum(-1), vocab_axes)
    gradient = p * ((1 + 2 * z_loss * log_z) / z)[:, None] - hit
    return jnp.stack([cross_entropy + z_loss * log_z**2, cross_entropy]), gradient


def _chunked(a: Array, tokens: int, chunk: int | None) -> Array:
    """Reshapes "batch seq …" to "chunks tokens …" and pads the last chunk with zeros: tokens of no weight."""
    count = -(-tokens // (chunk or tokens))
    size = -(-tokens // count)
    rest = a.shape[2:]
    a = jnp.pad(a.reshape(tokens, *rest), ((0, count * size - tokens), *((0, 0),) * len(rest)))
    return a.reshape(count, size, *rest)
