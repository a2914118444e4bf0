"""Several devices give what one gives: batches of any size, runs, restored states, evaluations."""

import functools
import json
import re
import shutil

import drawn
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from PIL import Image

from flax_unet import augment, checkpoint, data, devices, losses, predict, runs, train
from flax_unet.evaluate import evaluate, score
from flax_unet.model import UNet
from flax_unet_cli import evaluate as evaluate_program
from flax_unet_cli import predict as predict_program
from flax_unet_cli import train as train_program


class Plain(nn.Module):
    """Without batch statistics or dropout, so that devices differ in rounding only."""

    stride: int = 1
    num_classes: int = 1

    @nn.compact
    def __call__(self, image):
        return nn.Conv(1, (3, 3))(nn.relu(nn.Conv(4, (3, 3))(image)))


def make_batch(n, seed=0):
    rng = np.random.default_rng(seed)
    mask = (rng.random((n, 8, 8, 1)) < 0.5).astype(np.uint8)
    image = (100 * mask + rng.integers(0, 100, (n, 8, 8, 3))).astype(np.uint8)
    return {"image": image, "mask": mask, "weight": np.ones(n, np.float32)}


def test_the_mesh_is_over_the_first_devices_and_one_needs_none():
    assert devices.make_mesh(1) is None
    mesh = devices.make_mesh(3)
    assert list(mesh.devices) == jax.devices()[:3] and mesh.axis_names == ("batch",)
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"--devices {n}: jax finds 4"):
            devices.make_mesh(n)


def test_a_batch_is_filled_with_copies_of_weight_0():
    mesh, batch = devices.make_mesh(4), make_batch(5)
    batch["weight"][4] = 0
    more = devices.put(batch, mesh)
    assert np.asarray(more["weight"]).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
    np.testing.assert_array_equal(more["image"], batch["image"][[0, 1, 2, 3, 4, 0, 1, 2]])
    assert [len(shard.data) for shard in more["image"].addressable_shards] == [2, 2, 2, 2]
    cut = devices.first_rows({"a": more["weight"], "b": np.ones(3)}, 5, 8)
    assert (len(cut["a"]), len(cut["b"])) == (5, 3)
    assert devices.put(batch, None) is batch


def test_a_data_set_is_copied_to_each_device_unless_it_is_on_all():
    mesh, batch = devices.make_mesh(4), make_batch(8)
    batch |= {"index": np.array([3, 1, 2, 0, 5], np.int32), "weight": np.ones(5, np.float32)}
    placed = devices.put(batch, mesh)
    assert [len(shard.data) for shard in placed["image"].addressable_shards] == [8] * 4
    assert [len(shard.data) for shard in placed["index"].addressable_shards] == [2] * 4
    parts = batch | {"image": jax.device_put(batch["image"], devices.split(mesh))}
    assert devices.put(parts, mesh)["image"] is parts["image"]


@pytest.mark.parametrize("n", [1, 3, 4])
@pytest.mark.parametrize("resident", [False, True])
def test_steps_on_several_devices_are_those_of_one(n, resident):
    """Batches of 5, which neither 3 nor 4 devices can share equally; and one that is not JAX's."""
    model, tx, last = Plain(), optax.adam(1e-2), jax.devices()[-n:]
    mesh = jax.make_mesh((n,), ("batch",), axis_types=(AxisType.Auto,), devices=last)
    states, results = [], []
    for place in (None, mesh):
        state = train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))
        step = train.make_train_step(
            model, tx, losses.bce_soft_dice, augment=augment.random_flips, mesh=place
        )
        for seed in range(4):
            batch = make_batch(5, seed)
            if resident:
                image, mask = devices.replicate((batch["image"], batch["mask"]), place)
                batch |= {"image": image, "mask": mask, "index": np.arange(5, dtype=np.int32)}
            state, result = step(state, batch, jax.random.key(1))
            results.append(jax.device_get(result))
        assert place is None or state.step.devices() == set(last)
        states.append(jax.device_get(state.params))
    for one, several in zip(results[:4], results[4:], strict=True):
        assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for ours, expected in zip(several["confusion"], one["confusion"], strict=True):
            np.testing.assert_array_equal(ours, expected)  # and there are 5 rows
    for a, b in zip(*map(jax.tree.leaves, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_on_one_device_takes_a_state_in_memory_and_may_be_scanned():
    model, tx, key, batch = Plain(), optax.adam(1e-2), jax.random.key(1), make_batch(5)
    device = jax.devices()[-1]
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(AxisType.Auto,), devices=[device])
    step = train.make_train_step(model, tx, losses.bce, mesh=mesh)

    def new():
        return train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))

    state, first = step(jax.device_get(new()), batch, key)
    assert state.step.devices() == {device}
    _, second = step(state, batch, key)
    _, both = jax.lax.scan(lambda state, _: step(state, batch, key), new(), None, length=2)
    expected = [float(first["loss"]), float(second["loss"])]
    assert both["loss"].tolist() == pytest.approx(expected, rel=1e-5)


