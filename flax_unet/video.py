"""Videos, a frame at a time. Needs the extra `video`, which brings the program ffmpeg.

Only local files are opened, and nothing that their content may name: neither addresses nor other
files.
"""

import contextlib
import errno
import os
import re
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import IO

import numpy as np

from flax_unet.pictures import MAX_PIXELS, DataError

#: Of the files that are taken for videos.
SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v")
#: Higher rates are lowered to this one: browsers write 1000, and every frame would be doubled.
MAX_FPS = 240
#: What ffmpeg may open. Playlists and lists of files are no videos, and name what is to be read.
CONTAINERS = "mov,matroska,avi"
QUIET = ("-hide_banner", "-y")
#: Threads of the decoder and of the encoder: each one keeps a frame or two.
THREADS = ("-threads", "2")


@dataclass(frozen=True)
class Video:
    """What a video says about itself."""

    file: Path
    size: tuple[int, int]
    """Height and width of the frames as they are shown, in pixels."""
    fps: Fraction
    """Frames per second."""
    frames: int | None
    """How many there are by the duration that the file states, roughly; None if it states none."""


def ffmpeg() -> str:
    """The path of the program ffmpeg.

    Raises:
        ModuleNotFoundError: imageio-ffmpeg is not installed, or has no ffmpeg for this machine.
    """
    needed = "videos need imageio-ffmpeg: pip install 'flax-unet[video]'"
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(needed) from error
    except RuntimeError as error:
        raise ModuleNotFoundError(f"{needed} ({error})") from error


def open_video(path: str | os.PathLike) -> Video:
    """The size, rate and length of a video. Its first frame is decoded.

    Args:
        path: a local file: MP4, MOV, MKV, WebM or AVI.

    Raises:
        DataError: it is no video, or damaged, or has frames of more than `pictures.MAX_PIXELS`.
        ModuleNotFoundError: imageio-ffmpeg is not installed.
    """
    # The first line of this format has the exact rate, which the messages round.
    output = ("-frames:v", "1", "-pix_fmt", "yuv444p", "-f", "yuv4mpegpipe", "pipe:1")
    command = [*_input(Path(path)), *output]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    messages = done.stderr.decode(errors="replace")
    header = re.match(rb"YUV4MPEG2 W(\d+) H(\d+) F(\d+):(\d+) ", done.stdout)
    if header is None or int(header[3]) == 0 or int(header[4]) == 0:
        raise DataError(f"{path}: not a readable video ({_reason(messages)})")
    width, height, numerator, denominator = map(int, header.groups())
    if width * height > MAX_PIXELS:  # of a decoder that does not look at -max_pixels
        raise DataError(f"{path}: {width} x {height} pixels, more than {MAX_PIXELS:,}")
    fps = min(Fraction(numerator, denominator), Fraction(MAX_FPS))
    duration, number = re.search(r"Duration: (\d+):(\d+):([\d.]+)", messages), None
    if duration is not None:
        hours, minutes, seconds = map(float, duration.groups())
        number = round((3600 * hours + 60 * minutes + seconds) * fps)
    return Video(Path(path), (height, width), fps, number)


def frames(video: Video) -> Generator[np.ndarray, None, None]:
    """The frames of a video, uint8 [H, W, 3], read-only, one at a time at its constant rate.

    A video whose rate varies has frames repeated or left out. ffmpeg ends with the iterator, and
    with the program.

    Args:
        video: from `open_video`.

    Raises:
        DataError: it is damaged. Frames before the damage have been given.
    """
    height, width = video.size
    size = ("-s", f"{width}x{height}", "-r", str(video.fps))  # the same for all frames
    output = (*size, "-pix_fmt", "rgb24", "-f", "rawvideo", "pipe:1")
    command = [*_input(video.file), "-xerror", "-loglevel", "error", *output]
    count, pipe = 0, subprocess.PIPE
    with tempfile.TemporaryFile() as messages:  # a second pipe would have to be emptied
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=messages)
        assert process.stdout is not None
        try:
            while len(content := process.stdout.read(height * width * 3)) == height * width * 3:
                yield np.frombuffer(content, np.uint8).reshape(height, width, 3)
                count += 1
            code, text = process.wait(), _text(messages)
        finally:
            _end(process)
    if code or content or text:
        raise DataError(f"{video.file}: damaged after frame {count} ({_reason(text)})")


