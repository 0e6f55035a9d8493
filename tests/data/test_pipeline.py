import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama_eqx.batch import Batch
from llama_eqx.data.pipeline import (
    TokenWindows,
    n_batches,
    place,
    process_rows,
    rows,
    training_batches,
    validation_batches,
    validation_rows,
)
from llama_eqx.errors import ConfigError, DataError

SEQ = 4


def to_batch(rows):
    """A batch on the default device."""
    tokens = jnp.asarray(rows[:, :-1])
    return Batch(tokens, jnp.asarray(rows[:, 1:]), jnp.ones(tokens.shape))


@pytest.fixture
def windows(split):
    """A source of `count` windows of SEQ + 1 ids that count upwards, with an unused rest."""

    def windows(count, rest=3):
        tokens = count * SEQ + 1 + rest
        return TokenWindows(split([np.arange(tokens)]), SEQ)

    return windows


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((4, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    return lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))


def take(source, count, **arguments):
    with rows(source, **{"batch_size": 8, "seed": 1, **arguments}) as iterator:
        return [batch.copy() for batch in itertools.islice(iterator, count)]


def test_windows_share_the_id_at_which_they_meet(windows):
    source = windows(3)
    assert [row.tolist() for row in source] == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    assert source[0].dtype == np.int32
    with pytest.raises(IndexError):
        source[-1]


@pytest.mark.parametrize(("tokens", "count"), [(5, 1), (8, 1), (9, 2)])
def test_every_window_that_fits_is_there(split, tokens, count):
    source = TokenWindows(split([np.arange(tokens)]), SEQ)
    assert len(source) == len([source[i] for i in range(count)]) == count
    assert source[count - 1].shape == (SEQ + 1,)


@pytest.mark.parametrize("tokens", [0, 1, 4])
def test_a_split_without_a_window_says_what_to_change(split, tokens):
    with pytest.raises(DataError, match=f"val has {tokens} tokens, a row needs 5") as error:
        TokenWindows(split([np.arange(tokens)], name="val"), SEQ)
    assert "more text" in error.value.next
    assert "train.seq_len=0" not in str(error.value)
    assert "train.seq_len=-" not in str(error.value)


def test_windows_are_sent_without_their_map(windows):
    source = windows(10_000)
    source[0]
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert (pickle.loads(sent)[9_999] == source[9_999]).all()


def test_an_epoch_has_every_window_once_and_the_next_another_order(windows):
    source = windows(16)
    epochs = np.concatenate(take(source, 6))[:, 0].reshape(3, 16) // SEQ
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(16))] * 3
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


def test_batches_follow_from_the_seed_and_epochs_of_neighbouring_seeds_differ(windows):
    source = windows(16)
    orders = {}
    for seed in range(3):
        batches = take(source, 6, seed=seed)
        assert np.array_equal(batches, take(source, 6, seed=seed))
        for epoch, order in enumerate(np.concatenate(batches)[:, 0].reshape(3, 16)):
            orders[seed, epoch] = tuple(order.tolist())
    assert len(set(orders.values())) == 9


