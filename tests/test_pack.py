import json
import shutil
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_unet import pack
from flax_unet.efficientnet import Encoder
from flax_unet.model import ARTICLE, UNet

SMALL = UNet(features=(4, 8), norm="batch", patch=2)
BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
OLD = Path(__file__).parent / "golden" / "run-0.1.0" / "exported"


def packed(model=SMALL):
    image = jnp.zeros((1, model.stride, model.stride, 3))
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), image), np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return pack.Packed(model, variables, 64, {"from": "here"})


@pytest.mark.parametrize(
    "model",
    [
        ARTICLE,
        UNet((4, 8), norm=4),
        UNet((4, 8)),
        SMALL.clone(dtype=BFLOAT16, num_classes=3, remat=True),
        UNet((4, 4, 4, 4), norm="batch", encoder=Encoder("lite0")),
        UNet((4, 4, 4, 4), deep=True, encoder=Encoder("lite2", dtype=BFLOAT16)),
        UNet((4, 4, 4, 4), dtype=BFLOAT16, encoder=Encoder("lite2")),
    ],
)
def test_build_restores_what_describe_described(model):
    description = json.loads(json.dumps(pack.describe(model)))
    expected = model.clone(remat=False, dtype=jnp.dtype(model.dtype))
    if model.encoder is not None:
        encoder = Encoder(model.encoder.variant, dtype=jnp.dtype(model.encoder.dtype))
        expected = expected.clone(encoder=encoder)
    built = pack.build(description)
    assert built == expected and hash(built) == hash(expected)


def test_a_missing_attribute_has_its_default():
    assert pack.build({"features": [4, 8]}) == UNet((4, 8), dtype=FLOAT32)


@pytest.mark.parametrize(
    ("old", "norm"),
    [
        ({"batch_norm": True, "group_size": None}, "batch"),
        ({"batch_norm": True, "group_size": 1}, "batch"),
        ({"batch_norm": False, "group_size": 1}, "instance"),
        ({"batch_norm": False, "group_size": 4}, 4),
        ({"batch_norm": False, "group_size": None}, None),
        ({"group_size": None}, None),  # before version 0.1.0 had batch norm
        ({"group_size": 8}, 8),
    ],
)
def test_the_two_attributes_of_version_0_1_0_become_one_norm(old, norm):
    assert pack.build({"features": [8, 8], **old}).norm == norm


def test_the_encoder_of_version_0_1_0_has_the_networks_dtype():
    old = {"features": [4] * 4, "patch": 2, "dtype": "bfloat16", "encoder": "lite2"}
    model = pack.build(old | {"batch_norm": True, "group_size": None})
    assert model.encoder == Encoder("lite2", dtype=BFLOAT16)
    assert (model.dtype, model.norm, model.stride) == (BFLOAT16, "batch", 32)


def test_a_model_exported_by_version_0_1_0_is_loaded():
    description = json.loads((OLD / "model.json").read_text())["model"]
    assert "batch_norm" in description  # the old form
    model, variables, size, about = pack.load(OLD)
    assert (model.norm, model.features, model.residual, model.deep) == ("batch", (4, 8), True, True)
    assert (model.encoder, model.stride, size) == (None, 4, 16)
    assert about["training"]["loss"] == "bce_soft_dice"
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, shapes)
    again = pack.build(json.loads(json.dumps(pack.describe(model))))
    assert again == model


class Foreign(nn.Module):
    """Someone else's encoder."""

    patch = 2
    levels = 1

    @nn.compact
    def __call__(self, image):
        x = nn.Conv(4, (2, 2), strides=2)(image)
        return [x, nn.Conv(4, (2, 2), strides=2)(x)]


class Variant(UNet):
    """A subclass, which may compute something else."""


