"""The loss and its gradients against PyTorch's, whole and in chunks, on one device and on several, and what memory it takes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

from llama_eqx import build_model, load_config
from llama_eqx.batch import Batch
from llama_eqx.errors import ConfigError
from llama_eqx.sharding import MESH_AXES, Layout, Rules
from llama_eqx.training.cross_entropy import head_losses, head_scores
from llama_eqx.training.loss import LossConfig, policy_view

RULES = Rules(axes={"batch": ("data", "fsdp"), "embed": ("fsdp",), "seq": ("sequence",), "vocab": ("tensor",), "heads": ("tensor",)})


def layout(*shape, rules=RULES):
    devices = jax.devices()[: int(np.prod(shape))]
    return Layout(jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices), rules)


def arrays(batch=4, seq=16, embed=8, vocab=40):
    rng = np.random.default_rng(0)
    x, table = rng.standard_normal((batch, seq, embed)), rng.standard_normal((embed, vocab))
    weights = rng.random((batch, seq)) * (rng.random((batch, seq)) < 0.7)
    return (
        [jnp.asarray(a, jnp.float32) for a in (x, table)],
        jnp.asarray(rng.integers(0, vocab, (batch, seq))),
        jnp.asarray(weights, jnp.float32),
    )


def pytorch(x, table, targets, weights, z_loss):
    import torch

    x, table = (torch.tensor(np.asarray(a)).requires_grad_() for a in (x, table))
    logits = (x @ table).flatten(0, 1)
    weights = torch.tensor(np.asarray(weights)).flatten()
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor(np.asarray(targets), dtype=torch.int64).flatten(), reduction="none")
    objective = ((losses + z_loss * torch.logsumexp(logits, -1) ** 2) * weights).sum()
    objective.backward()
    return [objective.item(), (losses * weights).sum().item(), x.grad.numpy(), table.grad.numpy()]


def ours(x, table, targets, weights, chunk, z_loss, where):
    @jax.jit
    def run(x, table):
        losses = lambda x, table: head_losses(x, table, targets, weights, chunk=chunk, z_loss=z_loss, layout=where)  # noqa: E731
        (objective, cross_entropy), gradients = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True)(x, table)
        return [objective, cross_entropy, *gradients]

    return run(x, table)


@pytest.mark.parametrize(
    ("chunk", "z_loss", "shape"),
    [
        (None, 0.0, (1, 1, 1, 1)),
        (7, 1e-2, (1, 1, 1, 1)),
        (5, 1e-2, (2, 2, 1, 2)),
        (3, 0.0, (1, 2, 2, 2)),
        (None, 0.0, (1, 4, 1, 2)),
    ],
)
def test_loss_and_gradients_are_those_of_pytorch(chunk, z_loss, shape):
    (x, table), targets, weights = arrays()
    wanted = pytorch(x, table, targets, weights, z_loss)
    found = ours(x, table, targets, weights, chunk, z_loss, layout(*shape))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_vocabulary_split_as_the_batch_is():
    """A device with tokens of its own needs the whole head for them."""
    (x, table), targets, weights = arrays()
    where = layout(1, 4, 1, 1, rules=Rules(axes={"batch": ("data", "fsdp"), "vocab": ("fsdp",)}))
    for a, b in zip(ours(x, table, targets, weights, 5, 1e-2, where), pytorch(x, table, targets, weights, 1e-2), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    losses, _ = jax.jit(lambda x, table: head_scores(x, table, targets, chunk=5, layout=where))(x, table)
    assert (losses * weights).sum() == pytest.approx(pytorch(x, table, targets, weights, 0)[1], rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 2)])
@pytest.mark.parametrize("outside", [-100, -1, 40])
def test_a_target_outside_of_the_vocabulary_is_no_number_if_it_counts(outside, shape):
    (x, table), targets, weights = arrays()
    wanted = ours(x, table, targets, weights.at[1, 2].set(0), None, 1e-2, layout(*shape))
    targets = targets.at[1, 2].set(outside)
    for a, b in zip(ours(x, table, targets, weights.at[1, 2].set(0), None, 1e-2, layout(*shape)), wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    objective, cross_entropy, *_ = ours(x, table, targets, weights.at[1, 2].set(0.5), None, 1e-2, layout(*shape))
    assert np.isnan(objective)
    assert np.isnan(cross_entropy)
    losses, _ = jax.jit(lambda x, table: head_scores(x, table, targets, chunk=5, layout=layout(*shape)))(x, table)
    assert np.isnan(losses).sum() == 1
    assert np.isnan(losses[1, 2])


def test_in_bfloat16_sums_are_float32():
    (x, table), targets, weights = arrays(seq=64)
    wanted = pytorch(x, table, targets, weights, 0)
    found = ours(x.astype(jnp.bfloat16), table.astype(jnp.bfloat16), targets, weights, 16, 0.0, layout(1, 2, 1, 1))
    assert [a.dtype for a in found] == [jnp.float32, jnp.float32, jnp.bfloat16, jnp.bfloat16]
    for a, b in zip(found, wanted, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float32) - b) < 0.01 * np.linalg.norm(b)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_through_the_model(tied, precision, tiny):
    """Against the mean over all logits, as anyone would write it."""
    config, where = load_config(f"precision={precision}"), layout(1, 2, 1, 2)
    model = build_model(tiny(f"model.tied={tied}"), key=jax.random.key(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 13)), jnp.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], (tokens[:, 1:] % 3 > 0).astype(jnp.float32))
    view = policy_view(config.precision, config.remat, where)

    def plain(model):
        losses = optax.softmax_cross_entropy_with_integer_labels(view(model)(batch.tokens), batch.targets)
        return (losses * batch.loss_mask).sum()

    loss = LossConfig(chunk=5, z_loss=0).build(view, where)
    wanted, wanted_gradient = jax.jit(jax.value_and_grad(plain))(model)
    (found, sums), gradient = jax.jit(jax.value_and_grad(lambda model: loss(model, batch, None), has_aux=True))(model)
    assert found == sums.cross_entropy
    assert sums.weight == batch.loss_mask.sum()
    near = 1e-5 if precision == "float32" else 0.02
    np.testing.assert_allclose(found, wanted, rtol=near)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True):
        assert a.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) < near * jnp.linalg.norm(b)


def test_logits_of_a_large_vocabulary_do_not_exist_at_once():
    """2,048 tokens of Llama 3's vocabulary: 1 GiB of logits, of which a chunk of 64 tokens has 1/32."""
    vocab, embed, where = 128_256, 16, layout(1, 1, 1, 1)
    shapes = jax.ShapeDtypeStruct((4, 512, embed), jnp.float32), jax.ShapeDtypeStruct((embed, vocab), jnp.float32)
    ids, weights = jax.ShapeDtypeStruct((4, 512), jnp.int32), jax.ShapeDtypeStruct((4, 512), jnp.float32)

    def temporary(chunk, *, gradient):
        def losses(x, table, targets, weights):
            return head_losses(x, table, targets, weights, chunk=chunk, z_loss=1e-4, layout=where)

        run = jax.value_and_grad(losses, argnums=(0, 1), has_aux=True) if gradient else losses
        return jax.jit(run).lower(*shapes, ids, weights).compile().memory_analysis().temp_size_in_bytes

    jax.config.update("jax_disable_most_optimizations", False)
    try:
        logits, table = 4 * 512 * vocab * 4, embed * vocab * 4
        assert temporary(None, gradient=True) > logits
        assert temporary(64, gradient=True) < logits / 8
        assert temporary(64, gradient=False) < logits / 8
        assert temporary(1, gradient=False) < table  # an evaluation does not compute gradients to drop them
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("wrong", ["loss.chunk=0", "loss.z_loss=-1"])
def test_settings_that_cannot_be(wrong):
    with pytest.raises(ConfigError, match="loss"):
        load_config(wrong)
