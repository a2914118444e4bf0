"""ONNX files, computed by ONNX Runtime and compared with the networks that they were made of."""

import json
import shutil
import sys
from itertools import product
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from flax_unet import classes, images, pack
from flax_unet.efficientnet import Encoder
from flax_unet.model import ARTICLE, UNet
from flax_unet.onnx_file import OnnxModel, to_onnx
from flax_unet.predict import Mirrored
from flax_unet_cli import export
from tfds_kvasir.synthetic_polyps.draw import draw

ROOT = Path(__file__).parent.parent
SMALL = UNet((4, 8, 16), convs=2)
STRONG = SMALL.clone(norm="batch", residual=True, patch=2, deep=True)
PRETRAINED = UNet((4, 8, 8, 8), convs=1, norm="batch", residual=True, deep=True)
#: {kind: network, channels of the images}
NETWORKS = {
    "article": (ARTICLE.clone(features=(4, 8, 16), dropout=0.1), 3),
    "instance norm": (SMALL, 1),
    "group norm": (SMALL.clone(norm=2), 5),
    "strong": (STRONG.clone(dtype=jnp.bfloat16, remat=True), 3),  # both of no account
    "exclusive": (STRONG.clone(num_classes=4), 2),
    "overlapping": (SMALL.clone(num_classes=3, norm=4, overlapping=True), 3),
    "one level": (UNet((4,), norm="batch", residual=True, patch=4), 3),
    "pretrained": (PRETRAINED.clone(encoder=Encoder("lite2")), 4),
}


def random_variables(model, channels, seed=0):
    """Variables none of which is as `model.init` leaves it: 0, or 1."""
    image = jnp.zeros((1, model.stride, model.stride, channels))
    shapes, rng = jax.eval_shape(model.init, jax.random.key(0), image), np.random.default_rng(seed)

    def draw_array(path, x):
        if path[-1].key in ("scale", "variance"):
            return rng.uniform(0.5, 2, x.shape).astype(np.float32)
        if x.ndim == 1:
            return rng.normal(0, 0.1, x.shape).astype(np.float32)
        spread = np.sqrt(2 / np.prod(x.shape[:-1]))  # the magnitude of he_normal
        return rng.normal(0, spread, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw_array, shapes)


