"""What one clip would become: its bucket, the frames that are used, the time that is not, and why. Decodes nothing."""

from dataclasses import dataclass
from typing import Literal

from mochi_lora.data.geometry import choose_bucket, crop_plan, nearest_frames, shown_size
from mochi_lora.data.probe import ClipInfo
from mochi_lora.data.sources import ClipSource
from mochi_lora.spec import FRAMES_PER_SECOND, Bucket

Status = Literal["kept", "trimmed"]
_A_CUT_WORTH_SAYING = 0.01  # of the picture; steps of 16 cannot keep every ratio


@dataclass(frozen=True)
class Shapes:
    """What clips may become."""

    buckets: tuple[Bucket, ...]
    upscale: bool


@dataclass(frozen=True)
class ClipPlan:
    """One clip in its bucket."""

    source: ClipSource
    bucket: Bucket
    width: int  # pixels that are used, before scaling: of the picture as shown, or of the source's crop
    height: int
    seconds: float  # of the clip; 0 for images
    unused_seconds: float  # at its end
    source_frames: int  # different frames of the file that are shown
    is_configured: bool  # whether the bucket is one of those asked for; an image may take another

    @property
    def status(self) -> Status:
        """Trimmed if more than one frame's time at the end is not used."""
        return status_of(self.unused_seconds)

    @property
    def why(self) -> str:
        """For people: what is used of the clip, and what is not."""
        told = [self._time(), self._picture()]
        return "; ".join(text for text in told if text)

    def _time(self) -> str:
        if self.seconds == 0:
            return (
                "an image: one frame" if self.is_configured else f"an image: one frame, though {self.bucket} is not configured"
            )
        frames = f"{self.bucket.frames} frames at {FRAMES_PER_SECOND} fps from {self.source_frames} of the file"
        if self.status == "kept":
            return f"{frames}, the whole clip"
        return f"{frames}, the first {self.seconds - self.unused_seconds:.3f} of {self.seconds:.3f} s; no longer bucket is full"

    def _picture(self) -> str:
        plan = crop_plan(self.width, self.height, self.bucket)
        scale = plan.scaled_height / self.height
        kept = self.bucket.width * self.bucket.height / (plan.scaled_width * plan.scaled_height)
        size = f"{self.width}x{self.height} {'enlarged' if scale > 1 else 'reduced'} to {scale:.0%}" if scale != 1 else ""
        cut = f"{1 - kept:.0%} of the picture cut off at its edges" if 1 - kept > _A_CUT_WORTH_SAYING else ""
        return ", ".join(text for text in (size, cut) if text)


def status_of(unused_seconds: float) -> Status:
    """Trimmed if more than one frame's time at the end is not used."""
    return "trimmed" if unused_seconds > 1 / FRAMES_PER_SECOND else "kept"


def plan_clip(source: ClipSource, info: ClipInfo, shapes: Shapes) -> ClipPlan:
    """The plan of one clip. Raises ClipError where no bucket fits it, as `choose_bucket` does."""
    bucket = choose_bucket(info, source, shapes.buckets, upscale=shapes.upscale)
    width, height = shown_size(info, source)
    end = info.duration if source.end is None else min(source.end, info.duration)
    seconds = 0.0 if info.is_image else end - source.start
    chosen = nearest_frames(info.times, info.frame_seconds, bucket.frames, source.start, source.end)
    return ClipPlan(
        source=source,
        bucket=bucket,
        width=width,
        height=height,
        seconds=seconds,
        unused_seconds=0.0 if info.is_image else max(0.0, seconds - bucket.frames / FRAMES_PER_SECOND),
        source_frames=len(set(chosen)),
        is_configured=bucket in shapes.buckets,
    )
