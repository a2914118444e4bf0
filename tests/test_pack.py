import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_unet import pack
from flax_unet.efficientnet import Encoder
from flax_unet.model import ARTICLE, UNet

SMALL = UNet(features=(4, 8), batch_norm=True, patch=2)


def packed(model=SMALL):
    image = jnp.zeros((1, model.stride, model.stride, 3))
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), image), np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return pack.Packed(model, variables, 64, {"from": "here"})


@pytest.mark.parametrize(
    "model",
    [
        ARTICLE,
        SMALL.clone(dtype=jnp.dtype("bfloat16"), num_classes=3, remat=True),
        UNet((4, 4, 4, 4), patch=2, encoder=Encoder("lite2", dtype=jnp.dtype("bfloat16"))),
    ],
)
def test_a_network_is_built_as_it_was_described(model):
    described = json.loads(json.dumps(pack.describe(model)))
    expected = model.clone(remat=False, dtype=jnp.dtype(model.dtype))
    if model.encoder is not None:
        expected = expected.clone(
            dtype=jnp.dtype("float32"), encoder=Encoder("lite2", dtype=jnp.dtype("float32"))
        )
    assert pack.build(described) == expected


def test_an_attribute_that_is_not_described_has_its_default():
    assert pack.build({"features": [4, 8]}) == UNet((4, 8), dtype=jnp.dtype("float32"))


def test_a_model_is_loaded_as_it_was_saved_but_for_the_rounding_of_its_kernels(tmp_path):
    given = packed()
    pack.save(tmp_path / "new" / "model", given)
    found = pack.load(tmp_path / "new" / "model")
    assert found.model == given.model.clone(dtype=jnp.dtype("float32"))
    assert (found.image_size, found.about) == (64, {"from": "here"})
    assert jax.tree.structure(found.variables) == jax.tree.structure(given.variables)
    for a, b in zip(*map(jax.tree.leaves, (found.variables, given.variables)), strict=True):
        assert a.dtype == np.float32
        if b.ndim > 1:  # 11 bits
            np.testing.assert_allclose(a, b, rtol=2**-11, atol=2**-25)
        else:
            np.testing.assert_array_equal(a, b)
    assert any(
        (a != b).any()
        for a, b in zip(*map(jax.tree.leaves, (found.variables, given.variables)), strict=True)
    )
    numbers = sum(x.size for x in jax.tree.leaves(given.variables))
    few = sum(x.size for x in jax.tree.leaves(given.variables) if x.ndim == 1)
    names = 600 * len(jax.tree.leaves(given.variables))  # headers of the arrays, and the zip's
    assert (tmp_path / "new/model/weights.npz").stat().st_size < 2 * numbers + 2 * few + names


def test_a_model_is_not_written_over_nor_with_what_is_not_finite(tmp_path):
    given = packed()
    pack.save(tmp_path / "a", given)
    with pytest.raises(FileExistsError, match="choose another folder"):
        pack.save(tmp_path / "a", given)
    given.variables["params"]["head"]["kernel"] = np.full((2, 2, 4, 1), 1e6, np.float32)
    with pytest.raises(ValueError, match="params/head/kernel has values that are not finite"):
        pack.save(tmp_path / "b", given)
    assert not (tmp_path / "b").exists()


def test_a_model_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="model.json is missing"):
        pack.load(tmp_path)
    pack.save(tmp_path, packed())
    text, weights = (tmp_path / "model.json").read_text(), (tmp_path / "weights.npz").read_bytes()
    (tmp_path / "weights.npz").write_bytes(weights[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        pack.load(tmp_path)
    (tmp_path / "weights.npz").write_bytes(weights)
    (tmp_path / "model.json").write_text(text.replace('"deep"', '"depth"'))
    with pytest.raises(ValueError, match="no network has depth"):
        pack.load(tmp_path)
