import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_unet.model import UNet
from flax_unet.predict import predict_proba
from flax_unet.stablehlo_file import to_stablehlo

export = pytest.importorskip("jax.export")
pytest.importorskip("flatbuffers")


@pytest.mark.parametrize("raw", [True, False])
@pytest.mark.parametrize("classes", [1, 3])
def test_a_file_gives_the_probabilities_at_any_batch_and_size(raw, classes):
    model = UNet(features=(4, 8, 8), norm="batch", residual=True, num_classes=classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: rng.uniform(0.1, 1, x.shape).astype(np.float32), shapes)
    variables["params"] = jax.tree.map(lambda x: x - 0.5, variables["params"])
    loaded = export.deserialize(bytearray(to_stablehlo(model, variables, channels=2, raw=raw)))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    for shape in ((1, 8, 12, 2), (3, 20, 8, 2)):
        image = rng.integers(0, 256, shape, np.uint8)
        proba = loaded.call(image if raw else image / np.float32(255))
        expected = predict_proba(model, variables, image)
        assert proba.shape == (*shape[:3], classes)
        np.testing.assert_allclose(proba, expected, atol=1e-5)
    assert np.ptp(expected) > 0.05


def test_each_platform_has_its_own_form():
    """A depthwise convolution is shifted products on a CPU, and grouped elsewhere."""
    from flax_unet.efficientnet import Encoder

    encoder = Encoder("lite0")
    model = UNet(features=(4,) * encoder.levels, encoder=encoder, norm="batch")
    image = jnp.zeros((1, model.stride, model.stride, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    variables = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
    text = export.deserialize(bytearray(to_stablehlo(model, variables))).mlir_module()
    groups = "feature_group_count = 32 "
    assert text.count(groups) >= 1
    compiled = jax.jit(export.deserialize(bytearray(to_stablehlo(model, variables))).call)
    on_cpu = compiled.lower(np.zeros((1, model.stride, model.stride, 3), np.float32)).compile()
    assert "feature_group_count=32" not in on_cpu.as_text()
