"""Scores of a model: at the size of its network, and at each picture's own size.

    metrics, counts = evaluate(model, variables, arrays)   # at the network's size
    batches = list(score(model, variables, source, size))  # at both, each picture once
    content, counts, reliability = report(batches)

Metrics are defined in `flax_unet.metrics` and `flax_unet.boundary`.
"""

import os
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_unet import boundary, classes, data, formats, images, metrics, pictures
from flax_unet.classes import IGNORE
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.losses import bce
from flax_unet.model import accepted
from flax_unet.train import Loss, make_eval_step, make_forward, make_losses

RATIOS = (metrics.dice, metrics.iou, metrics.precision, metrics.recall)
#: Polyp size classes by fraction of the picture: [low, high).
POLYP_SIZES = {
    "none": (0, 1e-9),
    "small": (1e-9, 0.05),
    "medium": (0.05, 0.2),
    "large": (0.2, 1.01),
}

_eval_step = lru_cache(maxsize=8)(make_eval_step)


def evaluate(
    model: Any,
    variables: Any,
    arrays: data.Arrays,
    *,
    batch_size: int = 8,
    loss_fn: Loss = bce,
) -> tuple[dict[str, float], metrics.Confusion]:
    """Metrics of a model over a data set, at the size of its arrays.

    Args:
        model: the network, or `predict.Mirrored`.
        variables: its parameters (and state).
        arrays: the data set.
        batch_size: images at a time; affects `iou_coef` only.
        loss_fn: (logits, labels) to the loss per image.

    Returns:
        `metrics.summary`, and the counts per image [N, C].

    Raises:
        DataError: the data set is empty.
        ValueError: its images or masks have other values than the model needs.
    """
    if not len(arrays.image):
        raise pictures.DataError("the data set is empty")
    step, pending = _eval_step(model, loss_fn), []
    for batch in data.batches(arrays, batch_size):  # all are dispatched before the first is fetched
        result = step(variables, batch)
        del result["logits"]
        pending.append(result)
    classes.check_mask(arrays.mask, pending[0]["confusion"].tp.shape[-1])
    return _summary(jax.device_get(pending), len(arrays.image))


def _summary(
    results: Sequence[dict[str, Any]], n: int
) -> tuple[dict[str, float], metrics.Confusion]:
    """The metrics of n images, without the padding of the last batch."""
    counts = zip(*(result["confusion"] for result in results), strict=True)
    counts = metrics.Confusion(*(np.concatenate(each)[:n] for each in counts))
    loss = np.concatenate([result["loss"] for result in results])[:n]
    return metrics.summary(loss, [result["iou_coef"] for result in results], counts), counts


class Scores(NamedTuple):
    """A batch of n pictures, scored by `score`."""

    name: list[str]
    image: np.ndarray  # [n, H, W, C], at the network's size like all but `own_size`
    mask: np.ndarray  # uint8 [n, H, W, 1], or [n, H, W, K] of overlapping classes
    prediction: np.ndarray  # of the mask's shape: float16 probabilities of one class, else uint8
    result: dict[str, Any]  # of `train.eval_step`, with padding and without logits
    own_size: list[list[dict[str, Any]]]  # `score_picture` of each class, at the own sizes
    reliability: metrics.Reliability  # at the own sizes; of exclusive classes the predicted one's
    emptied: int  # masks that lost a class in resizing
    matrix: np.ndarray  # int64 [K, K], at the own sizes: pixels by true and predicted class; or
    # [0, 0] of overlapping classes
    seconds: float  # of the network for one entire batch