def random_image(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def logits_of(model, variables, image):
    model = model.clone(dtype=jnp.float32)
    quick = {"xla_backend_optimization_level": 0}  # to compile
    apply = jax.jit(model.apply, compiler_options=quick)
    return np.asarray(apply(variables, np.float32(image) / 255))


def written(path, *args, **options):
    """The path of a file that is valid."""
    made = to_onnx(*args, **options)
    onnx.checker.check_model(made, full_check=True)
    path.write_bytes(made.SerializeToString())
    return path


def interface(file):
    """The type of the input and the name of the output."""
    graph = onnx.load(file).graph
    (image,), (output,) = graph.input, graph.output
    return onnx.TensorProto.DataType.Name(image.type.tensor_type.elem_type), output.name


def assert_same_masks(ours, theirs, overlapping=False, threshold=0.5):
    """Equal but for pixels whose probability is within 1e-4 of the decision."""
    a, b = (classes.decide(p, overlapping=overlapping, threshold=threshold) for p in (ours, theirs))
    if overlapping or ours.shape[-1] == 1:
        unclear = abs(ours - threshold) < 1e-4
    else:
        *_, second, first = np.moveaxis(np.sort(ours, -1), -1, 0)
        unclear = (first - second < 1e-4)[..., None]
    assert not ((a != b) & ~unclear).any() and unclear.mean() < 0.02
    assert len(np.unique(a)) > 1


@pytest.mark.parametrize("kind", NETWORKS)
def test_one_file_computes_what_the_network_does_for_any_batch_and_size(tmp_path, kind):
    model, channels = NETWORKS[kind]
    variables = random_variables(model, channels)
    file = written(tmp_path / "a.onnx", model, variables, channels=channels)
    loaded = OnnxModel(file, threads=1)
    for size in ((1, 64, 96), (3, 32, 32)):
        image = random_image(*size, channels)
        logits = logits_of(model, variables, image)
        result = loaded._session.run(["logits"], {"image": np.float32(image) / 255})[0]
        assert result.shape == logits.shape and result.dtype == np.float32
        np.testing.assert_allclose(result, logits, rtol=0, atol=1e-4 * abs(logits).max())
        ours = classes.probabilities(jnp.array(logits), overlapping=model.overlapping)
        ours, theirs = np.asarray(ours), loaded.probabilities(image)
        assert_same_masks(ours, theirs, model.overlapping, threshold=np.median(ours))
    described = loaded.stride, loaded.num_classes, loaded.overlapping, loaded.channels
    assert described == (model.stride, model.num_classes, model.overlapping, channels)


@pytest.mark.parametrize("norm", ["batch", "instance", 2])
def test_the_epsilon_of_a_norm_counts_where_the_variance_is_small(tmp_path, norm):
    model = UNet((4,), convs=1, norm=norm)
    variables, image = random_variables(model, 1), random_image(1, 16, 16, 1)
    block = variables["params"]["bottleneck"]["Conv_0"]
    block["kernel"], block["bias"] = 1e-3 * block["kernel"], 0 * block["bias"]
    if norm == "batch":
        variables["batch_stats"]["bottleneck"]["BatchNorm_0"]["variance"][:] = 1e-5
    logits = logits_of(model, variables, image)
    file = written(tmp_path / "a.onnx", model, variables, channels=1, raw=True)
    result = OnnxModel(file)._session.run(["logits"], {"image": image})[0]
    np.testing.assert_allclose(result, logits, rtol=0, atol=1e-4 * abs(logits).max())


@pytest.mark.parametrize("kind", ["article", "exclusive", "overlapping"])
def test_probabilities_and_bytes_may_be_in_the_graph(tmp_path, kind):
    model, channels = NETWORKS[kind]
    variables, image = random_variables(model, channels), random_image(2, 32, 40, channels)
    logits = jnp.array(logits_of(model, variables, image))
    expected = classes.probabilities(logits, overlapping=model.overlapping)
    for raw, inside in product((True, False), (True, False)):
        options = {"channels": channels, "raw": raw, "probabilities": inside}
        file = written(tmp_path / "a.onnx", model, variables, **options)
        assert interface(file) == (
            "UINT8" if raw else "FLOAT",
            "probabilities" if inside else "logits",
        )
        # A float image of 255ths is rounded to the same bytes.
        for array in (image, image / np.float32(255), image / 255.0):
            proba = OnnxModel(file, threads=1).probabilities(array)
            assert proba.dtype == np.float32
            np.testing.assert_allclose(proba, expected, rtol=0, atol=1e-5)


def test_large_logits_become_probabilities_without_a_warning(tmp_path):
    model = UNet((1,), norm=None, convs=1)
    for num_classes, biases, expected in (
        (1, [-1e4], [0]),
        (1, [1e4], [1]),
        (2, [1e4, -1e4], [1, 0]),
    ):
        model = model.clone(num_classes=num_classes)
        variables = random_variables(model, 1)
        variables["params"]["head"]["bias"] = np.float32(biases)
        file = written(tmp_path / "a.onnx", model, variables, channels=1)
        proba = OnnxModel(file).probabilities(random_image(1, 2, 2, 1))
        assert (proba == expected).all()


@pytest.mark.parametrize(("name", "encoder"), [("strong", None), ("pretrained", "lite2")])
def test_the_models_of_the_repository_give_the_same_masks(tmp_path, name, encoder):
    model, variables, size, _ = pack.load(ROOT / "models" / name)
    assert (model.encoder and model.encoder.variant) == encoder
    image = draw(np.random.default_rng(0), size)[0][None]
    loaded = OnnxModel(written(tmp_path / "a.onnx", model, variables, raw=True))
    logits = logits_of(model, variables, image)
    result = loaded._session.run(["logits"], {"image": image})[0]
    np.testing.assert_allclose(result, logits, rtol=0, atol=1e-4 * abs(logits).max())
    proba = classes.probabilities(jnp.array(logits))
    assert_same_masks(np.asarray(proba), loaded.probabilities(image))


def test_batch_norm_leaves_no_node_and_metadata_are_kept(tmp_path):
    made = to_onnx(STRONG, random_variables(STRONG, 3), metadata={"by": "us", "stride": "7"})
    operators = {node.op_type for node in made.graph.node}
    assert operators == {*"Transpose SpaceToDepth Conv Relu Add MaxPool Concat Sum".split()} | {
        "ConvTranspose"
    }
    names = {array.name for array in made.graph.initializer}
    assert {"down0/Conv_1/kernel", "up1/shortcut/bias", "head1/kernel"} < names
    (file := tmp_path / "a.onnx").write_bytes(made.SerializeToString())
    assert OnnxModel(file).metadata == {
        "by": "us",
        "stride": "8",
        "num_classes": "1",
        "overlapping": "false",
    }


class Other(UNet):
    """A subclass, which may compute something else."""


class Foreign(nn.Module):
    """Someone else's encoder."""

    patch = 2
    levels = 1


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Other((4, 8)), "Other cannot be written as ONNX, only UNet can"),
        (nn.Dense(3), "Dense cannot be written as ONNX, only UNet can"),
        (Mirrored(SMALL), "Mirrored cannot be written as ONNX, only UNet can"),
        (UNet((4,), encoder=Foreign()), "Foreign cannot be written as ONNX, only Encoder can"),
        (SMALL.clone(norm=3), "cannot be split into groups of 3"),
    ],
)
def test_a_network_that_cannot_be_written_is_refused_by_name(model, words):
    with pytest.raises(ValueError, match=words):
        to_onnx(model, {"params": {}})


