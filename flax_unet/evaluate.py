"""Scores of a model: at the size of its network, and at each picture's own size.

    metrics, counts = evaluate(model, variables, arrays)   # at the network's size
    batches = list(score(model, variables, source, size))  # at both, each picture once
    content, counts, reliability = report(batches)

Metrics are defined in `flax_unet.metrics` and `flax_unet.boundary`.
"""

import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.sharding import Mesh

from flax_unet import boundary, classes, cpu, data, devices, formats, images, metrics, pictures
from flax_unet.classes import IGNORE
from flax_unet.formats import MaskFormat
from flax_unet.images import ImageFormat
from flax_unet.losses import bce
from flax_unet.model import accepted
from flax_unet.predict import is_on_host, is_tiled, predict_proba
from flax_unet.train import Loss, make_eval_step, make_forward, make_losses

RATIOS = metrics.RATIOS
#: Polyp size classes by fraction of the picture: [low, high).
POLYP_SIZES = {
    "none": (0, 1e-9),
    "small": (1e-9, 0.05),
    "medium": (0.05, 0.2),
    "large": (0.2, 1.01),
}

#: Height and width of the pictures that are kept of those predicted in tiles.
SHOWN = 384, 384

_eval_step = lru_cache(maxsize=8)(make_eval_step)


def evaluate(
    model: Any,
    variables: Any,
    arrays: data.Arrays,
    *,
    batch_size: int = 8,
    loss_fn: Loss = bce,
    mesh: Mesh | None = None,
) -> tuple[dict[str, float], metrics.Confusion]:
    """Metrics of a model over a data set, at the size of its arrays.

    Args:
        model: the network, or `predict.Mirrored` or `predict.Ensemble`.
        variables: its parameters (and state).
        arrays: the data set.
        batch_size: images at a time; affects `iou_coef` only.
        loss_fn: (logits, labels) to the loss per image.
        mesh: devices over which each batch is split, see `devices.make_mesh`.

    Returns:
        `metrics.summary`, and the counts per image [N, C].

    Raises:
        DataError: the data set is empty.
        ValueError: its images or masks have other values than the model needs.
    """
    if not len(arrays.image):
        raise pictures.DataError("the data set is empty")
    step, pending = _eval_step(model, loss_fn, mesh=mesh), []
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
    thresholds: np.ndarray  # int64 [n, 2, 102], at the own sizes: pixels of background and of one
    # class by ceil(100 p), see `best_threshold`; [n, 0] of several classes
    reliability: metrics.Reliability  # at the own sizes; of exclusive classes the predicted one's
    emptied: int  # masks that lost a class in resizing
    matrix: np.ndarray  # int64 [K, K], at the own sizes: pixels by true and predicted class; or
    # [0, 0] of overlapping classes
    seconds: float  # of the network for one entire batch


