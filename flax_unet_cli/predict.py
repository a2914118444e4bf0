"""Segment pictures and videos.

examples:
  flax-unet predict --model pretrained --out masks/ pictures/
  flax-unet predict --workdir runs/mine --out masks/ --objects --save mask outline -- a.png b.tif

Writes for each picture NAME-mask.png and NAME-overlay.png at its own size, and a row of
predictions.csv. A mask has 0 and 255, or the indices of the classes with a palette; of overlapping
classes there is one mask for each, NAME-mask-CLASS.png. The results of a folder are in the same
subfolders as its pictures.

Videos (MP4, MOV, M4V, MKV, WebM, AVI; pip install 'flax-unet[video]') become NAME-overlay.mp4
without sound, and NAME.csv with a row per frame; masks and probabilities of frames are not written.
"""

import errno
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from flax_unet import devices, draw, images, pictures, predict, runs, video
from flax_unet.classes import decide
from flax_unet.formats import BINARY
from flax_unet.images import ImageFormat
from flax_unet.pictures import DataError
from flax_unet_cli import program, results
from flax_unet_cli.model_path import ModelPath
from flax_unet_cli.results import Table, Task
from flax_unet_cli.sources import RangeFlags

Kind = Literal["mask", "overlay", "outline", "probabilities", "probabilities-npy"]


@dataclass(frozen=True)
class Options:
    """Flags of predict."""

    workdir: Annotated[ModelPath, tyro.conf.arg(aliases=["--model"])]
    """Workdir of the run whose model is used, folder of an exported model, or the name of a shipped
    one: pretrained or strong."""
    inputs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(help_behavior_hint="(required)")
    ]
    """Pictures, videos, and folders of them, which are searched with their subfolders."""
    out: Path = Path("predictions")
    """Folder for the results."""
    save: tuple[Kind, ...] = ("mask", "overlay")
    """What is written for each picture: mask and overlay, the prediction blended into the picture;
    outline, the borders of what is predicted drawn into the picture; probabilities, 0 to 1 as 0 to
    65535 in a grey PNG (NAME-probability.png, of several classes NAME-probability-CLASS.png);
    probabilities-npy, float32 [H, W, classes] in NAME-probability.npy. Of a video overlay and
    outline are written. Give it after the pictures."""
    objects: bool = False
    """Also write objects.csv, with a row for each connected object (pixels that touch at a side or
    a corner): its area, its box, its centroid in pixels and its mean probability."""
    overwrite: bool = False
    """Write over results that exist. By default nothing is done if there are any. Pictures and
    videos that are read are never written over."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""
    threshold: float = 0.5
    """Probability above which a pixel is in the mask (of one class, or of overlapping classes)."""
    quiet: bool = False
    """Print warnings and errors only."""
    devices: int | None = None
    """Devices that share the pictures, or the windows of a picture; by default all."""
    ranges: Annotated[RangeFlags, tyro.conf.arg(name="pictures")] = RangeFlags()
    flips: bool = False
    """Average the prediction over the 4 flips of each image, at 4 times the work; over the 2 flips
    left to right for a model trained with --upright."""
    window: int | tuple[int, int] | None = None
    """Predict the pictures at their own size, in overlapping windows of this height and width, in
    place of resizing them; by default if the model was trained on crops, of their size."""
    backend: Literal["jax", "onnx"] = "jax"
    """What computes the network: jax, on the device that it finds; or onnx, ONNX Runtime on the
    CPU, which needs less time there (pip install 'flax-unet[onnx]')."""
    max_memory: float = 1.5
    """GB that the program may take. Pictures and videos that need more are skipped."""


#: Bytes of the program itself.
PROGRAM = 0.55e9
#: Bytes per pixel of the windows of a model, measured.
WINDOW = 260
#: Bytes per pixel that ffmpeg takes for decoding a video, and for encoding each result, measured.
DECODER, ENCODER = 60, 120
#: Rows of a picture that are drawn at a time.
ROWS = 256
#: Errors after which no other result could be written either.
FULL = errno.ENOSPC, errno.EDQUOT
#: The first columns of predictions.csv.
PICTURE = ("file", "status", "error", "height", "width")
#: Columns of objects.csv.
BOX = ("x", "y", "width", "height")
OBJECT = ("file", "frame", "class", "area", *BOX, "centroid_x", "centroid_y", "mean_probability")


@dataclass
class Context:
    """What is the same for all pictures, and what is summed over them."""

    options: Options
    trained: runs.Trained
    model: Any
    size: tuple[int, int] | None
    """To which images are resized; None if the model takes them at their own size."""
    image_format: ImageFormat
    legend: tuple[str, ...]
    """Names of the classes by their colour; the first has none."""
    mesh: Mesh | None = None
    objects: Table | None = None
    images: int = 0
    """Pictures and frames that were segmented."""
    pixels: int = 0
    network: float = 0
    """Seconds."""

    @property
    def at_a_time(self) -> int:
        """Images that the network takes at a time: one for each device, if they are resized."""
        return 1 if self.mesh is None or self.size is None else self.mesh.size

    @property
    def others(self) -> float:
        """Bytes that several devices take if they share this computer's memory: the parameters and
        an image each."""
        if self.mesh is None or jax.default_backend() != "cpu":
            return 0
        parameters = sum(x.nbytes for x in jax.tree.leaves(self.trained.variables))
        image = WINDOW * math.prod(self.size) if self.size is not None else 0
        return (self.mesh.size - 1) * (parameters + image)

    def memory_of(self, size: tuple[int, int]) -> float:
        """Bytes that the prediction of a picture of this width and height takes at most."""
        return memory_of(size, self.image_format, self.model, self.others)

    @property
    def room(self) -> float:
        """Bytes that the program may take."""
        return self.options.max_memory * 1e9

    @contextmanager
    def in_network(self) -> Iterator[None]:
        """Meanwhile the seconds are counted as those of the network."""
        start = time.perf_counter()
        yield
        self.network += time.perf_counter() - start

    @property
    def overlapping(self) -> bool:
        return self.trained.model.overlapping

    @property
    def several(self) -> bool:
        """Whether there are several channels."""
        return self.model.num_classes > 1

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the channels."""
        return self.legend if self.several and not self.overlapping else self.legend[1:]

    @property
    def columns(self) -> list[str]:
        """Of a prediction in a table."""
        return results.columns(self.names, self.overlapping)

    @property
    def drawn(self) -> list[str]:
        """What is drawn into the images."""
        return [kind for kind in ("overlay", "outline") if kind in self.options.save]


