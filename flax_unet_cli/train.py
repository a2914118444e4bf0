"""Train a U-Net, or resume the run in the workdir.

examples:
  flax-unet train --workdir runs/mine --dataset folder --images my/images --masks my/masks
  flax-unet train --workdir runs/polyps --recipe pretrained --protocol effisegnet --image-size 128
  flax-unet train --workdir runs/demo --dataset synthetic_polyps --image-size 64 --epochs 12
"""

import contextlib
import errno
import json
import signal
import statistics
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from tqdm import tqdm

from flax_unet import (
    checkpoint,
    crops,
    data,
    devices,
    draw,
    images,
    processes,
    runs,
    summary,
)
from flax_unet.classes import decide
from flax_unet.evaluate import evaluate
from flax_unet.fit import Epoch, check_finite, fit
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.pictures import DataError
from flax_unet.predict import predict_proba
from flax_unet.recipes import RECIPES, Recipe, Training, as_described
from flax_unet.train import TrainState, make_forward
from flax_unet_cli import interrupt, program
from flax_unet_cli.sources import (
    ImageFlags,
    MaskFlags,
    Sources,
    check_used,
    image_format_of,
    load_split,
    mask_format_of,
    open_sources,
    split_of,
)


@dataclass(frozen=True)
class Options:
    """Flags of train, and of the studies."""

    places: Annotated[runs.Places, tyro.conf.arg(name="data")]
    settings: Annotated[runs.Settings, tyro.conf.arg(name="training")] = runs.Settings()
    masks: MaskFlags = MaskFlags()
    channels: Annotated[ImageFlags, tyro.conf.arg(name="pictures")] = ImageFlags()
    dry_run: bool = False
    """Stop after the summary of the data."""
    quiet: bool = False
    """Print warnings and errors only."""
    devices: int | None = None
    """Devices that share each batch; by default all."""
    fsdp: bool = False
    """Split parameters and optimizer state over the devices, too, if one has no room for them."""
    save_every: int = 1
    """Epochs from one checkpoint to the next: more where an epoch takes less time than writing one.
    The best is chosen among these; the last epoch, and one that a signal ends, are always saved."""
    several: Annotated[program.Several, tyro.conf.arg(name="processes")] = program.Several()


#: Seconds of an epoch of recipe `unet` on Kvasir-SEG at 256x256 on 2 CPU cores: docs/results.md.
SLOW = 260

#: Pictures of a split below which a warning says that its scores say little.
FEW = 5

#: Seconds between two drawings of the curves: one takes longer than a short epoch on a GPU.
CURVES_EVERY = 10.0


def run(options: Options) -> int:
    """Train to the last epoch, and say what is next."""
    if (code := complete(options)) or options.dry_run:
        return code
    workdir = options.places.workdir
    print("next:")
    out = workdir.parent / f"{workdir.name}-model"
    words = {
        "evaluate": (),
        "predict": ("--out", "predictions/", "PICTURES"),
        "export": ("--out", out),
    }
    for name, rest in words.items():
        print(f"  {program.command(name, '--workdir', workdir, *rest)}")
    return 0


def complete(options: Options) -> int:
    """Train to the last epoch; return 0, or 128 plus the signal that stopped it.

    Raises:
        FloatingPointError: the loss is not finite.
        ValueError, OSError: a setting or the data is unusable.
    """
    workdir = options.places.workdir
    with processes.together():
        prepared = prepare(options)
    if options.dry_run:
        return 0
    if processes.index() == 0:
        (workdir / "samples").mkdir(parents=True, exist_ok=True)
    with (
        runs.locked(workdir) as check,
        interrupt.signals_collected() as stop,  # also while the last checkpoint is being written
        checkpoint.open_checkpoints(workdir / "checkpoints") as checkpoints,
    ):
        state, progress = restore(options, prepared, checkpoints)
        try:
            train(options, prepared, state, progress, checkpoints, stop, check)
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, in another --workdir: this one is kept") from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise OSError(
                f"the disk of {workdir} is full: make room and run the same command again, which "
                "resumes from the latest checkpoint"
            ) from error
    if number := max(processes.each(lambda: max(stop, default=0))):
        name = signal.Signals(number).name
        print(f"{name}: the state is saved; run the same command again to resume")
        return 128 + number
    return 0


