"""Makes clips for tests with ffmpeg, each frame's number burnt in, and reads the numbers back from decoded pixels.

The picture is 128 x 64: eight blocks of 16 pixels across the upper half are the bits of the frame number (most significant
on the left, white is 1), the lower half is mid-grey. A picture turned or mirrored the wrong way reads as other numbers.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

WIDTH, HEIGHT, BITS = 128, 64, 8
H264 = ("-c:v", "libx264", "-pix_fmt", "yuv420p", "-preset", "ultrafast", "-crf", "18", "-bf", "2", "-g", "12")


def hdr(transfer: str, more: str = "hdr10=1") -> tuple[str, ...]:
    """10-bit HEVC of BT.2020 with an ffmpeg `transfer` (smpte2084 for PQ, arib-std-b67 for HLG) and `more` x265 parameters."""
    tags = f"colorprim=bt2020:transfer={transfer}:colormatrix=bt2020nc:range=limited"
    convert = "scale=out_color_matrix=bt2020nc:out_range=tv:flags=accurate_rnd+full_chroma_int+bicubic"
    x265 = ("-c:v", "libx265", "-preset", "ultrafast", "-pix_fmt", "yuv420p10le")
    return ("-vf", convert, *x265, "-x265-params", f"log-level=none:qp=2:{tags}:{more}")


def ffmpeg() -> str:
    """The ffmpeg program: from PATH, else imageio-ffmpeg's. Without one tests are skipped, but fail under CI=true."""
    if found := shutil.which("ffmpeg"):
        return found
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        if os.environ.get("CI") == "true":
            pytest.fail("no ffmpeg in PATH and no imageio-ffmpeg: CI must make footage")
        pytest.skip("no ffmpeg in PATH and no imageio-ffmpeg")


def run_ffmpeg(*arguments: str | Path, stdin: bytes | None = None) -> None:
    """ffmpeg with `arguments`; fails with what it said."""
    command = [ffmpeg(), "-hide_banner", "-loglevel", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")


def numbered_frame(number: int) -> np.ndarray:
    """uint8 [64, 128, 3] with `number` (0 to 255) written into it."""
    frame = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
    block = WIDTH // BITS
    for place in range(BITS):
        bit = number >> (BITS - 1 - place) & 1
        frame[: HEIGHT // 2, place * block : (place + 1) * block] = 255 * bit
    return frame


def make_clip(
    path: Path, *, frames: int = 48, rate: str = "30", codec: tuple[str, ...] = H264, last_number: int | None = None
) -> Path:
    """A clip of numbered frames at `path`; numbers stop counting at `last_number` (a frozen ending). Returns `path`."""
    last = frames - 1 if last_number is None else last_number
    raw = b"".join(numbered_frame(min(number, last)).tobytes() for number in range(frames))
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", rate, "-i", "-")
    run_ffmpeg(*source, *codec, path, stdin=raw)
    return path


def make_patches(path: Path, signals: np.ndarray, codec: tuple[str, ...]) -> Path:
    """Eight frames of 64 x 64 patches side by side, one per row of R'G'B' `signals` in [0, 1] (full range). Returns `path`."""
    picture = np.rint(np.repeat(np.repeat(signals[None], 64, 0), 64, 1) * 65535).astype("<u2")
    size = f"{picture.shape[1]}x64"
    source = ("-f", "rawvideo", "-pix_fmt", "rgb48le", "-s", size, "-r", "30", "-i", "-")
    run_ffmpeg(*source, *codec, path, stdin=picture.tobytes() * 8)
    return path


def make_interlaced(path: Path, order: str, codec: tuple[str, ...], frames: int = 48) -> Path:
    """30 frames a second of two fields, field k showing the number gray(k); `order` is tff or bff. Returns `path`.

    Gray code, since a bit that alternates from field to field is still in each of the two: no deinterlacer could see it.
    """
    raw = b"".join(numbered_frame(field ^ field >> 1).tobytes() for field in range(2 * frames))
    weave = f"tinterlace=interleave_{'top' if order == 'tff' else 'bottom'},setfield={order}"
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{WIDTH}x{HEIGHT}", "-r", "60", "-i", "-")
    run_ffmpeg(*source, "-vf", weave, *codec, path, stdin=raw)
    return path


def absurd(mp4: bytes) -> bytes:
    """`mp4` whose header promises 2^31 entries of a table: FFmpeg then asks for 16 GiB, and says that it got none."""
    count = mp4.index(b"stts") + 8
    return mp4[:count] + b"\x7f\xff\xff\xff" + mp4[count + 4 :]


def from_gray(code: int) -> int:
    """The number whose Gray code this is."""
    number = 0
    while code:
        number, code = number ^ code, code >> 1
    return number


def make_disc(path: Path, width: int, height: int, codec: tuple[str, ...], *, stretch: float = 1.0, frames: int = 8) -> Path:
    """A white disc on black in the middle, as high as half the picture, `stretch` times as wide as high. Returns `path`."""
    y, x = np.mgrid[:height, :width]
    radius = height / 4
    inside = ((x - (width - 1) / 2) / (radius * stretch)) ** 2 + ((y - (height - 1) / 2) / radius) ** 2 < 1
    picture = np.repeat(inside[..., None] * np.uint8(255), 3, 2).astype(np.uint8)
    source = ("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", "30", "-i", "-")
    run_ffmpeg(*source, *codec, path, stdin=picture.tobytes() * frames)
    return path


def read_numbers(clip: torch.Tensor) -> list[int]:
    """The number in each frame of float [3, T, H, W] in [-1, 1], any size of the aspect ratio 2:1."""
    _, _, height, width = clip.shape
    block = width // BITS
    row = clip[:, :, height // 8 : height * 3 // 8].mean(dim=(0, 2))  # [T, width], the middle of the upper half
    centres = torch.stack(
        [row[:, place * block + block // 4 : (place + 1) * block - block // 4].mean(1) for place in range(BITS)], 1
    )
    assert (centres.abs() > 0.5).all(), "a block is neither black nor white"
    return [sum(int(bit) << (BITS - 1 - place) for place, bit in enumerate(bits)) for bits in (centres > 0).int().tolist()]


def halved(path: Path, target: Path) -> Path:
    """Half of the bytes of `path` under `target`; an odd number, so that no cut falls between two packets by chance."""
    content = path.read_bytes()
    target.write_bytes(content[: len(content) // 2 - 1 | 1])
    return target
