import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from flax_unet.model import (
    ARTICLE,
    BatchNorm,
    Block,
    Dropout,
    GroupNorm,
    UNet,
    Upsample,
    max_pool,
    patches,
)

SMALL = UNet(features=(4, 8, 12), group_size=2)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def init(model, x):
    return jax.jit(model.init)(jax.random.key(1, impl="rbg"), x)  # quick to compile


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_article_has_its_number_of_parameters():
    variables = jax.eval_shape(ARTICLE.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert count(variables) == 11_707_729


def test_a_block_is_convolutions_and_relu():
    x = normal(0, 2, 5, 6, 3)
    block = Block(4, 2, None, batch_norm=False, dropout=0.0, residual=False, dtype=jnp.float32)
    variables = block.init(jax.random.key(1), x, False)
    expected = x
    for i in range(2):
        layer = variables["params"][f"Conv_{i}"]
        layer["bias"] = normal(i, 4)
        expected = np.maximum(reference.conv3x3(expected, layer["kernel"], layer["bias"]), 0)
    np.testing.assert_allclose(block.apply(variables, x, False), expected, rtol=1e-5, atol=1e-5)


def test_a_block_with_norm_is_convolution_norm_relu():
    x = normal(0, 2, 5, 6, 3)
    block = Block(
        4, 1, group_size=2, batch_norm=False, dropout=0.0, residual=False, dtype=jnp.float32
    )
    variables = block.init(jax.random.key(1), x, False)
    conv, norm = variables["params"]["Conv_0"], variables["params"]["GroupNorm_0"]
    norm["scale"], norm["bias"] = normal(2, 4), normal(3, 4)
    y = reference.conv3x3(x, conv["kernel"], conv["bias"])
    expected = np.maximum(reference.group_norm(y, 2, norm["scale"], norm["bias"]), 0)
    np.testing.assert_allclose(block.apply(variables, x, False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_group_norm_equals_the_reference_and_flax_with_its_gradient(size):
    x, scale, bias = 3 * normal(0, 2, 6, 5, 12) + 1, normal(1, 12), normal(2, 12)
    variables = {"params": {"scale": scale, "bias": bias}}
    ours, flaxs = GroupNorm(size), nn.GroupNorm(12 // size)
    np.testing.assert_allclose(
        ours.apply(variables, x), reference.group_norm(x, size, scale, bias), rtol=1e-4, atol=1e-5
    )

    def gradient(module):
        return jax.grad(lambda v, x: jnp.sin(module.apply(v, x)).sum(), argnums=(0, 1))

    with jax.numpy_rank_promotion("allow"):
        expected = gradient(flaxs)(variables, x)
    for a, b in zip(*map(jax.tree.leaves, (gradient(ours)(variables, x), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def batch_norm(x, weight=None, **variables):
    """The module's result in training, and the statistics after it."""
    return BatchNorm().apply(variables, x, True, weight, mutable=["batch_stats"])


def test_batch_norm_equals_the_reference_and_flax_with_its_gradient():
    x, scale, bias, kept, spread = map(
        np.asarray, (3 * normal(0, 4, 6, 5, 7) + 1, *(normal(seed, 7) for seed in range(1, 5)))
    )
    params, weight = {"scale": scale, "bias": bias}, jnp.array([1.0, 0.0, 1.0, 1.0])
    stats = {"mean": kept, "variance": 1 + spread**2}
    y, after = batch_norm(x, weight, params=params, batch_stats=stats)
    mean, variance, expected = reference.batch_norm(x, np.asarray(weight) > 0, scale, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for name, now in {"mean": mean, "variance": variance}.items():
        moved = 0.99 * stats[name] + 0.01 * now
        np.testing.assert_allclose(after["batch_stats"][name], moved, rtol=1e-5, atol=1e-6)
    # Otherwise it normalises by what it kept, whatever the batch.
    y = BatchNorm().apply({"params": params, "batch_stats": stats}, x, False, None)
    expected = (x - stats["mean"]) / np.sqrt(stats["variance"] + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    def ours(params, x):
        y, _ = batch_norm(x, weight, params=params)
        return (weight[:, None, None, None] * jnp.sin(y)).sum()

    def flaxs(params, x):
        norm = nn.BatchNorm(use_running_average=False)
        return jnp.sin(norm.apply({"params": params}, x, mutable=["batch_stats"])[0]).sum()

    real = np.array([0, 2, 3])
    mine = jax.grad(ours, argnums=(0, 1))(params, x)
    with jax.numpy_rank_promotion("allow"):
        expected = jax.grad(flaxs, argnums=(0, 1))(params, x[real])
    np.testing.assert_allclose(mine[1][real], expected[1], rtol=1e-3, atol=1e-4)
    assert not mine[1][1].any()
    for name in params:
        np.testing.assert_allclose(mine[0][name], expected[0][name], rtol=1e-3, atol=1e-4)


def test_batch_norm_of_no_real_image_keeps_its_statistics():
    x, stats = normal(0, 2, 4, 4, 3), {"mean": jnp.ones(3), "variance": jnp.full(3, 2.0)}
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    y, after = batch_norm(x, jnp.zeros(2), params=params, batch_stats=stats)
    assert jnp.isfinite(y).all()
    for name, value in stats.items():
        np.testing.assert_array_equal(after["batch_stats"][name], value)


def test_the_batch_norm_of_a_network_is_that_of_each_block():
    model = SMALL.clone(features=(4, 8), group_size=None, batch_norm=True, convs=1)
    x, weight = jax.nn.sigmoid(normal(0, 3, 8, 8, 3)), jnp.array([1.0, 1.0, 0.0])
    variables = init(model, x)
    assert set(variables["batch_stats"]) == {"down0", "bottleneck", "up0"}

    def run(x, weight):
        return model.apply(variables, x, train=True, weight=weight, mutable=["batch_stats"])

    logits, after = run(x, weight)
    expected, two = run(x[:2], None)
    np.testing.assert_allclose(logits[:2], expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (after, two)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # Outside of training, one image does not see another.
    alone, among = model.apply(variables, x[1:2]), model.apply(variables, x)[1:2]
    np.testing.assert_allclose(alone, among, rtol=1e-5, atol=1e-5)


def test_the_logits_of_a_deep_network_are_the_sum_of_its_levels():
    model = SMALL.clone(deep=True, patch=2)
    x = jax.nn.sigmoid(normal(0, 1, 16, 8, 3))
    variables = init(model, x)
    params = variables["params"]
    assert params["head1"]["kernel"].shape == (4, 4, 8, 1) and "head2" not in params
    for seed, name in enumerate(("head", "head1")):
        params[name]["bias"] = normal(seed, 1)
    logits, seen = model.apply(variables, x, capture_intermediates=True)
    levels = seen["intermediates"]
    expected = reference.upsample(levels["up0"]["__call__"][0], **params["head"])
    expected += reference.upsample(levels["up1"]["__call__"][0], **params["head1"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_residual_block_adds_its_input_before_the_last_relu():
    x = normal(0, 2, 5, 6, 3)
    block = Block(4, 2, None, batch_norm=False, dropout=0.0, residual=True, dtype=jnp.float32)
    variables = block.init(jax.random.key(1), x, False)
    first, second, shortcut = (
        variables["params"][name] for name in ("Conv_0", "Conv_1", "shortcut")
    )
    for seed, layer in enumerate((first, second, shortcut)):
        layer["bias"] = normal(seed, 4)
    y = np.maximum(reference.conv3x3(x, **first), 0)
    y = reference.conv3x3(y, **second) + reference.upsample(x, **shortcut)
    expected = np.maximum(y, 0)
    np.testing.assert_allclose(block.apply(variables, x, False), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_upsample_is_the_transposed_convolution(stride):
    x, layer = normal(0, 2, 3, 4, 5), Upsample(6, stride, jnp.float32)
    variables = layer.init(jax.random.key(1), x)
    variables["params"]["bias"] = normal(2, 6)
    expected = reference.upsample(x, **variables["params"])
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_patches_are_the_squares_of_a_picture():
    x = np.asarray(normal(0, 2, 6, 9, 2))
    y = patches(jnp.asarray(x), 3)
    assert y.shape == (2, 2, 3, 18)
    for i in range(2):
        for j in range(3):
            square = x[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            np.testing.assert_array_equal(y[:, i, j], square.reshape(2, -1))


def test_a_network_of_patches_gives_a_logit_a_pixel():
    model = SMALL.clone(patch=2, residual=True)
    x = normal(0, 1, 16, 24, 3)
    assert model.stride == 8
    variables = init(model, x)
    assert model.apply(variables, x).shape == (1, 16, 24, 1)
    assert variables["params"]["head"]["kernel"].shape == (2, 2, 4, 1)
    # What is moved by the stride, far from the border, gives what is moved by the stride.
    wide = normal(1, 1, 256, 16, 3)
    plain = model.clone(group_size=None)
    variables = init(plain, x)
    logits, moved = (plain.apply(variables, jnp.roll(wide, s, 1)) for s in (0, 8))
    np.testing.assert_allclose(logits[:, 120:128], moved[:, 128:136], atol=1e-5)


def test_max_pool_takes_the_largest_of_four():
    x = np.asarray(normal(0, 2, 4, 6, 3))
    y = max_pool(jnp.asarray(x))
    for i in range(2):
        for j in range(3):
            window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(y[:, i, j], window.max((1, 2)))


def test_the_gradient_of_a_window_goes_to_one_of_its_largest_whole():
    x = jnp.array([[1.0, 2.0, 5.0, 5.0], [0.0, 2.0, 3.0, 5.0]])[None, :, :, None]
    y, pull = jax.vjp(max_pool, x)
    assert y[0, 0, :, 0].tolist() == [2, 5]
    (gradient,) = pull(jnp.array([3.0, 7.0])[None, None, :, None])
    windows = np.asarray(gradient)[0, :, :, 0].reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)
    places = np.asarray(x)[0, :, :, 0].reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)
    assert (windows != 0).sum(1).tolist() == [1, 1] and windows.sum(1).tolist() == [3, 7]
    assert (places[windows != 0] == [2, 5]).all()


def test_dropout_drops_its_share_and_keeps_the_mean():
    x = jnp.ones((1000, 1000))
    y = Dropout(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    assert abs(float((y == 0).mean()) - 0.3) < 0.002  # four standard deviations
    assert abs(float(y.mean()) - 1) < 0.003
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-4)
    assert (Dropout(0.3).apply({}, x, False) == x).all()


def test_dropout_of_one_entry_says_nothing_of_another_nor_of_another_key():
    def mask(seed):
        ones = jnp.ones((8, 64, 64, 16))
        return np.asarray(
            Dropout(0.5).apply({}, ones, True, rngs={"dropout": jax.random.key(seed)})
        )

    first = mask(0) - 1  # of -1 and 1
    others = [mask(seed) - 1 for seed in (1, 2, 2**20)]
    others += [np.roll(first, shift, axis) for axis in range(4) for shift in (1, 2, 4)]
    others += [np.roll(others[0], 1, 3), first[::-1], first[:, :, :, ::-1]]
    for other in others:  # correlations, in standard deviations
        assert abs((first * other).sum()) / first.size**0.5 < 4
    # Sums of 64 entries spread as those of fair coins: a variance of 64, within 4 deviations.
    for axes in ((3, 0, 1, 2), (0, 1, 2, 3), (1, 3, 0, 2)):
        sums = first.transpose(axes).reshape(-1, 64).sum(1)
        assert abs(sums.var() / 64 - 1) < 4 * (2 / len(sums)) ** 0.5


def test_dropout_is_the_same_alone_and_under_vmap():
    x, keys = normal(0, 3, 2, 4, 4, 5), jax.random.split(jax.random.key(1), 3)

    def drop(x, key):
        return Dropout(0.3).apply({}, x, True, rngs={"dropout": key})

    for alone, x_i, key in zip(jax.vmap(drop)(x, keys), x, keys, strict=True):
        np.testing.assert_array_equal(alone, drop(x_i, key))


def test_dropout_stands_before_the_last_convolution_and_only_in_training():
    x = normal(0, 1, 8, 8, 3)
    block = Block(4, 3, None, batch_norm=False, dropout=0.5, residual=False, dtype=jnp.float32)
    variables = block.init(jax.random.key(1), x, False)

    def run(train):
        out, seen = block.apply(
            variables, x, train, rngs={"dropout": jax.random.key(2)}, capture_intermediates=True
        )
        return out, seen["intermediates"]

    (quiet, still), (noisy, moved) = run(False), run(True)
    assert (still["Conv_1"]["__call__"][0] == moved["Conv_1"]["__call__"][0]).all()
    assert not (still["Conv_2"]["__call__"][0] == moved["Conv_2"]["__call__"][0]).all()
    assert not (quiet == noisy).all()


def test_lists_are_as_good_as_tuples():
    assert hash(UNet(features=[4, 8], dropout=[0.1, 0.2])) == hash(
        UNet(features=(4, 8), dropout=(0.1, 0.2))
    )


def test_jit_equals_eager():
    x = jax.nn.sigmoid(normal(0, 2, 8, 12, 3))
    model = SMALL.clone(features=(4, 8), convs=1)
    variables = init(model, x)
    np.testing.assert_allclose(
        jax.jit(model.apply)(variables, x), model.apply(variables, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_and_logits_are_float32_whatever_the_computation(dtype):
    model = SMALL.clone(dtype=jnp.dtype(dtype), num_classes=2)
    x = jax.nn.sigmoid(normal(0, 2, 8, 12, 3))
    variables = init(model, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, x)
    assert (logits.dtype, logits.shape) == (jnp.float32, (2, 8, 12, 2))
    exact = jax.jit(model.clone(dtype=jnp.float32).apply)(variables, x)
    # bfloat16 keeps 8 bits: an error of 2^-9 a rounding, through the 20 layers of this network
    bound = 0 if dtype == "float32" else 2**-9 * 20 * float(jnp.abs(exact).max())
    assert float(jnp.abs(logits - exact).max()) <= bound


def test_one_image_does_not_see_another():
    x = jax.nn.sigmoid(normal(0, 3, 8, 8, 3))
    variables, apply = init(SMALL, x), jax.jit(SMALL.apply)
    np.testing.assert_allclose(
        apply(variables, x)[1:2], apply(variables, x[1:2]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (SMALL, (1, 10, 8, 3), "multiples of 4"),
        (SMALL, (8, 8, 3), r"\[B, H, W, C\]"),
        (SMALL.clone(group_size=3), (1, 8, 8, 3), "groups of 3"),
        (SMALL.clone(dropout=(0.1, 0.1)), (1, 8, 8, 3), "2 rates for 3 levels"),
        (SMALL.clone(dropout=1.0), (1, 8, 8, 3), "must be in"),
    ],
)
def test_what_does_not_fit_is_named(model, shape, words):
    with pytest.raises(ValueError, match=words):
        model.init(jax.random.key(0), jnp.zeros(shape))
