"""The examples in docstrings."""

import doctest
import importlib
import pkgutil

import jax
import pytest

import flax_unet

MODULES = [module.name for module in pkgutil.iter_modules(flax_unet.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run_and_print_what_they_say(name):
    with jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(importlib.import_module(f"flax_unet.{name}"))
    assert result.failed == 0


def test_what_is_called_from_outside_has_examples():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(f"flax_unet.{name}") for name in MODULES]
    tested = {test.name for module in modules for test in finder.find(module) if test.examples}
    assert tested >= {
        "flax_unet.model.UNet",
        "flax_unet.losses.bce",
        "flax_unet.losses.soft_dice",
        "flax_unet.metrics.confusion",
        "flax_unet.metrics.bootstrap_interval",
        "flax_unet.boundary.hd95",
        "flax_unet.train.make_train_step",
        "flax_unet.predict.predict_proba",
        "flax_unet.recipes.build",
    }
