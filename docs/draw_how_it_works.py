"""Draw the figure of docs/how-it-works.md: `python docs/draw_how_it_works.py`.

An SVG with its own light background, so that it is legible on light and dark pages.
"""

from html import escape
from pathlib import Path

WIDTH, HEIGHT = 800, 640
#: Fill and border of what lies on a disk, happens on the host, or on the device.
COLOURS = {
    "disk": ("#eceff1", "#78909c"),
    "host": ("#e3f2fd", "#1e88e5"),
    "device": ("#fff3e0", "#fb8c00"),
}
STYLE = """
  text { font: 13.5px "DejaVu Sans", Verdana, Arial, sans-serif; fill: #212121 }
  .title { font-weight: bold; font-size: 15px }
  .note { fill: #455a64; font-style: italic }
  path { fill: none; stroke: #37474f; stroke-width: 1.8; marker-end: url(#head) }
"""


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(content)}</text>'


def rectangle(x: int, y: int, width: int, height: int, kind: str) -> str:
    fill, border = COLOURS[kind]
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
        f'stroke="{border}" stroke-width="1.5"/>'
    )


def box(x: int, y: int, width: int, title: str, lines: list[str], kind: str) -> list[str]:
    """A box whose height fits its lines."""
    return [
        rectangle(x, y, width, 32 + 19 * len(lines), kind),
        text(x + 10, y + 21, title, "title"),
        *(text(x + 10, y + 42 + 19 * i, line) for i, line in enumerate(lines)),
    ]


def arrow(*points: tuple[int, int]) -> str:
    return '<path d="M ' + " L ".join(f"{x} {y}" for x, y in points) + '"/>'


def figure() -> str:
    step = [
        "image, mask = take(index)",
        "augment(key, image, mask)",
        "logits = model.apply(...)",
        "loss = loss_fn(logits, mask)   [B]",
        "mean over images of weight 1",
        "gradient, tx.update: new state",
        "counts tp, fp, fn, tn   [B, C]",
    ]
    parts = [
        text(20, 34, "once", "note"),
        *box(20, 46, 200, "files", ["PNG, JPEG, TIFF, npy, ...", "or a TFDS data set"], "disk"),
        *box(
            270, 46, 250, "formats", ["what values mean: found for", "all files together"], "host"
        ),
        *box(
            570, 46, 210, "arrays", ["image uint8 [N, H, W, C]", "mask uint8 [N, H, W, 1]"], "host"
        ),
        arrow((220, 81), (268, 81)),
        arrow((520, 81), (568, 81)),
        text(20, 172, "per epoch", "note"),
        *box(20, 184, 240, "order", ["shuffled(n, seed, epoch)"], "host"),
        *box(20, 272, 240, "batch", ["index int32 [B]", "weight [B], 0 for padding"], "host"),
        arrow((140, 235), (140, 270)),
        text(310, 172, "per step: one compiled program", "note"),
        rectangle(310, 184, 470, 252, "device"),
        *box(570, 200, 195, "data set", ["copied to the device", "once, stays there"], "device"),
        arrow((675, 116), (675, 198)),
        text(326, 208, "train_step", "title"),
        *(text(326, 236 + 22 * i, line) for i, line in enumerate(step)),
        *box(
            570,
            300,
            195,
            "key of step n",
            ["fold_in(run key, n),", "split: augment, dropout"],
            "device",
        ),
        text(326, 414, "(state, batch, key) → (state, metrics)", "title"),
        arrow((568, 232), (512, 232)),
        arrow((568, 335), (554, 335), (554, 254), (520, 254)),
        arrow((260, 307), (308, 307)),
        *box(
            20,
            486,
            230,
            "metrics",
            ["fetched while the device", "runs the next step", "→ metrics.jsonl"],
            "host",
        ),
        *box(
            285,
            486,
            230,
            "state",
            ["step, params, model_state,", "opt_state: donated to the", "next step"],
            "device",
        ),
        *box(
            550,
            486,
            230,
            "checkpoints",
            ["the two latest states,", "the best by validation Dice,", "checksums"],
            "disk",
        ),
        arrow((350, 436), (350, 460), (135, 460), (135, 484)),
        arrow((400, 436), (400, 484)),
        arrow((455, 484), (455, 438)),
        arrow((515, 530), (548, 530)),
        rectangle(20, 604, 16, 16, "disk"),
        text(44, 617, "on a disk"),
        rectangle(140, 604, 16, 16, "host"),
        text(164, 617, "on the host"),
        rectangle(276, 604, 16, 16, "device"),
        text(300, 617, "on the device: CPU, GPU or TPU"),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" role="img">'
    )
    marker = (
        '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" '
        'orient="auto"><polygon points="0,0 8,4 0,8" fill="#37474f"/></marker>'
    )
    return "\n".join(
        [
            head,
            "<title>From the files to a training step and its checkpoint</title>",
            f"<style>{STYLE}</style>",
            f"<defs>{marker}</defs>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="#fafafa"/>',
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    folder = Path(__file__).with_name("pictures")
    folder.mkdir(exist_ok=True)
    (folder / "how-it-works.svg").write_text(figure())