@contextlib.contextmanager
def writer(
    path: str | os.PathLike,
    size: tuple[int, int],
    fps: Fraction | float,
    overwrite: bool = False,
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write frames as an MP4 file (H.264): `with writer(path, size, fps) as write: write(frame)`.

    The file appears in one move when the block ends, and not at all if it raises. Frames are
    encoded as yuv420p, which every player shows and which needs even sizes: the last row or column
    of odd ones is repeated.

    Args:
        path: the file.
        size: height and width of the frames in pixels.
        fps: frames per second.
        overwrite: whether a file that exists is replaced.

    Yields:
        A function that writes a frame, uint8 [H, W, 3].

    Raises:
        DataError: the frames cannot be encoded, or there are none.
        OSError: the file cannot be written, or exists.
        ValueError: a frame is of another size or type.
        ModuleNotFoundError: imageio-ffmpeg is not installed.
    """
    path = Path(path)

    def check_absent() -> None:
        if not overwrite and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))

    check_absent()
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    height, width = (side + side % 2 for side in size)
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}")
    source += ("-r", str(Fraction(fps).limit_denominator(10**6)), "-i", "pipe:0")
    # The matrix by which players turn it to RGB again must be named, or they guess it by the size.
    colours = ("-vf", "scale=out_color_matrix=bt709:out_range=tv", "-pix_fmt", "yuv420p")
    colours += ("-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709")
    encoder = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "18", *THREADS)
    target = ("-movflags", "+faststart", "-f", "mp4", f"file:{part.absolute()}")
    command = [ffmpeg(), *QUIET, "-loglevel", "error", *source, *colours, *encoder, *target]
    part.open("xb").close()  # if it cannot be written, that is Python's error and not ffmpeg's
    with tempfile.TemporaryFile() as messages, contextlib.ExitStack() as stack:
        stack.callback(part.unlink, missing_ok=True)
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=messages
        )
        stdin, count = process.stdin, 0
        assert stdin is not None

        def failure() -> Exception:
            process.wait()
            text = _text(messages)
            if "No space left" in text:
                return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return DataError(f"{path}: the video cannot be written ({_reason(text)})")

        def write(frame: np.ndarray) -> None:
            nonlocal count
            if frame.shape != (*size, 3) or frame.dtype != np.uint8:
                expected = f"uint8 {(*size, 3)}"
                raise ValueError(f"frame is {frame.dtype} {frame.shape}: it must be {expected}")
            if (height, width) != size:
                missing = ((0, height - size[0]), (0, width - size[1]), (0, 0))
                frame = np.pad(frame, missing, mode="edge")
            try:
                stdin.write(np.ascontiguousarray(frame).data)
            except OSError as error:
                raise failure() from error
            count += 1

        try:
            yield write
            try:
                stdin.close()
            except OSError as error:
                raise failure() from error
            if process.wait() or not count:
                raise failure() if count else DataError(f"{path}: the video would have no frames")
        finally:
            _end(process)
        check_absent()
        part.replace(path)


def _end(process: subprocess.Popen) -> None:
    """End a process that may have ended."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what it can no longer take
            if stream is not None:
                stream.close()


def _input(file: Path) -> list[str]:
    """The command of ffmpeg up to its input."""
    if not file.is_file():  # a pipe would be waited for, for ever
        raise DataError(f"{file}: no such file; addresses such as http: are not opened")
    limits = ("-protocol_whitelist", "file,pipe", "-format_whitelist", CONTAINERS)
    limits += ("-max_pixels", str(MAX_PIXELS), *THREADS)
    # After "file:" a name is only a name.
    return [
        ffmpeg(),
        *QUIET,
        "-nostdin",
        *limits,
        "-i",
        f"file:{file.absolute()}",
        "-map",
        "0:v:0",
    ]


def _text(messages: IO[bytes]) -> str:
    messages.seek(0)
    return messages.read(10_000).decode(errors="replace")


def _reason(messages: str) -> str:
    """The first message of ffmpeg that says what is wrong, in one line."""
    pattern = r"^(?:\[[^]]*\] ?)+(?!.*(?:misdetection|no frame!|Not detecting))(.*)$"
    found = re.search(pattern, messages, re.MULTILINE)
    line = found[1] if found else (messages.strip().splitlines() or ["unknown format"])[-1]
    return line.strip() if line.isprintable() else ascii(line.strip())
