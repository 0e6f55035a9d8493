"""A number that tells states apart, computed where their arrays are."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt32


def fingerprint(tree: PyTree[Array]) -> str:
    """Returns 16 hexadecimal digits that depend on the name, shape, dtype and every bit of all arrays, and on nothing else.

    Every device sums what it holds modulo 2**32, where the order does not matter. So the same bits give the same digits on any mesh and any
    number of processes, all of which call this. It finds differences, not forgeries.
    """
    total = np.zeros(2, np.uint32)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        said = f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}"
        # One at a time: several at once, each a sum over all devices, may wait for each other on a CPU.
        total += np.asarray(_sums(leaf, np.uint32(zlib.crc32(said.encode()))))
    return "".join(f"{part:08x}" for part in total.tolist())


@jax.jit
def _sums(leaf: Array, salt: UInt32[Array, ""]) -> UInt32[Array, "2"]:
    bits = jax.lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.zeros(leaf.shape, jnp.uint32)
    for axis, size in enumerate(leaf.shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    mixed = _mix(bits ^ _mix(place ^ salt))
    return jnp.stack([jnp.sum(mixed, dtype=jnp.uint32), jnp.sum(_mix(mixed ^ salt), dtype=jnp.uint32)])


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The last step of MurmurHash3 (Appleby, 2011): every bit of the input affects every bit of the output."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
