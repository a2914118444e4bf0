"""Train a U-Net: `python experiments/train.py --workdir runs/`; again, to go on with it."""

import contextlib
import json
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from recipes import (
    DETERMINES,
    FALLING,
    Config,
    absolute,
    abstract_state,
    create_state,
    draw_panels,
    keep_compiled,
    load_split,
    make_recipe,
    open_sources,
    read_json,
    split_of,
    to_json,
    write_atomically,
)
from tqdm import tqdm

from flax_unet import checkpoint, data, draw, metrics, predict, train

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def check_workdir(config: Config, fingerprints: dict[str, str], begun: bool) -> None:
    """Write config.json, or compare it with that of the run that the workdir already holds.

    Raises:
        ValueError: the run there computes something else, and the message lists the differences;
            or the files there are of something else.
    """
    new = to_json(config, fingerprints)
    if begun:
        old, changes = read_json(config.workdir), {}
        for part in DETERMINES:
            changes |= differences(old[part], new[part])
        if changes:
            raise ValueError(
                f"{config.workdir} holds a run with other settings ({listed(changes)}): choose "
                "another --workdir, or the same settings to go on with it"
            )
        changes = differences(old["versions"], new["versions"])
        changes |= differences(old["free"], new["free"] | {"epochs": old["free"].get("epochs")})
        changes |= differences({"device": old["device"]}, {"device": new["device"]})
        if changes:
            print(f"warning: not as it was before: {listed(changes)}")
        new |= {"versions": old["versions"], "device": old["device"]}
    else:
        check_unused(config.workdir)
    write_atomically(config.workdir / "config.json", json.dumps(new, indent=2) + "\n")


def check_unused(workdir: Path) -> None:
    """Check that what a new run writes over is nobody's work.

    Raises:
        ValueError: config.json or metrics.jsonl are of something else, or the checkpoints are gone.
    """
    file, allowed = workdir / "metrics.jsonl", 0
    if (workdir / "config.json").exists():
        read_json(workdir)
        allowed = 2  # a run may be killed in its second epoch, with the first still being saved
    if file.exists() and len(file.read_bytes().splitlines()) > allowed:
        raise ValueError(f"{file} has no checkpoint to go on from: choose another --workdir")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{key: (old value, new value)} of what differs."""
    pairs = {key: (old.get(key), new.get(key)) for key in old | new}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """`key: old -> new, ...`"""
    return ", ".join(f"{key}: {old} -> {new}" for key, (old, new) in changes.items())


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keep other processes from training in a workdir, as long as this one lives.

    Raises:
        ValueError: one does.
    """
    with (workdir / ".lock").open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is training in {workdir}") from error
        yield


def read_history(file: Path, epochs: int) -> list[dict[str, Any]]:
    """The first lines of metrics.jsonl, one an epoch; what a killed run wrote after is removed."""
    lines = file.read_text().splitlines()[:epochs] if file.exists() else []
    try:
        history = [json.loads(line) for line in lines]
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): move it away to go on") from error
    write_atomically(file, "".join(line + "\n" for line in lines))
    return history


def record(figures: dict[str, Any], weight: np.ndarray) -> dict[str, Any]:
    """What an epoch's summary needs of one step, as JSON."""
    figures, real = jax.device_get(figures), weight > 0
    return {
        "loss": float(figures["loss"]),
        "update_norm": float(figures["update_norm"]),
        "iou_coef": float(figures["iou_coef"]),
        "confusion": [count[real].tolist() for count in figures["confusion"]],
    }


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """The training figures of an epoch from the records of its steps."""
    counts = [np.concatenate(each) for each in zip(*(r["confusion"] for r in records), strict=True)]
    # Each image counts the same, also those of the last, smaller batch.
    loss = np.repeat([r["loss"] for r in records], [len(r["confusion"][0]) for r in records])
    return metrics.summary(loss, [r["iou_coef"] for r in records], metrics.Confusion(*counts))


