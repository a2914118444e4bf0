"""A local page: `flax-unet serve --model DIR`, then open the address that it prints.

Drop a picture on the page: it shows the probabilities and the mask over the picture, and its area.
The threshold is changed by hand, and the mask downloaded as `flax-unet predict` would write it.

example:
  flax-unet serve --model pretrained
"""

import asyncio
import base64
import hashlib
import io
import json
import re
import socket
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

import jax
import numpy as np
import tyro
from PIL import Image

from flax_unet import classes, draw, images, pictures, predict, runs
from flax_unet.formats import BINARY
from flax_unet.pictures import DataError
from flax_unet_cli import program
from flax_unet_cli.model_path import ModelPath
from flax_unet_cli.sources import RangeFlags

if TYPE_CHECKING:  # the extra `serve`
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request

#: The page's thresholds are 0, 1 / THRESHOLDS, ... below 1.
THRESHOLDS = 200
#: Longest side of the picture that the page shows; areas and masks are of all pixels.
SHOWN = 1600
#: Pictures that may wait for the one prediction at a time; more are refused.
WAITING = 8
#: Seconds that a picture may take to arrive.
PATIENCE = 60
#: Rows of a picture that are decided at a time.
ROWS = 256


@dataclass(frozen=True)
class Options:
    """Flags of serve."""

    workdir: Annotated[ModelPath, tyro.conf.arg(aliases=["--model"])]
    """Workdir of the run whose model is used, folder of an exported model, or the name of a shipped
    one: pretrained or strong."""
    checkpoint: Literal["best", "latest"] = "best"
    """best by validation Dice."""
    host: str = "127.0.0.1"
    """Address to listen on. Any but the default lets other machines use the page, unencrypted and
    without a password; 0.0.0.0 is all addresses of this machine."""
    port: int = 8000
    """Port to listen on; 0 is any free one."""
    ranges: Annotated[RangeFlags, tyro.conf.arg(name="pictures")] = RangeFlags()
    flips: bool = False
    """Average the prediction over the 4 flips of each image, at 4 times the work; over the 2 flips
    left to right for a model trained with --upright."""
    max_megapixels: float = 25.0
    """Pictures with more million pixels are refused."""
    max_megabytes: float = 50.0
    """Larger files are refused."""


class Refused(Exception):
    """A request gets a line of plain text instead of what it asks for."""

    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


def probabilities(trained: runs.Trained, image: np.ndarray) -> np.ndarray:
    """Probabilities of an image [H, W, C] at its own size: float32 [H, W, K] in [0, 1]."""
    size = None if predict.is_on_host(trained.model) else trained.settings.size
    return predict.predict_resized(trained.model, trained.variables, image, size)


def levels(proba: np.ndarray) -> np.ndarray:
    """How many of the page's thresholds each probability exceeds, uint8 of the same shape.

    A pixel is in the mask of threshold i / THRESHOLDS exactly if its level is above i: the page
    knows the mask of each threshold to the pixel from one byte per probability.

    >>> levels(np.float32([0, 0.004, 0.5, 0.501, 1]))
    array([  0,   1, 100, 101, 200], dtype=uint8)
    """
    thresholds = (np.arange(THRESHOLDS) / THRESHOLDS).astype(np.float32)  # as NumPy compares them
    return np.searchsorted(thresholds, np.asarray(proba, np.float32)).astype(np.uint8)


def planes(proba: np.ndarray, overlapping: bool) -> np.ndarray:
    """What the page needs to know of probabilities [H, W, K], uint8 [N, H, W].

    Of one class its levels; of exclusive classes the index of the most probable one, and the levels
    of its probability; of overlapping classes the levels of each.

    Raises:
        ValueError: a probability is NaN.
    """
    exclusive, parts = proba.shape[-1] > 1 and not overlapping, []
    for top in range(0, len(proba), ROWS):
        p = proba[top : top + ROWS]
        index = classes.decide(p, overlapping=overlapping)
        sure = levels(p.max(-1, keepdims=True) if exclusive else p)
        parts.append(np.concatenate([index, sure], axis=-1) if exclusive else sure)
    return np.moveaxis(np.concatenate(parts), -1, 0)


def shown(image: np.ndarray) -> bytes:
    """An image [H, W, C] as a JPEG of at most `SHOWN` pixels a side."""
    height, width = image.shape[:2]
    scale = min(1, SHOWN / max(height, width))
    size = max(1, round(height * scale)), max(1, round(width * scale))
    if size != (height, width):
        image = pictures.resize_image(image, size)
    stream = io.BytesIO()
    Image.fromarray(draw.as_rgb(image)).save(stream, "JPEG", quality=92, subsampling=0)
    return stream.getvalue()


