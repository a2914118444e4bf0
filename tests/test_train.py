import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flax_unet import augment, losses, train
from flax_unet.model import ARTICLE, UNet

MODEL = UNet(features=(4, 8), group_size=2, dropout=0.2)
STILL = MODEL.clone(dropout=0.0)
TX = optax.adam(1e-3, eps=1e-7)


def make_batch(n=8, size=8, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (n, size, size, 3), np.uint8),
        "mask": rng.integers(0, 2, (n, size, size, 1), np.uint8),
        "weight": np.ones(n, np.float32),
    }


def make_state(model=MODEL, tx=TX):
    create = jax.jit(train.create_train_state, static_argnums=(0, 1, 3))
    return create(model, tx, jax.random.key(0), (1, 8, 8, 3))


def make_step(model=MODEL, tx=TX, **options):
    return train.make_train_step(model, tx, losses.bce, **options)


def assert_close(a, b, **tolerance):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, **tolerance)


def test_the_state_is_arrays_of_fixed_types_and_shapes():
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


def test_steps_are_adam_on_the_gradient_of_the_mean_loss():
    batch, key = make_batch(), jax.random.key(1)
    image, mask = batch["image"] / np.float32(255), batch["mask"].astype(np.float32)

    def loss(params):
        return losses.bce(STILL.apply({"params": params}, image), mask).mean()

    state, step = make_state(STILL), make_step(STILL)
    start, gradients = jax.device_get(state.params), []
    for _ in range(3):
        value, gradient = jax.jit(jax.value_and_grad(loss))(state.params)
        gradients.append(gradient)
        state, figures = step(state, batch, key)
        np.testing.assert_allclose(figures["loss"], value, rtol=1e-6)
    for before, after, *history in zip(
        *map(jax.tree.leaves, (start, state.params, *gradients)), strict=True
    ):
        expected = before + reference.adam([np.asarray(g) for g in history])
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=2e-6)


def test_jit_equals_eager():
    batch, key, model = make_batch(2), jax.random.key(1), MODEL.clone(convs=1)
    eager, figures = train.train_step(
        make_state(model), batch, key, model=model, tx=TX, loss_fn=losses.bce
    )
    jitted, same = make_step(model)(make_state(model), batch, key)
    assert_close((eager.params, figures), (jitted.params, same), rtol=1e-4, atol=1e-5)


