"""Fit a temperature to a trained model, for `export --calibrate`."""

import sys
from typing import Any

from flax_unet import calibration, data, metrics, runs
from flax_unet.evaluate import add_reliability, score
from flax_unet.pictures import DataError
from flax_unet_cli import evaluate, program
from flax_unet_cli.train import FEW


def calibrate(trained: runs.Trained) -> runs.Trained:
    """The model with the temperature that fits the validation pictures of its run best.

    Its `config` has a section `calibration`: the temperature, and the calibration errors before
    and after, those of `evaluate --split validation` with the checkpoint that is exported.

    Raises:
        ValueError: the pictures are not there, the model has a temperature already, or none fits.
    """
    if "calibration" in trained.config:
        raise ValueError("the model has a temperature already: calibrate the run that it is from")
    network = trained.network("--calibrate")
    options = evaluate.Options(trained.places.workdir, split="validation")
    try:
        source, split, _ = evaluate.open_split(options, trained)
    except (DataError, OSError) as error:
        raise DataError(
            f"--calibrate needs the pictures of the run, where they were in training: {error}"
        ) from error
    if trained.fingerprints.get(split) != data.fingerprint(source):
        print("warning: these are not the pictures that the run was started with", file=sys.stderr)
    if (n := len(source)) < FEW:
        print(f"warning: {split} has only {n} of the pictures: the temperature will say little")
    model, size = trained.predictor()
    formats = evaluate.format_of(options, trained, source), trained.image_format
    pictures = source, size, *formats
    with program.task(f"fitting a temperature to {n} pictures of {split}"):
        pairs = calibration.logits_of(model, trained.variables, *pictures)
        temperature = calibration.fit_temperature(*pairs, overlapping=network.overlapping)
    variables = calibration.with_temperature(network, trained.variables, temperature)

    def error_of(variables: Any) -> float:
        batches = score(model, variables, *pictures, loss_fn=trained.loss_fn)
        counts = [batch.reliability for batch in batches]
        return metrics.calibration_error(add_reliability(counts))

    with program.task("measuring the calibration error, before and after"):
        before, after = error_of(trained.variables), error_of(variables)
    print(
        f"temperature {temperature:.2f}: calibration error on {split} {before:.4f} -> {after:.4f}"
    )
    about = {"temperature": temperature, "calibration_error": [before, after]}
    return trained._replace(variables=variables, config=trained.config | {"calibration": about})
