"""A run on one page: `report_html` makes a single HTML file of what train and evaluate wrote.

It has no script and refers to no other file: style, curves and pictures are in it. Each number is
a `<data value=...>` element, which holds all of its digits.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from flax_unet.draw import as_rgb, palette
from flax_unet.metrics import Reliability
from flax_unet.svg import confusion_matrix, curves, escaped, number, reliability_diagram

RATIOS = {"dice": "Dice", "iou": "IoU", "precision": "Precision", "recall": "Recall"}
DISTANCES = {"hd95": "HD95, %", "assd": "ASSD, %", "surface_dice": "Surface Dice"}
COUNTED = {
    "pictures": "Pictures",
    "empty": "Empty masks",
    "emptied": "Masks that lose a class in resizing",
    "objects": "Objects",
    "objects_lost": "Objects that vanish in resizing",
}

STYLE = """
:root { color-scheme: light dark; --ground: #f5f6f8; --card: #fff; --ink: #1a2130; --soft: #5b6577;
  --line: #d9dde5; --one: #1f5fd0; --two: #d9480f; --cell: 31, 95, 208; }
@media (prefers-color-scheme: dark) { :root { --ground: #11151d; --card: #1a202b; --ink: #e8ebf1;
  --soft: #9aa5b8; --line: #323b4b; --one: #7fb0ff; --two: #ffa35c; --cell: 110, 165, 255; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem clamp(0.75rem, 3vw, 2rem); color: var(--ink);
  background: var(--ground); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Liberation Sans", sans-serif; }
h1, dd, p, figcaption, td:first-child, .left td { overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.15rem; margin: 0 0 0.7rem; }
p { margin: 0.3rem 0; } .soft, figcaption, th, dt { color: var(--soft); }
section { margin: 1rem 0; padding: 1.1rem 1.3rem; background: var(--card); border-radius: 0.8rem;
  border: 1px solid var(--line); overflow-x: auto; break-inside: avoid; }
dl.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: 1rem;
  margin: 0; }
dt, figcaption, th, svg { font-size: 0.875rem; } dd { margin: 0; font-size: 1.6rem; }
dd small { display: block; font-size: 0.875rem; color: var(--soft); }
table { border-collapse: collapse; width: 100%; }
th, td { padding: 0.3rem 0.6rem; text-align: right; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; } td { font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td small { display: block; color: var(--soft); } td small, data { white-space: nowrap; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr));
  gap: 1.5rem; }
figure { margin: 0.6rem 0 1rem; }
.swatch { display: inline-block; width: 0.9em; height: 0.9em; margin: 0 0.4em 0 0.8em;
  border-radius: 0.2em; vertical-align: -0.1em; print-color-adjust: exact; }
figure img { width: 100%; height: auto; display: block; border-radius: 0.4rem; }
figure img.small { image-rendering: pixelated; }
svg { display: block; width: 100%; max-width: 34rem; height: auto; fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .soft { fill: var(--soft); }
svg .dash { stroke: var(--soft); stroke-dasharray: 4 4; fill: none; }
svg .one { stroke: var(--one); } svg .two { stroke: var(--two); }
svg polyline { fill: none; stroke-width: 2; } svg circle.one, svg rect.one { fill: var(--one); }
svg circle.two { fill: var(--two); } svg .middle { text-anchor: middle; }
svg .end { text-anchor: end; } svg rect.cell { fill: rgb(var(--cell)); }
details summary { cursor: pointer; font-weight: 600; } details table { margin: 0.5rem 0 1rem; }
details td, .left td { text-align: left; } h3 { font-size: 1rem; margin: 0.8rem 0 0; }
@media print { :root { color-scheme: light; --ground: #fff; --card: #fff; --ink: #000;
  --soft: #444; --line: #bbb; --one: #1f5fd0; --two: #d9480f; --cell: 31, 95, 208; }
  body { padding: 0; max-width: none; font-size: 10pt; } * { print-color-adjust: exact; } }
"""


def report_html(
    *,
    title: str,
    config: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any] | None,
    pictures: Mapping[str, np.ndarray],
    reliability: Reliability | None = None,
) -> str:
    """The report on a run, one HTML file that needs no other; what is missing is left out.

    Args:
        title: its heading.
        config: the content of config.json; its `summary` is the table of the data.
        history: the records of metrics.jsonl, one per epoch.
        evaluation: the content of evaluation-WHAT.json, if the run was evaluated.
        pictures: {caption: image}, such as the best, median and worst prediction; see
            `draw.as_rgb` for the images.
        reliability: from `evaluate.report`.
    """
    own_size = (evaluation or {}).get("own_size", {})
    sections = {
        "Results": _headline(evaluation, history, config),
        "Curves": curves(history, (evaluation or {}).get("step")),
        "Classes": _classes(own_size),
        "Sizes": _sizes(own_size),
        "Shifted": _shifted(evaluation or {}),
        "Negatives": _negatives(evaluation or {}),
        "Pictures": _pictures(pictures, (evaluation or config).get("masks") or {}),
        "Reliability": reliability_diagram(reliability, own_size.get("calibration_error")),
        "Confusion": confusion_matrix(own_size.get("confusion_matrix"), evaluation),
        "Data": _data(config.get("summary") or {}),
        "Configuration": _configuration(config),
    }
    body = "".join(
        f"<section id={name.lower()}><h2>{name}</h2>{content}</section>\n"
        for name, content in sections.items()
        if content
    )
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<link rel="icon" href="data:,"><title>{escaped(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escaped(title)}</h1>\n"
        f'<p class="soft">{_subtitle(evaluation, history)}</p>\n{body}</body></html>\n'
    )


# Pieces


def _interval(ends: Sequence[float], digits: int = 4) -> str:
    if ends[0] == ends[1]:  # of one image, or of equal ones
        return "<small>&ndash;</small>"
    return f"<small>{ends[0]:.{digits}f} to {ends[1]:.{digits}f}</small>"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table of cells that are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{x}</td>" for x in row) + "</tr>\n" for row in rows)
    return f"<table class='{kind}'><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table>"


def _figure(caption: str, image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(as_rgb(image)).save(stream, "PNG")
    data, height, width = base64.b64encode(stream.getvalue()).decode(), *image.shape[:2]
    small = " class=small" if width < 600 else ""
    return (
        f'<figure><img alt="{escaped(caption)}" width={width} height={height}{small} '
        f'src="data:image/png;base64,{data}"><figcaption>{escaped(caption)}</figcaption></figure>'
    )


# Sections


def _subtitle(evaluation: Mapping[str, Any] | None, history: Sequence[Mapping[str, Any]]) -> str:
    if evaluation is None:
        return f"{len(history)} epochs; not evaluated yet"
    side = evaluation["image_size"] or evaluation["window"]
    height, width = (side, side) if isinstance(side, int) else side
    place = "at" if evaluation["image_size"] else "at their own size, in windows of"
    flips = ", averaged over flips" * bool(evaluation["flips"])
    members = f"ensemble of {len(evaluation['ensemble'])}, " if "ensemble" in evaluation else ""
    return escaped(
        f"{evaluation['protocol']}, {evaluation['what']}: {evaluation['n_images']} images "
        f"{place} {width} x {height} pixels; {members}{evaluation['checkpoint']} checkpoint, step "
        f"{evaluation['step']}{flips}"
    )


def _headline(
    evaluation: Mapping[str, Any] | None,
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
) -> str:
    if evaluation is None and not history:
        return ""
    place = "their own sizes" if evaluation and evaluation.get("window") else "the network's size"
    note = f"Means over images at {place}, with intervals of 95 %; the best possible is 1"
    if evaluation is None:
        saved = [record for record in history if record.get("saved", True)] or history
        several = config.get("model", {}).get("num_classes", 1) > 1
        cropped = config.get("settings", {}).get("crop") is not None
        chosen = "val_dice_pooled" if several or cropped else "val_dice_per_image"
        best = max(saved, key=lambda record: record[chosen])
        values = {
            name: (best[f"val_{key}_per_image"], "validation") for key, name in RATIOS.items()
        }
        note = f"Means over images at the network's size, in epoch {best['epoch']}, the best one"
    else:
        values = {}
        for key, name in RATIOS.items():
            ends = evaluation.get(f"{key}_per_image_interval")
            text = "mean over images" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"
            values[name] = evaluation[f"{key}_per_image"], text
        values["Calibration error"] = evaluation["own_size"]["calibration_error"], "of all pixels"
        cost = (
            f"{number(value, 2)} {escaped(key.replace('gflop', 'GFLOP').replace('_', ' '))}"
            for key, value in evaluation["cost"].items()
            if value is not None
        )
        note += f". Cost: {', '.join(cost)}"
    items = "".join(
        f"<div><dt>{name}</dt><dd>{number(value)}<small>{text}</small></dd></div>"
        for name, (value, text) in values.items()
    )
    return f"<dl class=cards>{items}</dl><p class=soft>{note}.</p>"


def _classes(own_size: Mapping[str, Any]) -> str:
    if "by_class" not in own_size:
        return ""
    rows = [
        [
            escaped(name),
            *(number(scores["pooled"][key]) for key in RATIOS),
            *_means(scores["per_image"], ["dice", *DISTANCES]),
            number(scores["n_images_with_it"]),
        ]
        for name, scores in own_size["by_class"].items()
    ]
    means = {"Mean": "mean_of_classes", "Mean without background": "mean_without_background"}
    for name, key in means.items():
        if name == "Mean" or "background" in own_size["by_class"]:
            values = (number(own_size[key][ratio]) for ratio in RATIOS)
            rows.append([f"<b>{name}</b>", *values, "", "", "", "", ""])
    head = ["Class", *RATIOS.values(), "Dice per image", *DISTANCES.values(), "Images with it"]
    note = (
        "At the pictures' own sizes. Dice to recall are of all pixels together, the others means "
        "over images with intervals of 95 %; distances are in percent of the diagonal."
    )
    return f"{_table(head, rows)}<p class=soft>{note}</p>"


def _sizes(own_size: Mapping[str, Any]) -> str:
    if "by_polyp_size" not in own_size:
        return ""
    ranges = {
        name: "nothing there" if high < 1e-6 else f"{100 * low:.0f} to {min(100, 100 * high):.0f} %"
        for name, (low, high) in own_size["polyp_sizes"].items()
    }
    groups = {"all": own_size, **own_size["by_polyp_size"]}
    rows = [
        [
            f"{escaped(name)}<small>{ranges.get(name, '')}</small>",
            number(scores["n_images"]),
            *_means(scores["per_image"], [*RATIOS, *DISTANCES]),
        ]
        for name, scores in groups.items()
        if scores["n_images"]
    ]
    head = ["Foreground", "Images", *RATIOS.values(), *DISTANCES.values()]
    note = (
        "At the pictures' own sizes, by the fraction of the picture that is foreground: means over "
        "images with intervals of 95 %; distances are in percent of the diagonal."
    )
    return f"{_table(head, rows)}<p class=soft>{note}</p>"


def _shifted(evaluation: Mapping[str, Any]) -> str:
    if "shifted" not in evaluation:
        return ""
    keys = "dice_per_image", "iou_per_image"
    rows = [
        [escaped(name), *(number(x[key]) + _interval(x[f"{key}_interval"]) for key in keys)]
        for name, x in {"not shifted": evaluation, **evaluation["shifted"]}.items()
    ]
    note = (
        "Pictures as another endoscope could have taken them, made by code: means over images as "
        "in the results, with intervals of 95 %; their mean over the shifts, and the drop to it."
    )
    return f"{_table(['Shift', 'Dice', 'IoU'], rows)}<p class=soft>{note}</p>"


def _negatives(evaluation: Mapping[str, Any]) -> str:
    if "negatives" not in evaluation:
        return ""
    scores = evaluation["negatives"]
    values = {f"claim above {100 * float(k):g} %": v for k, v in scores["claims"].items()}
    values["mean area"] = scores["claimed_area"]
    rows = [[name, number(x["mean"]) + _interval(x["interval"])] for name, x in values.items()]
    note = (
        f"How often an object is claimed in {scores['crops']} parts of pictures without one "
        f"({scores['pictures_without']} pictures have no such part): the fraction of the parts, "
        "by the area that is claimed in them, and the mean area, with intervals of 95 %."
    )
    return f"{_table(['', 'Fraction'], rows)}<p class=soft>{note}</p>"


def _means(per_image: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    digits = {"hd95": 2, "assd": 2}
    return [
        number(per_image[key]["mean"], digits.get(key, 4))
        + _interval(per_image[key]["interval"], digits.get(key, 4))
        for key in keys
    ]


def _pictures(pictures: Mapping[str, np.ndarray], masks: Mapping[str, Any]) -> str:
    """The pictures, and the colours of more than one class."""
    names, legend = masks.get("names", ()), ""
    if pictures and (len(names) > 2 or masks.get("overlapping")):
        for name, colour in zip(names[1:], palette(256)[1:].tolist(), strict=False):
            square = f"<span class=swatch style='background: rgb{tuple(colour)}'></span>"
            legend += f"{square}{escaped(name)} "
    return legend + "".join(_figure(*item) for item in pictures.items())


def _data(summary: Mapping[str, Any]) -> str:
    splits = {name: s for name, s in summary.items() if isinstance(s, dict) and "pictures" in s}
    if not splits:
        return ""
    sizes = [
        ", ".join(list(s["sizes"])[:3]) + ", ..." * (len(s["sizes"]) > 3) for s in splits.values()
    ]
    rows = [[name, *(number(s[key]) for s in splits.values())] for key, name in COUNTED.items()]
    rows.append(["Sizes", *map(escaped, sizes)])
    for name in next(iter(splits.values()))["classes"]:
        cells = [s["classes"][name] for s in splits.values()]
        texts = (f"{number(100 * c['fraction'], 2)} % in {number(c['pictures'])}" for c in cells)
        rows.append([escaped(name), *texts])
    others = (f"{name}: {n} pictures" for name, n in (summary.get("others") or {}).items())
    return (
        f"{_table(['', *map(escaped, splits)], rows)}<p class=soft>{escaped('; '.join(others))}</p>"
    )


def _configuration(config: Mapping[str, Any]) -> str:
    content = ""
    for section, values in config.items():
        if section == "summary" or values is None:
            continue
        items = values.items() if isinstance(values, dict) else [("", values)]
        rows = [[escaped(key), escaped(value)] for key, value in items]
        content += f"<h3>{escaped(section)}</h3>{_table([], rows, 'left')}"
    return content and f"<details><summary>All settings and versions</summary>{content}</details>"