class Prepared(NamedTuple):
    """What a run needs, before anything is written."""

    mesh: Mesh | None
    training: Training
    pictures: "Pictures"
    key: jax.Array
    channels: int  # of the images
    fixed_length: bool  # the number of epochs cannot change
    content: dict[str, Any]  # of config.json
    state: Any  # the first one; None if there is a checkpoint


def prepare(options: Options) -> Prepared:
    """Load the data and build what is trained; nothing is written.

    Raises:
        ValueError, OSError: a setting or the data is unusable.
    """
    settings, places = options.settings, options.places
    workdir = places.workdir
    if options.save_every < 1:
        raise ValueError(f"--save-every is {options.save_every}: it must be positive")
    runs.recipe_of(settings)  # settings that do not fit are refused before anything else
    checkpoint.check_folder(workdir)
    runs.check_writable(workdir)
    if (settings.dataset, settings.recipe, settings.size) == ("kvasir_seg", "unet", (256, 256)):
        hours = settings.epochs * SLOW / 3600
        print(
            f"note: {settings.epochs} epochs of recipe unet take {hours:.1f} hours on 2 CPU cores; "
            "--recipe pretrained\n(pip install 'flax-unet[pretrained]') is quicker and better",
            flush=True,
        )
    mesh = devices.make_mesh(options.devices)
    if options.fsdp and mesh is None:
        raise ValueError("--fsdp needs several devices")
    if mesh is not None:
        n = processes.count()
        of = f" of {n} processes" if n > 1 else ""
        print(f"each batch is split over {mesh.size} devices{of}", flush=True)
    begun = recorded = None
    if checkpoint.exists(workdir / "checkpoints"):  # a run keeps what it found out about its data
        with contextlib.suppress(OSError, ValueError, TypeError):  # `check_workdir` reports it
            begun = runs.recorded_config(workdir)
            places = replace(places, split_by=begun["places"]["split_by"])
            recorded = images.from_json(begun["images"])
    if begun is None:
        check_used(settings, places)
    with program.task(f"opening {settings.dataset}; the first time takes a minute"):
        sources = processes.in_turn(lambda: open_sources(settings, places, options.masks.classes))
    known = options.channels == ImageFlags() and recorded
    image_format = known or image_format_of(settings, sources, options.channels)
    mask_format = mask_format_of(settings, sources, options.masks)
    print(f"images: {image_format}\nmasks: {mask_format}", flush=True)
    recipe = runs.recipe_of(settings, mask_format, image_format)
    changed = []
    if begun is not None and begun["settings"]["recipe"] == settings.recipe:
        recipe, changed = as_begun(recipe, begun, workdir)
    pictures = load_pictures(options, sources, recipe, mask_format, image_format, mesh)
    recipe = with_class_weights(recipe, settings, pictures)
    training = runs.build(settings, recipe, pictures.n)
    hashes = fingerprints(sources, pictures)
    content = runs.to_json(settings, places, recipe, hashes, mask_format, image_format)
    content["summary"] = summarise_data(sources, pictures, mask_format)
    init_key, key = jax.random.split(jax.random.key(settings.seed))
    state = None
    if not options.dry_run:
        runs.check_workdir(workdir, content, options.save_every)
        if changed:
            warn(
                f"recipe {settings.recipe} has another {', '.join(changed)} now than when this run "
                "began; the run goes on with its own"
            )
        if not checkpoint.exists(workdir / "checkpoints"):
            state = runs.create_state(settings, recipe, training, init_key, image_format.channels)
            content["terms"] = runs.terms_of(settings)
    fixed_length = recipe.optimizer.fixed_length
    channels = image_format.channels
    return Prepared(mesh, training, pictures, key, channels, fixed_length, content, state)


def as_begun(recipe: Recipe, config: dict[str, Any], workdir: Path) -> tuple[Recipe, list[str]]:
    """The recipe as a run began with it, and what another version has changed in it since.

    Raises:
        ValueError: this version does not have what the run needs.
    """
    try:
        begun = as_described(recipe, config["training"])
    except ValueError as error:
        version = config["versions"].get("flax-unet", "unknown")
        raise ValueError(
            f"{workdir} cannot be resumed, {error}: resume it with flax-unet {version}, with which "
            "it began, or choose another --workdir"
        ) from error
    parts = "loss", "augment", "optimizer"
    return begun, [part for part in parts if getattr(begun, part) != getattr(recipe, part)]


