import errno
import os
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from flax_unet import video
from flax_unet.pictures import DataError

NTSC = Fraction(30000, 1001)


def moving(n, size=(48, 64)):
    """Frames of a square that moves to the right, on a grey that differs in each of them."""
    frames = []
    for i in range(n):
        frame = np.full((*size, 3), 40 + 4 * i, np.uint8)
        frame[10:26, 2 * i : 2 * i + 16] = (255, 40, 160)
        frames.append(frame)
    return frames


def write(path, frames, fps=NTSC, **options):
    with video.writer(path, frames[0].shape[:2], fps, **options) as write_frame:
        for frame in frames:
            write_frame(frame)
    return path


def ffmpeg(*words):
    command = [video.ffmpeg(), "-v", "error", "-y", *map(str, words)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return words[-1]


@pytest.fixture(scope="module")
def mp4(tmp_path_factory):
    return write(tmp_path_factory.mktemp("video") / "moving.mp4", moving(30))


@pytest.fixture
def processes(monkeypatch):
    """The processes that are started."""
    started, start = [], subprocess.Popen

    def start_and_record(*args, **options):
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start_and_record)
    return started


def test_frames_are_read_as_they_were_written(mp4):
    clip = video.open_video(mp4)
    assert (clip.size, clip.fps, clip.frames) == ((48, 64), NTSC, 30)
    frames = list(video.frames(clip))
    assert len(frames) == 30 and all(frame.dtype == np.uint8 for frame in frames)
    for frame, expected in zip(frames, moving(30), strict=True):
        assert abs(frame.astype(int) - expected).mean() < 2
        # Inside of the square the colour is exact but for rounding: both name the matrix.
        assert abs(frame[14:22].astype(int) - expected[14:22]).max(-1).min() <= 2
        np.testing.assert_allclose(frame[40, 60], expected[40, 60], atol=2)


def test_a_video_is_h264_in_the_pixels_that_every_player_shows(mp4):
    about = subprocess.run([video.ffmpeg(), "-i", mp4], capture_output=True, text=True).stderr
    assert "h264" in about and "yuv420p(tv, bt709" in about


@pytest.mark.parametrize("size", [(47, 64), (48, 63), (1, 1), (33, 35)])
def test_the_last_row_and_column_of_odd_sizes_are_repeated(tmp_path, size):
    frame = np.full((*size, 3), 200, np.uint8)
    clip = video.open_video(write(tmp_path / "odd.mp4", [frame] * 3))
    even = size[0] + size[0] % 2, size[1] + size[1] % 2
    assert clip.size == even
    assert all((abs(x.astype(int) - 200) <= 2).all() for x in video.frames(clip))


@pytest.mark.parametrize("suffix", [suffix for suffix in video.SUFFIXES if suffix != ".webm"])
def test_videos_of_other_containers_are_read(mp4, tmp_path, suffix):
    other = ffmpeg("-i", mp4, "-c:v", "copy", tmp_path / f"a'%d b{suffix}")
    clip = video.open_video(other)
    assert (clip.size, clip.fps) == ((48, 64), NTSC)
    frames = zip(video.frames(clip), moving(30), strict=True)
    assert all(abs(frame.astype(int) - expected).mean() < 2 for frame, expected in frames)


def test_webm_and_a_rotated_and_a_very_fast_video_are_read(mp4, tmp_path):
    webm = ffmpeg("-i", mp4, "-frames:v", "4", "-deadline", "realtime", tmp_path / "a.webm")
    assert len(list(video.frames(video.open_video(webm)))) == 4
    rotated = ffmpeg("-display_rotation", "90", "-i", mp4, "-c", "copy", tmp_path / "r.mp4")
    clip = video.open_video(rotated)
    assert clip.size == (64, 48)
    frame = next(frames := video.frames(clip))
    frames.close()
    assert abs(frame.astype(int) - np.rot90(moving(1)[0])).mean() < 2
    fast = write(tmp_path / "f.mp4", moving(9), fps=1000)
    assert video.open_video(fast).fps == video.MAX_FPS
    assert len(list(video.frames(video.open_video(fast)))) < 9


def test_a_name_that_is_not_utf_8_is_read(mp4, tmp_path):
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.mp4"))
    file.write_bytes(mp4.read_bytes())
    assert len(list(video.frames(video.open_video(file)))) == 30


def test_what_is_no_video_is_named(tmp_path, mp4):
    contents = {
        "text.mp4": b"hello",
        "empty.mp4": b"",
        "cut.mp4": mp4.read_bytes()[:900],
        # Lists of what is to be read instead.
        "list.mp4": b"ffconcat version 1.0\nfile whole.mp4\n",
        "playlist.m3u8": f"#EXTM3U\n#EXTINF:1,\nfile://{mp4}\n#EXT-X-ENDLIST\n".encode(),
    }
    (tmp_path / "whole.mp4").write_bytes(mp4.read_bytes())
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: not a readable video \(.+\)$") as raised:
            video.open_video(tmp_path / name)
        assert "\n" not in str(raised.value)
    os.mkfifo(tmp_path / "pipe.mp4")
    names = ("gone.mp4", "pipe.mp4", "", "http://127.0.0.1:9/a.mp4", f"concat:{mp4}", f"file:{mp4}")
    for name in names:
        path = name if ":" in name else tmp_path / name
        with pytest.raises(DataError, match="no such file; addresses such as http: are not opened"):
            video.open_video(path)