def score(
    model: Any,
    variables: Any,
    source: Sequence[dict[str, Any]],
    size: int | tuple[int, int] | None,
    mask_format: MaskFormat | None = None,
    image_format: ImageFormat | None = None,
    *,
    batch_size: int = 8,
    loss_fn: Loss = bce,
    tolerance: float = 1.0,
    threshold: float = 0.5,
    mesh: Mesh | None = None,
) -> Iterator[Scores]:
    """Decode and predict each picture once, and score it at the network's size and at its own.

    Args:
        model: the network, or `predict.Mirrored`, `predict.Ensemble` or `predict.Tiled`.
        variables: its parameters (and state).
        source: see `flax_unet.data`.
        size: height and width of the network's images; None for `predict.Tiled`, which predicts
            pictures at their own size alone.
        mask_format: what the values of the masks mean; by default found from this source.
        image_format: channels and range of the images; likewise.
        batch_size: pictures at a time; affects `iou_coef`, speed and memory.
        loss_fn: (logits, labels) to the loss per image; unused by `predict.Tiled`.
        tolerance: of the surface Dice, in percent of the picture's diagonal.
        threshold: probability above which a pixel is of a class; exclusive classes have none.
        mesh: devices over which each batch is split; not of `predict.Tiled`.

    Yields:
        `Scores` of each batch; with `predict.Tiled` of each picture.

    Raises:
        DataError: the source is empty, or an entry is unusable.
        ValueError: the threshold is not in [0, 1), or the classes have none; or size and model do
            not fit together.
    """
    if not len(source):
        raise pictures.DataError("the data set is empty")
    overlapping = classes.is_overlapping(model)
    if size is None and not is_tiled(model):
        raise ValueError("only predict.Tiled predicts pictures at their own size: give size")
    if size is not None and is_on_host(model):
        name = type(model).__name__
        raise ValueError(f"{name} predicts pictures at their own size, on the host: give size None")
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold is {threshold}: it must be in [0, 1)")
    mask_format = mask_format or formats.find(source)
    if mask_format.channels > 1 and not overlapping and threshold != 0.5:
        raise ValueError("exclusive classes have no threshold: the most probable one is predicted")
    decide = partial(classes.decide, threshold=threshold, overlapping=overlapping)
    read = {"mask_format": mask_format, "image_format": image_format or images.find(source)}
    at_own_size = partial(_at_own_size, decide=decide, overlapping=overlapping, tolerance=tolerance)
    if size is None:
        yield from _score_tiled(model, variables, source, read, at_own_size, decide)
        return
    size = (size, size) if isinstance(size, int) else size
    decode = partial(data.decode_resized, source, size=size, **read)
    forward, losses = None, make_losses(loss_fn, mesh)
    variables = variables if mesh is None else devices.spread(variables, mesh)
    recount = cpu.jit(partial(metrics.confusion, overlapping=overlapping))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), batch_size):
            index = range(start, min(start + batch_size, len(source)))
            resized, masks, names, true = zip(*pool.map(decode, index), strict=True)
            image, mask = np.stack(resized), np.stack(masks)
            rows, weight = data.pad(np.arange(len(index)), batch_size)
            batch = {"image": image[rows], "mask": mask[rows], "weight": weight}
            batch = devices.put(batch, mesh)
            if forward is None:  # compiled before it is timed
                forward = make_forward(model, mesh).lower(variables, batch).compile()
            began = time.perf_counter()
            result = jax.block_until_ready(forward(variables, batch))
            seconds = time.perf_counter() - began
            result["loss"] = losses(result["logits"], batch)
            result = devices.first_rows(result, batch_size, len(batch["weight"]))
            logits = result.pop("logits")
            if threshold != 0.5:
                shifted = logits - scipy.special.logit(np.float32(threshold))
                result["confusion"] = recount(shifted, mask[rows])
            proba = np.asarray(classes.probabilities(logits, overlapping=overlapping))[: len(index)]
            classes.check_mask(mask, proba.shape[-1])
            own_size = list(pool.map(at_own_size, proba, true))
            yield Scores(
                name=list(names),
                image=image,
                mask=mask,
                prediction=_shown(proba, decide),
                result=jax.device_get(result),
                own_size=[each.scores for each in own_size],
                thresholds=np.stack([each.thresholds for each in own_size]),
                reliability=add_reliability([each.reliability for each in own_size]),
                emptied=sum(map(_lost_a_class, true, masks)),
                matrix=np.sum([each.matrix for each in own_size], 0),
                seconds=seconds,
            )


def _score_tiled(
    model: Any,
    variables: Any,
    source: Sequence[dict[str, Any]],
    read: dict[str, Any],
    at_own_size: Callable[..., "_OwnSize"],
    decide: Callable[..., np.ndarray],
) -> Iterator[Scores]:
    """Scores of each picture at its own size, which is that of the network here."""
    for i in range(len(source)):
        example = source[i]
        image, true = data.decode_pair(example, **read)
        if i == 0:  # compiles one window, before it is timed
            predict_proba(model, variables, image[:1, :1])
        began = time.perf_counter()
        proba = predict_proba(model, variables, image)
        seconds = time.perf_counter() - began
        classes.check_mask(true, proba.shape[-1])
        own = at_own_size(proba, true)
        counts = ([[each[key] for each in own.scores]] for key in metrics.Confusion._fields)
        yield Scores(
            name=[example["name"]],
            image=pictures.resize_image(image, SHOWN)[None],
            mask=pictures.resize_mask(true, SHOWN)[None],
            prediction=_shown(pictures.resize_image(proba, SHOWN)[None], decide),
            result={
                "confusion": metrics.Confusion(*map(np.array, counts)),
                "loss": np.full(1, np.nan),  # would be compiled for each size of a picture
                "iou_coef": np.nan,
            },
            own_size=[own.scores],
            thresholds=own.thresholds[None],
            reliability=own.reliability,
            emptied=0,
            matrix=own.matrix,
            seconds=seconds,
        )


def _shown(proba: np.ndarray, decide: Callable[..., np.ndarray]) -> np.ndarray:
    """What `Scores.prediction` keeps of probabilities [n, H, W, K]."""
    return proba.astype(np.float16) if proba.shape[-1] == 1 else decide(proba)


class _OwnSize(NamedTuple):
    """A picture scored at its own size; see `Scores`."""

    scores: list[dict[str, Any]]
    thresholds: np.ndarray
    reliability: metrics.Reliability
    matrix: np.ndarray