class Fast(Encoder):
    """A subclass of the encoder."""


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (UNet((4,), norm=None, encoder=Foreign()), "Foreign cannot be described, only Encoder can"),
        (UNet((4,) * 4, encoder=Fast("lite0")), "Fast cannot be described, only Encoder can"),
        (Variant((4, 8)), "Variant cannot be described, only UNet can"),
        (nn.Dense(3), "Dense cannot be described, only UNet can"),
    ],
)
def test_a_network_that_could_not_be_built_again_is_refused_by_name(tmp_path, model, words):
    with pytest.raises(ValueError, match=words):
        pack.describe(model)
    with pytest.raises(ValueError, match=words):
        pack.save(tmp_path / "model", pack.Packed(model, {"params": {}}, 64, {}))
    assert not (tmp_path / "model").exists()


def test_a_model_is_loaded_as_it_was_saved_up_to_the_rounding_of_its_kernels(tmp_path):
    saved = packed()
    pack.save(tmp_path / "new" / "model", saved)
    loaded = pack.load(tmp_path / "new" / "model")
    assert loaded.model == saved.model.clone(dtype=FLOAT32)
    assert (loaded.image_size, loaded.about) == (64, {"from": "here"})
    assert jax.tree.structure(loaded.variables) == jax.tree.structure(saved.variables)
    pairs = list(zip(*map(jax.tree.leaves, (loaded.variables, saved.variables)), strict=True))
    for a, b in pairs:
        assert a.dtype == np.float32
        if b.ndim > 1:  # 11 bits
            np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-25)
        else:
            np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in pairs)
    numbers = sum(x.size for _, x in pairs)
    float32 = sum(x.size for _, x in pairs if x.ndim == 1)
    headers = 600 * len(pairs)  # of the arrays, and the zip's
    size = (tmp_path / "new/model/weights.npz").stat().st_size
    assert size < 2 * numbers + 2 * float32 + headers


def test_a_model_is_never_overwritten_and_never_has_infinite_weights(tmp_path):
    saved = packed()
    pack.save(tmp_path / "a", saved)
    with pytest.raises(FileExistsError, match=r"model.json exists: choose another folder"):
        pack.save(tmp_path / "a", saved)
    (tmp_path / "a" / "model.json").unlink()
    with pytest.raises(FileExistsError, match=r"weights.npz exists: choose another folder"):
        pack.save(tmp_path / "a", saved)
    saved.variables["params"]["head"]["kernel"] = np.full((2, 2, 4, 1), 1e6, np.float32)
    with pytest.raises(
        ValueError, match="params/head/kernel has NaN, infinity or values beyond float16"
    ):
        pack.save(tmp_path / "b", saved)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("size", [33, (32, 33), 2**14, 0])
def test_a_size_that_could_not_be_loaded_is_not_saved(tmp_path, size):
    with pytest.raises(ValueError, match="it must be a multiple of .*, up to 8192"):
        pack.save(tmp_path / "model", packed()._replace(image_size=size))
    assert not (tmp_path / "model").exists()


def test_a_folder_without_a_readable_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.json is missing"):
        pack.load(tmp_path)
    pack.save(tmp_path, packed())
    text, weights = (tmp_path / "model.json").read_text(), (tmp_path / "weights.npz").read_bytes()
    (tmp_path / "weights.npz").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        pack.load(tmp_path)
    (tmp_path / "weights.npz").write_bytes(weights)
    (tmp_path / "model.json").write_text(text.replace('"deep"', '"depth"'))
    with pytest.raises(ValueError, match="a UNet has no depth"):
        pack.load(tmp_path)


def rewrite(folder, change_content=None, change_arrays=None):
    """Write a saved model again, changed, and without its checksum."""
    content = json.loads((folder / "model.json").read_text())
    content.pop("checksum", None)
    (change_content or (lambda content: None))(content)
    (folder / "model.json").write_text(json.dumps(content))
    with np.load(folder / "weights.npz") as stored:
        arrays = dict(stored)
    (change_arrays or (lambda arrays: None))(arrays)
    np.savez(folder / "weights.npz", **arrays)


