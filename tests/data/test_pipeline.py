import itertools
import threading

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llama_eqx.batch import Batch
from llama_eqx.data.order import Order
from llama_eqx.data.pipeline import Ahead, Parts, place, process_rows, read, training_batches, validation_batches
from llama_eqx.data.rows import Documents, Windows
from llama_eqx.errors import ConfigError, DataError

SEQ = 4


@pytest.fixture
def windows(split):
    """`count` windows of SEQ + 1 ids that count upwards, with an unused rest."""
    return lambda count, rest=3: Windows(split([np.arange(count * SEQ + 1 + rest)]), SEQ)


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((4, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    return lambda *spec: NamedSharding(mesh, PartitionSpec(*spec))


def parts(rows, *, seed=1, batch_size=8, shard=0, n_shards=1):
    return Parts(rows, Order([len(rows)], [1], seed), batch_size, shard, n_shards)


def take(rows, count, *, start=0, **arguments):
    """The tokens of some batches, or of a part of each."""
    with read(parts(rows, **arguments), start) as iterator:
        return [part.batch.tokens.copy() for part in itertools.islice(iterator, count)]


def same(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((np.asarray(x) == np.asarray(y)).all()), a, b)))


def test_an_epoch_has_every_window_once_and_the_next_another_order(windows):
    epochs = np.concatenate(take(windows(16), 6))[:, 0].reshape(3, 16) // SEQ
    assert [sorted(epoch) for epoch in epochs.tolist()] == [list(range(16))] * 3
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3


@pytest.mark.parametrize(("count", "start"), [(19, 1), (19, 7), (32, 4), (5, 2), (1, 3)])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(windows, count, start):
    rows = windows(count)
    assert np.array_equal(take(rows, 8)[start:], take(rows, 8 - start, start=start))


@pytest.mark.parametrize(("count", "n_shards"), [(19, 2), (19, 4), (19, 8), (5, 4)])
def test_shards_together_are_the_batch_across_epochs(windows, count, n_shards):
    rows = windows(count)
    whole = take(rows, 6, start=1)
    shards = [take(rows, 6, start=1, shard=shard, n_shards=n_shards) for shard in range(n_shards)]
    for index, batch in enumerate(whole):
        assert np.array_equal(np.concatenate([shard[index] for shard in shards]), batch)


@pytest.mark.parametrize("n_shards", [3, 16])
def test_shards_that_do_not_divide_the_batch_are_refused(windows, n_shards):
    with pytest.raises(ConfigError, match="does not divide"):
        parts(windows(3), n_shards=n_shards)


def test_every_part_knows_the_rows_of_the_whole_batch(windows):
    whole, half = parts(windows(19)), parts(windows(19), shard=1, n_shards=2)
    for index in range(4):
        assert (whole[index].digest, whole[index].counted) == (half[index].digest, half[index].counted)
    assert whole[0].counted == 8 * SEQ


@pytest.mark.parametrize("count", [1, 7, 8, 9])
def test_validation_reads_every_row_once_in_order(windows, sharding, count):
    rows = windows(count)
    batches = list(validation_batches(rows, sharding("data", "sequence"), batch_size=8))
    assert len(batches) == -(-count // 8)
    tokens, mask = (np.concatenate([np.asarray(getattr(batch, name)) for batch in batches]) for name in ("tokens", "loss_mask"))
    assert (mask == (np.arange(len(mask)) < count)[:, None]).all()
    assert (tokens[:count, 0] == np.arange(count) * SEQ).all()
    assert not tokens[count:].any()


@pytest.mark.parametrize("spec", [(), ("data",), (("data", "sequence"),), ("data", "sequence"), (None, "sequence")])
def test_placed_batches_are_sharded_and_equal(split, sharding, spec):
    part = Documents(split([np.arange(20)], [np.arange(30)]), SEQ).read(np.arange(8))
    batch = place(part, sharding(*spec), 8)
    assert {leaf.sharding for leaf in jax.tree.leaves(batch)} == {sharding(*spec)}
    assert same(batch, part)
    assert len(jax.tree.leaves(batch)) == 5
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
        with pytest.raises(ConfigError, match="which are not one contiguous, equal part"):
            process_rows(layout, 8, SEQ)


def test_training_batches_are_placed_parts_with_what_has_been_drawn(windows, sharding):
    rows, layout = windows(11), sharding("data", "sequence")
    drawn = parts(rows)
    with training_batches(drawn, layout, 8, drawn.after(0)) as batches:
        begun = list(itertools.islice(batches, 5))
    for index, (batch, progress) in enumerate(begun):
        assert same(batch, drawn[index].batch)
        assert batch.tokens.sharding == layout
        assert progress == drawn.after(index + 1) == drawn.after(index + 1, drawn.after(index))
        assert progress.tokens == (index + 1) * 8 * SEQ
    with training_batches(drawn, layout, 8, drawn.after(2)) as batches:
        for (batch, progress), (expected, before) in zip(batches, begun[2:], strict=False):
            assert same(batch, expected)
            assert progress == before
    assert len({progress.ledger for _, progress in begun}) == 5


def test_what_is_made_ahead_comes_in_order_and_no_further_than_there_is_room():
    made = []

    def items():
        for i in range(10):
            made.append(i)
            yield i

    with Ahead(items(), room=2) as taken:
        assert [next(taken) for _ in range(3)] == [0, 1, 2]
        assert len(made) <= 5
    assert len(made) <= 6
    assert "batches" not in [thread.name for thread in threading.enumerate()]
    with Ahead(iter("abc")) as taken:
        assert list(taken) == ["a", "b", "c"]


def test_only_what_was_not_made_yet_is_waited_for():
    allowed = threading.Event()

    def items():
        yield from range(3)
        assert allowed.wait(60)
        yield 3

    with Ahead(items(), room=2) as taken:
        for _ in range(3):
            while taken._made.empty():
                threading.Event().wait(0.001)
            next(taken)
        assert taken.waited == 0
        threading.Timer(0.05, allowed.set).start()
        assert next(taken) == 3
        assert taken.waited > 0
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(taken)


def test_the_device_is_waited_for_before_an_item_is():
    """What is made while the device computes has kept nobody waiting."""
    allowed = threading.Event()

    def items():
        assert allowed.wait(60)
        yield 1

    def settle():
        allowed.set()
        while taken._made.empty():
            threading.Event().wait(0.001)

    with Ahead(items()) as taken:
        taken.settle = settle
        threading.Timer(2, allowed.set).start()
        assert next(taken) == 1
        assert taken.waited < 1


def test_an_error_arrives_where_the_batch_is_taken():
    def items():
        yield 1
        raise DataError("broken")

    with Ahead(items()) as taken:
        assert next(taken) == 1
        with pytest.raises(DataError, match="broken"):
            next(taken)


def test_a_batch_is_numpy_until_it_is_placed(windows):
    part = parts(windows(9))[0].batch
    assert isinstance(part, Batch)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(part))