def _at_own_size(
    proba: np.ndarray,
    true: np.ndarray,
    *,
    decide: Callable[..., np.ndarray],
    overlapping: bool,
    tolerance: float,
) -> _OwnSize:
    if proba.shape[:2] != true.shape[:2]:
        proba = pictures.resize_image(proba, true.shape[:2])
    counted, predicted, k = true != IGNORE, decide(proba), proba.shape[-1]
    if overlapping or k == 1:
        found, there, sure, right = predicted == 1, true == 1, proba, true
    else:  # each class against the rest
        found, there = (x == np.arange(k) for x in (predicted, true))
        sure, right = proba.max(-1, keepdims=True), predicted == true
    channels = np.broadcast_to(counted, found.shape)
    scores = [
        score_picture(found[..., i], there[..., i], counted=channels[..., i], tolerance=tolerance)
        for i in range(k)
    ]
    reliability = metrics.reliability(sure[counted], right[counted])
    thresholds = np.zeros(0, int)
    if k == 1:
        steps = np.ceil(100 * proba[counted].astype(np.float64)).astype(int)
        thresholds = np.bincount(steps + 102 * true[counted], minlength=204).reshape(2, 102)
    if overlapping:
        return _OwnSize(scores, thresholds, reliability, np.zeros((0, 0), int))
    k = max(2, k)
    matrix = np.bincount(true[counted].astype(int) * k + predicted[counted], minlength=k * k)
    return _OwnSize(scores, thresholds, reliability, matrix.reshape(k, k))


def best_threshold(thresholds: np.ndarray) -> tuple[float, np.ndarray]:
    """The threshold with the highest mean Dice per picture, of 0, 0.01, ... 0.99.

    Of several it is the one closest to 0.5.

    Args:
        thresholds: int [N, 2, 102], of each picture the pixels of background and of the class by
            ceil(100 p) for their probability p.

    Returns:
        The threshold, and the mean Dice at each, [100].
    """
    # Above j / 100 are the pixels with ceil(100 p) > j.
    above = thresholds[..., ::-1].cumsum(-1)[..., ::-1][..., 1:101]
    fp, tp = above[:, 0], above[:, 1]
    fn = thresholds[:, 1].sum(-1, keepdims=True) - tp
    dice = metrics.dice(metrics.Confusion(tp, fp, fn, None)).mean(0)
    best = np.flatnonzero(dice == dice.max())
    return int(best[np.abs(best - 50).argmin()]) / 100, dice


def _lost_a_class(mask: np.ndarray, resized: np.ndarray) -> bool:
    channels = zip(np.moveaxis(mask, -1, 0), np.moveaxis(resized, -1, 0), strict=True)
    return any({*np.unique(a)} - {0, IGNORE, *np.unique(b)} for a, b in channels)


def add_reliability(counts: Sequence[metrics.Reliability]) -> metrics.Reliability:
    """The reliability of all batches together."""
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


def counts_of(batches: Iterable[Scores]) -> metrics.Confusion:
    """The counts per image [N, C] at the network's size, of everything that `score` yields."""
    parts = [[x[: len(batch.name)] for x in batch.result["confusion"]] for batch in batches]
    return metrics.Confusion(*map(np.concatenate, zip(*parts, strict=True)))


def report(
    batches: Sequence[Scores], names: Sequence[str] = ("background", "foreground")
) -> tuple[dict[str, Any], metrics.Confusion, metrics.Reliability]:
    """The report on a scored data set.

    Args:
        batches: everything that `score` yielded.
        names: of the classes, see `formats.MaskFormat.learned`.

    Returns:
        The report (a JSON-serialisable dict), the counts per image [N, C] at the network's size,
        and the reliability. With `predict.Tiled` there is neither `loss` nor `iou_coef`.

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
    reliability = add_reliability([batch.reliability for batch in batches])
    if len(batches[0].own_size[0]) == 1:
        best, dice = best_threshold(np.concatenate([batch.thresholds for batch in batches]))
        chosen = {"threshold": best, "dice": dice.max(), "dice_at_half": dice[50]}
        own_size = _by_polyp_size(rows) | {"best_threshold": chosen}
    else:
        own_size = _by_class(rows, names)
    content = {
        **{name: value for name, value in values.items() if not np.isnan(value)},
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
    shape, flop = batches[0].image.shape, None
    shapes = jax.eval_shape(lambda v: (v, jnp.zeros(shape, jnp.float32)), variables)
    try:  # only on the CPU backend does JAX estimate the work before it compiles
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            if not is_on_host(model):
                apply = partial(model.apply, **accepted(model, train=False))
                counted = jax.jit(apply).lower(*shapes).cost_analysis() or {}
                flop = counted.get("flops")
    except (RuntimeError, NotImplementedError):  # JAX_PLATFORMS may exclude the CPU
        pass
    padded = len(batches[0].result["loss"])
    return {
        "parameters": _parameters(variables),
        "gflop_per_image": flop and flop / shape[0] / 1e9,
        "images_per_second": padded / statistics.median(batch.seconds for batch in batches),
    }


def _parameters(variables: Any) -> int:
    """The number of trained parameters; of an ensemble those of all members."""
    if isinstance(variables, list | tuple):
        return sum(map(_parameters, variables))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