def test_images_of_weight_zero_change_nothing():
    small, large = make_batch(3), make_batch(3)
    other = make_batch(5, seed=9)
    large = {k: np.concatenate([large[k], other[k]]) for k in large}
    large["weight"][3:] = 0
    key, step = jax.random.key(1), make_step(STILL)
    a, figures = step(make_state(STILL), small, key)
    b, filled = step(make_state(STILL), large, key)
    assert_close(a.params, b.params, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(figures["loss"], filled["loss"], rtol=1e-5)
    np.testing.assert_allclose(figures["iou_coef"], filled["iou_coef"], rtol=1e-5)
    assert_close(figures["confusion"], [count[:3] for count in filled["confusion"]])


def test_images_of_weight_zero_do_not_enter_the_batch_statistics():
    model = STILL.clone(batch_norm=True)
    small, other = make_batch(3), make_batch(5, seed=9)
    large = {k: np.concatenate([small[k], other[k]]) for k in small}
    large["weight"][3:] = 0
    key, step = jax.random.key(1), make_step(model)
    a, figures = step(make_state(model), small, key)
    b, filled = step(make_state(model), large, key)
    assert_close(a.model_state, b.model_state, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(figures["loss"], filled["loss"], rtol=1e-5)
    assert_close(a.params, b.params, rtol=1e-4, atol=2e-5)
    assert_close(figures["confusion"], [count[:3] for count in filled["confusion"]])
    large["weight"][3:] = 1
    c, _ = step(make_state(model), large, key)
    stats = [jax.tree.leaves(state.model_state)[0] for state in (b, c)]
    assert not np.allclose(*stats, rtol=1e-3)


def test_a_state_starts_from_the_variables_of_another():
    model = STILL.clone(batch_norm=True, deep=True, features=(4, 4, 8))
    tx = optax.chain(TX, train.average_params(0.9))
    state = make_state(model, tx)
    before, _ = make_step(model, tx)(state, make_batch(), jax.random.key(1))
    given = jax.tree.map(np.array, before.variables)
    begun = train.start_from(make_state(model, tx), tx, before.variables)
    assert_close(begun.variables, given, rtol=0, atol=0)  # the average begins there too
    assert_close(begun.params, given["params"], rtol=0, atol=0)
    assert int(begun.step) == 0 and not jax.tree.leaves(begun.opt_state[0])[1].any()
    make_step(model, tx)(begun, make_batch(), jax.random.key(1))  # donates its own copies
    assert_close(before.variables, given, rtol=0, atol=0)
    # Another number of classes: the heads stay, the rest is given.
    more = model.clone(num_classes=3)
    fresh = make_state(more, tx)
    begun = train.start_from(fresh, tx, given)
    for name, part in begun.params.items():
        expected = fresh.params if name.startswith("head") else given["params"]
        assert_close(part, expected[name], rtol=0, atol=0)


def test_variables_of_another_model_are_refused_by_name():
    state, given = make_state(STILL), make_state(STILL).variables
    del given["params"]["down0"]["Conv_0"]["bias"]
    given["params"]["extra"] = {"kernel": jnp.zeros(1)}
    given["params"]["head"]["kernel"] = jnp.zeros((1, 1, 5, 1))
    words = (
        r"params/down0/Conv_0/bias is missing, params/extra/kernel is not in the model, "
        r"params/head/kernel has shape \(1, 1, 5, 1\) instead of \(1, 1, 4, 1\)"
    )
    with pytest.raises(ValueError, match=words):
        train.start_from(state, TX, given)


def test_randomness_follows_the_step_and_the_key():
    batch = make_batch()
    frozen = optax.sgd(0.0)  # the parameters stay, so only the randomness can move the loss
    step, run = make_step(tx=frozen), []
    state = make_state(tx=frozen)
    for _ in range(2):
        state, figures = step(state, batch, jax.random.key(1))
        run.append(float(figures["loss"]))
    again, figures = step(make_state(tx=frozen), batch, jax.random.key(1))
    resumed, later = step(again, batch, jax.random.key(1))
    assert [float(figures["loss"]), float(later["loss"])] == run
    assert run[0] != run[1]
    _, other = step(make_state(tx=frozen), batch, jax.random.key(2))
    assert float(other["loss"]) != run[0]


def test_the_augmentation_is_applied_to_image_and_mask():
    def blank(key, image, mask):
        return jnp.zeros_like(image), jnp.ones_like(mask)

    batch = make_batch()
    plain = {"image": np.zeros_like(batch["image"]), "mask": np.ones_like(batch["mask"])}
    key = jax.random.key(1)
    _, expected = make_step(STILL)(make_state(STILL), batch | plain, key)
    _, figures = make_step(STILL, augment=blank)(make_state(STILL), batch, key)
    np.testing.assert_allclose(figures["loss"], expected["loss"], rtol=1e-6)


def resident(batch, place):
    """The batch as indices into a data set that holds its images in another order, and others."""
    n = len(batch["weight"])
    other = make_batch(n, seed=99)
    order = np.random.default_rng(0).permutation(2 * n)
    index = np.argsort(order)[:n].astype(np.int32)
    whole = {k: place(np.concatenate([batch[k], other[k]])[order]) for k in ("image", "mask")}
    return whole | {"index": index, "weight": batch["weight"]}


@pytest.mark.parametrize("place", [np.asarray, jax.device_put])
def test_indices_into_a_data_set_are_as_good_as_a_batch(place):
    batch, key, step = make_batch(), jax.random.key(1), make_step()
    expected = step(make_state(), batch, key)
    result = step(make_state(), resident(batch, place), key)
    assert_close(expected, result, rtol=1e-6, atol=1e-7)
    evaluate, variables = train.make_eval_step(MODEL, losses.bce), result[0].variables
    assert_close(evaluate(variables, batch), evaluate(variables, resident(batch, place)), rtol=1e-6)


def test_a_step_moves_nothing_between_host_and_device():
    state, step, key = make_state(), make_step(augment=augment.random_flips), jax.random.key(1)
    batch = jax.device_put(resident(make_batch(), np.asarray))
    state, _ = step(state, batch, key)
    with jax.transfer_guard("disallow"):
        step(state, batch, key)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_rematerialisation_changes_no_result_and_keeps_less(batch_norm):
    batch, key = make_batch(4, 32), jax.random.key(1)
    deep = UNet(features=(4, 4, 4), group_size=2, dropout=0.2, batch_norm=batch_norm)
    # Not Adam, which makes steps of the rounding of what is 0: biases before a batch norm.
    kept, results, sgd = [], [], optax.sgd(1.0)
    for remat in (False, True):
        step = make_step(deep, sgd, remat=remat)
        compiled = step.trace(make_state(deep, sgd), batch, key).lower().compile()
        kept.append(compiled.memory_analysis().temp_size_in_bytes)
        results.append(step(make_state(deep, sgd), batch, key))
    assert_close(*results, rtol=1e-5, atol=1e-6)
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_batch(parts):
    sgd = optax.sgd(1.0)  # the update is the gradient
    batch, key = make_batch(), jax.random.key(1)
    batch["weight"][5:] = 0
    start = jax.device_get(make_state(STILL, sgd).params)
    whole, figures = make_step(STILL, sgd)(make_state(STILL, sgd), batch, key)
    summed, same = make_step(STILL, sgd, accumulate=parts)(make_state(STILL, sgd), batch, key)
    for a, b, c in zip(*map(jax.tree.leaves, (start, whole.params, summed.params)), strict=True):
        np.testing.assert_allclose(a - c, a - b, atol=1e-5 * abs(a - b).max())
    assert_close(figures, same, rtol=1e-5)


def test_a_batch_without_a_real_image_moves_nothing():
    sgd, batch = optax.sgd(1.0), make_batch()
    start = jax.device_get(make_state(STILL, sgd).params)
    batch["weight"][:] = 0
    after, figures = make_step(STILL, sgd)(make_state(STILL, sgd), batch, jax.random.key(1))
    assert figures["loss"] == 0
    assert_close(start, after.params, rtol=0, atol=0)


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="8 images cannot be split into 3"):
        make_step(accumulate=3)(make_state(), make_batch(), jax.random.key(1))


def test_four_devices_are_as_good_as_one():
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))
    key, batches = jax.random.key(1), [make_batch(seed=s) for s in range(3)]
    results = []
    for model, options in [
        (MODEL, {}),
        (MODEL, {"mesh": mesh}),
        (STILL, {}),
        (STILL, {"mesh": mesh, "accumulate": 2}),
    ]:
        state, step = make_state(), make_step(model, augment=augment.random_flips, **options)
        for batch in batches:
            state, figures = step(state, batch, key)
        results.append((jax.device_get(state.params), jax.device_get(figures)))
    assert len(state.step.sharding.device_set) == 4
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    assert_close(results[2], results[3], rtol=1e-4, atol=1e-5)
    split = NamedSharding(mesh, PartitionSpec("batch"))
    held = [resident(batch, lambda x: jax.device_put(x, split)) for batch in batches]
    state, step = make_state(), make_step(augment=augment.random_flips, mesh=mesh)
    for batch in held:
        state, _ = step(state, batch, key)
    assert_close(results[0][0], jax.device_get(state.params), rtol=1e-4, atol=1e-5)
    evaluate = train.make_eval_step(MODEL, losses.bce, mesh=mesh)
    alone = train.make_eval_step(MODEL, losses.bce)
    variables = {"params": results[0][0]}
    assert_close(evaluate(variables, batches[0]), alone(variables, batches[0]), rtol=1e-5)


