import json
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_unet import augment, losses, recipes
from flax_unet.efficientnet import Encoder
from flax_unet.model import ARTICLE, UNet
from flax_unet.recipes import RECIPES, Adam, AdamW, Recipe


def build(recipe, learning_rate=1e-3, steps=100):
    return recipes.build(recipe, learning_rate=learning_rate, steps=steps)


def test_adam_is_the_formula_of_keras():
    rng, rate = np.random.default_rng(0), 1e-2
    # Most gradients of a U-Net are smaller than epsilon, where its position in the formula matters.
    gradients = rng.choice([-1, 1], (5, 40)) * 10 ** rng.uniform(-9, 0, (5, 40))
    m = v = expected = np.zeros(40)
    for t, g in enumerate(gradients, start=1):  # keras/src/optimizers/adam.py, update_step
        m, v = m + (g - m) * (1 - 0.9), v + (g * g - v) * (1 - 0.999)
        step = np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-7)
        expected = expected - rate * step

    tx, params = Adam().build(rate, 5), jnp.zeros(40)
    state = tx.init(params)
    for g in jnp.asarray(gradients, jnp.float32):
        updates, state = tx.update(g, state)
        params = params + updates
    # In float32, 1 - 0.999^t has a relative error of 6e-5.
    np.testing.assert_allclose(params, expected, rtol=1e-4, atol=1e-5 * rate)


def learning_rates(optimizer, steps, n):
    """The learning rates of n steps, measured on a kernel whose gradient is 0; biases stay."""
    tx = optimizer.build(1e-2, steps)
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state, rates = tx.init(params), []
    for _ in range(n):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        rates.append(float(-updates["kernel"][0, 0]) / optimizer.weight_decay)
        assert not updates["bias"].any()
    return np.array(rates)


def test_adamw_warms_up_then_decays_to_zero_at_the_last_step_and_decays_only_kernels():
    t = np.arange(101)
    cosine = 0.5 * (1 + np.cos(np.pi * (t - 5) / 95))
    expected = 1e-2 * np.where(t < 5, t / 5, cosine)
    rates = learning_rates(AdamW(), steps=100, n=101)
    np.testing.assert_allclose(rates, expected, rtol=1e-4, atol=1e-9)
    assert np.argmax(learning_rates(AdamW(warmup=0.2), steps=100, n=101)) == 20


def test_a_training_of_one_step_has_a_schedule():
    assert np.isfinite(learning_rates(AdamW(), steps=1, n=2)).all()


def test_the_encoder_has_a_fraction_of_the_learning_rate():
    params = {"encoder": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}

    def third_update(encoder_rate):
        tx = AdamW(encoder_rate=encoder_rate).build(1e-2, 100)
        state = tx.init(params)
        for _ in range(3):  # the rate of the first step is 0
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        return updates

    slow, plain = third_update(0.3), third_update(1.0)
    np.testing.assert_array_equal(slow["head"]["kernel"], plain["head"]["kernel"])
    expected = 0.3 * plain["encoder"]["kernel"]
    np.testing.assert_allclose(slow["encoder"]["kernel"], expected, rtol=1e-6)
    assert expected.all()


def test_the_article_is_the_tutorial():
    training = build(RECIPES["article"])
    assert training.model == ARTICLE
    assert training.loss_fn is losses.bce and training.augment is None
    assert RECIPES["article"].optimizer == Adam()


def test_the_default_has_the_tutorials_widths_with_instance_norm_and_augmentation():
    training = build(RECIPES["unet"])
    assert training.model.features == ARTICLE.features and training.model.convs == ARTICLE.convs
    assert training.model.norm == "instance" and training.model.dropout == 0
    assert training.loss_fn is losses.bce and training.augment is not None


@pytest.mark.parametrize("name", ["strong", "pretrained"])
def test_strong_and_pretrained_are_small_enough_to_ship(name):
    model = RECIPES[name].model
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    assert sum(x.size for x in jax.tree.leaves(variables)) < 9e6


def test_pretrained_is_strong_with_an_encoder():
    strong, pretrained = RECIPES["strong"], RECIPES["pretrained"]
    assert pretrained.model.encoder == Encoder("lite0") and pretrained.model.stride == 32
    assert pretrained.imagenet and not strong.imagenet
    assert pretrained.optimizer == replace(strong.optimizer, encoder_rate=0.3)
    assert (pretrained.loss, pretrained.augment) == (strong.loss, strong.augment)