def segment(
    trained: runs.Trained, data: bytes, name: str, max_pixels: int
) -> tuple[dict[str, Any], bytes]:
    """Segment a picture for the page.

    Args:
        trained: the model.
        data: the bytes of the picture's file.
        name: what error messages call it.
        max_pixels: pictures with more are refused before they are decoded.

    Returns:
        Width and height in pixels, the seconds of the prediction, the length of the JPEG and the
        number of planes; and the JPEG that the page shows, followed by the `planes`, as zlib packs
        them.

    Raises:
        DataError: the picture is unusable.
    """
    width, height = pictures.size_of(pictures.open_content(data, name, decode=False))
    if width * height > max_pixels:
        raise DataError(
            f"{name}: {width} x {height} pixels, more than {max_pixels / 1e6:g} million: make it "
            "smaller, or allow it with --max-megapixels"
        )
    image = images.read(pictures.open_content(data, name), trained.image_format, name)
    began = time.perf_counter()
    proba = probabilities(trained, image)
    seconds, jpeg = time.perf_counter() - began, shown(image)
    values = planes(proba, classes.is_overlapping(trained.model))
    height, width = image.shape[:2]  # EXIF may have turned it
    facts = {
        "width": width,
        "height": height,
        "seconds": round(seconds, 3),
        "jpeg": len(jpeg),
        "planes": len(values),
    }
    return facts, jpeg + zlib.compress(values.tobytes(), 1)


def about(trained: runs.Trained, name: str, max_pixels: int, max_bytes: int) -> dict[str, Any]:
    """What the page says about the model, as JSON."""
    overlapping, mask_format = classes.is_overlapping(trained.model), trained.mask_format or BINARY
    several = "overlapping" if overlapping else "exclusive"
    return {
        "name": name,
        "checkpoint": trained.checkpoint,
        "size": trained.settings.size,
        "flips": isinstance(getattr(trained.model, "model", None), predict.Mirrored)
        or isinstance(trained.model, predict.Mirrored),
        "kind": "one" if trained.model.num_classes == 1 and not overlapping else several,
        "names": mask_format.names,
        "colours": draw.palette(256).tolist(),
        "one_colour": draw.PREDICTED,
        "thresholds": THRESHOLDS,
        "max_pixels": max_pixels,
        "max_bytes": max_bytes,
    }


def app(
    trained: runs.Trained,
    *,
    name: str = "model",
    host: str = "127.0.0.1",
    max_pixels: int = 25_000_000,
    max_bytes: int = 50_000_000,
) -> "Starlette":
    """The page and what answers it: `GET /`, `GET /model`, and `POST /predict?name=NAME`.

    The body of the last is a picture's file; `segment` describes the answer, whose facts are in the
    header X-Result. Predictions run one at a time, in a thread. Errors are a line of plain text.

    Args:
        trained: from `runs.load_model`; its model may be a `predict.Mirrored`.
        name: of the model, which the page shows.
        host: the address that is listened on; requests to other names are refused.
        max_pixels: of a picture.
        max_bytes: of a picture's file.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    html, busy, waiting = Path(__file__).with_name("serve.html").read_text("utf-8"), None, 0

    async def page(_: "Request") -> Response:
        return HTMLResponse(html)

    async def model(_: "Request") -> Response:
        return JSONResponse(about(trained, name, max_pixels, max_bytes))

    async def segmented(request: "Request") -> Response:
        nonlocal busy, waiting
        if waiting >= WAITING:
            raise Refused(503, "other pictures are waiting already: try again later")
        waiting, busy = waiting + 1, busy or asyncio.Lock()
        try:
            data = await _body(request, max_bytes)
            async with busy:
                if await request.is_disconnected():
                    raise ClientDisconnect
                words = trained, data, _label(request), max_pixels
                facts, body = await run_in_threadpool(segment, *words)
        finally:
            waiting -= 1
        media_type = "application/octet-stream"
        return Response(body, media_type=media_type, headers={"X-Result": json.dumps(facts)})

    async def explain(_: "Request", error: Exception) -> Response:
        status = error.status if isinstance(error, Refused) else 422
        if isinstance(error, MemoryError | jax.errors.JaxRuntimeError):
            status, error = 507, MemoryError("the picture needs more memory than there is")
        return PlainTextResponse(str(error), status)

    kinds = Refused, ValueError, MemoryError, jax.errors.JaxRuntimeError, ClientDisconnect
    return Starlette(
        routes=[
            Route("/", page),
            Route("/model", model),
            Route("/predict", segmented, methods=["POST"]),
        ],
        middleware=[Middleware(_guarded, host=host, headers=_headers(html))],
        exception_handlers=dict.fromkeys(kinds, explain),
    )


def _label(request: "Request") -> str:
    """The picture's name, for error messages only."""
    name = request.query_params.get("name", "")[:200]
    return "".join(x for x in name if x.isprintable()) or "the picture"


async def _body(request: "Request", most: int) -> bytes:
    """The body of a request, of which no more is read than allowed."""
    words = f"{_label(request)}: more than {most / 1e6:g} MB: make it smaller, or allow it with "
    too_large = Refused(413, words + "--max-megabytes")
    if int(request.headers.get("content-length", 0)) > most:
        raise too_large
    data = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise too_large
    except TimeoutError as error:
        raise Refused(408, f"the picture did not arrive within {PATIENCE} seconds") from error
    return bytes(data)


# Who may ask


