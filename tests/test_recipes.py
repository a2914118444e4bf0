import jax
import jax.numpy as jnp
import numpy as np
import pytest
import recipes
from recipes import Config, make_recipe

from flax_unet import augment, efficientnet, losses
from flax_unet.efficientnet import Encoder
from flax_unet.model import ARTICLE, UNet


def test_keras_adam_is_the_formula_of_keras():
    rng, rate = np.random.default_rng(0), 1e-2
    # Most gradients of a U-Net are smaller than epsilon, and there its place decides.
    gradients = rng.choice([-1, 1], (5, 40)) * 10 ** rng.uniform(-9, 0, (5, 40))
    m = v = moved = np.zeros(40)
    for t, g in enumerate(gradients, start=1):  # keras/src/optimizers/adam.py, update_step
        m, v = m + (g - m) * (1 - 0.9), v + (g * g - v) * (1 - 0.999)
        moved = moved - rate * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)

    tx, total = recipes.keras_adam(rate), jnp.zeros(40)
    state = tx.init(total)
    for g in jnp.asarray(gradients, jnp.float32):
        updates, state = tx.update(g, state)
        total = total + updates
    # float32 knows 1 - 0.999^t to 6e-5 of it
    np.testing.assert_allclose(total, moved, rtol=1e-4, atol=1e-5 * rate)


def test_the_article_is_the_article(tmp_path):
    model, _, loss_fn, change = make_recipe(Config(tmp_path, recipe="article"))
    assert model == ARTICLE.clone(dtype=jnp.dtype("float32"))
    assert loss_fn is losses.bce and change is None
    defaults = Config(tmp_path)
    assert (defaults.batch_size, defaults.epochs, defaults.image_size) == (8, 100, 256)
    assert defaults.learning_rate == 1e-3


def test_the_default_has_its_widths_with_norm_and_augmentation(tmp_path):
    model, _, loss_fn, change = make_recipe(Config(tmp_path))
    assert model.features == ARTICLE.features and model.convs == ARTICLE.convs
    assert model.group_size == 1 and model.dropout == 0
    assert loss_fn is losses.bce and change is not None


def test_the_strong_recipe_is_small_enough_to_ship(tmp_path):
    model, _, loss_fn, change = make_recipe(Config(tmp_path, recipe="strong"))
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(x.size for x in jax.tree.leaves(variables)) < 9e6
    assert loss_fn is losses.bce_soft_dice and change is not None


def test_the_pretrained_recipe_begins_with_the_weights_of_imagenet(tmp_path):
    config = Config(tmp_path, recipe="pretrained", encoder="lite2")
    recipe = make_recipe(config)
    assert recipe.model.encoder == Encoder("lite2") and recipe.model.stride == 32
    assert recipe.loss_fn is losses.bce_soft_dice and recipe.augment is not None
    params = {"encoder": jnp.ones(2), "head": jnp.ones(2)}
    moments = recipe.tx.init(params)
    for _ in range(2):  # the rate of the first is 0
        updates, moments = recipe.tx.update(params, moments, params)
    expected = recipes.ENCODER_RATE * updates["head"]
    np.testing.assert_allclose(updates["encoder"], expected, rtol=1e-6)
    assert expected.all()
    state = recipes.create_state(config, recipe, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(state.params)) < 9e6
    given = efficientnet.imagenet("lite2")
    for variables in (state.variables, {"params": state.params, **state.model_state}):
        for kind in ("params", "batch_stats"):
            pairs = map(jax.tree.leaves, (variables[kind]["encoder"], given[kind]))
            assert all((a == b).all() for a, b in zip(*pairs, strict=True))