def test_variables_of_another_network_or_that_are_not_finite_are_refused_by_name():
    variables = random_variables(SMALL, 3)
    with pytest.raises(ValueError, match="with 1 channels: params/down0/Conv_0/kernel is .3, 3, 3"):
        to_onnx(SMALL, variables, channels=1)
    with pytest.raises(ValueError, match="params/bottleneck/GroupNorm_0/bias is .16,., and should"):
        to_onnx(SMALL.clone(norm=None), variables)
    with pytest.raises(ValueError, match="batch_stats/.*/mean is missing, and should be .16,."):
        to_onnx(SMALL.clone(norm="batch"), variables)
    variables["params"]["up1"]["Conv_1"]["bias"][3] = np.inf
    with pytest.raises(ValueError, match="params/up1/Conv_1/bias has NaN or infinity"):
        to_onnx(SMALL, variables)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((1, 32, 30, 3), np.uint8), "H and W multiples of 4"),
        (np.zeros((1, 30, 32, 3), np.uint8), "H and W multiples of 4"),
        (np.zeros((1, 32, 32, 1), np.uint8), r"it must be \[B, H, W, 3\]"),
        (np.zeros((32, 32, 3), np.uint8), r"it must be \[B, H, W, 3\]"),
        (np.zeros((1, 32, 32, 3), np.int64), "type int64: use uint8, or float"),
        (np.full((1, 32, 32, 3), 1.5), "values from 1.5 to 1.5"),
        (np.full((1, 32, 32, 3), np.nan), "values from nan"),
    ],
)
def test_an_image_that_the_file_does_not_take_is_refused(tmp_path, image, words):
    file = written(tmp_path / "a.onnx", SMALL, random_variables(SMALL, 3))
    with pytest.raises(ValueError, match=words):
        OnnxModel(file).probabilities(image)


#: {what is wrong: how a valid model is changed}
FOREIGN = {
    "no metadata": lambda m: m.ClearField("metadata_props"),
    "no number": lambda m: onnx.helper.set_model_props(m, properties(m, stride="4.5")),
    "no stride": lambda m: onnx.helper.set_model_props(m, properties(m, stride="0")),
    "no JSON": lambda m: onnx.helper.set_model_props(m, properties(m, overlapping="no")),
    "other classes": lambda m: onnx.helper.set_model_props(m, properties(m, num_classes="2")),
    "other input": lambda m: rename(m, "image", "x"),
    "other output": lambda m: rename(m, "logits", "y"),
    "no node": lambda m: m.graph.ClearField("node"),
}


def properties(model, **changes):
    return {p.key: p.value for p in model.metadata_props} | changes


def rename(model, old, new):
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_file_is_refused_by_name(tmp_path, case):
    made = to_onnx(SMALL, random_variables(SMALL, 3))
    FOREIGN[case](made)
    (file := tmp_path / "foreign.onnx").write_bytes(made.SerializeToString())
    with pytest.raises(ValueError, match="foreign.onnx is damaged, or was not written by"):
        OnnxModel(file)