def _guarded(inner: Any, host: str, headers: list[tuple[bytes, bytes]]) -> Any:
    """ASGI middleware: refuses requests of other sites, and adds headers to all answers."""
    from starlette.responses import PlainTextResponse

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *headers]
            await send(message)

        asked = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        respond = inner
        if reason := refusal(scope["method"], asked, host):
            respond = PlainTextResponse(reason, 403)
        await respond(scope, receive, send_with_headers)

    return outer


def refusal(method: str, headers: Mapping[str, str], host: str) -> str | None:
    """Why a request is refused, or None.

    The page of another site may send requests here from the browser of somebody who uses this one:
    under its own name, which leads to this address (DNS rebinding), or as a request to another
    origin.

    Args:
        method: GET, POST...
        headers: of the request, by lower-case name.
        host: the address that is listened on.
    """
    asked = headers.get("host", "")
    if not _is_ours(asked, host):
        return f"this server is not {asked[:100]!r}: use the address that it printed"
    if method in ("GET", "HEAD"):
        return None
    origin = headers.get("origin")
    same = origin is None or (origin.partition("://")[2] or origin) == asked
    if not same or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
        return "requests from the pages of other sites are refused"
    return None


def _is_ours(asked: str, host: str) -> bool:
    """Whether a Host header names this server: by an address, which no other site can have as its
    name, or by a name that it is known to have."""
    try:
        name = urlsplit(f"//{asked}").hostname or ""
    except ValueError:
        return False
    try:
        return ip_address(name).is_loopback or not _is_loopback(host)
    except ValueError:
        names = {"localhost"}
        return name in (names if _is_loopback(host) else names | {host.lower(), _this_machine()})


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _this_machine() -> str:
    return socket.gethostname().lower()


def _headers(html: str) -> list[tuple[bytes, bytes]]:
    """Headers of all answers. Only the script and the style of the page itself are allowed."""
    policy = "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
    policy += "form-action 'none'; frame-ancestors 'none'"
    for kind in ("script", "style"):
        [text] = re.findall(f"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        policy += f"; {kind}-src 'sha256-{digest}'"
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }
    return [(key.lower().encode(), value.encode()) for key, value in headers.items()]


# Running


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens on an address.

    Raises:
        OSError: it is taken, or not of this machine.
        ValueError: there is no such port.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port {port}: it must be from 0 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=128)
    except OSError as error:
        # Python adds the address to the reason.
        reason = (error.strerror or str(error)).partition(" (while ")[0]
        raise OSError(
            f"cannot listen on port {port} of {host} ({reason}): choose another --port or --host"
        ) from error


def make_server(application: "Starlette") -> "uvicorn.Server":
    """What serves an app, by `run(sockets=[listen(host, port)])`; it prints nothing but errors."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            application,
            log_level="error",
            access_log=False,
            server_header=False,
            loop="asyncio",  # others take the signals that `interrupt` waits for
            lifespan="off",
            ws="none",
            limit_concurrency=64,
            timeout_graceful_shutdown=1,
        )
    )


def run(options: Options) -> None:
    """Serve the page until Ctrl-C."""
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is not installed: pip install 'flax-unet[serve]'"
        ) from error
    max_pixels, max_bytes = options.max_megapixels * 1e6, options.max_megabytes * 1e6
    if not 1 <= max_pixels <= pictures.MAX_PIXELS:
        most = pictures.MAX_PIXELS / 1e6
        raise ValueError(f"--max-megapixels {options.max_megapixels:g}: use at most {most:g}")
    if not 1 <= max_bytes <= pictures.MAX_BYTES:
        most = pictures.MAX_BYTES / 1e6
        raise ValueError(f"--max-megabytes {options.max_megabytes:g}: use at most {most:g}")
    with listen(options.host, options.port) as listening:
        trained: Any = runs.load_model(options.workdir, options.checkpoint)
        trained = trained._replace(image_format=options.ranges.apply(trained.image_format))
        model, _ = trained.predictor(flips=options.flips)
        trained = trained._replace(model=model)
        # Compile now, so that the first picture does not wait for it.
        print("compiling", flush=True)
        shape = *trained.settings.size, trained.image_format.channels
        probabilities(trained, np.zeros(shape, np.uint8 if trained.image_format.raw else "f4"))
        host, port = listening.getsockname()[:2]
        application = app(
            trained,
            name=options.workdir.name,
            host=options.host,
            max_pixels=int(max_pixels),
            max_bytes=int(max_bytes),
        )
        if not _is_loopback(host):
            print(
                "warning: everyone who reaches this machine over the network can use the page; "
                "nothing is encrypted",
                file=sys.stderr,
            )
        name = _this_machine() if ip_address(host).is_unspecified else options.host
        link = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
        if trained.terms:
            print(f"the model was {trained.terms}", flush=True)
        print(f"the page of {options.workdir.name} is {link} (Ctrl-C ends it)", flush=True)
        make_server(application).run(sockets=[listening])  # until a signal
        raise KeyboardInterrupt


def main(args: list[str] | None = None) -> int:
    return program.main(Options, run, __doc__, args)
