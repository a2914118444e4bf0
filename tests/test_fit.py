"""The training loop, on networks that compile in a moment."""

import json
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_unet import augment, data, fit, losses, metrics, train
from flax_unet.model import BatchNorm, Dropout, UNet

N, BATCH, SEED = 10, 4, 7  # three steps per epoch, the last one with two padding images
STEPS = 3
KEY = jax.random.key(3)
TX = optax.adam(1e-2)


class Tiny(nn.Module):
    """A network with batch statistics and dropout."""

    @nn.compact
    def __call__(self, image, train=False, weight=None):
        x = nn.Dense(4, use_bias=False)(image)
        x = nn.relu(BatchNorm()(x, train, weight))
        return nn.Dense(1, use_bias=False)(Dropout(0.3)(x, train))


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (N, 8, 8, 3), np.uint8)
    masks = (images.mean(-1, keepdims=True) > 127).astype(np.uint8)
    return data.Arrays(images, masks, [str(i) for i in range(N)], "")


def new_state(model=None, tx=TX):
    return train.create_train_state(model or Tiny(), tx, jax.random.key(0), (1, 8, 8, 3))


def epochs_of(arrays, state=None, *, model=None, tx=TX, batches=None, **options):
    model = model or Tiny()
    options = {"epochs": 3, "augment": augment.random_flips} | options
    yield from fit.fit(
        model,
        tx,
        losses.bce,
        new_state(model, tx) if state is None else state,
        len(arrays.image),
        batches or partial(data.batches, arrays, BATCH),
        key=KEY,
        seed=SEED,
        batch_size=BATCH,
        **options,
    )


def copied(epochs):
    """The epochs with copies of their states, because each next epoch donates the last state."""
    return [epoch._replace(state=jax.tree.map(np.array, epoch.state)) for epoch in epochs]


@pytest.fixture(scope="module")
def straight(arrays):
    return copied(epochs_of(arrays))


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_array_equal(x, y)


def test_an_epoch_is_one_step_per_batch_of_the_shuffled_images(arrays, straight):
    step = train.make_train_step(Tiny(), TX, losses.bce, augment=augment.random_flips)
    state = new_state()
    for number, epoch in enumerate(straight, start=1):
        loss, coefs, counts = [], [], []
        for start in range(0, N, BATCH):
            index = data.shuffled(N, SEED, number - 1)[start : start + BATCH]
            real = len(index)
            index = np.resize(index, BATCH)
            batch = {"image": arrays.image[index], "mask": arrays.mask[index]}
            weight = np.float32(np.arange(BATCH) < real)
            state, result = step(state, batch | {"weight": weight}, KEY)
            loss += [float(result["loss"])] * real
            coefs.append(float(result["iou_coef"]))
            counts.append([count[:real] for count in jax.device_get(result["confusion"])])
        assert epoch.number == number and epoch.images == N and epoch.seconds > 0
        assert_equal(epoch.state, state)
        counts = metrics.Confusion(*map(np.concatenate, zip(*counts, strict=True)))
        assert epoch.metrics == metrics.summary(loss, coefs, counts)
        assert epoch.metrics["n_images"] == N
    assert number == 3 and int(state.step) == 3 * STEPS


@pytest.mark.parametrize("steps", range(1, 3 * STEPS + 1))
def test_a_stopped_run_resumes_to_the_same_state_and_metrics(arrays, straight, steps):
    taken = []

    def counted(order):
        for batch in data.batches(arrays, BATCH, order):
            taken.append(batch)
            yield batch

    stopped = copied(epochs_of(arrays, batches=counted, stop=lambda: len(taken) == steps))
    *complete, last = stopped
    assert int(last.state.step) == steps
    assert len(last.records) == steps - STEPS * len(complete)
    if last.metrics is None:
        records = last.records
    else:
        assert steps % STEPS == 0
        complete, records = stopped, []
    assert [epoch.metrics for epoch in complete] == [e.metrics for e in straight[: len(complete)]]
    # Saved as a checkpoint would be: arrays, and records as JSON.
    state = jax.tree.map(jnp.asarray, last.state)
    resumed = copied(epochs_of(arrays, state, records=json.loads(json.dumps(records))))
    rest = straight[len(complete) :]
    assert [epoch.number for epoch in resumed] == [epoch.number for epoch in rest]
    assert [epoch.metrics for epoch in resumed] == [epoch.metrics for epoch in rest]
    for epoch, expected in zip(resumed, rest, strict=True):
        assert_equal(epoch.state, expected.state)
    if resumed:  # only the images of this time count for its speed
        assert resumed[0].images == N - min(N, BATCH * len(records))


def test_stop_is_called_after_each_step_and_each_epoch(arrays):
    answers = iter([False, True])  # true only once
    [epoch] = epochs_of(arrays, stop=lambda: next(answers, False))
    assert epoch.metrics is None and int(epoch.state.step) == 2 and epoch.images == 2 * BATCH
    answers = iter([False] * STEPS + [True])
    [epoch] = epochs_of(arrays, stop=lambda: next(answers, False))
    assert epoch.metrics is not None and int(epoch.state.step) == STEPS


def test_a_finished_run_has_no_epochs_left_and_can_be_extended(arrays, straight):
    state = jax.tree.map(jnp.asarray, straight[1].state)
    assert list(epochs_of(arrays, state, epochs=2)) == []
    [epoch] = epochs_of(arrays, state, epochs=3)
    assert epoch.number == 3
    assert_equal(epoch.state, straight[2].state)