def score(
    model: Any,
    variables: Any,
    source: Sequence[dict[str, Any]],
    size: int | tuple[int, int],
    mask_format: MaskFormat | None = None,
    image_format: ImageFormat | None = None,
    *,
    batch_size: int = 8,
    loss_fn: Loss = bce,
    tolerance: float = 1.0,
) -> Iterator[Scores]:
    """Decode and predict each picture once, and score it at the network's size and at its own.

    Args:
        model: the network, or `predict.Mirrored`.
        variables: its parameters (and state).
        source: see `flax_unet.data`.
        size: height and width of the network's images.
        mask_format: what the values of the masks mean; by default found from this source.
        image_format: channels and range of the images; likewise.
        batch_size: pictures at a time; affects `iou_coef`, speed and memory.
        loss_fn: (logits, labels) to the loss per image.
        tolerance: of the surface Dice, in percent of the picture's diagonal.

    Yields:
        `Scores` of each batch.

    Raises:
        DataError: the source is empty, or an entry is unusable.
    """
    if not len(source):
        raise pictures.DataError("the data set is empty")

    decode = partial(
        data.decode_resized,
        source,
        size=(size, size) if isinstance(size, int) else size,
        mask_format=mask_format or formats.find(source),
        image_format=image_format or images.find(source),
    )

    overlapping = classes.is_overlapping(model)

    def at_own_size(proba: np.ndarray, true: np.ndarray) -> tuple[Any, Any, np.ndarray]:
        proba, counted = pictures.resize_image(proba, true.shape[:2]), true != IGNORE
        predicted, k = classes.decide(proba, overlapping=overlapping), proba.shape[-1]
        if overlapping or k == 1:
            found, there, sure, right = predicted == 1, true == 1, proba, true
        else:  # each class against the rest
            found, there = (x == np.arange(k) for x in (predicted, true))
            sure, right = proba.max(-1, keepdims=True), predicted == true
        channels = np.broadcast_to(counted, found.shape)
        scores = [
            score_picture(
                found[..., i], there[..., i], counted=channels[..., i], tolerance=tolerance
            )
            for i in range(k)
        ]
        reliability = metrics.reliability(sure[counted], right[counted])
        if overlapping:
            return scores, reliability, np.zeros((0, 0), int)
        k = max(2, k)
        matrix = np.bincount(true[counted].astype(int) * k + predicted[counted], minlength=k * k)
        return scores, reliability, matrix.reshape(k, k)

    forward, losses = None, make_losses(loss_fn)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), batch_size):
            index = range(start, min(start + batch_size, len(source)))
            resized, masks, names, true = zip(*pool.map(decode, index), strict=True)
            image, mask = np.stack(resized), np.stack(masks)
            rows, weight = data.pad(np.arange(len(index)), batch_size)
            batch = {"image": image[rows], "mask": mask[rows], "weight": weight}
            if forward is None:  # compiled before it is timed
                forward = make_forward(model).lower(variables, batch).compile()
            began = time.perf_counter()
            result = jax.block_until_ready(forward(variables, batch))
            seconds = time.perf_counter() - began
            logits = result.pop("logits")
            result["loss"] = losses(logits, batch)
            proba = np.asarray(classes.probabilities(logits, overlapping=overlapping))[: len(index)]
            classes.check_mask(mask, proba.shape[-1])
            own_size, counts, matrices = zip(*pool.map(at_own_size, proba, true), strict=True)
            one = proba.shape[-1] == 1 and not overlapping
            yield Scores(
                name=list(names),
                image=image,
                mask=mask,
                prediction=proba.astype(np.float16)
                if one
                else classes.decide(proba, overlapping=overlapping),
                result=jax.device_get(result),
                own_size=list(own_size),
                reliability=_add(counts),
                emptied=sum(map(_lost_a_class, true, masks)),
                matrix=np.sum(matrices, 0),
                seconds=seconds,
            )


def _lost_a_class(mask: np.ndarray, resized: np.ndarray) -> bool:
    channels = zip(np.moveaxis(mask, -1, 0), np.moveaxis(resized, -1, 0), strict=True)
    return any({*np.unique(a)} - {0, IGNORE, *np.unique(b)} for a, b in channels)


def _add(counts: Sequence[metrics.Reliability]) -> metrics.Reliability:
    return metrics.Reliability(*(np.sum(x, 0) for x in zip(*counts, strict=True)))


def score_picture(
    predicted: np.ndarray,
    true: np.ndarray,
    *,
    counted: np.ndarray | None = None,
    tolerance: float = 1.0,
) -> dict[str, float]:
    """Counts and metrics of a class in one picture; distances are in percent of its diagonal.

    Args:
        predicted, true: bool [H, W].
        counted: bool [H, W], the pixels that count; all by default.
        tolerance: of the surface Dice, in percent of the diagonal.
    """
    counted = np.ones_like(true) if counted is None else counted
    predicted, true, percent = predicted & counted, true & counted, 100 / np.hypot(*true.shape)
    neither = counted & ~predicted & ~true
    pixels = predicted & true, predicted & ~true, true & ~predicted, neither
    counts = metrics.Confusion(*(int(x.sum()) for x in pixels))
    distances = boundary.distances(predicted, true)
    return {
        "foreground_fraction": float(true.sum() / max(counted.sum(), 1)),
        **counts._asdict(),
        **{ratio.__name__: float(ratio(counts)) for ratio in RATIOS},
        "hd95": percent * boundary.hd95(distances),
        "assd": percent * boundary.assd(distances),
        "surface_dice": boundary.surface_dice(distances, tolerance / percent),
    }


