import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_unet import augment, losses, predict, train
from flax_unet.efficientnet import Encoder
from flax_unet.model import Dropout, UNet

MODEL = UNet(features=(4, 8), norm=2, dropout=0.2)
PLAIN = MODEL.clone(dropout=0.0)
TX = optax.adam(1e-3, eps=1e-7)


def make_batch(n=8, size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, size, size, 3), np.uint8),
        "mask": rng.integers(0, 2, (n, size, size, 1), np.uint8),
        "weight": np.ones(n, np.float32),
    }


def make_state(model=MODEL, tx=TX):
    return train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))


def make_step(model=MODEL, tx=TX, **options):
    return train.make_train_step(model, tx, losses.bce, **options)


def assert_close(a, b, **tolerance):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_the_types_and_shapes_of_a_state_never_change():
    abstract = jax.eval_shape(
        partial(train.create_train_state, MODEL, TX, image_shape=(1, 8, 8, 3)), jax.random.key(0)
    )
    state = make_state()
    assert state.step.dtype == jnp.int32 and state.model_state == {}
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)]
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(abstract)]
    after, _ = make_step()(state, make_batch(), jax.random.key(1))
    assert shapes == [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(after)]
    assert int(after.step) == 1


def test_steps_apply_adam_to_the_gradient_of_the_mean_loss():
    batch, key = make_batch(), jax.random.key(1)
    image, mask = batch["image"] / np.float32(255), batch["mask"].astype(np.float32)

    def loss(params):
        return losses.bce(PLAIN.apply({"params": params}, image), mask).mean()

    state, step = make_state(PLAIN), make_step(PLAIN)
    start, gradients = jax.device_get(state.params), []
    for _ in range(3):
        value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
        gradients.append(gradient)
        state, result = step(state, batch, key)
        np.testing.assert_allclose(result["loss"], value, rtol=1e-6)
    for before, after, *history in zip(
        *map(jax.tree.leaves, (start, state.params, *gradients)), strict=True
    ):
        expected = before + reference.adam([np.asarray(g) for g in history])
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=2e-6)


def test_jit_equals_eager():
    batch, key, model = make_batch(2), jax.random.key(1), MODEL.clone(convs=1)
    eager, result = train.train_step(
        make_state(model), batch, key, model=model, tx=TX, loss_fn=losses.bce
    )
    jitted, same = make_step(model)(make_state(model), batch, key)
    assert_close((eager.params, result), (jitted.params, same), rtol=1e-4, atol=1e-5)


def test_images_of_weight_zero_have_no_effect():
    small, large = make_batch(3), make_batch(3)
    other = make_batch(5, seed=9)
    large = {k: np.concatenate([large[k], other[k]]) for k in large}
    large["weight"][3:] = 0
    key, step = jax.random.key(1), make_step(PLAIN)
    a, result = step(make_state(PLAIN), small, key)
    b, padded = step(make_state(PLAIN), large, key)
    assert_close(a.params, b.params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result["loss"], padded["loss"], rtol=1e-5)
    np.testing.assert_allclose(result["iou_coef"], padded["iou_coef"], rtol=1e-5)
    assert_close(result["confusion"], [count[:3] for count in padded["confusion"]])


def test_images_of_weight_zero_do_not_affect_the_batch_statistics():
    model = PLAIN.clone(norm="batch")
    small, other = make_batch(3), make_batch(5, seed=9)
    large = {k: np.concatenate([small[k], other[k]]) for k in small}
    large["weight"][3:] = 0
    # SGD: Adam would make a full step of the rounding error in a gradient that is zero.
    key, tx = jax.random.key(1), optax.sgd(0.1)
    step = make_step(model, tx)
    a, result = step(make_state(model, tx), small, key)
    b, padded = step(make_state(model, tx), large, key)
    assert_close(a.model_state, b.model_state, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result["loss"], padded["loss"], rtol=1e-5)
    assert_close(a.params, b.params, rtol=1e-4, atol=1e-6)
    assert_close(result["confusion"], [count[:3] for count in padded["confusion"]])
    large["weight"][3:] = 1
    c, _ = step(make_state(model), large, key)
    stats = [jax.tree.leaves(state.model_state)[0] for state in (b, c)]
    assert not np.allclose(*stats, rtol=1e-3)


