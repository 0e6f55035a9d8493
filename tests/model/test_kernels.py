"""Every attention kernel against the plain one and against PyTorch's, forward and backward, on one device and on several."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from llama_eqx import load_config
from llama_eqx.errors import ConfigError
from llama_eqx.model.kernel import KernelConfig, attend, prompts
from llama_eqx.model.kernel.blocked import blocked
from llama_eqx.model.kernel.plain import Window, plain
from llama_eqx.model.kernel.shards import Blocks, on_shards
from llama_eqx.sharding import MESH_AXES, Layout, Rules

RULES = Rules(axes={"batch": ("data", "fsdp"), "seq": ("sequence",), "heads": ("tensor",), "kv_heads": ("tensor",)})


def layout(*shape):
    devices = jax.devices()[: int(np.prod(shape))]
    return Layout(jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices), RULES)


def arrays(batch, seq, slots, heads, kv_heads, head_dim, dtype=jnp.float32):
    shapes = [
        (batch, seq, heads, head_dim),
        (batch, slots, kv_heads, head_dim),
        (batch, slots, kv_heads, head_dim),
        (batch, seq, heads, head_dim),
    ]
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


def ids(kind, batch, seq):
    """None, documents packed into rows (other ones in each row), or rows that begin with padding."""
    if kind == "whole":
        return None
    if kind == "packed":
        ends = np.random.default_rng(0).random((batch, seq)) < 3 / seq
        found = jnp.asarray(1 + np.cumsum(ends, axis=1), jnp.int32)
    else:
        found = jnp.asarray(np.arange(seq)[None] >= np.arange(1, batch + 1)[:, None] * seq // (batch + 2), jnp.int32)
    return found, found


def with_gradients(kernel):
    """The result and the gradients of q, k and v for a given cotangent."""

    def run(q, k, v, cotangent, segment_ids):
        out, vjp = jax.vjp(lambda q, k, v: kernel(q, k, v, segment_ids), q, k, v)
        return out, *vjp(cotangent)

    return jax.jit(run)


def assert_same(kernel, reference, inputs, segment_ids):
    with jax.default_matmul_precision("highest"):
        found = with_gradients(kernel)(*inputs, segment_ids)
        wanted = with_gradients(reference)(*inputs, segment_ids)
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize(("kind", "kv_heads"), [("whole", 1), ("packed", 2), ("padded", 4)])
def test_blocked_is_plain(kind, kv_heads):
    """Rows of 100 in blocks of 32 and 48: neither divides."""
    inputs = arrays(2, 100, 100, 4, kv_heads, 8)
    kernel = lambda q, k, v, segment_ids: blocked(q, k, v, 0, segment_ids, 32, 48)  # noqa: E731
    assert_same(kernel, lambda q, k, v, segment_ids: plain(q, k, v, 0, segment_ids), inputs, ids(kind, 2, 100))


@pytest.mark.parametrize("start", [3, 90])
def test_blocked_from_a_far_slot(start):
    """A piece of 30 queries in a cache of 120 slots of which the last are not written yet; the start is traced."""
    inputs = arrays(2, 30, 120, 4, 2, 8)
    slots = jnp.asarray(np.arange(120) < start + 30, jnp.int32)[None].repeat(2, 0)
    segment_ids = jnp.ones((2, 30), jnp.int32), slots
    kernel = lambda q, k, v, ids: blocked(q, k, v, jnp.asarray(start), ids, 16, 32)  # noqa: E731
    assert_same(kernel, lambda q, k, v, ids: plain(q, k, v, start, ids), inputs, segment_ids)


@pytest.mark.parametrize("kind", ["whole", "packed"])
def test_plain_is_pytorch(kind):
    import torch

    inputs = arrays(2, 40, 40, 4, 2, 8)
    segment_ids = ids(kind, 2, 40)
    q, k, v, cotangent = (torch.tensor(np.asarray(x)).transpose(1, 2).requires_grad_() for x in inputs)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    if segment_ids is not None:
        row = torch.tensor(np.asarray(segment_ids[0]))
        mask = (mask & (row[:, :, None] == row[:, None, :]))[:, None]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    out.backward(cotangent)
    wanted = [x.detach().transpose(1, 2).numpy() for x in (out, q.grad, k.grad, v.grad)]
    found = with_gradients(lambda q, k, v, segment_ids: plain(q, k, v, 0, segment_ids))(*inputs, segment_ids)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
def test_plain_in_a_window_is_by_hand(kind):
    """A query sees itself and the 4 slots before, in its own segment."""
    (q, k, v, _), segment_ids = arrays(2, 20, 20, 4, 2, 8), ids(kind, 2, 20)
    found = attend(q, k, v, segment_ids=segment_ids, window=Window(5))
    for row in range(2):
        for i in range(20):
            slots = [j for j in range(max(i - 4, 0), i + 1) if segment_ids is None or segment_ids[0][row, i] == segment_ids[0][row, j]]
            for head in range(4):
                keys, values = (np.asarray(x)[row, slots, head // 2].astype(np.float64) for x in (k, v))
                weights = np.exp(keys @ np.asarray(q)[row, i, head] / np.sqrt(8))
                np.testing.assert_allclose(found[row, i, head], weights @ values / weights.sum(), atol=1e-5)


@pytest.mark.parametrize("size", [1, 40, 70, 100])
@pytest.mark.parametrize(("kind", "applies"), [("whole", True), ("packed", True), ("padded", False)])
def test_blocked_in_a_window_is_plain(kind, applies, size):
    """Windows within a block, over several, and of the whole row. Whether they apply is known to the compiled program alone."""
    inputs, window = arrays(2, 100, 100, 4, 2, 8), Window(size, jnp.asarray(applies))
    kernel = lambda q, k, v, ids: blocked(q, k, v, 0, ids, 16, 24, window)  # noqa: E731
    assert_same(kernel, lambda q, k, v, ids: plain(q, k, v, 0, ids, Window(size) if applies else None), inputs, ids(kind, 2, 100))


def test_blocked_computes_the_blocks_of_a_window_alone():
    """Keys before the window are NaN, which no mask hides in a product."""
    q, k, v, _ = arrays(1, 64, 128, 2, 2, 8)
    found = blocked(q, k.at[:, :32].set(jnp.nan), v.at[:, :32].set(jnp.nan), 64, None, 16, 16, Window(32))
    np.testing.assert_allclose(found, plain(q, k, v, jnp.asarray(64), None, Window(32)), atol=2e-5)


SPLITS = {"one": (1, 1, 1, 1), "batch": (2, 2, 1, 1), "heads": (1, 2, 1, 4), "queries": (1, 2, 4, 1), "all": (2, 1, 2, 2)}


@pytest.mark.parametrize(("name", "split"), [("blocked", "all"), ("splash", "one"), ("splash", "queries")])
def test_a_window_in_one_of_two_layers(name, split):
    """The compiled program is the same for both, but the mask of splash is fixed when it is made."""
    where, window = layout(*SPLITS[split]), lambda applies: Window(130, applies)
    inputs, segment_ids = arrays(2, 512, 512, 4, 2, 64), ids("packed", 2, 512)
    kernel = lambda q, k, v, ids, here: on_shards(name, Blocks(128, 128, False), where.mesh, where.spec, q, k, v, 0, ids, here)  # noqa: E731

    def layers(q, k, v, ids):
        fold = lambda _, applies: (None, kernel(q, k, v, ids, window(applies)))  # noqa: E731
        first, second = jax.lax.scan(fold, None, jnp.asarray([True, False]))[1]
        return first + 2 * second

    assert_same(layers, lambda q, k, v, ids: plain(q, k, v, 0, ids, window(True)) + 2 * plain(q, k, v, 0, ids), inputs, segment_ids)


@pytest.mark.parametrize(("split", "kind"), [("batch", "packed"), ("heads", "whole"), ("queries", "packed"), ("all", "packed")])
def test_blocked_on_several_devices(split, kind):
    """With 2 key heads: split by `heads` they are fewer than devices."""
    where = layout(*SPLITS[split])
    inputs = arrays(4, 64, 64, 8, 2, 8)
    kernel = lambda q, k, v, segment_ids: on_shards("blocked", Blocks(16, 16, False), where.mesh, where.spec, q, k, v, 0, segment_ids)  # noqa: E731
    assert_same(kernel, lambda q, k, v, segment_ids: plain(q, k, v, 0, segment_ids), inputs, ids(kind, 4, 64))


@pytest.mark.parametrize(
    ("split", "kind", "kv_heads", "fused"),
    [("one", "whole", 1, False), ("batch", "packed", 2, True), ("queries", "packed", 4, False), ("all", "whole", 2, False)],
)
def test_splash_is_plain(split, kind, kv_heads, fused):
    """Interpreted, where there is no TPU."""
    where = layout(*SPLITS[split])
    inputs = arrays(4, 512, 512, 4, kv_heads, 64)
    kernel = lambda q, k, v, segment_ids: on_shards("splash", Blocks(128, 256, fused), where.mesh, where.spec, q, k, v, 0, segment_ids)  # noqa: E731
    assert_same(kernel, lambda q, k, v, segment_ids: plain(q, k, v, 0, segment_ids), inputs, ids(kind, 4, 512))


@pytest.mark.parametrize(("dtype", "asked"), [(jnp.bfloat16, False), (jnp.float32, True)])
def test_splash_multiplies_16_bits_as_its_compiler_can(dtype, asked):
    """Mosaic refuses products of bfloat16 numbers that are to be as exact as those of float32, as the verbs ask by default."""
    where = layout(1, 1, 1, 1)
    inputs = arrays(1, 256, 256, 2, 2, 64, dtype)
    for fused in (True, False):
        kernel = lambda q, k, v, _, fused=fused: on_shards("splash", Blocks(128, 128, fused), where.mesh, where.spec, q, k, v, 0, None)  # noqa: E731
        with jax.default_matmul_precision("highest"):
            text = str(jax.make_jaxpr(with_gradients(kernel))(*inputs, None))
        assert text.count("pallas_call") > 1
        assert ("HIGHEST" in text) == asked


@pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["whole", "packed", "padded"])
def test_cudnn_is_plain(kind):
    where, segment_ids = layout(1, 1, 1, 1), ids(kind, 2, 512)
    inputs = arrays(2, 512, 512, 8, 2, 64, jnp.bfloat16)
    kernel = lambda q, k, v, segment_ids: on_shards("cudnn", Blocks(512, 512, False), where.mesh, where.spec, q, k, v, 0, segment_ids)  # noqa: E731
    exact = with_gradients(lambda q, k, v, ids: plain(q, k, v, 0, ids))(*(x.astype(jnp.float32) for x in inputs), segment_ids)
    for a, b in zip(with_gradients(kernel)(*inputs, segment_ids), exact, strict=True):
        assert a.dtype == jnp.bfloat16
        assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


def test_blocked_in_bfloat16_is_near():
    inputs = arrays(2, 256, 256, 4, 2, 64, jnp.bfloat16)
    exact = with_gradients(lambda q, k, v, ids: plain(q, k, v, 0, ids))(*(x.astype(jnp.float32) for x in inputs), None)
    for kernel in (lambda q, k, v, ids: blocked(q, k, v, 0, ids, 64, 64), lambda q, k, v, ids: plain(q, k, v, 0, ids)):
        for a, b in zip(with_gradients(kernel)(*inputs, None), exact, strict=True):
            assert a.dtype == jnp.bfloat16
            assert jnp.linalg.norm(a.astype(jnp.float32) - b) < 0.01 * jnp.linalg.norm(b)


def test_memory_grows_with_the_row_and_not_with_its_square():
    def temporary(kernel, seq):
        inputs = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(1, seq, seq, 2, 2, 16)]
        return with_gradients(kernel).lower(*inputs, None).compile().memory_analysis().temp_size_in_bytes

    jax.config.update("jax_disable_most_optimizations", False)
    try:
        kernel = lambda q, k, v, ids: blocked(q, k, v, 0, ids, 256, 256)  # noqa: E731
        assert temporary(kernel, 4096) < 2.2 * temporary(kernel, 2048)
        assert temporary(kernel, 4096) < temporary(lambda q, k, v, ids: plain(q, k, v, 0, ids), 4096) / 8
    finally:
        jax.config.update("jax_disable_most_optimizations", True)


BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("platform", "dtype", "seq", "head_dim", "name", "reason"),
    [
        ("tpu", BF16, 4096, 128, "splash", ""),
        ("tpu", BF16, 4000, 128, "blocked", "multiples of 128"),
        ("gpu", BF16, 4096, 64, "cudnn", ""),
        ("gpu", F32, 4096, 64, "blocked", "16-bit"),
        ("gpu", BF16, 4096, 256, "blocked", "head_dim=256"),
        ("cpu", F32, 4096, 64, "blocked", ""),
        ("cpu", F32, 128, 64, "plain", ""),
    ],
)
def test_auto_takes_what_the_platform_has(platform, dtype, seq, head_dim, name, reason):
    choice = load_config().kernel.choose(platform, dtype=dtype, seq=seq, slots=seq, head_dim=head_dim)
    assert choice.name == name
    assert reason in choice.reason
    assert bool(reason) == bool(choice.reason)


def test_a_kernel_that_cannot_be_used_says_why():
    with pytest.raises(ConfigError, match="it is for TPUs"):
        load_config("kernel.name=splash").kernel.choose("cpu", dtype=F32, seq=512, slots=512, head_dim=64)
    with pytest.raises(ConfigError, match="192 queries on a device"):  # 384 would do
        load_config("kernel.name=splash").kernel.choose("tpu", dtype=F32, seq=384, slots=384, head_dim=64, shards=2)
    with pytest.raises(ConfigError, match="16-bit"):
        load_config("kernel.name=cudnn").kernel.choose("gpu", dtype=F32, seq=512, slots=512, head_dim=64)
    with pytest.raises(ConfigError, match="multiple of 128"):
        load_config("kernel.q_block=100")


def test_a_kernel_holds_only_within_its_block(monkeypatch):
    where, seen = layout(1, 1, 1, 1), []
    monkeypatch.setattr("llama_eqx.model.kernel.on_shards", lambda name, *rest: seen.append(name) or rest[3])
    config = KernelConfig(name="blocked", q_block=128, kv_block=128, fused_backward=False)
    q, k, v, _ = arrays(1, 8, 8, 2, 2, 8)
    config.block(attend, where.mesh, where.spec)(q, k, v)
    attend(q, k, v)
    assert seen == ["blocked"]


def gpu(version="cuda 13000", capability="9.0"):
    return SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version=version), compute_capability=capability)


def test_prompts_on_a_gpu(monkeypatch):
    """Whole rows are cuDNN's. With padding or in a cache that is not empty they are not, and neither are short or exact ones."""
    taken = []
    for name in ("cudnn", "plain"):
        monkeypatch.setattr(f"llama_eqx.model.kernel.{name}", lambda q, *rest, name=name, **more: taken.append(name) or q)

    def kernels(*arrays, **more):
        """Those of a program that is yet to be compiled for some platform."""
        taken.clear()
        with prompts():
            jax.make_jaxpr(lambda *arrays: attend(*arrays, **more))(*arrays)
        return {*taken}

    q, k, v, _ = arrays(1, 256, 256, 2, 2, 8, jnp.bfloat16)
    monkeypatch.setattr(jax, "devices", lambda: [gpu()])
    assert kernels(q, k, v) == {"cudnn", "plain"}
    assert kernels(q, k, v, segment_ids=ids("padded", 1, 256)) == {"plain"}
    assert kernels(q, k, v, start=jnp.asarray(0)) == {"plain"}
    assert kernels(*(x[:, :128] for x in (q, k, v))) == {"plain"}
    assert kernels(q[:, :200], k, v) == {"plain"}
    assert kernels(*(x.astype(jnp.float32) for x in (q, k, v))) == {"plain"}
    for devices in ([gpu(), gpu()], [gpu("rocm 70000", "gfx942")], [gpu(capability="7.5")]):
        monkeypatch.setattr(jax, "devices", lambda devices=devices: devices)
        assert kernels(q, k, v) == {"plain"}
    monkeypatch.setattr(jax, "devices", lambda: [gpu()])
    taken.clear()
    jax.make_jaxpr(attend)(q, k, v)  # of no prompt: by the plain one itself
    assert not taken
