"""What each of several processes computes for tests/test_processes.py: prints it as JSON."""

import argparse
import json
import zlib
from pathlib import Path

import jax
import numpy as np
import optax
from test_devices import Plain, Wide, make_batch

from flax_unet import checkpoint, data, devices, losses, parallel, processes, train
from flax_unet.evaluate import evaluate
from flax_unet.pictures import DataError


def exchanges(folder):
    """Values, files and errors that the processes tell each other."""
    index, marker, caught = processes.index(), folder / "marker", {}
    processes.BLOCK = 1000  # so that some values are sent in parts
    sent = processes.each(lambda: bytes([index + 1]) * (3000 * index + 7))

    def failing():
        raise DataError(f"in process {index}")

    def odd():
        class Odd(Exception):
            pass

        raise Odd("cannot be pickled")

    def one_fails():
        with processes.together():
            if index == 1:
                failing()

    def one_fails_before_the_others_exchange():
        with processes.together():
            if index == 0:
                failing()
            processes.each(lambda: None)

    calls = {
        "all": lambda: processes.each(failing),
        "one": one_fails,
        "before": one_fails_before_the_others_exchange,
        "first": lambda: processes.first(failing),
        "odd": lambda: processes.each(odd if index == 1 else lambda: None),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            caught[name] = [type(error).__name__, str(error)]

    def bad(i):
        if i in (3, 4, 7):
            raise DataError(f"picture {i}")
        return i * i

    try:
        parallel.map_all(bad, range(9))
    except DataError as error:
        caught["map_all"] = str(error)
    computed = []
    return {
        "each": [[each[0], len(each)] for each in sent],
        "first": processes.first(lambda: f"from {index}"),
        "in_turn": processes.in_turn(lambda: (marker.exists(), marker.touch())[0]),
        "first_of_host": processes.first_of_host(),
        "caught": caught,
        "map_all": parallel.map_all(lambda i: (computed.append(i), i * i)[1], range(9)),
        "computed": sorted(computed),
    }


def signals(mesh):
    """What each call of `agreed` answers, if process 1 gets a signal after three of them."""
    collected, answers = [], []
    ask = processes.agreed(collected, mesh)
    for i in range(6):
        if i == 3 and processes.index() == 1:
            collected.append(15)
        answers.append(ask())
    return answers


def streamed(mesh):
    """The rows of batches of five that are decoded here, and the batches as a whole."""
    decoded, batches = [], []

    def decode(i):
        decoded.append(i)
        return np.full((2, 2, 1), i, np.uint8), np.full((2, 2, 1), i % 2, np.uint8)

    for batch in data.decoded_batches(decode, np.arange(100, 112), 5, mesh):
        put = devices.put(batch, mesh)
        parts = {name: devices.on_host(put[name]).tolist() for name in ("image", "weight")}
        batches.append(parts | {"here": devices.here(put["image"])[:, 0, 0, 0].tolist()})
    return {"decoded": sorted(decoded), "batches": batches}


def steps(mesh, split):
    """Losses and counts of three steps of five images, and scores of eleven."""
    model, tx = Wide() if split else Plain(), optax.adam(1e-3)
    state = train.create_train_state(model, tx, jax.random.key(0), (1, 8, 8, 3))
    state = devices.shard(state, mesh) if split else devices.replicate(state, mesh)
    step, results = train.make_train_step(model, tx, losses.bce, mesh=mesh), []
    for seed in range(3):
        state, result = step(state, make_batch(5, seed), jax.random.key(1))
        result = jax.device_get(result)
        results.append([float(result["loss"]), result["confusion"].tp.tolist()])
    batch = make_batch(11)
    arrays = data.Arrays(batch["image"], batch["mask"], [str(i) for i in range(11)], "")
    arrays = data.to_device(arrays, mesh)
    scores, counts = evaluate(model, state.variables, arrays, batch_size=5, mesh=mesh)
    return state, {"steps": results, "scores": scores, "counts": counts.tp.tolist()}


def saved(mesh, state, folder):
    """Save a state, and restore what other devices have saved."""
    with checkpoint.open_checkpoints(folder / "here") as checkpoints:
        checkpoint.save(checkpoints, state, {"a": 1}, dice=0.5)
        checkpoint.finish(checkpoints, state)
    leaves = [np.ascontiguousarray(devices.on_host(leaf)) for leaf in jax.tree.leaves(state)]
    crcs, progress = [zlib.crc32(leaf.tobytes()) for leaf in leaves], None
    abstract = jax.eval_shape(lambda: state)
    restored = {}
    for split in (False, True):
        with checkpoint.open_checkpoints(folder / "other") as checkpoints:
            target = devices.abstract(abstract, mesh, split=split)
            found, progress = checkpoint.restore(checkpoints, target)
            places = {leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found)}
            restored[str(split)] = [
                [zlib.crc32(devices.on_host(leaf).tobytes()) for leaf in jax.tree.leaves(found)],
                sorted(places),
            ]
    return {"saved": crcs, "restored": restored, "progress": progress}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    flags = parser.parse_args()
    processes.start(flags.coordinator, flags.processes, flags.process)
    mesh = devices.make_mesh()
    result = exchanges(flags.folder)
    result["signals"] = signals(mesh)
    result["streamed"] = streamed(mesh)
    _, result["replicated"] = steps(mesh, split=False)
    state, result["split"] = steps(mesh, split=True)
    result |= saved(mesh, state, flags.folder)
    file = flags.folder / f"{processes.index()}.json"
    file.write_text(json.dumps(result))
    processes.leave(0)


if __name__ == "__main__":
    main()