def test_a_whole_run_is_traced_once():
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


def test_batch_statistics_would_travel_in_the_state():
    import flax.linen as nn

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x, train=False, weight=None):
            x = nn.Conv(1, (1, 1))(x)
            seen = self.variable("batch_stats", "mean", lambda: jnp.zeros(()))
            if train:
                seen.value = 0.5 * seen.value + 0.5 * x.mean()
            return x - seen.value[None, None, None, None]

    state = make_state(Normed())
    after, _ = make_step(Normed())(state, make_batch(), jax.random.key(1))
    assert float(after.model_state["batch_stats"]["mean"]) != 0
    assert set(after.variables) == {"params", "batch_stats"}


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_lowers_for_accelerators(platform, dtype):
    model = ARTICLE.clone(group_size=1, dtype=jnp.dtype(dtype))
    create = partial(train.create_train_state, model, TX, image_shape=(1, 32, 32, 3))
    state = jax.eval_shape(create, jax.random.key(0))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make_batch(8, 256)))
    step = make_step(model, augment=augment.random_flips)
    text = step.trace(state, batch, jax.eval_shape(lambda: jax.random.key(0))).lower(
        lowering_platforms=(platform,)
    )
    assert "stablehlo.convolution" in text.as_text()


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
        with pytest.raises(ValueError, match=r"one value\s+an image"):
            make_step()(make_state(), batch | {"weight": np.ones(shape, np.float32)}, key)
        mean = train.make_train_step(MODEL, TX, lambda x, y: losses.bce(x, y).mean())
        with pytest.raises(ValueError, match=r"the loss has shape \(\)"):
            mean(make_state(), batch, key)


def test_uint8_and_float_images_are_the_same():
    batch = make_batch()
    as_float = batch | {"image": batch["image"] / np.float32(255)}
    _, a = make_step(STILL)(make_state(STILL), batch, jax.random.key(1))
    _, b = make_step(STILL)(make_state(STILL), as_float, jax.random.key(1))
    np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)


def test_the_library_needs_no_tensorflow_tfds_or_orbax_to_be_imported():
    program = (
        "import sys, flax_unet, flax_unet.model, flax_unet.train, flax_unet.predict\n"
        "print({'tensorflow', 'tensorflow_datasets', 'orbax'} & set(sys.modules))"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "set()\n"


def test_the_average_of_the_parameters_is_their_moving_average():
    tx = optax.chain(optax.sgd(0.1), train.average_params(0.3))
    state, step, batch = make_state(STILL, tx), make_step(STILL, tx), make_batch()
    mean = jax.device_get(state.params)
    assert_close(state.variables["params"], mean)
    for t in range(5):
        state, _ = step(state, batch, jax.random.key(0))
        keep = min(0.3, (1 + t) / (10 + t))
        now = jax.device_get(state.params)
        mean = jax.tree.map(lambda old, new, k=keep: k * old + (1 - k) * new, mean, now)
        assert_close(state.variables["params"], mean, rtol=1e-5, atol=1e-7)
    # It changes no update, and is not what is trained.
    plain = make_state(STILL, optax.sgd(0.1))
    for _ in range(5):
        plain, _ = make_step(STILL, optax.sgd(0.1))(plain, batch, jax.random.key(0))
    assert_close(state.params, plain.params, rtol=1e-6, atol=1e-8)
    assert_close(plain.variables["params"], plain.params)