def report(
    batches: Sequence[Scores], names: Sequence[str] = ("background", "foreground")
) -> tuple[dict[str, Any], metrics.Confusion, metrics.Reliability]:
    """The report on a scored data set.

    Args:
        batches: everything that `score` yielded.
        names: of the classes, see `formats.MaskFormat.learned`.

    Returns:
        The report (a JSON-serialisable dict), the counts per image [N, C] at the network's size,
        and the reliability.

    Raises:
        ValueError: there are no batches.
    """
    if not batches:
        raise ValueError("there is nothing to report: `score` yielded no batches")
    rows = [
        {"name": name, **(scores[0] if len(scores) == 1 else dict(zip(names, scores, strict=True)))}
        for batch in batches
        for name, scores in zip(batch.name, batch.own_size, strict=True)
    ]
    values, counts = _summary([batch.result for batch in batches], len(rows))
    ratios = np.stack([metrics.dice(counts).mean(-1), metrics.iou(counts).mean(-1)], axis=-1)
    dice_interval, iou_interval = metrics.bootstrap_interval(ratios)
    reliability = _add([batch.reliability for batch in batches])
    one = len(batches[0].own_size[0]) == 1
    own_size = _by_polyp_size(rows) if one else _by_class(rows, names)
    content = {
        **values,
        "classes": list(names),
        "masks_that_lost_a_class": sum(batch.emptied for batch in batches),
        "dice_per_image_interval": dice_interval,
        "iou_per_image_interval": iou_interval,
        "own_size": {
            **own_size,
            "confusion_matrix": np.sum([batch.matrix for batch in batches], 0).tolist(),
            "calibration_error": metrics.calibration_error(reliability),
            "images": rows,
        },
    }
    return content, counts, reliability


def _by_polyp_size(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by_size = {
        name: mean_scores([x for x in rows if low <= x["foreground_fraction"] < high])
        for name, (low, high) in POLYP_SIZES.items()
    }
    return {**mean_scores(rows), "polyp_sizes": POLYP_SIZES, "by_polyp_size": by_size}


def _by_class(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The scores of each class, and the means of the pooled ratios over classes.

    The second mean leaves out a class `background`, as is usual in medicine.
    """
    by_class = {name: mean_scores([row[name] for row in rows]) for name in names}
    for name, scores in by_class.items():
        scores["n_images_with_it"] = sum(row[name]["foreground_fraction"] > 0 for row in rows)

    def mean(kept: list[str]) -> dict[str, float]:
        keys = [ratio.__name__ for ratio in RATIOS]
        return {key: float(np.mean([by_class[n]["pooled"][key] for n in kept])) for key in keys}

    foreground = [name for name in names if name != "background"]
    return {
        "n_images": len(rows),
        "mean_of_classes": mean(list(names)),
        "mean_without_background": mean(foreground),
        "by_class": by_class,
    }


def mean_scores(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and 95 % interval of each metric over some pictures, and the pooled ratios."""
    if not scores:
        return {"n_images": 0}
    keys = [*(ratio.__name__ for ratio in RATIOS), "hd95", "assd", "surface_dice"]
    values = np.array([[each[key] for key in keys] for each in scores])
    intervals = metrics.bootstrap_interval(values)
    total = metrics.Confusion(*(sum(x[key] for x in scores) for key in metrics.Confusion._fields))
    return {
        "n_images": len(scores),
        "per_image": {
            key: {"mean": float(column.mean()), "interval": interval}
            for key, column, interval in zip(keys, values.T, intervals, strict=True)
        },
        "pooled": {ratio.__name__: float(ratio(total)) for ratio in RATIOS},
    }


def cost(model: Any, variables: Any, batches: Sequence[Scores]) -> dict[str, float | None]:
    """Parameters, GFLOP per image as XLA counts them on a CPU, and images per second.

    Args:
        model, variables: as `score` takes them.
        batches: everything that `score` yielded.
    """
    shape = batches[0].image.shape
    shapes = jax.eval_shape(lambda v: (v, jnp.zeros(shape, jnp.float32)), variables)
    try:  # only on the CPU backend does JAX estimate the work before it compiles
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            apply = partial(model.apply, **accepted(model, train=False))
            counted = jax.jit(apply).lower(*shapes).cost_analysis() or {}
        flop = counted.get("flops")
    except (RuntimeError, NotImplementedError):  # JAX_PLATFORMS may exclude the CPU
        flop = None
    padded = len(batches[0].result["loss"])
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(variables["params"])),
        "gflop_per_image": flop and flop / shape[0] / 1e9,
        "images_per_second": padded / statistics.median(batch.seconds for batch in batches),
    }
