"""Train a U-Net: `python experiments/train.py --workdir runs/`; again, to go on with it."""

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from recipes import Config, abstract_state, load_split, make_recipe, to_json, write_atomically
from tqdm import tqdm

from flax_unet import checkpoint, data, draw, metrics, predict, train


class Stopped(Exception):
    """A signal asked the run to end."""


def check_workdir(config: Config, fingerprints: dict[str, str]) -> None:
    """Write config.json, or compare it with the run that the workdir already holds.

    Raises:
        ValueError: the run there computes something else; the message lists the differences.
    """
    file, new = config.workdir / "config.json", to_json(config, fingerprints)
    if file.exists():
        old = json.loads(file.read_text())
        for part in ("config", "data"):
            if changes := differences(old[part], new[part]):
                raise ValueError(
                    f"{config.workdir} holds a run with other settings ({changes}): "
                    "choose another --workdir, or the same settings to go on with it"
                )
        if old["free"]["epochs"] > config.epochs:
            print(f"note: this run was to have {old['free']['epochs']} epochs")
        for part in ("device", "versions"):
            if changes := differences({part: old[part]}, {part: new[part]}):
                print(f"warning: not as it was when the run began: {changes}")
    write_atomically(file, json.dumps(new, indent=2) + "\n")


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """`key: old -> new` of what differs."""
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return ", ".join(f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys)


def read_history(file: Path, epochs: int) -> list[dict[str, Any]]:
    """The first lines of metrics.jsonl, one an epoch; what a killed run wrote after is removed."""
    lines = file.read_text().splitlines()[:epochs] if file.exists() else []
    write_atomically(file, "".join(line + "\n" for line in lines))
    return [json.loads(line) for line in lines]


def record(figures: dict[str, Any], weight: np.ndarray) -> dict[str, Any]:
    """What an epoch's summary needs of one step, as JSON."""
    real = weight > 0
    return {
        "loss": float(figures["loss"]),
        "iou_coef": float(figures["iou_coef"]),
        "confusion": [np.asarray(count)[real].tolist() for count in figures["confusion"]],
    }


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """The training figures of an epoch from the records of its steps."""
    counts = [np.concatenate(each) for each in zip(*(r["confusion"] for r in records), strict=True)]
    loss = np.repeat(
        [r["loss"] for r in records], [len(r["confusion"][0]) for r in records]
    )  # each image counts the same
    return metrics.summary(loss, [r["iou_coef"] for r in records], metrics.Confusion(*counts))


def run(config: Config) -> None:
    """Train to the last epoch; raise Stopped once a signal came and the state is saved."""
    workdir = config.workdir
    model, tx, loss_fn, augment = make_recipe(config)
    arrays = {split: load_split(config, split) for split in ("train", "validation")}
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    check_workdir(config, {split: a.fingerprint for split, a in arrays.items()})
    n, size = len(arrays["train"].image), config.batch_size
    steps_per_epoch = -(-n // size)

    init_key, key = jax.random.split(jax.random.key(config.seed))
    checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints")
    records: list[dict[str, Any]] = []
    if checkpoints.latest_step() is not None:
        state, progress = checkpoint.restore(checkpoints, abstract_state(config))
        records = progress["records"]
        print(f"going on after step {int(state.step)}")
    else:
        create = jax.jit(train.create_train_state, static_argnums=(0, 1, 3))
        state = create(model, tx, init_key, (1, model.stride, model.stride, 3))
    first = int(state.step) // steps_per_epoch
    history = read_history(workdir / "metrics.jsonl", first)
    step_fn = train.make_train_step(model, tx, loss_fn, augment=augment)
    events = event_writer(workdir, int(state.step))

    stop: list[int] = []

    def on_signal(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)  # the second time it ends at once
        stop.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)

    for epoch in range(first, config.epochs):
        started = time.perf_counter()
        order = data.shuffled(n, config.seed, epoch)[len(records) * size :]
        done_before = len(records)
        bar = tqdm(
            data.batches(arrays["train"], size, order),
            f"epoch {epoch + 1}/{config.epochs}",
            total=steps_per_epoch,
            initial=done_before,
            unit_scale=size,
            unit="image",
            leave=False,
            dynamic_ncols=True,
        )
        for batch in bar:
            state, figures = step_fn(state, batch, key)
            records.append(record(jax.device_get(figures), batch["weight"]))
            loss = records[-1]["loss"]
            bar.set_postfix(loss=f"{loss:.4f}")
            if not np.isfinite(loss):
                raise FloatingPointError(
                    f"the loss of step {int(state.step)} (epoch {epoch + 1}) is {loss}: the last "
                    "checkpoint is kept; try a smaller --learning-rate"
                )
            if stop and len(records) < steps_per_epoch:
                checkpoint.save(checkpoints, state, {"records": records})
                break
        bar.close()
        if len(records) == steps_per_epoch:
            seconds = time.perf_counter() - started
            validation, _ = predict.evaluate(
                model, state.variables, arrays["validation"], batch_size=size, loss_fn=loss_fn
            )
            line = {"epoch": epoch + 1, "step": int(state.step)}
            line |= {k: v for k, v in summary(records).items() if k != "n_images"}
            line |= {f"val_{k}": v for k, v in validation.items() if k != "n_images"}
            line["seconds"] = round(seconds, 3)
            line["images_per_second"] = round((n - done_before * size) / seconds, 3)
            history.append(line)
            # The line first, the checkpoint after: a line too many is removed at the next start.
            with (workdir / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
            records = []
            checkpoint.save(
                checkpoints, state, {"records": records}, dice=validation["dice_per_image"]
            )
            report(line, config.epochs, events)
            if (epoch + 1) % max(1, config.epochs // 10) == 0 or epoch + 1 == config.epochs:
                draw_samples(config, model, state, arrays["validation"], epoch + 1)
            draw.save_curves(workdir / "curves.png", history)
        if stop:
            break
    checkpoints.wait_until_finished()
    checkpoints.close()
    if stop:
        raise Stopped(signal.Signals(stop[0]).name)


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


def draw_samples(
    config: Config, model: Any, state: train.TrainState, arrays: data.Arrays, epoch: int
) -> None:
    """Write the panels of the first four validation images."""
    images, masks = arrays.image[:4], arrays.mask[:4]
    proba = np.asarray(predict.predict_proba(model, state.variables, images))
    rows = [draw.panels(*each) for each in zip(images, proba[..., 0], masks[..., 0], strict=True)]
    draw.save_sheet(config.workdir / "samples" / f"epoch-{epoch:04d}.png", rows)


def main(args: list[str] | None = None) -> int:
    config = tyro.cli(Config, description=__doc__, args=args)
    try:
        run(config)
    except Stopped as signal_name:
        print(f"{signal_name}: the state is saved; run the same command again to go on")
        return 128 + signal.Signals[str(signal_name)]
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