def test_scores_on_several_devices_are_those_of_one():
    batch = make_batch(11)
    arrays = data.Arrays(batch["image"], batch["mask"], [str(i) for i in range(11)], "")
    model, mesh = Plain(), devices.make_mesh(4)
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    one, ones = evaluate(model, variables, arrays, batch_size=5)
    for resident in (arrays, data.to_device(arrays, mesh)):
        several, counts = evaluate(model, variables, resident, batch_size=5, mesh=mesh)
        assert several == pytest.approx(one, rel=1e-5)
        for a, b in zip(counts, ones, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return drawn.discs(tmp_path_factory.mktemp("discs"), 30, 16)


def flags(folders, workdir, n, epochs):
    places = f"--workdir {workdir} --images {folders}/images --masks {folders}/masks"
    rest = f"--dataset folder --image-size 16 --features 4 8 --batch-size 6 --devices {n}"
    return [*places.split(), *rest.split(), "--epochs", str(epochs)]


def history(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def alone(folders, tmp_path_factory):
    """A run of four epochs on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert train_program.main(flags(folders, workdir, 1, 4)) == 0
    return workdir


def check_same_run(workdir, other):
    for ours, expected in zip(history(workdir), history(other), strict=True):
        for name in ("loss", "val_loss", "dice_per_image", "val_dice_per_image"):
            assert ours[name] == near(expected[name], name), name


def near(value, name):
    """Devices add in any order; rounding may then move a pixel or two across Dice's threshold.

    One pixel of a validation picture is 0.005. Counts are compared exactly where each step starts
    from equal parameters, in other tests.
    """
    return pytest.approx(value, abs=0.01) if "dice" in name else pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("crop", [False, True])
def test_pictures_that_take_half_of_the_memory_are_streamed(
    folders, alone, tmp_path, crop, monkeypatch, capsys
):
    size = 16 * 16 * 4 * 24  # bytes of the images and masks of 24 training pictures
    more = ["--crop", "16"] if crop else []
    for room, streamed in ((2 * size, False), (2 * size - 1, True)):
        monkeypatch.setattr(devices, "memory", lambda room=room: room)
        command = flags(folders, tmp_path / f"run{streamed}", 3, 1)
        if crop:
            at = command.index("--image-size")
            command[at : at + 2] = more
        assert train_program.main(command) == 0
        assert ("decoded again in each epoch" in capsys.readouterr().out) == streamed
    check_same_run(tmp_path / "runTrue", tmp_path / "runFalse")


def test_a_run_that_goes_on_with_another_number_of_devices_is_that_on_one(
    folders, alone, tmp_path, monkeypatch, capsys
):
    workdir, places, fit = tmp_path / "run", [], train_program.fit

    def spy(model, tx, loss_fn, state, *args, **kwargs):
        places.append({len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)})
        return fit(model, tx, loss_fn, state, *args, **kwargs)

    monkeypatch.setattr(train_program, "fit", spy)
    for n, epochs in ((4, 1), (1, 2), (3, 3), (4, 4)):
        assert train_program.main(flags(folders, workdir, n, epochs)) == 0
    assert places == [{4}, {1}, {3}, {4}]
    assert "each batch is split over 4 devices" in capsys.readouterr().out
    check_same_run(workdir, alone)
    assert runs.load_model(workdir).settings.epochs == 4


def test_a_state_saved_by_four_devices_is_restored_bit_for_bit(tmp_path):
    mesh, model, tx = devices.make_mesh(4), Plain(), optax.adam(1e-2)
    state = train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))
    step = train.make_train_step(model, tx, losses.bce, mesh=mesh)
    state, _ = step(state, make_batch(8), jax.random.key(1))
    expected = jax.device_get(state)
    with checkpoint.open_checkpoints(tmp_path / "c") as checkpoints:
        checkpoint.save(checkpoints, state, {"a": 1}, dice=0.5)
        checkpoint.finish(checkpoints, state)
        abstract = jax.eval_shape(lambda: expected)
        restored, _ = checkpoint.restore(checkpoints, abstract)
    for place in (None, mesh):
        for a, b in zip(
            *map(jax.tree.leaves, (devices.replicate(restored, place), expected)), strict=True
        ):
            np.testing.assert_array_equal(a, b)


def test_evaluation_on_several_devices_writes_the_same_report(folders, alone, tmp_path):
    reports = []
    for n in (1, 4):
        workdir = tmp_path / str(n)
        shutil.copytree(alone, workdir)
        assert evaluate_program.main(["--workdir", str(workdir), "--devices", str(n)]) == 0
        reports.append(json.loads((workdir / "evaluation-test.json").read_text()))
    one, four = reports
    assert four["dice_per_image"] == pytest.approx(one["dice_per_image"], rel=1e-6)
    for a, b in zip(one["own_size"]["images"], four["own_size"]["images"], strict=True):
        assert {k: a[k] for k in ("tp", "fp", "fn", "tn")} == {
            k: b[k] for k in ("tp", "fp", "fn", "tn")
        }


def test_scores_of_a_source_on_several_devices(folders):
    trained_size, source = 16, data.FolderSource(folders / "images", folders / "masks")
    model = Plain()
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    found = []
    for n in (1, 4):
        batches = score(
            model, variables, source, trained_size, batch_size=7, mesh=devices.make_mesh(n)
        )
        found.append([x for batch in batches for x in batch.result["confusion"].tp.ravel()])
    assert found[0] == found[1] and len(found[0]) == 35  # five batches of 7, with their padding


@pytest.mark.parametrize("shape", [(40, 24), (8, 8)])
def test_the_windows_of_a_picture_are_shared_by_the_devices(shape):
    model, rng = Plain(), np.random.default_rng(0)
    variables = model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32))
    image = rng.random((1, *shape, 3), np.float32)
    one = predict.Tiled(model, 8, batch_size=2)
    mesh = devices.make_mesh(3)
    three = predict.Tiled(model, 8, batch_size=2, mesh=mesh)
    assert (one.windows, three.windows) == (2, 6)
    np.testing.assert_allclose(
        three.apply(variables, image), one.apply(variables, image), rtol=1e-5, atol=1e-6
    )
    logits = predict.logits_function(model)  # compiled for both
    placed = jax.device_put(np.zeros((6, 8, 8, 3), np.float32), devices.split(mesh))
    result = logits(devices.replicate(variables, mesh), placed)
    assert len(result.sharding.device_set) == 3


@pytest.mark.parametrize("n", [1, 4, 5])
def test_resized_images_are_shared_by_the_devices(n, monkeypatch):
    model, mesh, rng = (
        predict.Mirrored(UNet(features=(4, 8))),
        devices.make_mesh(4),
        np.random.default_rng(0),
    )
    variables = model.model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    images = [rng.integers(0, 256, (20 + 5 * i, 30, 3), np.uint8) for i in range(n)]
    one = [predict.predict_resized(model, variables, image, (16, 32)) for image in images]
    real, rows = predict._apply, []

    def spy(model):
        def apply(variables, image):
            rows.append([len(shard.data) for shard in image.addressable_shards])
            return real(model)(variables, image)

        return apply

    batch = rng.integers(0, 256, (n, 15, 30, 3), np.uint8)  # padded
    together = predict.predict_proba(model, variables, batch, mesh)
    np.testing.assert_allclose(
        together, predict.predict_proba(model, variables, batch), rtol=1e-4, atol=1e-5
    )
    monkeypatch.setattr(predict, "_apply", spy)
    several = list(predict.predict_images(model, variables, images, (16, 32), mesh))
    assert rows == [[-(-n // 4)] * 4]
    for ours, expected in zip(several, one, strict=True):
        if n <= 4:  # a device has one image
            np.testing.assert_array_equal(ours, expected)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_prediction_on_several_devices_writes_the_same_masks(folders, alone, tmp_path):
    masks = []
    for n in (1, 4):
        command = ["--workdir", str(alone), "--out", str(tmp_path / str(n)), "--window", "16"]
        command += ["--devices", str(n), str(folders / "images")]
        assert predict_program.main(command) == 0
        files = sorted((tmp_path / str(n)).glob("*-mask.png"))
        masks.append([np.asarray(Image.open(file)) for file in files])
    for one, four in zip(*masks, strict=True):
        np.testing.assert_array_equal(one, four)


def abstract_step(mesh, model, tx, rows):
    """A step, and the shapes of its arguments on a mesh; the data set is on each device."""
    entire, split = (
        NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec("batch"))
    )

    def array(shape, dtype, place):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    state = jax.eval_shape(
        lambda: train.create_train_state(model, tx, jax.random.key(0), (1, 32, 32, 3))
    )
    state = jax.tree.map(lambda x: array(x.shape, x.dtype, entire), state)
    batch = {
        "image": array((640, 32, 32, 3), np.uint8, entire),
        "mask": array((640, 32, 32, 1), np.uint8, entire),
        "index": array((rows,), np.int32, split),
        "weight": array((rows,), np.float32, split),
    }
    step = functools.partial(train.train_step, model=model, tx=tx, loss_fn=losses.bce)
    placed = jax.tree.map(lambda _: entire, state)
    step = jax.jit(step, out_shardings=(placed, entire), donate_argnums=0)
    return step, (state, batch, jax.eval_shape(lambda: jax.random.key(0)))


def communicated(program, operation):
    """The number of entries that each operation of this kind returns, in XLA's text."""
    lines = re.findall(rf"= (.*?) {operation}(?:-start)?\(", program)
    shapes = (re.findall(r"\w\d+\[([\d,]*)\]", line) for line in lines)
    return [sum(int(np.prod([int(n) for n in x.split(",") if n])) for x in each) for each in shapes]


def test_a_step_adds_the_gradients_once_and_gathers_no_data_set():
    model, tx = UNet(features=(8, 16, 32), norm="batch"), optax.adam(1e-3)
    step, arguments = abstract_step(devices.make_mesh(4), model, tx, rows=8)
    program = step.lower(*arguments).compile().as_text()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(arguments[0].params))
    sums = communicated(program, "all-reduce")
    assert parameters < sum(sums) < 1.05 * parameters  # and the sums of batch norm
    assert len([n for n in sums if n > 1000]) <= 2
    assert sum(communicated(program, "all-gather")) <= 32  # the counts of 8 images
    for operation in ("all-to-all", "collective-permute", "reduce-scatter"):
        assert communicated(program, operation) == []


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("n", [8, 256])
def test_a_step_is_lowered_for_more_devices_than_there_are(platform, n):
    mesh = AbstractMesh((n,), ("batch",), axis_types=(AxisType.Auto,))
    model, tx = UNet(features=(4, 8), norm="batch"), optax.adam(1e-3)
    step, arguments = abstract_step(mesh, model, tx, rows=n)
    text = step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert f'"batch"={n}' in text


class Wide(nn.Module):
    """Arrays that are split, and some that are not; without batch statistics or dropout."""

    @nn.compact
    def __call__(self, image):
        x = nn.relu(nn.Conv(64, (3, 3))(image))
        x = nn.relu(nn.Conv(130, (3, 3))(x))  # 130 is no multiple of 4, 64 is
        return nn.Conv(1, (1, 1))(x)


def test_a_state_that_is_split_over_the_devices_trains_as_one_that_is_not():
    mesh, model, tx = devices.make_mesh(4), Wide(), optax.adam(1e-3)
    states, results = [], []
    for place in (lambda x: x, lambda x: devices.shard(x, mesh)):
        state = place(train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3)))
        split_over = (
            {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(state)} if (states) else {}
        )
        step = train.make_train_step(model, tx, losses.bce, mesh=mesh)
        for seed in range(3):
            state, result = step(state, make_batch(5, seed), jax.random.key(1))
            results.append(jax.device_get(result))
        states.append(state)
    assert split_over[(3, 3, 64, 130)] == PartitionSpec(None, None, ("batch",))
    assert split_over[(3, 3, 3, 64)] == PartitionSpec()  # small
    after = {leaf.shape: leaf.sharding.spec for leaf in jax.tree.leaves(states[1])}
    assert after == split_over
    parts = [
        sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        for state in states
    ]
    assert parts[1] < 0.3 * parts[0]
    for one, split in zip(results[:3], results[3:], strict=True):
        assert split["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, map(jax.device_get, states)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    evaluation = train.make_eval_step(model, losses.bce, mesh=mesh)
    pair = [evaluation(state.variables, make_batch(5))["loss"] for state in states]
    np.testing.assert_allclose(*pair, rtol=1e-4)


def test_each_of_n_devices_holds_an_nth_of_a_wide_network():
    """500 million parameters with Adam's moments, 6 GB, of which nothing is allocated here."""
    mesh, tx = devices.make_mesh(4), optax.adam(1e-3)
    model = UNet(features=(264, 528, 1056, 2112, 4224), convs=2, norm="batch")
    state = jax.eval_shape(
        lambda: train.create_train_state(model, tx, jax.random.key(0), (1, 32, 32, 3))
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(state.params)) > 500e6
    placed = devices.shardings(state, mesh)
    abstract = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, placed
    )
    rows = devices.split(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((4, 32, 32, c), np.uint8, sharding=rows)
        for name, c in (("image", 3), ("mask", 1))
    }
    batch["weight"] = jax.ShapeDtypeStruct((4,), np.float32, sharding=rows)
    step = functools.partial(train.train_step, model=model, tx=tx, loss_fn=losses.bce)
    compiled = (
        jax.jit(step, out_shardings=(placed, devices.replicated(mesh)), donate_argnums=0)
        .lower(abstract, batch, jax.eval_shape(lambda: jax.random.key(0)))
        .compile()
    )
    memory = compiled.memory_analysis()
    nth = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)) / 4
    for needed in (memory.argument_size_in_bytes, memory.output_size_in_bytes):
        assert needed == pytest.approx(nth, rel=0.01)
    assert memory.alias_size_in_bytes == pytest.approx(nth, rel=0.01)  # donated


def test_a_split_run_is_that_on_one_device_and_goes_on_there(folders, alone, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train_program.main([*flags(folders, workdir, 4, 2), "--fsdp"]) == 0
    assert train_program.main(flags(folders, workdir, 1, 3)) == 0
    assert train_program.main([*flags(folders, workdir, 3, 4), "--fsdp"]) == 0
    check_same_run(workdir, alone)
    capsys.readouterr()
    assert train_program.main([*flags(folders, tmp_path / "b", 1, 1), "--fsdp"]) == 1
    assert "--fsdp needs several devices" in capsys.readouterr().err