def test_a_state_can_start_from_the_variables_of_another():
    model = PLAIN.clone(norm="batch", deep=True, features=(4, 4, 8))
    tx = optax.chain(TX, train.average_params(0.9))
    before, _ = make_step(model, tx)(make_state(model, tx), make_batch(), jax.random.key(1))
    variables = jax.tree.map(np.array, before.variables)
    started = train.start_from(make_state(model, tx), tx, before.variables)
    assert_close(started.variables, variables, rtol=0, atol=0)  # the average starts there too
    assert_close(started.params, variables["params"], rtol=0, atol=0)
    assert int(started.step) == 0 and not jax.tree.leaves(started.opt_state[0])[1].any()
    make_step(model, tx)(started, make_batch(), jax.random.key(1))  # donates its own copies
    assert_close(before.variables, variables, rtol=0, atol=0)
    # Another number of classes: only the heads keep their initial values.
    more = model.clone(num_classes=3)
    fresh = make_state(more, tx)
    started = train.start_from(fresh, tx, variables)
    for name, module in started.params.items():
        expected = fresh.params if name.startswith("head") else variables["params"]
        assert_close(module, expected[name], rtol=0, atol=0)


def test_variables_of_another_model_are_refused_by_name():
    state, variables = make_state(PLAIN), make_state(PLAIN).variables
    del variables["params"]["down0"]["Conv_0"]["bias"]
    variables["params"]["extra"] = {"kernel": jnp.zeros(1)}
    variables["params"]["head"]["kernel"] = jnp.zeros((1, 1, 5, 1))
    words = (
        r"params/down0/Conv_0/bias is missing, params/extra/kernel is not in the model, "
        r"params/head/kernel has shape \(1, 1, 5, 1\) instead of \(1, 1, 4, 1\)"
    )
    with pytest.raises(ValueError, match=words):
        train.start_from(state, TX, variables)


def test_the_randomness_depends_on_the_step_and_the_key_only():
    batch = make_batch()
    frozen = optax.sgd(0.0)  # the parameters never change, so only the randomness varies the loss
    step = make_step(tx=frozen)

    def two_losses():
        state, first = step(make_state(tx=frozen), batch, jax.random.key(1))
        _, second = step(state, batch, jax.random.key(1))
        return float(first["loss"]), float(second["loss"])

    losses = two_losses()
    assert two_losses() == losses and losses[0] != losses[1]
    _, other = step(make_state(tx=frozen), batch, jax.random.key(2))
    assert float(other["loss"]) != losses[0]


def test_the_augmentation_is_applied_to_image_and_mask():
    def blank(key, image, mask):
        return jnp.zeros_like(image), jnp.ones_like(mask)

    batch = make_batch()
    plain = {"image": np.zeros_like(batch["image"]), "mask": np.ones_like(batch["mask"])}
    key = jax.random.key(1)
    _, expected = make_step(PLAIN)(make_state(PLAIN), batch | plain, key)
    _, result = make_step(PLAIN, augment=blank)(make_state(PLAIN), batch, key)
    np.testing.assert_allclose(result["loss"], expected["loss"], rtol=1e-6)


def resident(batch, place):
    """The batch as indices into a larger data set, whose images are in another order."""
    n = len(batch["weight"])
    other = make_batch(n, seed=99)
    order = np.random.default_rng(0).permutation(2 * n)
    index = np.argsort(order)[:n].astype(np.int32)
    arrays = {k: place(np.concatenate([batch[k], other[k]])[order]) for k in ("image", "mask")}
    return arrays | {"index": index, "weight": batch["weight"]}


@pytest.mark.parametrize("place", [np.asarray, jax.device_put])
def test_a_batch_of_indices_gives_the_same_result_as_its_images(place):
    batch, key, step = make_batch(), jax.random.key(1), make_step()
    expected = step(make_state(), batch, key)
    result = step(make_state(), resident(batch, place), key)
    assert_close(expected, result, rtol=1e-6, atol=1e-7)
    evaluate, variables = train.make_eval_step(MODEL, losses.bce), result[0].variables
    assert_close(evaluate(variables, batch), evaluate(variables, resident(batch, place)), rtol=1e-6)