@pytest.mark.parametrize("name", RECIPES)
def test_the_objects_of_a_recipe_are_those_that_it_names(name):
    recipe = RECIPES[name]
    training = build(recipe)
    assert training.model is recipe.model
    assert training.loss_fn is getattr(losses, recipe.loss)
    image = jax.random.bits(jax.random.key(0), (2, 16, 16, 3), jnp.uint8)
    key, expected = jax.random.key(1), (image, image[..., :1] % 2)
    for i, (function, settings) in enumerate(recipe.augment.items()):
        apply = getattr(augment, function)
        expected = apply(jax.random.fold_in(key, i), *expected, **settings)
    if not recipe.augment:
        assert training.augment is None
        return
    result = training.augment(key, image, image[..., :1] % 2)
    for a, b in zip(result, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", RECIPES)
def test_a_description_is_json_from_which_the_recipe_can_be_made_again(name):
    recipe = RECIPES[name]
    description = json.loads(json.dumps(recipes.describe(recipe)))
    optimizer = dict(description.pop("optimizer"))
    optimizer = getattr(recipes, optimizer.pop("name"))(**optimizer)
    again = Recipe(about=recipe.about, model=recipe.model, optimizer=optimizer, **description)
    assert again == recipe


@pytest.mark.parametrize("crop", [None, (32, 64)])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_what_another_one_describes(name, crop):
    recipe = recipes.configure(RECIPES[name], crop=crop)
    description = json.loads(json.dumps(recipes.describe(recipe)))
    other = replace(recipe, loss="other", augment={}, optimizer=AdamW(clip=7.0))
    assert recipes.as_described(other, description) == recipe


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"name": "SGD"}},
        {"optimizer": {"name": "AdamW", "other": 1}},
        {"augment": None},
        {"augment": {"random_other": {}}},
        {"augment": {"random_blur": {"other": 1}}},
        {"loss": "other"},
    ],
)
def test_a_description_of_another_program_is_refused(change):
    description = recipes.describe(RECIPES["strong"]) | change
    with pytest.raises(ValueError, match="another version or program: "):
        recipes.as_described(RECIPES["strong"], description)


def test_a_description_differs_with_everything_but_the_text():
    strong = RECIPES["strong"]
    colour = strong.augment | {"random_colour": {"brightness": 0.1}}
    others = [
        replace(strong, loss="bce"),
        replace(strong, augment=colour),
        replace(strong, optimizer=Adam()),
        replace(strong, optimizer=replace(strong.optimizer, clip=2.0)),
        replace(strong, imagenet=True),
    ]
    descriptions = [json.dumps(recipes.describe(each)) for each in (strong, *others)]
    assert len({*descriptions}) == 6
    assert recipes.describe(replace(strong, about="another")) == recipes.describe(strong)


def test_the_settings_of_an_optimizer_reach_it():
    params = {"encoder": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    gradient = jax.tree.map(lambda x: jnp.full_like(x, 3.0), params)

    def trained(optimizer):
        tx, after = optimizer.build(1e-2, 10), params
        state = tx.init(after)
        for scale in (1.0, 1.0, 0.1):
            scaled = jax.tree.map(lambda g, scale=scale: scale * g, gradient)
            updates, state = tx.update(scaled, state, after)
            after = optax.apply_updates(after, updates)
        return b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves((after, state)))

    changes = {
        "warmup": 0.4,
        "clip": 0.5,
        "weight_decay": 0.01,
        "average_decay": 0.05,
        "encoder_rate": 0.5,
    }
    assert changes.keys() == asdict(AdamW()).keys()
    changed = [AdamW(**{name: value}) for name, value in changes.items()]
    assert len({trained(optimizer) for optimizer in (AdamW(), *changed)}) == 6


def test_a_recipe_is_configured_with_another_network():
    model = recipes.configure(RECIPES["article"], features=(4, 8), dtype="bfloat16").model
    assert model == ARTICLE.clone(features=(4, 8), dropout=(0.1, 0.1), dtype=jnp.dtype("bfloat16"))
    pretrained = recipes.configure(RECIPES["pretrained"], encoder="lite2", dtype="bfloat16")
    assert pretrained.model.encoder == Encoder("lite2", dtype=jnp.dtype("bfloat16"))
    assert pretrained.model.features == RECIPES["pretrained"].model.features
    assert replace(pretrained, model=RECIPES["pretrained"].model) == RECIPES["pretrained"]


def test_overlapping_classes_keep_the_loss_of_one_class():
    recipe = recipes.configure(RECIPES["strong"], num_classes=3, overlapping=True)
    assert recipe.model.overlapping and recipe.model.num_classes == 3
    assert recipe.loss == "bce_soft_dice" and recipe.augment["random_affine"]["outside"] == 255
    exclusive = recipes.configure(RECIPES["strong"], num_classes=3)
    assert not exclusive.model.overlapping and exclusive.loss == "cross_entropy_soft_dice"


def test_pictures_with_a_top_are_rotated_little():
    recipe = recipes.configure(RECIPES["strong"], upright=True)
    affine = RECIPES["strong"].augment["random_affine"]
    changed = affine | {"rotation": 10.0, "upright": True}
    assert recipe.augment == RECIPES["strong"].augment | {"random_affine": changed}
    assert list(recipe.augment) == list(RECIPES["strong"].augment)  # the same order
    assert recipes.configure(RECIPES["article"], upright=True).augment == {}


@pytest.mark.parametrize("features", [(), (8, 0), (4,) * 7])
def test_impossible_features_are_refused(features):
    with pytest.raises(ValueError, match="give one to six positive numbers"):
        recipes.configure(RECIPES["unet"], features=features)


@pytest.mark.parametrize("name", ["unet", "article", "strong"])
def test_an_encoder_is_refused_by_a_recipe_that_has_none(name):
    with pytest.raises(ValueError, match="encoder is lite2, but this recipe has none"):
        recipes.configure(RECIPES[name], encoder="lite2")


def test_the_type_of_the_computation_is_the_models():
    model = recipes.configure(RECIPES["unet"], features=(4, 8), dtype="bfloat16").model
    image = jnp.zeros((1, 8, 8, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def text(model):
        return str(jax.make_jaxpr(model.apply)(variables, image))

    assert "bf16" in text(model) and "bf16" not in text(UNet(features=(4, 8)))
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
