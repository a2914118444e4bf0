"""How long training takes to reach a Dice: `python benchmarks/time_to_dice.py --out FOLDER`.

Kvasir-SEG at 128x128, protocol effisegnet: our recipes, the tutorial in Keras, and a U-Net of
segmentation_models.pytorch, from scratch and from the ImageNet weights of our recipe `pretrained`.
Each trains in a separate process, one after the other, on the same pixels, until the Dice of the
100 validation pictures, smoothed, is 0.80, or its time or its schedule ends. Prints the tables of
docs/benchmarks.md, and writes FOLDER/summary.json and the epochs of each to FOLDER/NAME.jsonl. What
FOLDER has already is not trained again, and is in the tables.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from conductor import HERE, about
from quality import LEVELS, smooth

SIZE = 128
CONTENDERS = {
    "pretrained": ("quality_ours.py", "pretrained"),
    "strong": ("quality_ours.py", "strong"),
    "smp-imagenet": ("quality_torch.py", "tu-tf_efficientnet_lite0"),
    "smp": ("quality_torch.py", "resnet34"),
    "unet": ("quality_ours.py", "unet"),
    "keras": ("quality_keras.py",),
}


def write_pictures(file: Path) -> None:
    """Decode and resize the training and validation pictures, for all contenders."""
    import tfds_kvasir
    from flax_unet import data

    sources, arrays = tfds_kvasir.sources("kvasir_seg", "effisegnet"), {}
    for split in ("train", "validation"):
        loaded = data.load(sources[split], SIZE)
        arrays |= {f"{split}_image": loaded.image, f"{split}_mask": loaded.mask}
    np.savez(file, **arrays)


def processor() -> str:
    """The name of the processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def train(name: str, pictures: Path, file: Path, minutes: float) -> None:
    """Train a contender, and write what it prints to a file while it does."""
    script, *arguments = CONTENDERS[name]
    command = [sys.executable, str(HERE / script), str(pictures), str(minutes), *arguments]
    with file.open("w") as output:

        def write(content: dict[str, Any]) -> None:
            print(name, json.dumps(content), flush=True)
            print(json.dumps(content), file=output, flush=True)

        machine = {"about": about(), "processor": processor(), "load": os.getloadavg()}
        write({"started": time.time(), "minutes": minutes, **machine})
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or ():
                if line.startswith("{"):  # skip messages of libraries
                    write(json.loads(line))
        if process.returncode == 0:
            write({"ended": time.time(), "load": os.getloadavg()})
        else:
            print(f"{name} failed with code {process.returncode}", flush=True)


def read(file: Path, minutes: float) -> list[dict[str, Any]]:
    """The lines of a contender that has ended, or none."""
    lines = file.read_text().splitlines() if file.exists() else []
    if not lines or "ended" not in lines[-1]:
        return []
    read = [json.loads(line) for line in lines]
    if read[0]["minutes"] != minutes:
        sys.exit(f"{file} is of --minutes {read[0]['minutes']:g}: choose another --out")
    return read


def summarise(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """When a contender reached each level, and what else there is to say."""
    first, began, *epochs, last = lines
    seconds = np.diff([0, *(epoch["train_seconds"] for epoch in epochs)]).tolist()
    timely = [epoch for epoch in epochs if epoch["train_seconds"] <= 60 * first["minutes"]]
    scores = [epoch["dice"] for epoch in timely]

    def reached(level: float, values: list[float]) -> dict[str, Any] | None:
        found = (epoch for epoch, value in zip(timely, values, strict=True) if value >= level)
        return next(found, None)

    in_time = len(timely) == len(epochs)
    return {
        "about": [first["about"], first["processor"]],
        "load": [first["load"], last["load"]],
        "start-up": began["began"] - first["started"],
        "start-up, CPU": began["cpu_seconds"],
        "first epoch": seconds[0],
        "median epoch": statistics.median(seconds),
        "fastest epoch": min(seconds),
        "epochs": len(epochs),
        "validation": sum(epoch["validation_seconds"] for epoch in epochs),
        "others, CPU": epochs[-1]["others_cpu_seconds"],
        "best Dice": max(epoch["dice"] for epoch in epochs),
        "end": f"{len(epochs)} epochs" if in_time else f"{first['minutes']:g} min",
        "smoothed": {level: reached(level, smooth(scores)) for level in LEVELS},
        "raw": {level: reached(level, scores) for level in LEVELS},
    }


def table(summaries: dict[str, dict[str, Any]], key: str) -> str:
    """A Markdown table of the time to each level, smoothed and (raw)."""

    def cell(summary: dict[str, Any], level: float) -> str:
        smoothed, raw = summary["smoothed"][level], summary["raw"][level]
        text = f"not in {summary['end']}" if smoothed is None else f"{smoothed[key]:.0f}"
        return text if raw is None else f"{text} ({raw[key]:.0f})"

    rows = [["", *(f"{level:.2f}" for level in LEVELS)], ["---"] * (1 + len(LEVELS))]
    rows += [[name, *(cell(each, level) for level in LEVELS)] for name, each in summaries.items()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def other(summaries: dict[str, dict[str, Any]]) -> str:
    """A Markdown table of times, CPU use and epochs."""
    keys = ["start-up", "start-up, CPU", "first epoch", "median epoch", "fastest epoch"]
    keys += ["others, CPU", "validation", "epochs"]
    rows = [["", *keys, "best Dice"], ["---"] * (2 + len(keys))]
    for name, each in summaries.items():
        rows.append([name, *(f"{each[key]:.0f}" for key in keys), f"{each['best Dice']:.3f}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quality"))
    parser.add_argument("--minutes", type=float, default=60, help="for each, of training")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # each compiles all that it runs
    files = {name: options.out / f"{name}.jsonl" for name in CONTENDERS}
    for file in files.values():
        read(file, options.minutes)  # ends the program before hours are lost
    with tempfile.TemporaryDirectory() as folder:
        pictures = Path(folder) / "pictures.npz"
        for name, file in files.items():
            if name not in options.only or read(file, options.minutes):
                continue
            if not pictures.exists():
                write_pictures(pictures)
            train(name, pictures, file, options.minutes)
    ended = {name: read(file, options.minutes) for name, file in files.items()}
    summaries = {name: summarise(lines) for name, lines in ended.items() if lines}
    (options.out / "summary.json").write_text(json.dumps(summaries, indent=1) + "\n")
    print("\nwall-clock seconds to a smoothed Dice (to the first such Dice):\n")
    print(table(summaries, "train_seconds"))
    print("\nthe same in CPU seconds:\n\n" + table(summaries, "train_cpu_seconds"))
    print("\nthe same in epochs:\n\n" + table(summaries, "epoch"))
    print("\nother seconds:\n\n" + other(summaries))
    conditions = {
        name: (each["about"][0].split(", ", 1)[1], each["about"][1])
        for name, each in summaries.items()
    }
    if len(set(conditions.values())) > 1:
        print("\nmeasured under different conditions:")
        print(*(f"{name}: {', '.join(each)}" for name, each in conditions.items()), sep="\n")
    if missing := {*options.only} - summaries.keys():
        sys.exit(f"these failed, and are missing above: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
