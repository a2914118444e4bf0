"""What OpenVINO's precision does to masks: `python benchmarks/precision.py`.

models/strong segments synthetic polyps. OpenVINO computes in float32, and in what it chooses
itself, which is bfloat16 on CPUs that have it; ONNX Runtime in float32. Prints the largest
difference from flax_unet's probabilities, and the pixels that change class.
"""

import tempfile
from pathlib import Path

import numpy as np
from onnx_peer import openvino

from flax_unet import pack, predict
from flax_unet.onnx_file import OnnxModel, to_onnx
from tfds_kvasir.synthetic_polyps.draw import draw

PICTURES = 16


def main() -> None:
    folder = Path(__file__).parent.parent / "models" / "strong"
    model, variables, size, _ = pack.load(folder)
    assert isinstance(size, int)
    rng = np.random.default_rng(0)
    image = np.stack([draw(rng, size)[0] for _ in range(PICTURES)])
    expected = np.asarray(predict.predict_proba(model, variables, image))
    content = to_onnx(model, variables, raw=True, probabilities=True).SerializeToString()
    with tempfile.TemporaryDirectory() as name:
        (file := Path(name, "strong.onnx")).write_bytes(content)
        runtime = OnnxModel(file)
    for name, probabilities in (
        ("ONNX Runtime", runtime.probabilities),
        ("OpenVINO, float32", openvino(content, "float32")),
        ("OpenVINO, default", openvino(content, "default")),
    ):
        proba = probabilities(image)
        changed = (proba > 0.5) != (expected > 0.5)
        print(
            f"{name}: probabilities differ by up to {abs(proba - expected).max():.2g}, "
            f"{changed.sum()} of {changed.size} pixels change class, "
            f"up to {changed.sum((1, 2, 3)).max()} of a picture's {size * size}"
        )


if __name__ == "__main__":
    main()