@contextlib.contextmanager
def signals_noted() -> Iterator[list[int]]:
    """A list to which SIGTERM and Ctrl-C are added instead of ending the program at once."""
    noted: list[int] = []

    def note(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second time it ends at once
        noted.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_finite(step: int, **values: float) -> None:
    """Raise FloatingPointError, with the step's number, if a value is infinite or not a number."""
    for name, value in values.items():
        if not np.isfinite(value):
            raise FloatingPointError(
                f"the {name.replace('_', ' ')} of step {step} is {value}: the last checkpoint is "
                "kept; try a smaller --learning-rate in another --workdir"
            )


def run(config: Config) -> int:
    """Train to the last epoch; return 0, or the signal that came, with the state saved.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError, OSError: a setting or the data cannot be used.
    """
    # Settings that do not fit are refused before anything else.
    recipe = make_recipe(config)
    abstract = abstract_state(recipe)
    print(
        f"{config.dataset}: opening the pictures, which takes a minute the first time", flush=True
    )
    sources = open_sources(config)
    pictures = load_pictures(config, sources)
    (config.workdir / "samples").mkdir(parents=True, exist_ok=True)
    with (
        locked(config.workdir),
        signals_noted() as stop,  # also while the last save is waited for
        checkpoint.open_checkpoints(config.workdir / "checkpoints") as checkpoints,
    ):
        begun = checkpoints.latest_step() is not None
        fingerprints = {split: data.fingerprint(source) for split, source in sources.items()}
        init_key, key = jax.random.split(jax.random.key(config.seed))
        # First, for nothing is to be written if --init cannot be used.
        state, records = None if begun else create_state(config, recipe, init_key), []
        check_workdir(config, fingerprints, begun)
        if state is None:
            state, progress = checkpoint.restore(checkpoints, abstract)
            records = progress["records"]
            print(f"going on after step {int(state.step)}")
        fit(config, pictures, key, state, records, checkpoints, stop)
    return stop[0] if stop else 0


class Pictures(NamedTuple):
    """What a run learns from; `deal` makes batches of the `n` training images, in an order."""

    n: int
    deal: Callable[[np.ndarray], Iterator[dict[str, Any]]]
    validation: data.Arrays


def load_pictures(config: Config, sources: dict[str, Any]) -> Pictures:
    """The pictures of a run, those for training on the device unless they are to be streamed.

    Raises:
        ValueError: a split is empty, or a picture cannot be used.
    """
    source, size = split_of(config, sources, "train"), config.batch_size
    if config.stream:
        if find_spec("grain") is None:
            raise data.DataError("--stream needs grain: pip install 'flax-unet[stream]'")
        deal = partial(data.stream, source, config.image_size, size)
    else:
        arrays = data.to_device(load_split(config, sources, "train"))
        deal = partial(data.batches, arrays, size)
    return Pictures(len(source), deal, load_split(config, sources, "validation"))


def fit(
    config: Config,
    pictures: Pictures,
    key: jax.Array,
    state: train.TrainState,
    records: list[dict[str, Any]],
    checkpoints: Any,
    stop: list[int],
) -> None:
    """The epochs that are left, from a state and the records of the epoch that it stands in."""
    workdir, size = config.workdir, config.batch_size
    model, tx, loss_fn, augment = make_recipe(config, pictures.n)
    step_fn = train.make_train_step(model, tx, loss_fn, augment=augment)
    n, deal, validation = pictures
    resident = data.to_device(validation)
    steps_per_epoch = -(-n // size)
    first, step = int(state.step) // steps_per_epoch, int(state.step)
    history = read_history(workdir / "metrics.jsonl", first)
    events = event_writer(workdir, step)
    if first >= config.epochs:
        more = "" if config.recipe in FALLING else "; ask for more with --epochs"
        print(f"all {first} epochs are done{more}")
    for epoch in range(first, config.epochs):
        done, started = len(records) * size, time.perf_counter()
        order = data.shuffled(n, config.seed, epoch)[done:]
        bar = tqdm(
            desc=f"epoch {epoch + 1}/{config.epochs}",
            total=n,
            initial=done,
            unit=" images",
            leave=False,
            dynamic_ncols=True,
        )
        # The figures of a step are fetched while the device is at the next.
        late: list[tuple[int, dict[str, Any], np.ndarray]] = []
        with bar:
            for batch in deal(order):
                state, figures = step_fn(state, batch, key)
                step += 1
                late.append((step, figures, batch["weight"]))
                if len(late) > 1:
                    settle(*late.pop(0), records, bar)
                if stop:
                    break
            settle(*late.pop(0), records, bar)
        if len(records) < steps_per_epoch:  # the next start makes the rest of the epoch
            checkpoint.save(checkpoints, state, {"records": records})
            return
        seconds = time.perf_counter() - started
        scores, _ = predict.evaluate(
            model, state.variables, resident, batch_size=size, loss_fn=loss_fn
        )
        check_finite(step, validation_loss=scores["loss"])
        line = {
            "epoch": epoch + 1,
            "step": step,
            **summary(records),
            **{f"val_{name}": value for name, value in scores.items()},
            "seconds": round(seconds, 3),
            "images_per_second": round((n - done) / seconds, 3),
        }
        # The checkpoint comes last: what a killed run wrote before it is written anew.
        history.append(line)
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        report(line, config.epochs, events)
        draw.save_curves(workdir / "curves.png", history)
        if (epoch + 1) % max(1, config.epochs // 10) == 0 or epoch + 1 == config.epochs:
            sheet = workdir / "samples" / f"epoch-{epoch + 1:04d}.png"
            shown = range(min(4, len(validation.image)))
            draw_panels(sheet, model, state.variables, validation, shown)
        dice, records = scores["dice_per_image"], []
        checkpoint.save(checkpoints, state, {"records": records}, dice=dice)
        if stop:
            return


def settle(
    step: int, figures: dict[str, Any], weight: np.ndarray, records: list[dict[str, Any]], bar: tqdm
) -> None:
    """Wait for the figures of a step, check, record and show them."""
    records.append(record(figures, weight))
    loss = records[-1]["loss"]
    check_finite(step, loss=loss, update_norm=records[-1]["update_norm"])
    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    bar.update(int(weight.sum()))


def event_writer(workdir: Path, step: int) -> Any:
    """A writer of TensorBoard event files, if tensorboardX is installed."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)


def report(line: dict[str, Any], epochs: int, events: Any) -> None:
    """Print an epoch's figures, the article's first and ours after; write the event file."""
    shown = {
        "loss": "loss",
        "accuracy": "accuracy",
        "iou_coef": "iou_coef",
        "dice_per_image": "dice",
        "iou_per_image": "iou",
    }
    parts = [
        f"{prefix}{short} {line[prefix + key]:.4f}"
        for prefix in ("", "val_")
        for key, short in shown.items()
    ]
    print(
        f"epoch {line['epoch']}/{epochs}  {'  '.join(parts)}  {line['seconds']:.0f} s", flush=True
    )
    if events is not None:
        for key, value in line.items():
            events.add_scalar(key, value, line["step"])
        events.flush()


def main(args: list[str] | None = None) -> int:
    config = absolute(tyro.cli(Config, description=__doc__, args=args))
    keep_compiled()
    try:
        number = run(config)
    except KeyboardInterrupt:
        print("interrupted before the first step")
        return 128 + signal.SIGINT
    except (ValueError, FloatingPointError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if number:
        name = signal.Signals(number).name
        print(f"{name}: the state is saved; run the same command again to go on")
        return 128 + number
    return 0


if __name__ == "__main__":
    sys.exit(main())
