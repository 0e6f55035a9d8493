"""The digits at the end of a run: the same for the same bits wherever they are, others for any other bit, place, name or type."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama_eqx.checkpoint.fingerprint import fingerprint

TREE = {
    "weight": jnp.arange(64, dtype=jnp.float32).reshape(8, 8),
    "half": jnp.array([0.0, jnp.nan, jnp.inf, 1.0], jnp.bfloat16),
    "step": jnp.int32(7),
}


def test_the_mesh_does_not_matter():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    for spec in (PartitionSpec(), PartitionSpec("a", "b"), PartitionSpec("b"), PartitionSpec(None, ("a", "b"))):
        placed = {**TREE, "weight": jax.device_put(TREE["weight"], NamedSharding(mesh, spec))}
        assert fingerprint(placed) == fingerprint(TREE)
    assert len(fingerprint(TREE)) == 16


def test_every_bit_place_name_type_and_shape_matters():
    def flipped(name, place, bit):
        words = np.array(TREE[name]).view(f"uint{8 * TREE[name].dtype.itemsize}")
        words.flat[place] ^= 1 << bit
        return {**TREE, name: jnp.asarray(words.view(TREE[name].dtype))}

    weight = TREE["weight"]
    trees = [
        TREE,
        *(flipped("weight", place, bit) for place in (0, 63) for bit in range(32)),
        *(flipped("half", 1, bit) for bit in range(16)),
    ]
    trees += [
        {**TREE, "weight": weight.T},
        {**TREE, "weight": weight.reshape(4, 16)},
        {**TREE, "weight": weight.at[0, 0].set(-0.0)},
        {**TREE, "step": jnp.uint32(7)},
        {**TREE, "half": TREE["half"].astype(jnp.float16)},
        {"other": weight, "half": TREE["half"], "step": TREE["step"]},
    ]
    found = [fingerprint(tree) for tree in trees]
    assert len({*found}) == len(found) - 1  # -0.0 is a flipped bit of 0.0
