"""Inference from the tutorial's network as an ONNX file, as a worker.

`python benchmarks/onnx_peer.py onnxruntime|openvino`; see worker.py. The file takes uint8 and
returns probabilities. The precision `default` is what OpenVINO computes in if it is not told:
bfloat16 on CPUs that have it.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import ours
from worker import images, serve

from flax_unet.model import ARTICLE
from flax_unet.onnx_file import OnnxModel, to_onnx

THREADS = os.cpu_count() or 1


def openvino(content: bytes, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    """An ONNX file as a function of an image, computed by OpenVINO on all cores."""
    # Its import would fork, which JAX does not survive well, to report its use over the network.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": THREADS}
    if precision != "default":
        options["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "bfloat16": "bf16"}[precision]
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    return lambda image: compiled(image)[0]


@cache
def session(library: str, precision: str) -> Callable[[np.ndarray], np.ndarray]:
    made = to_onnx(ARTICLE, ours.variables("float32"), raw=True, probabilities=True)
    content = made.SerializeToString()
    if library == "openvino":
        return openvino(content, precision)
    assert precision == "float32"
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder, "article.onnx")).write_bytes(content)
        return OnnxModel(file, threads=THREADS).probabilities


def work(kind: str, precision: str, batch: int, times: int) -> None:
    assert kind == "infer"
    probabilities = session(sys.argv[1], precision)
    for _ in range(times):
        probabilities(IMAGE[:batch])


if __name__ == "__main__":
    IMAGE = images(32)[0]
    serve(work)
