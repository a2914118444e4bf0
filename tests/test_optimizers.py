"""Optimizers of optax and how they meet the training step."""

import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from flax_unet import losses, train
from flax_unet.model import UNet

MODEL = UNet((4, 8), convs=1)
BATCH_NORM = MODEL.clone(norm="batch")
SGD = optax.sgd(0.1)


def make_batch(n=4, size=8):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (n, size, size, 3), np.uint8),
        "mask": rng.integers(0, 2, (n, size, size, 1), np.uint8),
        "weight": np.ones(n, np.float32),
    }


def run(tx, steps, *, model=MODEL, frozen=(), **options):
    """The first state and the last, and the losses."""
    state = train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))
    first, results = jax.tree.map(np.array, state), []  # copied: the state is donated
    step = train.make_train_step(model, tx, losses.bce, frozen=frozen, **options)
    for _ in range(steps):
        state, result = step(state, make_batch(), jax.random.key(1))
        results.append(float(result["loss"]))
    return first, state, results


def assert_close(a, b, tolerance=1e-6):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_optimizer_is_given_the_loss_and_its_gradient_as_values_and_functions(accumulate):
    def update(updates, state, params, *, value, grad, value_fn, grad_fn):
        given = value, value_fn(params), grad, grad_fn(params, 0)
        return updates, given

    tx = optax.GradientTransformationExtraArgs(
        lambda params: (jnp.zeros(()), jnp.zeros(()), params, params), update
    )
    first, state, results = run(tx, 1, accumulate=accumulate)
    value, again, grad, grad_again = state.opt_state
    np.testing.assert_allclose((value, again), results[0], rtol=1e-6)
    image = jnp.asarray(make_batch()["image"], jnp.float32) / 255

    def loss(params):
        logits = MODEL.apply({"params": params}, image)
        return optax.sigmoid_binary_cross_entropy(logits, 1.0 * make_batch()["mask"]).mean()

    expected = jax.jit(jax.grad(loss))(first.params)
    assert_close(grad, expected, 1e-5)
    assert_close(grad_again, expected, 1e-5)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(optax.adam(1e-2), contrib.reduce_on_plateau()),
        optax.polyak_sgd(),
        optax.lbfgs(),
        contrib.sam(SGD, SGD, opaque_mode=True),
        contrib.prodigy(),
        contrib.dog(),
        optax.MultiSteps(optax.adam(1e-2), 2),
    ],
    ids=["reduce_on_plateau", "polyak_sgd", "lbfgs", "sam", "prodigy", "dog", "MultiSteps"],
)
def test_optimizers_with_demands_of_their_own_lower_the_loss(tx):
    _, state, results = run(tx, 12)
    assert results[-1] < results[0]
    # Some states hold the parameters themselves, and both are donated.
    again = train.start_from(state, tx, state.variables)
    step = train.make_train_step(MODEL, tx, losses.bce)
    assert float(step(again, make_batch(), jax.random.key(1))[1]["loss"]) < results[0]


@pytest.mark.parametrize("wrap", [lambda tx: tx, partial(train.freeze, frozen=["down0"])])
def test_the_variables_of_schedule_free_are_its_averaged_parameters(wrap):
    _, state, _ = run(wrap(contrib.schedule_free_adamw(1e-2)), 5)
    free = optax.tree.get_all_with_path(state.opt_state, "z")
    ((_, z),) = free
    ((_, b1),) = optax.tree.get_all_with_path(state.opt_state, "b1")
    y, x = state.params["head"]["kernel"], state.variables["params"]["head"]["kernel"]
    # y = (1 - b1) z + b1 x: Defazio et al., "The Road Less Scheduled", 2024, equation 1.
    np.testing.assert_allclose((1 - b1) * z["head"]["kernel"] + b1 * x, y, rtol=1e-5, atol=1e-7)
    assert np.abs(x - y).max() > 1e-4
    assert jax.tree.structure(state.params) == jax.tree.structure(state.variables["params"])


