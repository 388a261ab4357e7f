"""What every group of settings is, and the values that several of them share. No torch in this room."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from mochi_lora import spec


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values cannot be changed after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _legal_bucket(text: str) -> str:
    return str(spec.Bucket.parse(text))


def _legal_frames(frames: int) -> int:
    if problem := spec.illegal_frames(frames):
        raise ValueError(problem)
    return frames


def _legal_size(size: int) -> int:
    if problem := spec.illegal_size("size", size):
        raise ValueError(problem)
    return size


BucketText = Annotated[str, AfterValidator(_legal_bucket)]
Frames = Annotated[int, AfterValidator(_legal_frames)]
Size = Annotated[int, AfterValidator(_legal_size)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
