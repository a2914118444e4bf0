"""An ensemble of networks, against means of probabilities in NumPy's float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import encode

from flax_unet import devices, evaluate, predict
from flax_unet.formats import BINARY
from flax_unet.model import accepted


class Net(nn.Module):
    """A small network whose sides are multiples of its stride, which compiles in no time."""

    stride: int
    num_classes: int = 1
    overlapping: bool = False

    @nn.compact
    def __call__(self, image, train):
        assert not train
        each = self.stride
        x = nn.relu(nn.Conv(5, (3, 3))(image - 0.5))
        wide = nn.avg_pool(x, (each, each), (each, each)).repeat(each, 1).repeat(each, 2)
        return 4 * nn.Conv(self.num_classes, (3, 3))(jnp.concatenate([x, wide], -1))


SMALL, OTHER = Net(2), Net(3)


def init(model, seed, channels=3):
    shape = jnp.zeros((1, 12, 12, channels))
    return model.init(jax.random.key(seed), shape, train=False)


def image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def probabilities(logits, kind):
    logits = np.asarray(logits, np.float64)
    if kind != "exclusive":
        return 1 / (1 + np.exp(-logits))
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def logits_of(model, variables, batch):
    return jax.jit(lambda v, x: model.apply(v, x, **accepted(model, train=False)))(
        variables, batch / np.float32(255)
    )


KINDS = {
    "one": {},
    "exclusive": {"num_classes": 3},
    "overlapping": {"num_classes": 2, "overlapping": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_ensemble_has_the_mean_of_the_probabilities(kind):
    members = [model.clone(**KINDS[kind]) for model in (SMALL, OTHER, SMALL)]
    variables = [init(model, seed) for seed, model in enumerate(members)]
    ensemble, batch = predict.Ensemble(members), image(2, 18, 12, 3)
    assert ensemble.stride == 6 and ensemble.num_classes == members[0].num_classes
    each = [logits_of(*pair, batch) for pair in zip(members, variables, strict=True)]
    expected = np.mean([probabilities(logits, kind) for logits in each], 0)
    of_mean_logits = probabilities(np.mean(each, 0), kind)
    assert np.abs(expected - of_mean_logits).max() > 1e-3  # the two can be told apart
    for given in (tuple(variables), list(variables)):
        proba = predict.predict_proba(ensemble, given, batch)
        np.testing.assert_allclose(proba, expected, rtol=1e-5, atol=1e-6)
    logits = logits_of(ensemble, tuple(variables), batch)
    if kind == "exclusive":  # the logarithm of the mean itself
        np.testing.assert_allclose(logits, np.log(expected), rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_allclose(logits, np.log(expected / (1 - expected)), rtol=1e-4, atol=1e-4)


class Constant:
    """Logits that are the same everywhere."""

    stride = 1

    def __init__(self, *logits):
        self.logits, self.num_classes = logits, len(logits)

    def apply(self, variables, image):
        return jnp.broadcast_to(jnp.float32(self.logits), (*image.shape[:3], self.num_classes))


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([(200.0,), (200.0,)], (200.0,)),  # of which a float32 sigmoid is 1
        ([(-200.0,), (-200.0,)], (-200.0,)),
        ([(1000.0,), (-1000.0,)], (0.0,)),
        ([(-300.0,), (-301.0,)], (-300 + np.log((1 + np.exp(-1)) / 2),)),
        ([(0.0, -500.0), (0.0, -500.0)], (0.0, -500.0)),
    ],
)
def test_probabilities_that_round_to_0_or_1_have_finite_logits(members, expected):
    ensemble = predict.Ensemble(tuple(Constant(*logits) for logits in members))
    logits = ensemble.apply(((), ()), jnp.zeros((1, 2, 2, 3)))
    np.testing.assert_allclose(logits, np.broadcast_to(expected, logits.shape), rtol=1e-6)


@pytest.fixture(scope="module")
def two():
    """Two different members, and their variables."""
    return predict.Ensemble((SMALL, OTHER)), (init(SMALL, 0), init(OTHER, 1))


def test_it_is_mirrored_and_a_member_may_be_mirrored(two):
    ensemble, variables = two
    batch = image(1, 12, 18, 3)
    views = [batch, batch[:, :, ::-1]]
    each = [
        [logits_of(*pair, view) for pair in zip(ensemble.models, variables, strict=True)]
        for view in views
    ]
    mean = [np.mean([probabilities(x, "one") for x in view], 0) for view in each]
    mean[1] = mean[1][:, :, ::-1]
    logits = np.mean([np.log(p / (1 - p)) for p in mean], 0)
    proba = predict.predict_proba(predict.Mirrored(ensemble, upright=True), variables, batch)
    np.testing.assert_allclose(proba, probabilities(logits, "one"), rtol=1e-4, atol=1e-5)
    mirrored = predict.Ensemble(tuple(predict.Mirrored(x, upright=True) for x in ensemble.models))
    flipped = [(np.asarray(a) + np.asarray(b)[:, :, ::-1]) / 2 for a, b in zip(*each, strict=True)]
    expected = np.mean([probabilities(x, "one") for x in flipped], 0)
    proba = predict.predict_proba(mirrored, variables, batch)
    np.testing.assert_allclose(proba, expected, rtol=1e-4, atol=1e-5)


def test_it_predicts_in_windows_and_a_member_may(two):
    ensemble, variables = two
    picture = image(24, 42, 3)
    whole = predict.Tiled(ensemble, (24, 42))
    assert predict.is_tiled(whole) and not predict.is_tiled(ensemble)
    one_window = predict.predict_proba(ensemble, variables, picture)
    np.testing.assert_allclose(
        predict.predict_proba(whole, variables, picture), one_window, atol=1e-5
    )
    members = tuple(predict.Tiled(model, 12) for model in ensemble.models)
    tiled = predict.Ensemble(members)
    assert predict.is_tiled(tiled) and predict.is_on_host(tiled) and tiled.stride == 1
    pairs = zip(members, variables, strict=True)
    expected = np.mean([predict.predict_proba(*pair, picture) for pair in pairs], 0)
    proba = predict.predict_proba(tiled, variables, picture)
    np.testing.assert_allclose(proba, expected, rtol=1e-5, atol=1e-6)
    mixed = predict.Ensemble((SMALL, members[0]))
    assert predict.is_on_host(mixed) and not predict.is_tiled(mixed)
    with pytest.raises(ValueError, match="window .* is not a multiple of 6"):
        predict.Tiled(ensemble, 10)  # of which one member has stride 2


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_member_beside_one_in_windows_takes_the_same_pixels(two, mirrored):
    """A network without a norm, so that pixels of 0 to 255 would show."""
    ensemble, variables = two
    picture = image(24, 42, 3)
    other = predict.Mirrored(OTHER) if mirrored else OTHER
    members = predict.Tiled(SMALL, 12), other
    pairs = [*zip(members, variables, strict=True)]
    expected = np.mean([predict.predict_proba(*pair, picture) for pair in pairs], 0)
    for given in (picture, picture.astype(np.float32) / 255):
        proba = predict.predict_proba(predict.Ensemble(members), variables, given)
        np.testing.assert_allclose(proba, expected, rtol=1e-5, atol=1e-6)


def test_several_devices_share_the_images(two):
    ensemble, variables = two
    batch, mesh = image(3, 12, 12, 3), devices.make_mesh(2)
    alone = predict.predict_proba(ensemble, variables, batch)
    np.testing.assert_allclose(
        predict.predict_proba(ensemble, variables, batch, mesh), alone, rtol=1e-5, atol=1e-6
    )
    tiled = predict.Tiled(ensemble, 12, mesh=mesh)
    proba = predict.predict_proba(tiled, variables, batch)
    np.testing.assert_allclose(proba, alone, rtol=1e-5, atol=1e-6)


def test_it_is_scored_like_a_network(two):
    ensemble, variables = two
    pictures = image(3, 12, 12, 3)
    masks = (image(3, 12, 12) > 128).astype(np.uint8)
    source = [
        {"name": str(i), "image": encode(picture), "mask": encode(mask)}
        for i, (picture, mask) in enumerate(zip(pictures, masks, strict=True))
    ]
    batches = list(evaluate.score(ensemble, variables, source, 12, BINARY, batch_size=2))
    content, *_ = evaluate.report(batches)
    proba = np.mean(
        [
            probabilities(logits_of(*pair, pictures), "one")
            for pair in zip(ensemble.models, variables, strict=True)
        ],
        0,
    )[..., 0]
    found = proba > 0.5
    dice = 2 * (found & (masks == 1)).sum((1, 2)) / (found.sum((1, 2)) + masks.sum((1, 2)))
    assert [row["dice"] for row in content["own_size"]["images"]] == pytest.approx(dice)
    entropy = -np.where(masks, np.log(proba), np.log(1 - proba)).mean()
    assert content["loss"] == pytest.approx(entropy, rel=1e-4)
    number = sum(x.size for v in variables for x in jax.tree.leaves(v["params"]))
    assert evaluate.cost(ensemble, variables, batches)["parameters"] == number


def test_the_channels_of_pictures_are_found(two):
    members = predict.Ensemble((SMALL, predict.Tiled(OTHER, 12)))
    variables = init(SMALL, 0, channels=1), init(OTHER, 1, channels=1)
    assert predict._format_for(members, variables).channels == 1
    assert predict._format_for(*two).channels == 3


def test_it_is_compiled_inside_of_other_transformations(two):
    ensemble, variables = two
    batch = jnp.asarray(image(1, 6, 6, 3) / np.float32(255))
    expected = ensemble.apply(variables, batch)
    np.testing.assert_allclose(
        jax.jit(ensemble.apply)(variables, batch), expected, rtol=1e-4, atol=1e-5
    )
    slope = jax.grad(lambda x: ensemble.apply(variables, x).sum())(batch)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0
    assert hash(ensemble) == hash(
        predict.Ensemble([SMALL, OTHER])
    ) and ensemble == predict.Ensemble([SMALL, OTHER])


def test_members_that_do_not_belong_together_are_refused(two):
    with pytest.raises(ValueError, match=r"agree in num_classes: \[1, 3\]"):
        predict.Ensemble((SMALL, SMALL.clone(num_classes=3)))
    kinds = [SMALL.clone(num_classes=3, overlapping=x) for x in (False, True)]
    with pytest.raises(ValueError, match=r"agree in overlapping: \[False, True\]"):
        predict.Ensemble(kinds)
    with pytest.raises(ValueError, match="needs models"):
        predict.Ensemble(())
    ensemble, variables = two
    for wrong, number in ((variables[:1], "1"), (variables[0], "no")):
        with pytest.raises(ValueError, match=f"2 models takes a tuple .* it has {number} such"):
            ensemble.apply(wrong, jnp.zeros((1, 6, 6, 3)))
