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
    ConvTranspose,
    Dropout,
    GroupNorm,
    UNet,
    max_pool,
    space_to_depth,
)
from flax_unet.predict import predict_proba

SMALL = UNet(features=(4, 8, 12), norm=2)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def init(model, x):
    return jax.jit(model.init)(jax.random.key(1, impl="rbg"), x)  # quick to compile


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_the_tutorials_network_has_as_many_parameters_as_in_keras():
    variables = jax.eval_shape(ARTICLE.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert count(variables) == 11_707_729


def test_a_block_is_convolutions_and_relu():
    x = normal(0, 2, 5, 6, 3)
    block = Block(4, 2, None, dropout=0.0, residual=False, dtype=jnp.float32)
    variables = block.init(jax.random.key(1), x, False)
    expected = x
    for i in range(2):
        layer = variables["params"][f"Conv_{i}"]
        layer["bias"] = normal(i, 4)
        expected = np.maximum(reference.conv3x3(expected, layer["kernel"], layer["bias"]), 0)
    np.testing.assert_allclose(block.apply(variables, x, False), expected, rtol=1e-5, atol=1e-5)


def test_a_block_with_norm_is_convolution_norm_relu():
    x = normal(0, 2, 5, 6, 3)
    block = Block(4, 1, norm=2, dropout=0.0, residual=False, dtype=jnp.float32)
    variables = block.init(jax.random.key(1), x, False)
    conv, norm = variables["params"]["Conv_0"], variables["params"]["GroupNorm_0"]
    norm["scale"], norm["bias"] = normal(2, 4), normal(3, 4)
    y = reference.conv3x3(x, conv["kernel"], conv["bias"])
    expected = np.maximum(reference.group_norm(y, 2, norm["scale"], norm["bias"]), 0)
    np.testing.assert_allclose(block.apply(variables, x, False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 3, 12])
def test_group_norm_and_its_gradient_equal_the_reference_and_flax(size):
    x, scale, bias = 3 * normal(0, 2, 6, 5, 12) + 1, normal(1, 12), normal(2, 12)
    variables = {"params": {"scale": scale, "bias": bias}}
    ours, theirs = GroupNorm(size), nn.GroupNorm(12 // size)
    np.testing.assert_allclose(
        ours.apply(variables, x), reference.group_norm(x, size, scale, bias), rtol=1e-4, atol=1e-5
    )

    def gradient(module):
        return jax.grad(lambda v, x: jnp.sin(module.apply(v, x)).sum(), argnums=(0, 1))

    with jax.numpy_rank_promotion("allow"):
        expected = gradient(theirs)(variables, x)
    for a, b in zip(*map(jax.tree.leaves, (gradient(ours)(variables, x), expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def batch_norm(x, weight=None, **variables):
    """The output in training, and the updated statistics."""
    return BatchNorm().apply(variables, x, True, weight, mutable=["batch_stats"])


def test_batch_norm_and_its_gradient_equal_the_reference_and_flax():
    x, scale, bias, center, spread = map(
        np.asarray, (3 * normal(0, 4, 6, 5, 7) + 1, *(normal(seed, 7) for seed in range(1, 5)))
    )
    params, weight = {"scale": scale, "bias": bias}, jnp.array([1.0, 0.0, 1.0, 1.0])
    stats = {"mean": center, "variance": 1 + spread**2}
    y, after = batch_norm(x, weight, params=params, batch_stats=stats)
    mean, variance, expected = reference.batch_norm(x, np.asarray(weight) > 0, scale, bias)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    for name, value in {"mean": mean, "variance": variance}.items():
        average = 0.99 * stats[name] + 0.01 * value
        np.testing.assert_allclose(after["batch_stats"][name], average, rtol=1e-5, atol=1e-6)
    # Outside of training it normalises by the averages, whatever the batch.
    y = BatchNorm().apply({"params": params, "batch_stats": stats}, x, False, None)
    expected = (x - stats["mean"]) / np.sqrt(stats["variance"] + 1e-5) * scale + bias
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)

    def ours(params, x):
        y, _ = batch_norm(x, weight, params=params)
        return (weight[:, None, None, None] * jnp.sin(y)).sum()

    def theirs(params, x):
        norm = nn.BatchNorm(use_running_average=False)
        return jnp.sin(norm.apply({"params": params}, x, mutable=["batch_stats"])[0]).sum()

    real = np.array([0, 2, 3])
    by_params, by_x = jax.grad(ours, argnums=(0, 1))(params, x)
    with jax.numpy_rank_promotion("allow"):
        expected = jax.grad(theirs, argnums=(0, 1))(params, x[real])
    np.testing.assert_allclose(by_x[real], expected[1], rtol=1e-3, atol=1e-4)
    assert not by_x[1].any()
    for name in params:
        np.testing.assert_allclose(by_params[name], expected[0][name], rtol=1e-3, atol=1e-4)


def test_batch_statistics_warm_up_with_the_steps():
    batches = np.random.default_rng(0).normal(5, 3, (12, 4, 6, 6, 2)).astype(np.float32)
    params = {"scale": jnp.ones(2), "bias": jnp.zeros(2)}
    stats = {"mean": jnp.zeros(2), "variance": jnp.ones(2)}
    mean, variance = np.zeros(2), np.ones(2)
    for i, x in enumerate(batches):
        _, after = BatchNorm().apply(
            {"params": params, "batch_stats": stats}, x, True, None, i, mutable=["batch_stats"]
        )
        stats, keep = after["batch_stats"], (1 + i) / (10 + i)
        mean = keep * mean + (1 - keep) * x.mean((0, 1, 2))
        variance = keep * variance + (1 - keep) * x.var((0, 1, 2))
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-5)
    np.testing.assert_allclose(stats["variance"], variance, rtol=1e-4)
    assert abs(stats["mean"] - 5).max() < 0.5  # 0.99 from 0 would have left it at 0.6


def test_a_batch_of_padding_leaves_the_batch_statistics_unchanged():
    x, stats = normal(0, 2, 4, 4, 3), {"mean": jnp.ones(3), "variance": jnp.full(3, 2.0)}
    params = {"scale": jnp.ones(3), "bias": jnp.zeros(3)}
    y, after = batch_norm(x, jnp.zeros(2), params=params, batch_stats=stats)
    assert jnp.isfinite(y).all()
    for name, value in stats.items():
        np.testing.assert_array_equal(after["batch_stats"][name], value)


def test_a_network_passes_the_weight_to_the_batch_norm_of_each_block():
    model = SMALL.clone(features=(4, 8), norm="batch", convs=1)
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
    # Outside of training, no image affects another.
    alone, together = model.apply(variables, x[1:2]), model.apply(variables, x)[1:2]
    np.testing.assert_allclose(alone, together, rtol=1e-5, atol=1e-5)


def test_deep_logits_are_the_sum_over_the_levels():
    model = SMALL.clone(deep=True, patch=2)
    x = jax.nn.sigmoid(normal(0, 1, 16, 8, 3))
    variables = init(model, x)
    params = variables["params"]
    assert params["head1"]["kernel"].shape == (4, 4, 8, 1) and "head2" not in params
    for seed, name in enumerate(("head", "head1")):
        params[name]["bias"] = normal(seed, 1)
    logits, captured = model.apply(variables, x, capture_intermediates=True)
    levels = captured["intermediates"]
    expected = reference.upsample(levels["up0"]["__call__"][0], **params["head"])
    expected += reference.upsample(levels["up1"]["__call__"][0], **params["head1"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_a_residual_block_adds_its_input_before_the_last_relu():
    x = normal(0, 2, 5, 6, 3)
    block = Block(4, 2, None, dropout=0.0, residual=True, dtype=jnp.float32)
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
def test_conv_transpose_equals_the_reference(stride):
    x, layer = normal(0, 2, 3, 4, 5), ConvTranspose(6, stride, jnp.float32)
    variables = layer.init(jax.random.key(1), x)
    variables["params"]["bias"] = normal(2, 6)
    expected = reference.upsample(x, **variables["params"])
    np.testing.assert_allclose(layer.apply(variables, x), expected, rtol=1e-5, atol=1e-5)


def test_space_to_depth_folds_squares_of_an_image_into_channels():
    x = np.asarray(normal(0, 2, 6, 9, 2))
    y = space_to_depth(jnp.asarray(x), 3)
    assert y.shape == (2, 2, 3, 18)
    for i in range(2):
        for j in range(3):
            square = x[:, 3 * i : 3 * i + 3, 3 * j : 3 * j + 3]
            np.testing.assert_array_equal(y[:, i, j], square.reshape(2, -1))


def test_a_network_on_patches_gives_one_logit_per_pixel():
    model = SMALL.clone(patch=2, residual=True)
    x = normal(0, 1, 16, 24, 3)
    assert model.stride == 8
    variables = init(model, x)
    assert model.apply(variables, x).shape == (1, 16, 24, 1)
    assert variables["params"]["head"]["kernel"].shape == (2, 2, 4, 1)
    # Far from the border, an image shifted by the stride has logits shifted by the stride.
    wide = normal(1, 1, 256, 16, 3)
    plain = model.clone(norm=None)
    variables = init(plain, x)
    logits, shifted = (plain.apply(variables, jnp.roll(wide, s, 1)) for s in (0, 8))
    np.testing.assert_allclose(logits[:, 120:128], shifted[:, 128:136], atol=1e-5)


def test_max_pool_takes_the_largest_of_four():
    x = np.asarray(normal(0, 2, 4, 6, 3))
    y = max_pool(jnp.asarray(x))
    for i in range(2):
        for j in range(3):
            window = x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            np.testing.assert_array_equal(y[:, i, j], window.max((1, 2)))


@pytest.mark.parametrize("position", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("others", [-1.0, 0.0, 1.0, np.inf])
def test_a_nan_anywhere_in_a_window_makes_its_maximum_nan(position, others):
    window = np.full((2, 2), others, np.float32)
    window[position] = np.nan
    x = np.concatenate([window, np.ones((2, 2), np.float32)], axis=1)[None, :, :, None]
    y = np.asarray(max_pool(jnp.asarray(x)))[0, 0, :, 0]
    assert np.isnan(y[0]) and y[1] == 1


def test_the_gradient_of_a_window_goes_to_exactly_one_of_its_largest():
    x = jnp.array([[1.0, 2.0, 5.0, 5.0], [0.0, 2.0, 3.0, 5.0]])[None, :, :, None]
    y, pull = jax.vjp(max_pool, x)
    assert y[0, 0, :, 0].tolist() == [2, 5]
    (gradient,) = pull(jnp.array([3.0, 7.0])[None, None, :, None])
    windows = np.asarray(gradient)[0, :, :, 0].reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)
    places = np.asarray(x)[0, :, :, 0].reshape(2, 2, 2).transpose(1, 0, 2).reshape(2, 4)
    assert (windows != 0).sum(1).tolist() == [1, 1] and windows.sum(1).tolist() == [3, 7]
    assert (places[windows != 0] == [2, 5]).all()


def test_dropout_zeroes_its_rate_of_the_entries_and_preserves_the_mean():
    x = jnp.ones((1000, 1000))
    y = Dropout(0.3).apply({}, x, True, rngs={"dropout": jax.random.key(0)})
    assert abs(float((y == 0).mean()) - 0.3) < 0.002  # four standard deviations
    assert abs(float(y.mean()) - 1) < 0.003
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-4)
    assert (Dropout(0.3).apply({}, x, False) == x).all()


def test_dropout_is_independent_between_entries_and_between_keys():
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
    # Sums of 64 entries vary like those of fair coins: a variance of 64, within 4 deviations.
    for axes in ((3, 0, 1, 2), (0, 1, 2, 3), (1, 3, 0, 2)):
        sums = first.transpose(axes).reshape(-1, 64).sum(1)
        assert abs(sums.var() / 64 - 1) < 4 * (2 / len(sums)) ** 0.5


def test_dropout_under_vmap_equals_dropout_alone():
    x, keys = normal(0, 3, 2, 4, 4, 5), jax.random.split(jax.random.key(1), 3)

    def drop(x, key):
        return Dropout(0.3).apply({}, x, True, rngs={"dropout": key})

    for alone, x_i, key in zip(jax.vmap(drop)(x, keys), x, keys, strict=True):
        np.testing.assert_array_equal(alone, drop(x_i, key))


def test_dropout_acts_before_the_last_convolution_and_only_in_training():
    x = normal(0, 1, 8, 8, 3)
    block = Block(4, 3, None, dropout=0.5, residual=False, dtype=jnp.float32)
    variables = block.init(jax.random.key(1), x, False)

    def run(train):
        out, captured = block.apply(
            variables, x, train, rngs={"dropout": jax.random.key(2)}, capture_intermediates=True
        )
        return out, captured["intermediates"]

    (plain, before), (dropped, after) = run(False), run(True)
    assert (before["Conv_1"]["__call__"][0] == after["Conv_1"]["__call__"][0]).all()
    assert not (before["Conv_2"]["__call__"][0] == after["Conv_2"]["__call__"][0]).all()
    assert not (plain == dropped).all()


def test_a_network_accepts_lists_for_tuples():
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
def test_parameters_and_logits_are_float32_for_every_dtype(dtype):
    model = SMALL.clone(dtype=jnp.dtype(dtype), num_classes=2)
    x = jax.nn.sigmoid(normal(0, 2, 8, 12, 3))
    variables = init(model, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits = jax.jit(model.apply)(variables, x)
    assert (logits.dtype, logits.shape) == (jnp.float32, (2, 8, 12, 2))
    exact = jax.jit(model.clone(dtype=jnp.float32).apply)(variables, x)
    # bfloat16 has 8 bits: an error of 2^-9 per rounding, through the 20 layers of this network
    bound = 0 if dtype == "float32" else 2**-9 * 20 * float(jnp.abs(exact).max())
    assert float(jnp.abs(logits - exact).max()) <= bound


def test_no_image_affects_another():
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
        (SMALL.clone(norm=3), (1, 8, 8, 3), "groups of 3"),
        (SMALL.clone(norm=0), (1, 8, 8, 3), "groups of 0"),
        (SMALL.clone(norm=True), (1, 8, 8, 3), "norm is True: use 'batch'"),
        (SMALL.clone(norm=2.0), (1, 8, 8, 3), "norm is 2.0: use 'batch'"),
        (SMALL.clone(patch=0), (1, 8, 8, 3), "patch is 0: it must be positive"),
        (SMALL.clone(convs=0), (1, 8, 8, 3), "convs is 0: it must be positive"),
        (SMALL.clone(num_classes=0), (1, 8, 8, 3), "num_classes is 0: it must be positive"),
        (SMALL.clone(features=()), (1, 8, 8, 3), r"features is \(\): it must be positive"),
        (SMALL.clone(features=(4, 0)), (1, 8, 8, 3), r"features is \(4, 0\): it must be positive"),
        (SMALL.clone(norm="layer"), (1, 8, 8, 3), "norm is 'layer': use 'batch'"),
        (SMALL.clone(dropout=(0.1, 0.1)), (1, 8, 8, 3), "2 rates for 3 levels"),
        (SMALL.clone(dropout=1.0), (1, 8, 8, 3), "must be in"),
    ],
)
def test_an_attribute_or_a_shape_that_does_not_fit_is_named(model, shape, words):
    with pytest.raises(ValueError, match=words):
        model.init(jax.random.key(0), jnp.zeros(shape))


def test_instance_norm_is_group_norm_with_one_channel_per_group():
    x = jax.nn.sigmoid(normal(0, 2, 8, 8, 3))
    model = UNet(features=(4, 8), convs=1)  # "instance" is the default
    variables = init(model, x)
    np.testing.assert_array_equal(
        model.apply(variables, x), model.clone(norm=1).apply(variables, x)
    )


@pytest.mark.parametrize(
    ("norm", "module", "collections"),
    [
        ("batch", "BatchNorm_0", {"params", "batch_stats"}),
        ("instance", "GroupNorm_0", {"params"}),
        (3, "GroupNorm_0", {"params"}),
        (None, None, {"params"}),
    ],
)
def test_the_norm_decides_which_module_follows_a_convolution(norm, module, collections):
    model = UNet(features=(6,), norm=norm, convs=1)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    assert set(variables) == collections
    assert set(variables["params"]["bottleneck"]) - {"Conv_0"} == {module} - {None}


def test_only_a_group_norm_restricts_the_number_of_channels():
    for norm in ("batch", "instance", None):
        for features in ((6,), (5, 7)):
            model = UNet(features=features, norm=norm)
            jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))


class Squares(nn.Module):
    """An encoder of one's own: 4x4 patches, then two halvings."""

    patch = 4
    levels = 2

    @nn.compact
    def __call__(self, image):
        maps = [nn.Conv(5, (4, 4), strides=4)(image)]
        for _ in range(self.levels):
            maps.append(nn.Conv(5, (2, 2), strides=2)(maps[-1]))
        return maps


def test_a_network_takes_patch_and_stride_from_its_encoder():
    net = UNet((4, 8), norm="batch", encoder=Squares())
    assert net.stride == 16
    x = jax.nn.sigmoid(normal(0, 2, 32, 48, 3))
    variables = init(net, x)
    assert net.apply(variables, x).shape == (2, 32, 48, 1)
    assert variables["params"]["head"]["kernel"].shape == (4, 4, 4, 1)
    proba = predict_proba(net, variables, np.zeros((20, 30, 3), np.uint8))
    assert proba.shape == (20, 30, 1)
    # An explicit patch may repeat the encoder's, and must not contradict it.
    np.testing.assert_array_equal(net.clone(patch=4).apply(variables, x), net.apply(variables, x))
    with pytest.raises(ValueError, match="patch is 2, but the encoder's is 4: leave it out"):
        net.clone(patch=2).apply(variables, x)


def test_a_deep_network_scales_its_heads_by_the_encoders_patch():
    net = UNet((4, 8), norm=None, deep=True, encoder=Squares())
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    assert variables["params"]["head1"]["kernel"].shape == (8, 8, 8, 1)


def test_an_encoder_that_lacks_what_it_must_say_is_refused_by_name():
    class Silent(nn.Module):
        def __call__(self, image):
            return [image, max_pool(image)]

    net, image = UNet((4,), norm=None, encoder=Silent()), jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match="Silent needs the attributes `patch` and `levels`"):
        net.init(jax.random.key(0), image)
    with pytest.raises(ValueError, match="Silent needs the attributes `patch` and `levels`"):
        _ = net.stride


@pytest.mark.parametrize("change", ["too few", "too many", "too large", "not halved"])
def test_an_encoder_whose_maps_have_other_sizes_than_promised_is_refused(change):
    class Wrong(Squares):
        @nn.compact
        def __call__(self, image):
            first, second, third = Squares()(image)
            return {
                "too few": [first, second],
                "too many": [first, second, third, max_pool(third)],
                "too large": [image, first, second],
                "not halved": [first, second, second],
            }[change]

    net = UNet((4, 8), norm=None, encoder=Wrong())
    with pytest.raises(ValueError, match=r"Wrong returns maps of \[.*promise \[\(8, 8\)"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
