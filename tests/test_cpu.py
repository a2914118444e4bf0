"""The CPU's formulations equal the plain ones, and each platform gets its own."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

from flax_unet import cpu, efficientnet, losses, recipes, train
from flax_unet.efficientnet import Encoder
from flax_unet.model import UNet

NHWC = ("NHWC", "HWIO", "NHWC")
#: Shapes of image and kernel. The last two are not paired: an odd width, and too many channels.
CONVOLUTIONS = [
    ((2, 6, 8, 3), (3, 3, 3, 5)),
    ((1, 5, 2, 1), (3, 3, 1, 5)),
    ((1, 4, 7, 3), (3, 3, 3, 5)),
    ((1, 4, 6, 8), (3, 3, 8, 5)),
]
#: Size of the kernel, stride.
DEPTHWISE = [(3, 1), (3, 2), (5, 1), (5, 2)]
ACCELERATORS = ("cuda", "tpu")
TX = optax.adam(1e-3)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def convolve(image, kernel):
    return cpu.convolve(image, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def plain(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def depthwise(stride):
    return lambda image, kernel: cpu.depthwise(image, kernel, stride)


def grouped(stride):
    def convolution(image, kernel):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=NHWC,
            feature_group_count=image.shape[-1],
        )

    return convolution


@pytest.fixture(params=["cpu", "default"])
def form(request, monkeypatch):
    """Run a test with the CPU's form, and with the form that accelerators get."""
    if request.param == "default":
        monkeypatch.setattr(
            jax.lax, "platform_dependent", lambda *args, default, **platforms: default(*args)
        )
    return request.param


def value_and_gradients(f, image, kernel):
    def compute(image, kernel):
        out, pull = jax.vjp(f, image, kernel)
        return out, *pull(normal(9, *out.shape))

    return jax.jit(compute)(image, kernel)


def assert_close(a, b, tolerance=1e-5):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


@pytest.mark.parametrize("shapes", CONVOLUTIONS)
def test_convolution_equals_the_reference_and_xla_in_value_and_gradients(form, shapes):
    image, kernel = (normal(seed, *shape) for seed, shape in enumerate(shapes))
    expected = reference.conv3x3(image, kernel, np.zeros(5))
    ours, theirs = (value_and_gradients(f, image, kernel) for f in (convolve, plain))
    np.testing.assert_allclose(ours[0], expected, rtol=1e-5, atol=1e-5)
    assert_close(ours, theirs)


@pytest.mark.parametrize(("size", "stride"), DEPTHWISE)
def test_depthwise_equals_the_reference_and_xla_in_value_and_gradients(form, size, stride):
    image, kernel = normal(0, 2, 6, 8, 3), normal(1, size, size, 1, 3)
    expected = reference.depthwise(image, kernel, stride)
    ours, theirs = (value_and_gradients(f(stride), image, kernel) for f in (depthwise, grouped))
    np.testing.assert_allclose(ours[0], expected, rtol=1e-4, atol=1e-5)
    assert_close(ours, theirs)


def test_the_accelerators_form_of_a_network_equals_the_cpus(monkeypatch):
    model = UNet((5, 8), convs=1, norm=None)
    image, mask = jax.nn.sigmoid(normal(0, 2, 16, 16, 3)), jnp.ones((2, 16, 16, 1))
    variables = jax.jit(model.init)(jax.random.key(1, impl="rbg"), image)

    def result():
        def loss(variables):
            return losses.bce(model.apply(variables, image), mask).mean()

        return jax.jit(jax.value_and_grad(loss))(variables)

    expected, calls = result(), []

    def default_of(*args, default, **platforms):
        calls.append(platforms)
        return default(*args)

    monkeypatch.setattr(jax.lax, "platform_dependent", default_of)
    assert_close(result(), expected)
    assert [list(platforms) for platforms in calls] == [["cpu"]] * 2  # 3 and 5 channels


def scalar(f):
    return lambda image, kernel: jnp.sin(f(image, kernel)).sum()


def gradients(f):
    return jax.grad(scalar(f), argnums=(0, 1))


def sum_of_gradients(f):
    return lambda *args: sum(jnp.cos(x).sum() for x in gradients(f)(*args))


