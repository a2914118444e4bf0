import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from flax_unet import pack, safetensors_file
from flax_unet.model import UNet

numpy_format = pytest.importorskip("safetensors.numpy")
SMALL = UNet(features=(4, 8), norm="batch", patch=2, residual=True)


def packed(model=SMALL, seed=0, **changes):
    image = jnp.zeros((1, model.stride, model.stride, 3))
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), image), np.random.default_rng(seed)
    variables = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return pack.Packed(model, variables, (64, 32), {"from": "here"})._replace(**changes)


def test_tensors_are_equal_bit_for_bit_and_named_by_their_paths(tmp_path):
    saved = packed()
    safetensors_file.save(tmp_path / "new" / "folder", saved)
    tensors = numpy_format.load_file(tmp_path / "new" / "folder" / "weights.safetensors")
    expected = flatten_dict(saved.variables, sep=".")
    assert "params.down0.Conv_0.kernel" in tensors and tensors.keys() == expected.keys()
    assert any(name.startswith("batch_stats.") for name in tensors)
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, np.float32)
        assert tensor.tobytes() == expected[name].tobytes()


def test_arrays_of_jax_in_any_order_of_memory_are_equal_too(tmp_path):
    saved = packed()
    variables = jax.tree.map(lambda x: jnp.asarray(np.asfortranarray(x)), saved.variables)
    safetensors_file.save(tmp_path / "a", saved._replace(variables=variables))
    fortran = jax.tree.map(np.asfortranarray, saved.variables)
    safetensors_file.save(tmp_path / "b", saved._replace(variables=fortran))
    safetensors_file.save(tmp_path / "c", saved)
    files = [(tmp_path / name / "weights.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


def test_the_config_builds_the_model(tmp_path):
    safetensors_file.save(tmp_path, packed())
    content = json.loads((tmp_path / "model.json").read_text())
    assert pack.build(content["model"]) == SMALL.clone(dtype=jnp.dtype("float32"))
    assert (content["image_size"], content["about"]) == ([64, 32], {"from": "here"})
    assert {file.name for file in tmp_path.iterdir()} == {"model.json", "weights.safetensors"}


def test_it_may_be_beside_the_same_exported_model(tmp_path):
    pack.save(tmp_path, packed())
    before = (tmp_path / "model.json").read_bytes()
    safetensors_file.save(tmp_path, packed())
    assert (tmp_path / "model.json").read_bytes() == before
    assert pack.load(tmp_path).image_size == (64, 32)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"model": {}}'])
def test_another_model_is_not_overwritten(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(FileExistsError, match="another model"):
        safetensors_file.save(tmp_path, packed())
    assert {file.name for file in tmp_path.iterdir()} == {"model.json"}


def test_weights_are_not_overwritten(tmp_path):
    safetensors_file.save(tmp_path, packed())
    before = (tmp_path / "weights.safetensors").read_bytes()
    with pytest.raises(FileExistsError):
        safetensors_file.save(tmp_path, packed(seed=1))
    assert (tmp_path / "weights.safetensors").read_bytes() == before


def test_values_that_are_not_finite_are_refused(tmp_path):
    saved = packed()
    saved.variables["params"]["head"]["bias"][0] = np.nan
    with pytest.raises(ValueError, match="params.head.bias has NaN"):
        safetensors_file.save(tmp_path / "model", saved)
    assert not (tmp_path / "model").exists()


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"flax-unet\[safetensors\]"):
        safetensors_file.save(tmp_path, packed())


def test_the_layouts_are_those_that_the_documentation_gives_for_pytorch():
    """A convolution and a transposed one by loops over PyTorch's definition, in its layout."""
    model = UNet(features=(2, 3), norm=None, convs=1)
    saved = packed(model)
    params = saved.variables["params"]
    x = np.random.default_rng(1).normal(size=(3, 4, 4)).astype(np.float32)  # [C, H, W]

    def conv(x, layer):  # Conv2d: weight [out, in, height, width]
        weight = layer["kernel"].transpose(3, 2, 0, 1)
        n, pad = weight.shape[2], weight.shape[2] // 2
        padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (n, n), (1, 2))
        return np.einsum("oiuv,ihwuv->ohw", weight, windows) + layer["bias"][:, None, None]

    def transposed(x, layer, s):  # ConvTranspose2d: weight [in, out, height, width]
        weight = layer["kernel"].transpose(2, 3, 0, 1)
        blocks = np.einsum("iouv,ihw->ohuwv", weight, x)
        o, h, _, w, _ = blocks.shape
        return blocks.reshape(o, h * s, w * s) + layer["bias"][:, None, None]

    skip = np.maximum(conv(x, params["down0"]["Conv_0"]), 0)
    small = skip.reshape(2, 2, 2, 2, 2).max((2, 4))
    low = np.maximum(conv(small, params["bottleneck"]["Conv_0"]), 0)
    both = np.concatenate([transposed(low, params["upsample0"], 2), skip])
    up = np.maximum(conv(both, params["up0"]["Conv_0"]), 0)
    expected = transposed(up, params["head"], 1)
    logits = model.apply(saved.variables, x.transpose(1, 2, 0)[None])
    np.testing.assert_allclose(logits[0].transpose(2, 0, 1), expected, rtol=1e-4, atol=1e-5)