@pytest.mark.parametrize("remat", [False, True])
def test_a_frozen_module_stays_as_it_is_and_normalises_by_its_statistics(remat):
    tx = optax.chain(optax.adamw(1e-2, weight_decay=0.1), train.average_params(0.9))
    first, state, _ = run(
        train.freeze(tx, ["down0"]), 3, model=BATCH_NORM, frozen=["down0"], remat=remat
    )
    for collection in ("params", "batch_stats"):
        old, new = first.variables[collection], state.variables[collection]
        for x, y in zip(*map(jax.tree.leaves, (old["down0"], new["down0"])), strict=True):
            np.testing.assert_array_equal(x, y)
        changed = zip(*map(jax.tree.leaves, (old["up0"], new["up0"])), strict=True)
        assert all(np.abs(x - y).max() > 0 for x, y in changed)


def test_a_frozen_network_trains_on_the_output_of_inference():
    names, batch = ["bottleneck", "down0", "up0"], make_batch()
    tx = train.freeze(SGD, names)
    first, _, results = run(tx, 1, model=BATCH_NORM, frozen=names)
    expected = train.eval_step(first.variables, batch, model=BATCH_NORM, loss_fn=losses.bce)
    np.testing.assert_allclose(results[0], expected["loss"].mean(), rtol=1e-6)


def test_a_frozen_module_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="no module 'down': the modules are bottleneck, down0"):
        run(train.freeze(SGD, ["down"]), 1)


def test_steps_run_inside_of_a_scan():
    batches = jax.tree.map(lambda x: np.stack([x] * 3), make_batch())
    step = train.make_train_step(MODEL, SGD, losses.bce)
    state = train.create_train_state(MODEL, SGD, jax.random.key(0), (1, 8, 8, 3))
    state, result = jax.lax.scan(lambda s, b: step(s, b, jax.random.key(1)), state, batches)
    _, expected, results = run(SGD, 3)
    np.testing.assert_allclose(result["loss"], results, rtol=1e-6)
    assert_close(state.params, expected.params)


def test_with_64_bits_enabled_a_state_has_the_same_types():
    program = """
import jax, numpy as np, sys
jax.config.update("jax_enable_x64", True)
import optax
from flax_unet import UNet, efficientnet, losses, train
tx = optax.chain(optax.adamw(optax.cosine_decay_schedule(1e-3, 9)), train.average_params(0.9))
for norm in ("batch", "instance"):
    model = UNet((4, 4, 4, 4), norm=norm, residual=True, encoder=efficientnet.Encoder("lite0"))
    batch = {
        "image": np.zeros((4, 32, 32, 3), np.uint8),
        "mask": np.zeros((4, 32, 32, 1), np.uint8),
        "weight": np.ones(4),
    }
    for accumulate in (1, 2):
        state = train.create_train_state(model, tx, jax.random.key(0), (1, 32, 32, 3))
        step = jax.eval_shape(
            train.make_train_step(model, tx, losses.bce_soft_dice, accumulate=accumulate),
            state, batch, jax.random.key(1),
        )
        types = {str(x.dtype) for x in jax.tree.leaves((state, step))}
        assert types == {"int32", "float32"}, types
        same = jax.tree.map(lambda a, b: a.dtype == b.dtype, state, step[0])
        assert all(jax.tree.leaves(same))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_batch_statistics_of_what_the_optimizer_never_changes_are_refused():
    def labels(params):
        return {name: "zero" if name == "down0" else "adam" for name in params}

    tx = optax.multi_transform({"adam": optax.adam(1e-2), "zero": optax.set_to_zero()}, labels)
    with pytest.raises(ValueError, match="never changes down0/BatchNorm_0, but its batch stat.*"):
        run(tx, 1, model=BATCH_NORM)
    run(tx, 1)  # without batch statistics it is enough
    run(tx, 1, model=BATCH_NORM, frozen=["down0"])
    slow = optax.multi_transform({"adam": optax.adam(1e-2), "zero": SGD}, labels)
    run(slow, 1, model=BATCH_NORM)


def test_a_frozen_name_of_no_module_is_refused_by_the_step():
    with pytest.raises(ValueError, match="frozen: there is no module 'dwn0': the modules are"):
        run(optax.adam(1e-3), 1, frozen=["dwn0"])