def test_on_step_is_called_with_the_images_and_the_record_of_each_step(arrays):
    calls = []
    for epoch in epochs_of(arrays, epochs=2, on_step=lambda *args: calls.append(args)):
        images, records = zip(*calls, strict=True)
        assert images == (4, 4, 2) and list(records) == epoch.records
        assert {"loss", "update_norm", "iou_coef", "confusion"} == records[0].keys()
        calls.clear()


def test_images_on_the_device_give_the_same_run(arrays, straight):
    for epoch, expected in zip(epochs_of(data.to_device(arrays)), straight, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (epoch.state, expected.state)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert epoch.metrics == pytest.approx(expected.metrics, rel=1e-5)


class Stock(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(image))
        return nn.Conv(2, (1, 1))(nn.relu(x))


@pytest.mark.parametrize("model", [Stock(), nn.Dense(2), UNet((2, 4), num_classes=2, convs=1)])
def test_any_linen_module_can_be_trained(arrays, model):
    two = arrays._replace(mask=np.concatenate([arrays.mask, 1 - arrays.mask], -1))
    with jax.numpy_rank_promotion("allow"):  # Flax' layers broadcast
        epochs = [epoch.metrics for epoch in epochs_of(two, model=model, epochs=4)]
    assert epochs[-1]["loss"] < epochs[0]["loss"]


def test_a_loss_that_is_not_finite_is_an_error_with_the_number_of_the_step(arrays):
    def broken(key, image, mask):
        return jnp.full(image.shape, jnp.nan), mask

    with pytest.raises(FloatingPointError, match="the loss of step 1 is nan: try a smaller learn"):
        list(epochs_of(arrays, augment=broken))
    later = new_state().replace(step=jnp.int32(2 * STEPS))
    with pytest.raises(FloatingPointError, match="the loss of step 7 is nan"):
        list(epochs_of(arrays, later, augment=broken))


@pytest.mark.parametrize("step", [1, 2, 3, 5, 9])  # 3 and 9 are the last of their epochs
def test_an_update_that_is_not_finite_is_an_error_before_its_epoch_is_yielded(arrays, step):
    tx = optax.sgd(lambda count: jnp.where(count == step - 1, jnp.inf, 0.1))
    epochs, calls = epochs_of(arrays, tx=tx, on_step=lambda *_: calls.append(1)), []
    with pytest.raises(FloatingPointError, match=f"the update norm of step {step} is (inf|nan)"):
        for epoch in epochs:
            assert epoch.number * STEPS < step
    assert len(calls) == step - 1


def test_an_epoch_stopped_at_its_end_is_resumed_with_its_records(arrays, straight):
    [stopped] = copied(epochs_of(arrays, stop=iter([0, 0, 1]).__next__))
    assert len(stopped.records) == STEPS and stopped.metrics == straight[0].metrics
    state = jax.tree.map(jnp.asarray, stopped.state)
    resumed = copied(epochs_of(arrays, state, records=stopped.records))
    assert [epoch.number for epoch in resumed] == [2, 3]
    assert_equal(resumed[-1].state, straight[-1].state)


def test_records_of_another_state_are_refused(arrays, straight):
    state = jax.tree.map(jnp.asarray, straight[0].state)
    with pytest.raises(ValueError, match="made 0 of the 3 steps.*there are records of 2"):
        next(epochs_of(arrays, state, records=straight[0].records[:2]))
    state = state.replace(step=jnp.int32(5))
    with pytest.raises(ValueError, match="made 2 of the 3 steps.*there are records of 0"):
        next(epochs_of(arrays, state))


@pytest.mark.parametrize("other", [2, 5])
def test_batches_of_another_size_are_refused(arrays, other):
    with pytest.raises(ValueError, match="10 images are 3 batches of 4, but `batches` made"):
        list(epochs_of(arrays, batches=partial(data.batches, arrays, other)))


def test_accumulate_remat_and_augment_are_those_of_the_step(arrays, monkeypatch):
    make, passed = train.make_train_step, {}

    def spy(*args, **options):
        passed.update(options)
        return make(*args, **options)

    monkeypatch.setattr(fit, "make_train_step", spy)
    model = UNet((2, 4), convs=1)
    options = {"accumulate": 2, "remat": True, "augment": augment.random_flips, "mesh": None}
    options["frozen"] = ("down0",)
    list(epochs_of(arrays, model=model, epochs=1, **options))
    assert passed == options


class Plain(nn.Module):
    """Without batch statistics or dropout, so that devices differ in rounding only."""

    @nn.compact
    def __call__(self, image):
        return nn.Dense(1, use_bias=False)(nn.relu(nn.Dense(4, use_bias=False)(image)))


@pytest.mark.parametrize("resident", [False, True])
def test_four_devices_give_the_same_run_as_one(arrays, resident):
    eight = arrays._replace(image=arrays.image[:8], mask=arrays.mask[:8])
    alone = copied(epochs_of(eight, model=Plain()))
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    if resident:
        eight = eight._replace(
            image=jax.device_put(eight.image, split), mask=jax.device_put(eight.mask, split)
        )
    devices, together = [], []
    for epoch in epochs_of(eight, model=Plain(), mesh=mesh):
        devices.append({len(x.sharding.device_set) for x in jax.tree.leaves(epoch.state)})
        together += copied([epoch])
    assert devices == [{4}] * 3
    for ours, expected in zip(together, alone, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (ours.state, expected.state)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        assert ours.metrics == pytest.approx(expected.metrics, rel=1e-4)
