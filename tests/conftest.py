"""Settings of all tests: several fake devices, no silent broadcasting, an empty cache folder."""

import shutil

import jax
import pytest

from flax_unet import devices

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def one_device():
    """Programs use one of the fake devices, unless a test says --devices."""
    make_mesh = devices.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "make_mesh", lambda n=None: make_mesh(1 if n is None else n))
        yield


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by Playwright."""
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("there is no chromium")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