def test_a_step_transfers_nothing_between_host_and_device():
    state, step, key = make_state(), make_step(augment=augment.random_flips), jax.random.key(1)
    batch = jax.device_put(resident(make_batch(), np.asarray))
    state, _ = step(state, batch, key)
    with jax.transfer_guard("disallow"):
        step(state, batch, key)


@pytest.mark.parametrize("norm", [2, "batch"])
def test_rematerialisation_changes_no_result_and_needs_less_memory(norm):
    batch, key = make_batch(4, 32), jax.random.key(1)
    deep = UNet(features=(4, 4, 4), norm=norm, dropout=0.2)
    # Not Adam: it turns the rounding errors of zero gradients (biases before a batch norm) into
    # steps of full size.
    memory, results, sgd = [], [], optax.sgd(1.0)
    for remat in (False, True):
        step = make_step(deep, sgd, remat=remat)
        compiled = step.trace(make_state(deep, sgd), batch, key).lower().compile()
        memory.append(compiled.memory_analysis().temp_size_in_bytes)
        results.append(step(make_state(deep, sgd), batch, key))
    assert_close(*results, rtol=1e-5, atol=1e-6)
    assert memory[1] < 0.8 * memory[0]


@pytest.mark.parametrize("accumulate", [2, 4])
def test_accumulated_gradients_equal_those_of_the_batch(accumulate):
    sgd = optax.sgd(1.0)  # the update is the gradient
    batch, key = make_batch(), jax.random.key(1)
    batch["weight"][5:] = 0
    start = jax.device_get(make_state(PLAIN, sgd).params)
    at_once, result = make_step(PLAIN, sgd)(make_state(PLAIN, sgd), batch, key)
    step = make_step(PLAIN, sgd, accumulate=accumulate)
    summed, same = step(make_state(PLAIN, sgd), batch, key)
    for a, b, c in zip(*map(jax.tree.leaves, (start, at_once.params, summed.params)), strict=True):
        np.testing.assert_allclose(a - c, a - b, atol=1e-5 * abs(a - b).max())
    assert_close(result, same, rtol=1e-5)


def test_a_batch_of_padding_changes_no_parameter():
    sgd, batch = optax.sgd(1.0), make_batch()
    start = jax.device_get(make_state(PLAIN, sgd).params)
    batch["weight"][:] = 0
    after, result = make_step(PLAIN, sgd)(make_state(PLAIN, sgd), batch, jax.random.key(1))
    assert result["loss"] == 0
    assert_close(start, after.params, rtol=0, atol=0)


def test_a_batch_that_does_not_split_into_the_micro_batches_is_refused():
    with pytest.raises(ValueError, match="8 images cannot be split into 3"):
        make_step(accumulate=3)(make_state(), make_batch(), jax.random.key(1))


def test_four_devices_give_the_same_result_as_one():
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    key, batches = jax.random.key(1), [make_batch(seed=s) for s in range(3)]
    results = []
    for model, options in [
        (MODEL, {}),
        (MODEL, {"mesh": mesh}),
        (PLAIN, {}),
        (PLAIN, {"mesh": mesh, "accumulate": 2}),
    ]:
        state, step = make_state(), make_step(model, augment=augment.random_flips, **options)
        for batch in batches:
            state, result = step(state, batch, key)
        results.append((jax.device_get(state.params), jax.device_get(result)))
    assert len(state.step.sharding.device_set) == 4
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert_close(results[2], results[3], rtol=1e-4, atol=1e-5)
    split = NamedSharding(mesh, PartitionSpec("batch"))
    data_sets = [resident(batch, lambda x: jax.device_put(x, split)) for batch in batches]
    state, step = make_state(), make_step(augment=augment.random_flips, mesh=mesh)
    for batch in data_sets:
        state, _ = step(state, batch, key)
    assert_close(results[0][0], jax.device_get(state.params), rtol=1e-4, atol=1e-5)
    evaluate = train.make_eval_step(MODEL, losses.bce, mesh=mesh)
    alone = train.make_eval_step(MODEL, losses.bce)
    variables = {"params": results[0][0]}
    pair = evaluate(variables, batches[0]), alone(variables, batches[0])
    assert_close(*pair, rtol=1e-5, atol=1e-6)