@pytest.mark.parametrize(("count", "start"), [(19, 1), (19, 2), (19, 7), (32, 4), (5, 2)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(windows, count, start):
    source = windows(count)
    assert np.array_equal(take(source, 8)[start:], take(source, 8 - start, start=start))


@pytest.mark.parametrize(("count", "n_shards"), [(19, 2), (19, 4), (19, 8), (5, 4)])
def test_shards_together_are_the_batch_across_epochs(windows, count, n_shards):
    source = windows(count)
    whole = take(source, 6, start=1)
    shards = [take(source, 6, start=1, shard=shard, n_shards=n_shards) for shard in range(n_shards)]
    for index, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([shard[index] for shard in shards]), batch)


def test_shards_that_do_not_divide_the_batch_are_refused(windows):
    for n_shards in (3, 16):
        with pytest.raises(ConfigError, match="does not divide"), rows(windows(3), batch_size=8, seed=0, n_shards=n_shards):
            pass
        with pytest.raises(ConfigError, match="does not divide"):
            next(validation_rows(windows(3), 8, n_shards=n_shards))


@pytest.mark.parametrize("n_shards", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_validation_reads_every_window_once_in_order(windows, count, n_shards):
    source = windows(count)
    shards = [list(validation_rows(source, 8, shard=shard, n_shards=n_shards)) for shard in range(n_shards)]
    assert {len(shard) for shard in shards} == {n_batches(source, 8)} == {-(-count // 8)}
    found = []
    for batch in zip(*shards, strict=True):
        array = np.concatenate([array for array, _ in batch])
        real = np.concatenate([real for _, real in batch])
        assert array.shape == (8, SEQ + 1)
        assert array.dtype == np.int32
        assert not array[~real].any()
        found.extend(array[real].tolist())
    assert found == [row.tolist() for row in source]


def test_targets_are_the_next_tokens():
    array = np.arange(10, dtype=np.int32).reshape(2, 5)
    batch = to_batch(array)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]
    assert batch.loss_mask.tolist() == [[1.0] * 4] * 2
    assert (batch.tokens.dtype, batch.targets.dtype, batch.loss_mask.dtype) == (np.int32, np.int32, np.float32)
    assert batch.segment_ids is None
    assert batch.positions is None


@pytest.mark.parametrize("spec", [(), ("data",), (("data", "sequence"),), ("data", "sequence"), (None, "sequence")])
def test_placed_batches_are_sharded_and_equal(sharding, spec):
    array = np.arange(40, dtype=np.int32).reshape(8, 5)
    real = np.arange(8) < 6
    batch, whole = place(array, sharding(*spec), 8, real), to_batch(array)
    assert {leaf.sharding for leaf in jax.tree.leaves(batch)} == {sharding(*spec)}
    assert (batch.tokens == whole.tokens).all()
    assert (batch.targets == whole.targets).all()
    assert batch.loss_mask.tolist() == [[1.0] * 4] * 6 + [[0.0] * 4] * 2
    assert place(array, sharding(*spec), 8).loss_mask.all()
    assert process_rows(sharding(*spec), 8, 4) == (0, 1)


@pytest.mark.parametrize(
    ("devices", "spec", "expected"),
    [
        ([0, 1, 2, 3], ("data", "sequence"), (0, 2)),
        ([4, 5, 6, 7], ("data", "sequence"), (1, 2)),
        ([4, 5], ("data", None), (2, 4)),
        ([6, 7], (("data", "sequence"),), (3, 4)),
        ([1, 3, 5, 7], ("data", "sequence"), (0, 1)),  # processes that split the sequence hold every row
        ([2, 4], ("data", None), None),  # rows 2 to 5: not one of two halves
        ([0, 6], ("data", None), None),
    ],
)
def test_the_rows_of_a_process_follow_from_its_devices(sharding, monkeypatch, devices, spec, expected):
    layout = sharding(*spec)
    everywhere = layout.devices_indices_map((8, SEQ))
    here = {device: everywhere[device] for device in layout.mesh.devices.flat if device.id in devices}
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda *_: here)
    if expected:
        assert process_rows(layout, 8, SEQ) == expected
    else:
        with pytest.raises(ConfigError, match="not one run of them"):
            process_rows(layout, 8, SEQ)


def test_training_and_validation_batches_are_placed_rows(windows, sharding):
    source, layout = windows(11), sharding("data", "sequence")
    with training_batches(source, layout, batch_size=8, seed=1, start=2) as batches:
        for array, batch in zip(take(source, 3, start=2), batches, strict=False):
            assert (batch.tokens == array[:, :-1]).all()
            assert (batch.targets == array[:, 1:]).all()
            assert batch.tokens.sharding == layout
    first, last = validation_batches(source, layout, batch_size=8)
    assert first.loss_mask.all()
    assert last.loss_mask.tolist() == [[1.0] * SEQ] * 3 + [[0.0] * SEQ] * 5