#: What JAX makes of a function of an image and a kernel.
TRANSFORMS = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "grad": gradients,
    "vmap": lambda f: lambda x, k: jax.vmap(f)(jnp.stack([x, 2 * x]), jnp.stack([k, 3 * k])),
    "vmap of grad": lambda f: (
        lambda x, k: jax.vmap(gradients(f), (0, None))(jnp.stack([x, 2 * x]), k)
    ),
    "remat": lambda f: jax.jit(gradients(jax.checkpoint(f))),
    "scan": lambda f: gradients(lambda x, k: jax.lax.map(lambda y: f(y[None], k), x)),
    "grad of grad": lambda f: jax.grad(sum_of_gradients(f), argnums=(0, 1)),
    "jvp of grad": lambda f: lambda x, k: jax.jvp(gradients(f), (x, k), (x, k)),
    "jvp": lambda f: lambda x, k: jax.jvp(f, (x, k), (2 * x, k)),
    "linearize": lambda f: lambda x, k: jax.linearize(f, x, k)[1](x, k),
    "grad of jvp": lambda f: jax.grad(lambda x, k: jax.jvp(scalar(f), (x, k), (x, k))[1], (0, 1)),
    "vmap of jvp": lambda f: (
        lambda x, k: jax.vmap(lambda k: jax.jvp(f, (x, k), (x, k))[1])(jnp.stack([k, 3 * k]))
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_convolve_can_be_transformed_like_xlas_convolution(name):
    transform = TRANSFORMS[name]
    image, kernel = normal(0, 2, 6, 8, 3), normal(1, 3, 3, 3, 5)
    assert_close(*(transform(f)(image, kernel) for f in (convolve, plain)))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_depthwise_can_be_transformed_like_xlas_convolution(name):
    image, kernel = normal(0, 2, 6, 8, 3), normal(1, 3, 3, 1, 3)
    assert_close(*(TRANSFORMS[name](f(2))(image, kernel) for f in (depthwise, grouped)))


def convolutions(text):
    """Number of groups and operand shapes of each convolution in a StableHLO module.

    The gradient of a kernel is also a convolution: of the image with the result's gradient.
    """
    pattern = r"stablehlo\.convolution.*batch_group_count = (\d+).*feature_group_count = (\d+).*"
    pattern += r" : \((.*), (.*)\) ->"

    def shape(tensor):
        return tuple(map(int, re.findall(r"\d+(?=x)", tensor)))

    return [
        (int(batch_groups) * int(groups), shape(image), shape(kernel))
        for batch_groups, groups, image, kernel in re.findall(pattern, text)
    ]


@cache
def traced_step(model, size, tx=TX, loss_fn=losses.bce, augment=None):
    """A training step, traced for no platform in particular."""
    create = partial(train.create_train_state, model, tx, image_shape=(1, size, size, 3))
    batch = {
        "image": jax.ShapeDtypeStruct((2, size, size, 3), jnp.uint8),
        "mask": jax.ShapeDtypeStruct((2, size, size, 1), jnp.uint8),
        "weight": jax.ShapeDtypeStruct((2,), jnp.float32),
    }
    key = jax.random.key(0)
    step = train.make_train_step(model, tx, loss_fn, augment=augment)
    return step.trace(jax.eval_shape(create, key), batch, jax.eval_shape(lambda: key))


def lowered(traced, platform):
    convs = convolutions(text := traced.lower(lowering_platforms=(platform,)).as_text())
    assert len(convs) == text.count("stablehlo.convolution")
    return convs


@pytest.mark.parametrize("platform", ["cpu", *ACCELERATORS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_platform_gets_its_form_of_convolutions_of_few_channels(platform, dtype):
    model = UNet((5, 8), convs=1, dtype=jnp.dtype(dtype))  # 3 -> 5 -> 8 channels, then 10 -> 5
    convs = lowered(traced_step(model, 32), platform)
    pairs = [((2, 32, 17, 6), (3, 2, 6, 10)), ((2, 16, 9, 10), (3, 2, 10, 16))]
    plain = [((2, 32, 32, 3), (3, 3, 3, 5)), ((2, 16, 16, 5), (3, 3, 5, 8))]
    expected, other = (pairs, plain) if platform == "cpu" else (plain, pairs)
    for image, kernel in [*expected, ((2, 32, 32, 10), (3, 3, 10, 5))]:
        assert (1, image, kernel) in convs
    # Each convolution has a gradient of its kernel and, except the first, one of its input.
    assert len(convs) == 3 * 3 - 1
    operands = {operand for _, *pair in convs for operand in pair}
    assert operands.isdisjoint(operand for pair in other for operand in pair)


@pytest.mark.parametrize("platform", ["cpu", *ACCELERATORS])
def test_each_platform_gets_its_form_of_depthwise_convolutions(platform, monkeypatch):
    stages = [(1, *stage) for _, *stage in efficientnet.STAGES]  # one block each, to be quick
    monkeypatch.setattr(efficientnet, "STAGES", stages)
    model = UNet((8, 8, 8, 8), norm=None, convs=1, encoder=Encoder("lite0"))
    convs = lowered(traced_step(model, 64), platform)
    separate = [(groups, kernel) for groups, _, kernel in convs if groups > 1]
    if platform == "cpu":
        assert not separate
    else:
        widths = (32, 96, 144, 240, 480, 672, 1152)  # expansion times channels of the stage before
        assert len(separate) == 3 * len(widths)  # forward, and both gradients
        for width, (_, kernel, *_) in zip(widths, stages, strict=True):
            assert (width, (kernel, kernel, 1, width)) in separate
    # The stem (with one gradient) and the decoder's four are the same on all platforms.
    assert len(convs) - len(separate) == 2 + 3 * 4
    assert (1, (2, 64, 64, 3), (3, 3, 3, 32)) in convs


@pytest.mark.parametrize("recipe", ["article", "strong"])
def test_the_step_of_a_recipe_lowers_for_accelerators(recipe):
    recipe = recipes.configure(recipes.RECIPES[recipe], features=(4, 6))
    model, tx, loss_fn, augment = recipes.build(recipe, learning_rate=1e-3, steps=10)
    traced = traced_step(model, 32, tx, loss_fn, augment)
    size, channels = 32 // model.patch, 3 * model.patch**2
    for platform in ACCELERATORS:
        convs = lowered(traced, platform)
        assert (1, (2, size, size, channels), (3, 3, channels, 4)) in convs
        assert not any(kernel[:2] == (3, 2) for _, _, kernel in convs)


@pytest.mark.parametrize("width, channels, pairs", [(8, 3, True), (7, 3, False), (8, 16, False)])
def test_only_few_channels_and_even_widths_are_paired(width, channels, pairs):
    image, kernel = jnp.zeros((1, 4, width, channels)), jnp.zeros((3, 3, channels, 5))
    [(_, shape, _)] = convolutions(jax.jit(convolve).lower(image, kernel).as_text())
    assert shape == ((1, 4, width // 2 + 1, 2 * channels) if pairs else image.shape)


def test_sums_equal_separate_sums_with_all_their_derivatives():
    x = normal(0, 2, 3, 4, 5)

    def f(total):
        def value(x):
            first, second = total([x, x * x], (1, 2))
            return (jnp.sin(first) * second).sum()

        return value

    ours, theirs = f(cpu.sums), f(lambda arrays, axes: [x.sum(axes) for x in arrays])
    assert_close(cpu.sums([x, x * x], (0, 1)), [x.sum((0, 1)), (x * x).sum((0, 1))])
    for transform in (
        jax.grad,
        lambda f: lambda x: jax.jvp(f, (x,), (x,)),
        lambda f: jax.grad(lambda x: jnp.cos(jax.grad(f)(x)).sum()),
        lambda f: lambda x: jax.vmap(f)(jnp.stack([x, 2 * x])),
        lambda f: lambda x: jax.jvp(jax.grad(f), (x,), (x,)),
    ):
        assert_close(transform(ours)(x), transform(theirs)(x), 1e-4)


def test_xla_knows_the_compiler_options_and_does_what_they_are_for():
    """One that it no longer knows is left out without a word, or taken without an effect."""
    options = cpu.compiler_options()
    ynn = "xla_cpu_experimental_ynn_fusion_type" in options
    assert ynn or jax.__version_info__ < (0, 10)

    def compiled(function, *shapes, **options):
        arguments = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        return jax.jit(function, **options).lower(*arguments).compile().as_text()

    def barrier(x):
        return jax.lax.optimization_barrier(2 * x) + 1

    assert "opt-barrier" not in compiled(barrier, (8,))
    assert "opt-barrier" in compiled(barrier, (8,), compiler_options=options)
    convolve = partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=NHWC,
    )
    shapes = (8, 64, 64, 64), (3, 3, 64, 64)
    assert ("ynn" in compiled(convolve, *shapes)) == ynn  # else there is nothing left to keep away
    assert "ynn" not in compiled(convolve, *shapes, compiler_options=options)
    products = compiled(jnp.matmul, (512, 512), (512, 512), compiler_options=options)
    assert ("ynn" in products) == ynn