def test_an_entire_run_is_traced_once():
    traces = []

    def loss(logits, labels):
        traces.append(logits.shape)
        return losses.bce(logits, labels)

    step = train.make_train_step(MODEL, TX, loss)
    state = make_state()
    for seed in range(4):
        state, _ = step(state, make_batch(seed=seed), jax.random.key(1))
    assert len(traces) == 1


def test_the_state_is_donated():
    state = make_state()
    after, _ = make_step()(state, make_batch(), jax.random.key(1))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))


def train_briefly(model, steps=3, batch=None, **options):
    """The state and the results of some steps on one batch."""
    state = train.create_train_state(model, TX, jax.random.key(0), (1, 32, 32, 3))
    step, results = train.make_train_step(model, TX, losses.bce, **options), []
    for _ in range(steps):
        state, result = step(state, batch or make_batch(4, 32), jax.random.key(1))
        results.append(jax.device_get(result))
    return state, results


class Stock(nn.Module):
    """Flax' own batch norm, which knows no weight."""

    @nn.compact
    def __call__(self, image, train=False):
        x = nn.Conv(4, (3, 3))(image)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Conv(1, (1, 1))(x)


class Silent(nn.Module):
    """A module that is the same in training and in inference."""

    @nn.compact
    def __call__(self, image):
        return nn.Conv(1, (1, 1))(nn.relu(nn.Conv(4, (3, 3))(image)))