def test_the_error_names_a_damaged_file(tmp_path, capfd):
    content = written(tmp_path / "a.onnx", SMALL, random_variables(SMALL, 3)).read_bytes()
    file = tmp_path / "damaged.onnx"
    for damaged in (b"", b"onnx", content[: len(content) // 2], content[:-9]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged.onnx is damaged, or was not written by"):
            OnnxModel(file)
    with pytest.raises(FileNotFoundError, match="missing.onnx"):
        OnnxModel(tmp_path / "missing.onnx")
    assert capfd.readouterr() == ("", "")


def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch):
    file, variables = tmp_path / "a.onnx", random_variables(SMALL, 3)
    file.touch()
    for package in ("onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    for package, use in (
        ("onnx", lambda: to_onnx(SMALL, variables)),
        ("onnxruntime", lambda: OnnxModel(file)),
    ):
        words = rf"the package {package}: pip install 'flax-unet\[onnx\]'"
        with pytest.raises(ModuleNotFoundError, match=words):
            use()


# The program


@pytest.fixture
def workdir(tmp_path):
    """A run of 4 steps."""
    source = ROOT / "tests" / "golden" / "run-0.1.0" / "workdir"
    return Path(shutil.copytree(source, tmp_path / "run"))


def test_a_run_is_exported_as_a_file_and_a_folder_at_once(workdir, tmp_path, capsys):
    out, file = tmp_path / "models" / "a", tmp_path / "onnx" / "a.onnx"
    flags = ["--workdir", str(workdir), "--checkpoint", "latest"]
    assert export.main([*flags, "--out", str(out), "--onnx", str(file)]) == 0
    assert capsys.readouterr().out.count("written: ") == 2
    assert [path.name for path in file.parent.iterdir()] == ["a.onnx"]
    exported, loaded = pack.load(out), OnnxModel(file)
    image = random_image(2, 32, 48, 3)
    logits = jnp.array(logits_of(exported.model, exported.variables, image))
    proba = loaded.probabilities(image)
    # The folder's kernels are rounded to float16.
    np.testing.assert_allclose(proba, classes.probabilities(logits), rtol=0, atol=2e-3)
    content = {name: json.loads(value) for name, value in loaded.metadata.items()}
    side = exported.image_size
    assert (content["image_size"], content["stride"]) == ([side, side], exported.model.stride)
    assert len(content["class_names"]) == 2 and content["num_classes"] == 1
    assert images.from_json({name: content[name] for name in images.to_json(images.RGB)}).raw
    assert "/" not in json.dumps(content)  # no path of this machine
    assert interface(file) == ("UINT8", "probabilities")

    before = file.read_bytes()
    assert export.main([*flags, "--onnx", str(file)]) == 1
    assert "a.onnx exists: choose another file" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert export.main(flags) == 1
    assert (
        "say what to write: --out FOLDER, --onnx FILE or --stablehlo FILE"
        in capsys.readouterr().err
    )


def test_an_exported_model_is_exported_as_a_file(tmp_path):
    file = tmp_path / "a.onnx"
    flags = ["--onnx-output", "logits", "--onnx-input", "float", "--onnx", str(file)]
    assert export.main(["--model", str(ROOT / "models" / "strong"), *flags]) == 0
    assert interface(file) == ("FLOAT", "logits")


def test_bytes_are_refused_for_a_model_of_other_values(workdir, tmp_path, capsys):
    out = tmp_path / "model"
    flags = ["--workdir", str(workdir), "--checkpoint", "latest"]
    assert export.main([*flags, "--out", str(out)]) == 0
    content = json.loads((out / "model.json").read_text())
    content["about"]["images"] |= {"kind": "integers", "low": [7.0], "high": [4095.0]}
    del content["checksum"]
    (out / "model.json").write_text(json.dumps(content))
    flags = ["--workdir", str(out), "--onnx", str(tmp_path / "a.onnx")]
    assert export.main([*flags, "--onnx-input", "uint8"]) == 1
    assert "uint8: the model takes images of 3 channels, integers, 7 to 4095" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "a.onnx").exists()
    assert export.main(flags) == 0
    loaded = OnnxModel(tmp_path / "a.onnx")
    assert (loaded.metadata["low"], loaded.metadata["high"]) == ("[7.0]", "[4095.0]")
    assert interface(tmp_path / "a.onnx") == ("FLOAT", "probabilities")