def restore(
    options: Options, prepared: Prepared, checkpoints: Any
) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, on the devices, and its progress; config.json is written.

    Raises:
        ValueError: the workdir holds another run.
        CheckpointError: there is no checkpoint that can be read.
    """
    mesh, training, pictures, _, channels, _, content, state = prepared
    settings, workdir, progress = options.settings, options.places.workdir, {}
    with processes.together():
        content, changes = runs.check_workdir(workdir, content, options.save_every)
    if changes:
        warn(f"resuming with other versions, device or places: {changes}")
    if checkpoints.latest_step() is not None:
        abstract = runs.abstract_state(training, channels)
        if mesh is not None:
            abstract = devices.abstract(abstract, mesh, split=options.fsdp)
        checkpoint.set_aside_damaged(checkpoints, abstract)
        state, progress = checkpoint.restore(checkpoints, abstract)
        print(f"resuming after step {int(state.step)}")
        done = int(state.step) // -(-pictures.n // settings.batch_size)
        content["settings"]["epochs"] = max(done, settings.epochs)
    if state is None:
        raise checkpoint.CheckpointError(
            f"no checkpoint in {workdir} can be read: the same command begins the run again"
        )
    text = json.dumps(content, indent=2) + "\n"
    processes.first(lambda: runs.write_atomically(workdir / "config.json", text))
    progress["config"] = content
    if options.fsdp and mesh is not None:
        return devices.shard(state, mesh), progress
    return devices.replicate(state, mesh), progress


def warn(message: str) -> None:
    if processes.index() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


class Pictures(NamedTuple):
    """What a run learns from."""

    n: int  # training images or crops in an epoch
    batches: Callable[..., Iterator[dict[str, Any]]]  # of those with the given indices
    train: data.Arrays | None  # None if they are streamed; without pixels if there are crops
    validation: data.Arrays
    seen: dict[str, dict[bytes, str]]  # by split, the hash and name of each picture


def load_pictures(
    options: Options,
    sources: Sources,
    recipe: Recipe,
    mask_format: MaskFormat,
    image_format: ImageFormat,
    mesh: Mesh | None,
) -> Pictures:
    """The pictures of a run; the training pictures are on each device unless they are streamed.

    Raises:
        ValueError: a split is empty, or a picture is unusable.
    """
    settings, size = options.settings, options.settings.batch_size
    source, arrays = split_of(settings, sources, "train"), None
    seen: dict[str, dict[bytes, str]] = {split: {} for split in sources}

    def load(split: str) -> data.Arrays:
        return load_split(settings, sources, split, mask_format, image_format, seen[split])

    formats = {"mask_format": mask_format, "image_format": image_format}
    if settings.crop is not None:
        return load_crops(options, sources, recipe, formats, seen, mesh)
    if must_stream(options, len(source) * settings.size[0] * settings.size[1], formats):
        batches = partial(data.stream, source, settings.size, size, **formats, mesh=mesh)
    else:
        arrays = data.to_device(load("train"), mesh)
        batches = partial(data.batches, arrays, size)
    validation = load("validation")
    return Pictures(len(source), batches, arrays, validation, seen)


def load_crops(
    options: Options,
    sources: Sources,
    recipe: Recipe,
    formats: dict[str, Any],
    seen: dict[str, dict[bytes, str]],
    mesh: Mesh | None,
) -> Pictures:
    """The pictures of a run on crops. They are streamed, too, if the device has no room for them.

    Raises:
        ValueError: as `load_pictures`.
    """
    settings, arrays = options.settings, None
    source, validation = (split_of(settings, sources, x) for x in ("train", "validation"))
    areas = crops.areas(source)
    streamed = must_stream(options, sum(areas), formats)
    frame = crops.frame_of(settings.size, recipe.augment.get("random_affine"))
    cut = crops.crops_of(areas, settings.size, frame, settings.seed)
    height, width = settings.size
    print(
        f"an epoch has {len(cut)} crops of {height}x{width} from {len(source)} pictures, as many "
        "as cover their area; a third of them are centred at a pixel of a class"
    )
    if streamed:
        batches = partial(crops.stream, source, cut, settings.batch_size, **formats, mesh=mesh)
    else:
        with program.task(f"loading {len(source)} pictures of train"):
            resident = crops.load(source, **formats, padding=frame[1], pictures=seen["train"])
        batches = partial(crops.batches, resident, cut, settings.batch_size)
        arrays = resident.arrays
    with program.task(f"loading {len(validation)} pictures of validation"):
        tiles = crops.whole(validation, settings.size, **formats, pictures=seen["validation"])
    return Pictures(len(cut), batches, arrays, tiles, seen)


def must_stream(options: Options, pixels: int, formats: dict[str, Any]) -> bool:
    """Whether pictures are decoded during training: with --stream, or if there is no room for them.

    Each device holds all of them, if they take at most half of its memory.

    Raises:
        DataError: grain is missing.
    """
    needed = pixels * crops.bytes_per_pixel(**formats)
    room = min(processes.each(devices.memory)) / 2
    if not options.places.stream and needed <= room:
        return False
    if not options.places.stream:
        print(
            f"the training pictures take {needed / 1e9:.1f} GB, more than half of the memory "
            f"({room / 1e9:.1f} GB): they are decoded again in each epoch, as with --stream"
        )
    if find_spec("grain") is None:
        raise DataError("this needs grain: pip install 'flax-unet[stream]'")
    return True


def with_class_weights(recipe: Recipe, settings: runs.Settings, pictures: Pictures) -> Recipe:
    """The recipe with the class weights of the settings.

    Raises:
        ValueError: there is one class only, or the training masks are streamed or lack a class.
    """
    weights, k = settings.class_weights, recipe.model.num_classes
    if weights is None:
        return recipe
    if k == 1 or recipe.model.overlapping:
        raise ValueError("--class-weights needs exclusive classes, more than two with --classes")
    if weights == "frequency":
        if pictures.train is None:
            raise ValueError("--class-weights frequency does not go with --stream: give numbers")
        pixels = [facts.resized for facts in pictures.train.facts]
        number = np.array([sum(each.get(str(i), 0) for each in pixels) for i in range(k)])
        if not number.all():
            raise ValueError(f"class {number.argmin()} is in no training mask, so it has no weight")
        weights = tuple((np.median(number) / number).round(4).tolist())
        print(f"class weights: {weights}")
    if len(weights) != k:
        raise ValueError(f"there are {len(weights)} class weights for {k} classes")
    return replace(recipe, class_weight=weights)


def fingerprints(sources: Sources, pictures: Pictures) -> dict[str, str]:
    """The fingerprint of each split; those of the loaded ones are known already."""
    known = {"validation": pictures.validation.fingerprint}
    if pictures.train is not None:
        known["train"] = pictures.train.fingerprint
    return {
        split: known.get(split) or data.fingerprint(sources[split], pictures.seen[split])
        for split in sources
    }


def summarise_data(sources: Sources, pictures: Pictures, mask_format: MaskFormat) -> dict[str, Any]:
    """Print and return a summary of the data.

    Raises:
        DataError: no training mask has an object at the network's size.
    """
    loaded = {"train": pictures.train, "validation": pictures.validation}
    known = {split: arrays.facts for split, arrays in loaded.items() if arrays is not None}
    content = summary.summarise(known, mask_format.names)
    print(summary.as_text(content))
    others = {split: len(source) for split, source in sources.items() if split not in content}
    print("".join(f"{split}: {n} pictures\n" for split, n in others.items()), end="")
    for split, source in sources.items():
        if (n := len(source)) < FEW and split != "train":
            print(f"warning: {split} has only {n} of the pictures: its scores will say little")
    facts = () if pictures.train is None else pictures.train.facts
    if facts and not any(one.resized.keys() - {"0"} for one in facts):
        size = max(one.needed for one in facts)
        if not size:
            raise DataError(
                "all training masks are empty: see what their values mean, --foreground"
            )
        raise DataError(
            "all masks are empty after resizing: the objects are too small for this --image-size; "
            f"about {size} would keep them"
        )
    splits, doubles = list(pictures.seen), []
    for i, split in enumerate(splits):
        for other in splits[i + 1 :]:
            for same in pictures.seen[split].keys() & pictures.seen[other].keys():
                names = pictures.seen[split][same], pictures.seen[other][same]
                doubles.append(f"{names[0]} ({split}) and {names[1]} ({other})")
    if doubles:
        shown = "; ".join(sorted(doubles)[:3])
        warn(f"{len(doubles)} pictures are the same in two splits: {shown}")
    left_out = len(getattr(sources["train"], "left_out", ()))
    return content | {
        "others": others,
        "files_left_out": left_out,
        "same_in_two_splits": len(doubles),
    }


def train(
    options: Options,
    prepared: Prepared,
    state: Any,
    progress: dict[str, Any],
    checkpoints: Any,
    stop: list[int],
    check: Callable[[], None],
) -> None:
    """Run the remaining epochs, given the state and the progress of the last checkpoint.

    Progress is the `records` of the unfinished epoch, the `history` of the epochs before, and the
    `config`, as JSON. Of several processes the first one writes.
    """
    settings, workdir = options.settings, options.places.workdir
    mesh, training, pictures, key, *_ = prepared
    n, batches, _, validation, _ = pictures
    first, writes = int(state.step) // -(-n // settings.batch_size), processes.index() == 0
    records = progress.get("records", [])
    history = processes.first(lambda: runs.read_history(workdir, first, progress.get("history")))
    if first >= settings.epochs:
        more = "" if prepared.fixed_length else "; ask for more with --epochs"
        print(f"all {first} epochs are done{more}")
    resident = data.to_device(validation, mesh)
    due = 0.0  # when to draw the curves again
    # Of crops and of several classes a picture may lack some: the pooled Dice has no empty case.
    per_image = training.model.num_classes == 1 and settings.crop is None
    chosen = "dice_per_image" if per_image else "dice_pooled"
    ends = [time.monotonic()]  # of epochs
    if first < settings.epochs:
        print("compiling; the first time takes up to a minute", flush=True)
        compile_evaluation(training, state.variables, resident, settings.batch_size, mesh)

    bar = tqdm(
        desc=f"epoch {first + 1}/{settings.epochs}",
        total=n,
        initial=len(records) * settings.batch_size,
        unit=" images",
        leave=False,
        dynamic_ncols=True,
        disable=True if first >= settings.epochs else None,
    )

    def on_step(images: int, record: dict[str, Any]) -> None:
        if not interrupt.unsaved.is_set():
            bar.clear()
            print(f"compiled in {time.monotonic() - ends[0]:.0f} s", flush=True)
        interrupt.unsaved.set()
        bar.set_postfix(loss=f"{record['loss']:.4f}", refresh=False)
        bar.update(images)

    def save(epoch: Epoch, dice: float | None = None) -> None:
        records = epoch.records if epoch.metrics is None else []
        content = {"records": records, "history": [*history], "config": progress["config"]}
        checkpoint.save(checkpoints, epoch.state, content, dice=dice)

    stopped = processes.agreed(stop, mesh)
    epochs = fit(
        training.model,
        training.tx,
        training.loss_fn,
        state,
        n,
        batches,
        key=devices.replicate(key, mesh),
        seed=settings.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        augment=training.augment,
        records=records,
        on_step=on_step,
        stop=lambda: bool(stopped()),
        mesh=mesh,
        check_values=False,  # the mask format has refused values without a meaning
    )
    save_last: Callable[[], None] | None = None  # what is not on disk yet
    written = event_writer(workdir, int(state.step)) if writes else contextlib.nullcontext()
    with bar, written as events:
        for epoch in epochs:
            bar.clear()
            if writes:
                check()
            save_last = partial(save, epoch)
            if epoch.metrics is None:  # the next start completes the epoch
                break
            scores, _ = evaluate(
                training.model,
                epoch.state.variables,
                resident,
                batch_size=settings.batch_size,
                loss_fn=training.loss_fn,
                mesh=mesh,
            )
            check_finite(int(epoch.state.step), validation_loss=scores["loss"])
            # The checkpoint comes last, so that a killed run repeats everything before it.
            line = metrics_line(epoch, epoch.metrics, scores)
            last = epoch.number == settings.epochs
            saved = last or epoch.number % options.save_every == 0 or bool(stopped())
            history.append(line if saved else line | {"saved": False})
            ends.append(time.monotonic())
            if writes:
                with (workdir / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps(history[-1]) + "\n")
                    runs.sync(file)
                print(epoch_line(history, chosen, settings.epochs, ends), flush=True)
                if stop or last or time.monotonic() > due:
                    draw.save_curves(workdir / "curves.png", history)
                    due = time.monotonic() + CURVES_EVERY
            if epoch.number % max(1, settings.epochs // 10) == 0 or last:
                variables = devices.entire(epoch.state.variables)
                if writes:
                    file = workdir / "samples" / f"epoch-{epoch.number:04d}.png"
                    save_samples(file, training.model, variables, validation)
            save_last = partial(save, epoch, scores[chosen])
            if saved:
                save_last()
                save_last = None
            if events is not None:
                try:
                    events(line)
                except OSError as error:
                    warnings.warn(f"no more TensorBoard events are written: {error}", stacklevel=2)
                    events = None
            if epoch.number < settings.epochs:
                bar.set_description(f"epoch {epoch.number + 1}/{settings.epochs}", refresh=False)
                bar.initial = 0
                bar.reset()
    if save_last is not None:
        save_last()
    checkpoint.finish(checkpoints, state)


def compile_evaluation(
    training: Training, variables: Any, arrays: data.Arrays, batch_size: int, mesh: Mesh | None
) -> None:
    """Compile what follows an epoch before there are steps that an interruption would lose."""
    model: Any = training.model
    batch = devices.put(next(data.batches(arrays, batch_size)), mesh)
    jax.block_until_ready(make_forward(model, mesh)(variables, batch))
    variables = devices.entire(variables)
    if processes.index() == 0:  # which draws samples
        predict_proba(model, variables, np.asarray(devices.here(arrays.image)[:4]))


def metrics_line(
    epoch: Epoch, metrics: dict[str, float], scores: dict[str, float]
) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "epoch": epoch.number,
        "step": int(epoch.state.step),
        **metrics,
        **{f"val_{name}": value for name, value in scores.items()},
        "seconds": round(epoch.seconds, 3),
        "images_per_second": round(epoch.images / epoch.seconds, 3),
    }


def save_samples(file: Path, model: Any, variables: Any, arrays: data.Arrays) -> None:
    """Draw the first four images with their predictions."""
    images, masks = np.asarray(arrays.image[:4]), np.asarray(arrays.mask[:4])
    proba = np.asarray(predict_proba(model, variables, images))
    prediction = proba
    if model.num_classes > 1:
        prediction = decide(proba, overlapping=model.overlapping)
    rows = dict(zip(arrays.name[:4], map(draw.panels, images, prediction, masks), strict=True))
    draw.save_sheet(file, rows, arrays.mask_format.names if model.num_classes > 1 else ())


@contextlib.contextmanager
def event_writer(workdir: Path, step: int) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """A function that writes a line of metrics.jsonl for TensorBoard; None without tensorboardX.

    It writes in its caller's thread. The thread of tensorboardX's SummaryWriter, once a write has
    failed, makes the program wait for ever.
    """
    try:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar
    except ImportError:
        yield None
        return
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    writer = EventsWriter(str(folder / "events"))
    proto: Any = event_pb2  # generated, and opaque to type checkers
    # TensorBoard forgets what a killed run wrote from this step on.
    start = proto.SessionLog(status=proto.SessionLog.START)
    writer.write_event(proto.Event(step=step + 1, session_log=start))

    def write(line: dict[str, Any]) -> None:
        for name, value in line.items():
            event = {"wall_time": time.time(), "step": line["step"], "summary": scalar(name, value)}
            writer.write_event(proto.Event(**event))
        writer.flush()

    try:
        yield write
    finally:
        with contextlib.suppress(OSError):
            writer.close()


def epoch_line(history: list[dict[str, Any]], chosen: str, epochs: int, ends: list[float]) -> str:
    """An epoch in less than 100 columns; metrics.jsonl has the rest.

    Args:
        history: the lines of metrics.jsonl.
        chosen: the metric by which the best checkpoint is chosen.
        epochs: of the whole run.
        ends: when training and each of its epochs ended, in seconds; the first epoch compiles.
    """
    line, name = history[-1], f"val_{chosen}"
    seconds = [after - before for before, after in pairwise(ends)]
    left = (epochs - line["epoch"]) * statistics.median(seconds[1:] or seconds)
    remaining = f", {tqdm.format_interval(left)} left" if left else ""
    saved = [each for each in history if each.get("saved", True)]
    is_best = line in saved and line[name] == max(each[name] for each in saved)
    texts = (
        f"epoch {line['epoch']}/{epochs}",
        f"val dice {line[name]:.4f}{' (best)' * is_best}",
        f"loss {line['loss']:.4f}",
        f"val loss {line['val_loss']:.4f}",
        tqdm.format_interval(seconds[-1]) + remaining,
    )
    return "  ".join(texts)


def main(args: list[str] | None = None) -> int:
    listed = "\n".join(
        textwrap.fill(f"{name}: {recipe.about}", 80, initial_indent="  ", subsequent_indent="    ")
        for name, recipe in RECIPES.items()
    )
    return program.main(Options, run, f"{__doc__}\nrecipes:\n{listed}", args)