@pytest.mark.parametrize("encoder", [None, Encoder("lite0")])
def test_a_step_passes_its_number_to_every_batch_norm(encoder):
    features = (2, 2, 2, 2) if encoder else (2, 4)
    model = UNet(features=features, convs=1, norm="batch", encoder=encoder)
    batch = make_batch(2, 64)
    tx = optax.sgd(0.0)
    state = train.create_train_state(model, tx, jax.random.key(0), (1, 64, 64, 3))
    step = train.make_train_step(model, tx, losses.bce)
    image = batch["image"] / np.float32(255)
    # With step None the momentum is 0.99, and 0.1 in the first of the steps.
    apply = jax.jit(partial(model.apply, train=True, mutable=["batch_stats"]))
    _, fixed = apply(state.variables, image, weight=batch["weight"])
    before = state.model_state["batch_stats"]
    expected = jax.tree.map(lambda old, new: old + 90 * (new - old), before, fixed["batch_stats"])
    expected = jax.device_get(expected)
    state, _ = step(state, batch, jax.random.key(1))
    for a, b in zip(
        *map(jax.tree.leaves, (state.model_state["batch_stats"], expected)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_a_module_with_stock_batch_norm_is_trained_and_evaluated():
    with jax.numpy_rank_promotion("allow"):  # Flax' layers broadcast
        model, batch = Stock(), make_batch(4, 32)
        state, results = train_briefly(model, batch=batch)
        assert results[2]["loss"] < results[0]["loss"]
        # Three updates of the mean with Flax' momentum, from 0: it was called with train=True.
        mean = state.variables["batch_stats"]["BatchNorm_0"]["mean"]
        assert np.abs(mean).max() > 1e-4
        result = train.make_eval_step(model, losses.bce)(state.variables, batch)
        logits = model.apply(state.variables, batch["image"] / np.float32(255))
        np.testing.assert_allclose(result["logits"], logits, rtol=1e-5, atol=1e-6)


class Required(nn.Module):
    """A module whose `train` has no default."""

    stride = 1

    @nn.compact
    def __call__(self, image, train):
        return nn.Conv(1, (1, 1))(Dropout(0.5)(image, train))


class Keywords(nn.Module):
    """A module that takes any keyword."""

    stride = 1

    @nn.compact
    def __call__(self, image, **options):
        return nn.Conv(1, (1, 1))(Dropout(0.5)(image, options["train"]))


@pytest.mark.parametrize("model", [Required(), Keywords()])
def test_a_module_that_demands_train_is_given_it_in_inference(model):
    batch = make_batch(2, 32)
    with jax.numpy_rank_promotion("allow"):
        state, _ = train_briefly(model, 1, batch)
        expected = model.apply(state.variables, batch["image"] / np.float32(255), train=False)
        result = train.make_eval_step(model, losses.bce)(state.variables, batch)
        np.testing.assert_allclose(result["logits"], expected, rtol=1e-5, atol=1e-6)
        proba = predict.predict_proba(model, state.variables, batch["image"])
        np.testing.assert_allclose(proba, jax.nn.sigmoid(expected), rtol=1e-5, atol=1e-6)
        mirrored = predict.Mirrored(model).apply(state.variables, jnp.ones((1, 2, 2, 3)))
    assert mirrored.shape == (1, 2, 2, 1)


class Listed(nn.Module):
    """A module with an attribute that is not hashable."""

    sizes: np.ndarray

    @nn.compact
    def __call__(self, image):
        return nn.Conv(1, (1, 1))(image)


def test_a_module_that_is_not_hashable_is_refused_by_name():
    with pytest.raises(
        ValueError, match="Listed has an attribute that is not hashable: use a tuple"
    ):
        train_briefly(Listed(np.zeros(3)))


def test_a_module_without_training_arguments_is_trained():
    with jax.numpy_rank_promotion("allow"):
        state, results = train_briefly(Silent())
    assert results[2]["loss"] < results[0]["loss"] and state.model_state == {}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_train_weight_and_step_go_only_to_modules_that_accept_them(accumulate):
    calls = []

    class Both(nn.Module):
        @nn.compact
        def __call__(self, image, train=False, weight=None):
            calls.append({"train": train, "weight": weight is not None and weight.shape})
            return nn.Conv(1, (1, 1))(image)

    class WeightOnly(nn.Module):
        @nn.compact
        def __call__(self, image, weight=None):
            calls.append({"weight": weight is not None and weight.shape})
            return nn.Conv(1, (1, 1))(image)

    class Keywords(nn.Module):
        @nn.compact
        def __call__(self, image, **options):
            calls.append({k: v if k == "train" else v.shape for k, v in options.items()})
            return nn.Conv(1, (1, 1))(image)

    shape = (4 // accumulate,)
    with jax.numpy_rank_promotion("allow"):
        for model, expected in [
            (Both(), {"train": True, "weight": shape}),
            (WeightOnly(), {"weight": shape}),
            (Keywords(), {"train": True, "weight": shape, "step": ()}),
        ]:
            train_briefly(model, 1, accumulate=accumulate)
            assert calls[-1] == expected


class Training(nn.Module):
    @nn.compact
    def __call__(self, image, training=False):
        return nn.Conv(1, (1, 1))(image)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, image, *, deterministic=True):
        return nn.Conv(1, (1, 1))(image)


class RunningAverage(nn.Module):
    @nn.compact
    def __call__(self, image, use_running_average=True):
        return nn.Conv(1, (1, 1))(image)


@pytest.mark.parametrize(
    ("model", "argument"),
    [
        (Training(), "training"),
        (Deterministic(), "deterministic"),
        (RunningAverage(), "use_running_average"),
    ],
)
def test_a_module_with_another_name_for_train_is_refused_by_name(model, argument):
    words = f"{type(model).__name__} has no argument `train` but {argument}: wrap it"
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(ValueError, match=words):
            train_briefly(model, 1)


class StockEncoder(nn.Module):
    """An encoder with Flax' own batch norm."""

    patch = 2
    levels = 1

    @nn.compact
    def __call__(self, image, train):
        maps = [image]
        for _ in range(2):
            x = nn.Conv(4, (3, 3), strides=2)(maps[-1])
            maps.append(nn.relu(nn.BatchNorm(use_running_average=not train)(x)))
        return maps[1:]


class OwnEncoder(nn.Module):
    """An encoder that counts the images of weight 1."""

    patch: int = 4
    levels: int = 1

    @nn.compact
    def __call__(self, image, train=False, weight=None):
        count = self.variable("batch_stats", "images", lambda: jnp.zeros(()))
        if train:
            count.value += weight.sum()
        maps = [nn.Conv(4, (4, 4), strides=4)(image)]
        return [*maps, nn.Conv(4, (2, 2), strides=2)(maps[0])]


def test_a_network_on_an_encoder_of_stock_layers_is_trained():
    with jax.numpy_rank_promotion("allow"):
        model = UNet((6,), norm="batch", encoder=StockEncoder())
        state, results = train_briefly(model)
        assert results[2]["loss"] < results[0]["loss"]
        mean = state.variables["batch_stats"]["encoder"]["BatchNorm_0"]["mean"]
        assert np.abs(mean).max() > 1e-4
        logits = model.apply(state.variables, jnp.zeros((1, 32, 32, 3)))
    assert logits.shape == (1, 32, 32, 1)


def test_an_encoder_is_given_the_weight_if_it_accepts_it():
    batch = make_batch(4, 32)
    batch["weight"][3:] = 0
    with jax.numpy_rank_promotion("allow"):
        model = UNet((6,), norm=None, encoder=OwnEncoder())
        state, _ = train_briefly(model, 2, batch)
    assert state.model_state["batch_stats"]["encoder"]["images"] == 2 * 3


@pytest.mark.parametrize(
    "image", [np.zeros((1, 8, 8, 3), np.int32), np.zeros((1, 8, 8, 3), np.uint16)]
)
def test_an_image_of_another_type_is_refused(image):
    batch = make_batch(1) | {"image": image}
    with pytest.raises(ValueError, match="uint8 in 0..255"):
        make_step()(make_state(), batch, jax.random.key(1))


@pytest.mark.parametrize("shape", [(8, 1), (1,), ()])
def test_a_weight_or_a_loss_that_would_be_broadcast_is_refused(shape):
    batch, key = make_batch(), jax.random.key(1)
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(ValueError, match="one value per image"):
            make_step()(make_state(), batch | {"weight": np.ones(shape, np.float32)}, key)
        mean = train.make_train_step(MODEL, TX, lambda x, y: losses.bce(x, y).mean())
        with pytest.raises(ValueError, match=r"the loss has shape \(\)"):
            mean(make_state(), batch, key)


def test_uint8_and_float_images_give_the_same_loss():
    batch = make_batch()
    as_float = batch | {"image": batch["image"] / np.float32(255)}
    _, a = make_step(PLAIN)(make_state(PLAIN), batch, jax.random.key(1))
    _, b = make_step(PLAIN)(make_state(PLAIN), as_float, jax.random.key(1))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)


def test_training_imports_neither_tensorflow_tfds_nor_orbax():
    program = (
        "import sys, flax_unet, flax_unet.model, flax_unet.train, flax_unet.predict\n"
        "print({'tensorflow', 'tensorflow_datasets', 'orbax'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_averaged_parameters_are_the_exponential_moving_average():
    tx = optax.chain(optax.sgd(0.1), train.average_params(0.3))
    state, step, batch = make_state(PLAIN, tx), make_step(PLAIN, tx), make_batch()
    mean = jax.device_get(state.params)
    assert_close(state.variables["params"], mean)
    for t in range(5):
        state, _ = step(state, batch, jax.random.key(0))
        decay = min(0.3, (1 + t) / (10 + t))
        new = jax.device_get(state.params)
        mean = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, mean, new)
        assert_close(state.variables["params"], mean, rtol=1e-5, atol=1e-7)
    # Averaging changes neither the updates nor the parameters that are trained.
    sgd = optax.sgd(0.1)
    plain, step = make_state(PLAIN, sgd), make_step(PLAIN, sgd)
    for _ in range(5):
        plain, _ = step(plain, batch, jax.random.key(0))
    assert_close(state.params, plain.params, rtol=1e-6, atol=1e-8)
    assert_close(plain.variables["params"], plain.params)