def test_an_encoder_moves_by_its_share():
    tx = recipes.falling_adamw(1e-2, 100, recipes.slow_encoder(0.3))
    falling = recipes.falling_adamw(1e-2, 100)
    params = {"encoder": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    slow, plain = tx.init(params), falling.init(params)
    for _ in range(3):
        gradients = jax.tree.map(jnp.ones_like, params)
        ours, slow = tx.update(gradients, slow, params)
        theirs, plain = falling.update(gradients, plain, params)
    np.testing.assert_array_equal(ours["head"]["kernel"], theirs["head"]["kernel"])
    expected = 0.3 * theirs["encoder"]["kernel"]
    np.testing.assert_allclose(ours["encoder"]["kernel"], expected, rtol=1e-6)
    assert expected.all()


def test_config_json_holds_what_the_augmentation_is_given(tmp_path):
    image = jax.random.bits(jax.random.key(0), (2, 64, 64, 3), jnp.uint8)
    for name in ("unet", "strong"):
        config = Config(tmp_path, recipe=name)
        key, expected = jax.random.key(1), (image, image[..., :1] % 2)
        given = iter(recipes.to_json(config, {})["training"]["augment"])
        expected = augment.random_affine(jax.random.fold_in(key, 0), *expected, **next(given))
        expected = augment.random_colour(jax.random.fold_in(key, 1), *expected, **next(given))
        if name == "strong":
            expected = augment.random_blur(jax.random.fold_in(key, 2), *expected, **next(given))
            expected = augment.random_noise(jax.random.fold_in(key, 3), *expected, **next(given))
        assert not list(given)
        mask = image[..., :1] % 2
        for a, b in zip(make_recipe(config).augment(key, image, mask), expected, strict=True):
            np.testing.assert_array_equal(a, b)


def test_no_features_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give one to six positive numbers"):
        make_recipe(Config(tmp_path, features=()))


def test_the_rate_of_the_strong_recipe_rises_and_falls_and_only_kernels_decay():
    tx = recipes.falling_adamw(1e-2, 100)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state, sizes = tx.init(params), []
    for _ in range(100):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        sizes.append(float(-updates["kernel"][0, 0]) / 0.02)  # without a gradient: rate x decay
        assert not updates["bias"].any()
    t = np.arange(100)
    falling = 0.5 * (1 + np.cos(np.pi * (t - 5) / 95))
    np.testing.assert_allclose(sizes, 1e-2 * np.where(t < 5, t / 5, falling), rtol=1e-4, atol=1e-9)


def test_the_type_of_the_computation_is_the_models(tmp_path):
    recipe = make_recipe(Config(tmp_path, dtype="bfloat16", features=(4, 8)))
    image = jnp.zeros((1, 8, 8, 3))
    variables = jax.eval_shape(recipe.model.init, jax.random.key(0), image)

    def text(model):
        return str(jax.make_jaxpr(model.apply)(variables, image))

    assert "bf16" in text(recipe.model) and "bf16" not in text(UNet(features=(4, 8)))


def test_config_json_gives_back_the_configuration_and_the_network(tmp_path):
    for recipe in ("unet", "strong", "pretrained", "article"):
        config = Config(tmp_path, recipe=recipe, features=(4, 8), dtype="bfloat16")
        stored = recipes.to_json(config, {"train": "0" * 64})
        assert recipes.from_json(stored, tmp_path) == (config, make_recipe(config).model)
        assert stored["training"]["loss"] == make_recipe(config).loss_fn.__name__
    assert stored["model"]["dropout"] == [0.1, 0.1] and stored["model"]["group_size"] is None
    assert "encoder" not in stored["config"]


@pytest.mark.parametrize("part", ["config", "model"])
def test_a_configuration_of_another_version_is_named(tmp_path, part):
    stored = recipes.to_json(Config(tmp_path), {})
    stored[part]["depth"] = 3
    with pytest.raises(ValueError, match="is of another version or program"):
        recipes.from_json(stored, tmp_path)


def test_a_picture_as_small_as_the_stride_is_refused(tmp_path):
    with pytest.raises(ValueError, match="image_size 32 leaves the bottleneck one pixel"):
        make_recipe(Config(tmp_path, image_size=32))
    assert make_recipe(Config(tmp_path, image_size=32, recipe="article")).model.stride == 32


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"images": "here"}, "--images goes with --dataset folder"),
        ({"masks": "here"}, "--masks goes with --dataset folder"),
        ({"kvasir_zip": "x.zip", "dataset": "synthetic_polyps"}, "--kvasir-zip goes with"),
        ({"dataset": "folder", "images": "here"}, "needs --images DIR and --masks DIR"),
    ],
)
def test_a_flag_of_another_data_set_is_refused(tmp_path, flags, words):
    with pytest.raises(ValueError, match=words):
        recipes.open_sources(Config(tmp_path, **flags))