@pytest.mark.parametrize(
    ("suffix", "damage"), [(".mkv", "cut"), (".mp4", "cut"), (".mp4", "noise")]
)
def test_a_damaged_video_is_named_after_the_frames_before(mp4, tmp_path, suffix, damage, processes):
    whole = ffmpeg("-i", mp4, "-c", "copy", "-movflags", "faststart", tmp_path / f"a{suffix}")
    content = bytearray(whole.read_bytes())
    end = len(content) * 8 // 10
    if damage == "noise":
        content[end : end + 100] = np.random.default_rng(0).bytes(100)
    else:
        del content[end:]
    (tmp_path / f"cut{suffix}").write_bytes(content)
    count = 0
    with pytest.raises(DataError, match=rf"cut{suffix}: damaged after frame \d+ \(.+\)") as raised:
        for _ in video.frames(video.open_video(tmp_path / f"cut{suffix}")):
            count += 1
    assert count < 30 and f"frame {count} " in str(raised.value)
    assert all(process.poll() is not None for process in processes)


def test_too_large_frames_are_refused(mp4, monkeypatch):
    monkeypatch.setattr(video, "MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(DataError, match="Picture size 64x48 exceeds"):
        video.open_video(mp4)


def test_no_process_is_left_when_the_reader_stops_early(mp4, tmp_path, processes):
    frames = video.frames(video.open_video(mp4))
    next(frames)
    frames.close()
    with pytest.raises(KeyboardInterrupt), video.writer(tmp_path / "a.mp4", (8, 8), 5) as write_one:
        write_one(np.zeros((8, 8, 3), np.uint8))
        raise KeyboardInterrupt
    assert len(processes) == 3 and all(process.poll() is not None for process in processes)
    assert not list(tmp_path.iterdir())


def test_no_process_is_left_when_the_program_is_killed(mp4, tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "from flax_unet import video\n"
        "start = subprocess.Popen\n"
        "def say(*args, **options):\n"
        "    process = start(*args, **options)\n"
        "    print(process.pid, flush=True)\n"
        "    return process\n"
        f"clip = video.open_video({str(mp4)!r})\n"
        "subprocess.Popen = say\n"
        "frames = video.frames(clip)\n"
        "with video.writer('a.mp4', clip.size, clip.fps) as write:\n"
        "    write(next(frames))\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as program:
        assert program.stdout is not None
        words = [program.stdout.readline().strip() for _ in range(3)]
        program.send_signal(signal.SIGKILL)
    assert words[2] == "ready"

    def runs(pid):
        try:
            return re.search(r"\) (\w)", Path(f"/proc/{pid}/stat").read_text())[1] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    until = time.monotonic() + 20
    while any(map(runs, words[:2])) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(runs, words[:2])) and not (tmp_path / "a.mp4").exists()


def test_a_file_appears_whole_and_only_when_it_may(tmp_path):
    path = tmp_path / "a.mp4"
    with video.writer(path, (8, 8), 5) as write_frame:
        write_frame(np.zeros((8, 8, 3), np.uint8))
        assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="a.mp4"):
        write(path, moving(2))
    other = tmp_path / "b.mp4"
    with pytest.raises(FileExistsError), video.writer(other, (8, 8), 5) as write_frame:
        write_frame(np.zeros((8, 8, 3), np.uint8))
        other.touch()  # meanwhile
    assert path.read_bytes() == before and not other.read_bytes()
    write(path, moving(2), overwrite=True)
    assert path.read_bytes() != before
    with pytest.raises(DataError, match="c.mp4: the video would have no frames"):
        with video.writer(tmp_path / "c.mp4", (8, 8), 5):
            pass
    for frame in (np.zeros((8, 9, 3), np.uint8), np.zeros((8, 8, 3))):
        with pytest.raises(ValueError, match=r"it must be uint8 \(8, 8, 3\)"):
            with video.writer(tmp_path / "c.mp4", (8, 8), 5) as write_frame:
                write_frame(frame)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "gone" / "c.mp4", moving(1))
    assert {file.name for file in tmp_path.iterdir()} == {"a.mp4", "b.mp4"}


def test_a_full_disk_and_other_failures_of_the_encoder(tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    monkeypatch.setattr(video, "ffmpeg", lambda: str(program))
    out = tmp_path / "out"
    out.mkdir()
    for words, error in (("No space left on device", OSError), ("Unknown encoder", DataError)):
        program.write_text(f"#!/bin/sh\necho '[enc @ 0x1] {words}' >&2\nexit 1\n")
        program.chmod(0o755)
        with pytest.raises(error, match=words) as raised:
            write(out / "a.mp4", moving(9))
        assert "a.mp4" in str(raised.value)
        assert error is DataError or raised.value.errno == errno.ENOSPC
    assert not list(out.iterdir())


def test_the_extra_is_named_if_it_is_missing(mp4, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'flax-unet\[video\]'$"):
        video.open_video(mp4)
    with pytest.raises(ModuleNotFoundError, match="video"):
        write(mp4.with_name("a.mp4"), moving(1))