class Segmented(NamedTuple):
    """The prediction of an image."""

    proba: np.ndarray  # float32 [H, W, K]
    mask: np.ndarray  # from `classes.decide`
    drawn: dict[str, np.ndarray]  # by kind: uint8 [H, W, 3], with a legend of several classes


def probabilities(context: Context, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Probabilities of images [H, W, C], at the size of each: float32 [H, W, K]."""
    variables = context.trained.variables
    return predict.predict_images(context.model, variables, images, context.size, context.mesh)


def memory_of(
    size: tuple[int, int], image_format: ImageFormat, model: Any, others: float = 0
) -> float:
    """Bytes that the prediction of a picture takes at most, measured.

    Args:
        size: of the picture.
        image_format: how it is read.
        model: as it predicts.
        others: bytes that are taken besides.
    """
    values = image_format.channels * (1 if image_format.raw else 12)
    windows = model.windows * model.size[0] * model.size[1] if predict.is_tiled(model) else 0
    picture = size[0] * size[1] * (13 + values + 4 * model.num_classes)
    # Other devices than a CPU have a memory of their own: two batches pass through this one.
    passing = 8 * (image_format.channels + model.num_classes)
    window = WINDOW if jax.default_backend() == "cpu" else passing
    return PROGRAM + picture + window * windows + others


def run(options: Options) -> int:
    """Segment every picture and video; return 1 if some could not be read or written."""
    if not 0 <= options.threshold < 1:
        raise ValueError(f"threshold is {options.threshold}: it must be in [0, 1)")
    runs.check_writable(options.out)
    context = _load(options)
    if context.several and not context.overlapping and options.threshold != Options.threshold:
        raise ValueError(
            "the most probable class is predicted, so there is no threshold: leave out --threshold"
        )
    tables: dict[str, Sequence[str]] = {"predictions.csv": [*PICTURE, *context.columns, "seconds"]}
    if options.objects:
        tables["objects.csv"] = OBJECT
    plan = results.plan(
        options.inputs,
        options.out,
        ends=_ends(context),
        video_ends=(".csv", *(f"-{kind}.mp4" for kind in context.drawn)),
        tables=tuple(tables),
        overwrite=options.overwrite,
    )
    videos = any(task.is_video for task in plan.tasks)
    if videos:
        video.ffmpeg()  # whether it is installed
    options.out.mkdir(parents=True, exist_ok=True)
    if context.trained.terms:
        print(f"the model was {context.trained.terms}", flush=True)
    print(f"segmenting {len(plan.tasks)} pictures and videos, after compiling", flush=True)
    start = time.perf_counter()
    with ExitStack() as stack:
        table, *others = (
            stack.enter_context(Table(options.out / name, columns, options.overwrite))
            for name, columns in tables.items()
        )
        context.objects = others[0] if others else None
        failed = _segment_all(plan, context, table)
    if context.images:
        print(_speed(context, time.perf_counter() - start))
    done, left_out = len(plan.tasks) + len(plan.unreadable) - len(failed), failed + plan.left_out
    kind = "pictures and videos" if videos else "pictures"
    words = f"; left out: {results.listed(left_out)}" if left_out else ""
    out = results.printable(options.out)
    print(f"{done} of {len(plan.tasks)} {kind} segmented into {out}{words}")
    return min(len(failed), 1)


def _load(options: Options) -> Context:
    trained = runs.load_model(options.workdir, options.checkpoint)
    mesh = None if options.backend == "onnx" else devices.make_mesh(options.devices)
    model, size = trained.predictor(
        flips=options.flips,
        window=options.window,
        backend=options.backend,
        progress=True,
        mesh=mesh,
    )
    if mesh is not None:
        trained = trained._replace(variables=devices.replicate(trained.variables, mesh))
    return Context(
        options,
        trained,
        model,
        size,
        options.ranges.apply(trained.image_format),
        (trained.mask_format or BINARY).names,
        mesh,
    )


def _segment_all(plan: results.Plan, context: Context, table: Table) -> list[str]:
    """Segment all pictures and videos; return the names of those that failed."""
    failed = []

    def skip(name: str, error: Exception) -> str:
        failed.append(name)
        message = results.printable(error)
        tqdm.write(f"skipped: {message}", file=sys.stderr)
        return message

    for error in plan.unreadable:
        skip(error.filename, error)
    with tqdm(total=len(plan.tasks), unit=" pictures", leave=False, disable=None) as bar:
        start = time.perf_counter()
        for group, waiting in _in_groups(plan.tasks, context):
            probas = _predict(waiting, context)
            shared = (time.perf_counter() - start) / len(group)
            for task, error in group:
                start = time.perf_counter() - shared
                try:
                    if error is not None:
                        raise error
                    if task.is_video:
                        row = ["segmented", None, *_video(task, context)]
                    else:
                        row = ["segmented", None, *_picture(task, waiting, probas, context)]
                except (ValueError, OSError) as error:
                    if isinstance(error, OSError) and error.errno in FULL:
                        raise
                    row = ["failed", skip(task.name, error)]
                row += [None] * (len(table.columns) - len(row) - 2)
                table.add([task.name, *row, time.perf_counter() - start])
                bar.update()
            start = time.perf_counter()
    return failed


def _speed(context: Context, seconds: float) -> str:
    n, network = context.images, context.network
    return (
        f"{n} image{'s' * (n > 1)} in {seconds:.1f} s: {n / seconds:.2f} images/s, "
        f"{context.pixels / seconds / 1e6:.2f} megapixels/s; {network:.1f} s in the network and "
        f"its compilation, {seconds - network:.1f} s elsewhere"
    )


# Pictures


def _picture(
    task: Task, waiting: list[np.ndarray], probas: Iterator[np.ndarray], context: Context
) -> list[Any]:
    """Segment the first image that waits; return its height and width, and the cells of its
    prediction."""
    segmented = _segment(waiting.pop(0), probas, context)
    contents = _contents(segmented, context)
    for file, content in zip(task.results, contents, strict=True):
        results.save(file, content, context.options.overwrite)
    return [*segmented.mask.shape[:2], *_measured(segmented, context, task.name)]


def _in_groups(
    tasks: Iterable[Task], context: Context
) -> Iterator[tuple[list[tuple[Task, Exception | None]], list[np.ndarray]]]:
    """Read as many pictures as the network takes at a time, or as fit in the memory.

    A video is not read, and comes by itself.

    Yields:
        Tasks, each with the error if its picture cannot be read; and the images of the others.
    """
    group, waiting, most = [], [], 0.0
    for task in tasks:
        error = None
        try:
            (context.options.out / task.name).parent.mkdir(parents=True, exist_ok=True)
            needed = math.inf if task.is_video else _needed(task, context)
            if group and max(most, needed) + sum(x.nbytes for x in waiting) > context.room:
                yield group, waiting
                group, waiting, most = [], [], 0.0
            most = max(most, needed)
            if not task.is_video:
                waiting.append(_read(task, context))
        except (ValueError, OSError) as caught:
            error = caught
        group.append((task, error))
        if len(waiting) in (0, context.at_a_time):
            yield group, waiting
            group, waiting, most = [], [], 0.0
    if group:
        yield group, waiting


def _needed(task: Task, context: Context) -> float:
    """Bytes that the prediction of a picture takes, by its header."""
    name = str(task.file)
    size = pictures.size_of(pictures.open_content(task.file, name, decode=False))
    _check_memory(name, size, needed := context.memory_of(size), context)
    return needed


def _read(task: Task, context: Context) -> np.ndarray:
    name = str(task.file)
    return images.read(pictures.open_content(task.file, name), context.image_format, name)


def _check_memory(name: str, size: tuple[int, int], needed: float, context: Context) -> None:
    if needed > context.room:
        raise DataError(
            f"{name}: {size[0]} x {size[1]} pixels take {needed / 1e9:.1f} GB: allow it with "
            f"--max-memory {needed / 1e9 + 0.05:.1f}"
        )


def _predict(waiting: list[np.ndarray], context: Context) -> Iterator[np.ndarray]:
    """The probabilities of images, of which there may be none."""
    with context.in_network():
        return probabilities(context, waiting) if waiting else iter(())


def _segment(image: np.ndarray, probas: Iterator[np.ndarray], context: Context) -> Segmented:
    """Segment an image, given an iterator whose next item is its probabilities."""
    with context.in_network():
        proba = next(probas)
    context.images += 1
    context.pixels += proba.shape[0] * proba.shape[1]
    threshold, drawn = context.options.threshold, {}
    mask, overlay = decide_and_draw(image, proba, threshold, context.overlapping)
    if "overlay" in context.drawn:
        drawn["overlay"] = overlay
    del overlay
    if "outline" in context.drawn:
        drawn["outline"] = draw_outlines(image, mask, several=context.several)
    if context.several:
        legend = draw.legend(context.legend, image.shape[1])
        for kind in drawn:
            drawn[kind] = np.concatenate([drawn[kind], legend])
    return Segmented(proba, mask, drawn)


def _ends(context: Context) -> list[str]:
    """What the names of a picture's results end with, in the order of `_contents`."""
    each = [""]
    if context.several:
        each = [f"-{results.in_a_name(name)}" for name in context.names]
    ends = {
        "mask": [f"-mask{name}.png" for name in (each if context.overlapping else [""])],
        "overlay": ["-overlay.png"],
        "outline": ["-outline.png"],
        "probabilities": [f"-probability{name}.png" for name in each],
        "probabilities-npy": ["-probability.npy"],
    }
    return [end for kind in dict.fromkeys(context.options.save) for end in ends[kind]]


def _contents(segmented: Segmented, context: Context) -> Iterator[Image.Image | np.ndarray]:
    """The results of a picture, each one made when it is asked for."""
    proba, mask, drawn = segmented
    for kind in dict.fromkeys(context.options.save):
        if kind == "mask" and context.several and not context.overlapping:
            result = Image.fromarray(mask[..., 0], "P")
            result.putpalette(draw.palette(256).tobytes())
            yield result
        elif kind == "mask":
            for i in range(mask.shape[-1]):
                yield Image.fromarray(mask[..., i] * np.uint8(255))
        elif kind == "probabilities":
            for i in range(proba.shape[-1]):
                yield Image.fromarray(as_16_bits(proba[..., i]))
        else:
            yield proba if kind == "probabilities-npy" else Image.fromarray(drawn.pop(kind))


def _measured(
    segmented: Segmented, context: Context, name: str, frame: int | None = None
) -> list[Any]:
    """The cells of a prediction; its objects are written to their table."""
    most = None if context.objects is not None else results.BOXES
    cells, rows = results.measure(
        segmented.mask, segmented.proba, context.names, context.overlapping, most
    )
    if context.objects is not None:
        context.objects.add(*([name, frame, *row] for row in rows))
    return cells


def as_16_bits(proba: np.ndarray) -> np.ndarray:
    """Probabilities [H, W] from 0 to 1 as uint16, from 0 to 65535, rounded."""
    result = np.empty(proba.shape, np.uint16)
    for top in range(0, len(proba), ROWS):
        # float32 has too few digits for the product; resizing may give a little more than 1
        exact = proba[top : top + ROWS].astype(np.float64).clip(0, 1) * 65535
        result[top : top + ROWS] = np.rint(exact)
    return result


def decide_and_draw(
    image: np.ndarray, proba: np.ndarray, threshold: float, overlapping: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The mask that probabilities [H, W, K] predict, and an overlay [H, W, 3], strip by strip."""
    masks, overlays = [], []
    for top in range(0, len(image), ROWS):
        strip, p = image[top : top + ROWS], proba[top : top + ROWS]
        mask = decide(p, threshold=threshold, overlapping=overlapping)
        if proba.shape[-1] == 1:
            overlays.append(draw.overlay(strip, (p * mask)[..., 0]))
        else:
            overlays.append(draw.class_overlay(strip, draw.flat(mask), draw.palette(256)))
        masks.append(mask)
    return np.concatenate(masks), np.concatenate(overlays)


def draw_outlines(image: np.ndarray, mask: np.ndarray, *, several: bool) -> np.ndarray:
    """The borders of what is predicted in the image, uint8 [H, W, 3], strip by strip.

    Args:
        image: [H, W, C].
        mask: from `classes.decide`.
        several: whether there are colours for several classes; or one, that of the overlay.
    """
    colours = draw.palette(256) if several else np.array([(0, 0, 0), draw.PREDICTED], np.uint8)
    result = np.empty((*image.shape[:2], 3), np.uint8)
    for top in range(0, len(image), ROWS):
        first, end = max(top - 2, 0), top + ROWS + 2  # as far as a border reaches
        strip = draw.outlines(image[first:end], mask[first:end], colours)
        result[top : top + ROWS] = strip[top - first :][:ROWS]
    return result


# Videos


def _video(task: Task, context: Context) -> list[Any]:
    """Segment a video; return its height and width."""
    name, overwrite = str(task.file), context.options.overwrite
    clip = video.open_video(task.file)
    height, width = clip.size
    needed = context.memory_of((width, height))
    needed += width * height * (DECODER + ENCODER * len(context.drawn))
    _check_memory(name, (width, height), needed, context)
    values = context.image_format.channels * (1 if context.image_format.raw else 4)
    n = min(context.at_a_time, 1 + int((context.room - needed) / (width * height * values)))
    shown = height
    if context.several:
        shown += len(draw.legend(context.legend, width))
    own, *drawn_files = task.results
    columns = ["frame", "time", "height", "width", *context.columns, "seconds"]
    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(video.writer(file, (shown, width), clip.fps, overwrite))
            for kind, file in zip(context.drawn, drawn_files, strict=True)
        }
        table = stack.enter_context(Table(own, columns, overwrite))
        frames = stack.enter_context(closing(video.frames(clip)))
        frames = tqdm(frames, total=clip.frames, unit=" frames", leave=False, disable=None)
        stack.callback(frames.close)
        start, i = time.perf_counter(), 0
        for waiting in _read_frames(frames, n, name, context):
            probas = _predict(waiting, context)
            shared = (time.perf_counter() - start) / len(waiting)
            while waiting:
                start = time.perf_counter() - shared
                segmented = _segment(waiting.pop(0), probas, context)
                for kind, write in writers.items():
                    write(segmented.drawn[kind])
                cells = _measured(segmented, context, task.name, i)
                seconds = time.perf_counter() - start
                table.add([i, float(i / clip.fps), height, width, *cells, seconds])
                i += 1
            start = time.perf_counter()
    return [height, width]


def _read_frames(
    frames: Iterable[np.ndarray], n: int, name: str, context: Context
) -> Iterator[list[np.ndarray]]:
    """The images of a video, n at a time; at its end, or before an error, perhaps fewer."""
    waiting = []
    try:
        for frame in frames:
            waiting.append(images.read(Image.fromarray(frame), context.image_format, name))
            if len(waiting) == n:
                yield waiting
                waiting = []
    except DataError:
        if waiting:
            yield waiting
        raise
    if waiting:
        yield waiting


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