KERNEL = "params/down0/Conv_0/kernel"
#: {what is wrong with the arrays: how, what the message says}
BAD_ARRAYS = {
    "NaN": (lambda a: a[KERNEL].fill(np.nan), f"{KERNEL} has NaN or infinity"),
    "too large": (
        lambda a: a.update({KERNEL: np.full(a[KERNEL].shape, 1e300)}),
        f"{KERNEL} has NaN or infinity",
    ),
    "missing": (lambda a: a.pop(KERNEL), f"{KERNEL} is missing"),
    "one more": (lambda a: a.update({"params/evil": np.ones(3)}), "params/evil is not of this"),
    "shape": (lambda a: a.update({KERNEL: a[KERNEL][:1]}), f"{KERNEL} has another shape"),
    "integers": (
        lambda a: a.update({KERNEL: a[KERNEL].astype(np.int64)}),
        f"{KERNEL}.npy has the type int64, not float",
    ),
    "text": (
        lambda a: a.update({KERNEL: a[KERNEL].astype(str)}),
        f"{KERNEL}.npy has the type <U32, not float",
    ),
    "objects": (
        lambda a: a.update({KERNEL: a[KERNEL].astype(object)}),
        f"{KERNEL}.npy has the type object, not float",
    ),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_not_the_models_are_refused_by_name(tmp_path, case):
    change, words = BAD_ARRAYS[case]
    pack.save(tmp_path, packed())
    rewrite(tmp_path)
    pack.load(tmp_path)  # as version 0.2.0 wrote it
    rewrite(tmp_path, change_arrays=change)
    with pytest.raises(ValueError, match=words):
        pack.load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("features", [10**9, 10**9]),
        ("features", [4] * 1000),
        ("features", [4.0, 8.0]),
        ("features", "48"),
        ("features", []),
        ("convs", 10**6),
        ("convs", 0),
        ("patch", 10**9),
        ("num_classes", 0),
        ("num_classes", True),
        ("dtype", "int8"),
        ("dtype", "object"),
        ("encoder", {"variant": "../x", "dtype": "float32"}),
        ("image_size", 0),
        ("image_size", 10**6),
        ("image_size", 33),
        ("image_size", [64, 64, 64]),
        ("image_size", 64.0),
    ],
)
def test_attributes_that_no_model_has_are_refused(tmp_path, key, value):
    pack.save(tmp_path, packed())

    def change(content):
        (content if key in content else content["model"])[key] = value

    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match="cannot be read"):
        pack.load(tmp_path)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("model", [SMALL, UNet((4,) * 4, encoder=Encoder("lite0"))])
def test_models_of_any_channels_are_loaded(tmp_path, model, channels):
    image = jnp.zeros((1, model.stride, model.stride, channels))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    pack.save(tmp_path, pack.Packed(model, variables, 64, {}))
    loaded = pack.load(tmp_path).variables
    assert jax.tree.map(np.shape, loaded) == jax.tree.map(np.shape, variables)


def test_no_flipped_bit_of_a_model_is_loaded(tmp_path):
    pack.save(tmp_path / "good", packed())
    good, rng = pack.load(tmp_path / "good"), np.random.default_rng(0)
    for name in ("model.json", "weights.npz"):
        content = (tmp_path / "good" / name).read_bytes()
        for at in rng.choice(len(content), 12, replace=False):
            folder = Path(shutil.copytree(tmp_path / "good", tmp_path / f"{name}-{at}"))
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(rng.integers(8))
            (folder / name).write_bytes(damaged)
            try:
                loaded = pack.load(folder)
            except ValueError:
                continue
            # A bit that says nothing, such as a time in the zip.
            assert (loaded.model, loaded[2:]) == (good.model, good[2:])
            for a, b in zip(*map(jax.tree.leaves, (loaded[1], good[1])), strict=True):
                np.testing.assert_array_equal(a, b)


def test_nothing_is_left_behind_by_a_model_that_cannot_be_written(tmp_path):
    with pytest.raises(TypeError, match="int64 is not JSON serializable"):
        pack.save(tmp_path / "model", packed()._replace(about={"step": np.int64(1)}))
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("old", "new"), [('"image_size": 64', '"image_size": 96'), ("here", "herb")]
)
def test_a_changed_model_json_is_found_by_its_checksum(tmp_path, old, new):
    pack.save(tmp_path, packed())
    file = tmp_path / "model.json"
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(ValueError, match="not what was saved .checksum."):
        pack.load(tmp_path)
