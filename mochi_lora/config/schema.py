"""Every setting there is, with its sentence, its unit and its legal range. No torch in this room.

`configs/style.yaml` lists all of them with their defaults (a test holds the two together). Unknown keys fail.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mochi_lora import spec
from mochi_lora.config.curation import CaptionConfig, FilterConfig, PrepareConfig, SplitConfig
from mochi_lora.config.engine import EngineConfig
from mochi_lora.config.schedule import guidance_schedule, length_of_linear_part, linear_quadratic_schedule
from mochi_lora.config.section import BucketText, Decay, Frames, Section, Share, Size


class RunConfig(Section):
    """Where the run lives and what seeds it."""

    folder: Path = Field(Path("runs/style"), description="Folder of this run: checkpoints, adapters, samples, metrics.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random in training; same seed, same run.")


class ModelConfig(Section):
    """The pretrained Mochi that stays frozen."""

    base: str = Field(spec.BASE_MODEL, description="Hub id, or local folder in diffusers layout, of the base model.")
    revision: str | None = Field(None, description="Hub commit or tag to pin; null takes what is downloaded, or the newest.")


class PartConfig(Section):
    """One entry of `data.mix`: a folder or table with settings of its own."""

    clips: Path = Field(description="As data.clips.")
    repeats: int = Field(1, ge=1, strict=True, description="Times each clip comes per epoch; with weights the least number.")
    weight: float | None = Field(None, gt=0, strict=True, description="Share of the samples, relative to the other weights.")
    trigger: str = Field("", description="Words put before each caption that does not hold them.")
    buckets: list[BucketText] | None = Field(None, min_length=1, description="Instead of data.buckets.")
    upscale: bool | None = Field(None, description="Instead of data.upscale.")


_CLIPS = Path("clips")


class DataConfig(Section):
    """Clips in, cached samples out."""

    clips: Path = Field(
        _CLIPS,
        description="Folder of clips with same-stem .txt captions, or a CSV / JSONL file, or a Hugging Face datasets folder.",
    )
    mix: list[PartConfig] = Field(
        [],
        description="Several of them instead of data.clips, each {clips: PATH} and, if wanted, repeats: N (times each clip "
        "comes per epoch), weight: W (on all or none: share of the samples, relative), trigger: WORDS (put before captions "
        "without them), buckets, upscale (instead of those below).",
    )
    cache: Path = Field(Path("cache"), description="Folder of encoded samples; safe to share between runs.")
    buckets: list[BucketText] = Field(
        ["37x480x848"],
        min_length=1,
        description="Clip shapes, FRAMESxHEIGHTxWIDTH in pixels; a clip takes the nearest aspect ratio, then the most frames.",
    )
    upscale: bool = Field(False, description="Enlarge clips smaller than their bucket instead of rejecting them.")
    validation_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of clips held out for the validation loss, whole videos at a time (0 to 1); 0 trains on all.",
    )
    loader_workers: int = Field(2, ge=0, description="Processes per GPU that read and prepare cached samples.")

    @field_validator("mix")
    @classmethod
    def _mix_is_one_thing(cls, mix: list[PartConfig], checked: ValidationInfo) -> list[PartConfig]:
        if mix and checked.data.get("clips", _CLIPS) != _CLIPS:
            message = f"given together with data.clips ({checked.data['clips']}): make that an entry here and leave it out"
            raise ValueError(f"{message}, or give --data.clips {_CLIPS}")
        weighted = [part for part in mix if part.weight is not None]
        if len(weighted) not in (0, len(mix)):
            raise ValueError(f"{len(weighted)} of {len(mix)} entries have a weight: give every entry one, or none")
        return mix


class EncodeConfig(Section):
    """How clips and captions are encoded once, before training."""

    vae_precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="VAE arithmetic: bf16 autocast over fp32 weights, or fp32; auto is bf16 on a GPU, fp32 on a CPU."
    )
    text_precision: Literal["bf16", "fp32", "int8"] = Field(
        "bf16", description="T5 weights: bf16 (9 GiB), fp32 (18 GiB) or int8 (5 GiB, bitsandbytes)."
    )
    text_batch: int = Field(8, ge=1, description="Captions encoded at once.")
    read_ahead: int | None = Field(
        None,
        ge=0,
        description="Clips read by threads while the VAE works, each held in memory (37x480x848: 0.2 GB, 163 frames: 0.8 GB); "
        "0 reads in turn, null takes as many as the GPU's share of the CPU cores, from 2 to 8.",
    )
    unknown_token_limit: float = Field(
        0.1, ge=0, le=1, description="Captions with a larger share of tokens unknown to T5 are named in the report (0 to 1)."
    )


class AdapterConfig(Section):
    """The LoRA that is trained."""

    rank: int = Field(8, ge=1, le=512, description="Inner width of each LoRA pair.")
    alpha: float = Field(8.0, gt=0, description="Numerator of the LoRA scale alpha/rank (alpha/sqrt(rank) with rslora).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input (0 to 1).")
    targets: str = Field(
        "joint_attention",
        description="visual_attention, joint_attention, joint_attention_mlp, or a regular expression over names in a block.",
    )
    rslora: bool = Field(False, description="Scale by alpha/sqrt(rank) instead of alpha/rank.")
    dora: bool = Field(False, description="Weight-decomposed LoRA: learns a magnitude per output channel as well.")
    init_adapter: Path | None = Field(
        None, description="Adapter file to start from; its rank, alpha and targets must equal these."
    )


class ObjectiveConfig(Section):
    """What the adapter is asked to learn."""

    sigma: Literal["uniform", "logit_normal", "stratified"] = Field(
        "uniform", description="Distribution of the noise level sigma in (0, 1)."
    )
    logit_mean: float = Field(0.0, description="Mean of logit(sigma); only for logit_normal.")
    logit_std: float = Field(1.0, gt=0, description="Standard deviation of logit(sigma); only for logit_normal.")
    strata: int = Field(16, ge=2, description="Number of equal sigma bands visited in turn; only for stratified.")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Chance per sample of training without its caption, for guidance (0 to 1)."
    )
    temporal_weight: float = Field(
        0.0, ge=0, description="Weight of the appearance-debiased temporal term, for motion adapters; 0 is off."
    )


class TrainConfig(Section):
    """The optimiser's side of training."""

    steps: int = Field(1000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(1, ge=1, description="Samples per GPU and micro-step.")
    gradient_accumulation: int = Field(1, ge=1, description="Micro-steps per optimiser step.")
    learning_rate: float = Field(1e-4, gt=0, description="Peak learning rate.")
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="Course after the warm-up: constant, or down to 0 at the last step."
    )
    warmup_steps: int = Field(100, ge=0, description="Optimiser steps over which the learning rate rises linearly.")
    optimizer: Literal["adamw", "adamw8bit", "paged_adamw", "paged_adamw8bit"] = Field(
        "adamw", description="adamw (fused, torch), or bitsandbytes' 8-bit and paged variants (GPU memory)."
    )
    betas: tuple[Decay, Decay] = Field(
        (0.9, 0.999), description="Adam's decay rates of the two moments, each from 0 to below 1."
    )
    epsilon: float = Field(1e-8, gt=0, description="Adam's denominator offset.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay on the adapter.")
    gradient_clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    ema_decay: float = Field(0.0, ge=0, lt=1, description="Decay of the adapter's moving average per optimiser step; 0 is off.")
    log_every: int = Field(10, ge=1, description="Optimiser steps between log lines.")
    checkpoint_every: int = Field(200, ge=1, description="Optimiser steps between checkpoints and adapter files.")
    keep_checkpoints: int = Field(2, ge=1, description="Resume states kept; adapter files are all kept.")
    comfyui_copy: bool = Field(
        False, description="Write each adapter file in ComfyUI's layout as well, into comfyui/ beside it; not with dora."
    )
    validate_every: int = Field(200, ge=0, description="Optimiser steps between held-out losses; 0 is never.")
    validation_bands: int = Field(8, ge=1, description="Fixed noise levels at which the held-out loss is measured.")
    sample_every: int = Field(
        200, ge=0, description="Optimiser steps between sample videos, also at step 0 and the end; 0 is never."
    )
    peer_timeout_minutes: float = Field(
        30.0,
        gt=0,
        description="How long ranks that are alive wait for each other in a step; one that is gone is missed within a minute.",
    )

    @model_validator(mode="after")
    def _warmup_fits(self) -> "TrainConfig":
        if self.warmup_steps >= self.steps:
            message = f"warmup_steps {self.warmup_steps} must be smaller than steps {self.steps}: lower it, or train longer"
            raise ValueError(message)
        return self


# genmoai/mochi @0c86aeb `demos/cli.py`, a comment: "FastMochi" weights.
PRESETS: dict[str | None, dict[str, Any]] = {
    "fastmochi": {"steps": 8, "guidance": 1.5, "linear_steps": 6, "threshold_noise": 0.1},
}


class SampleConfig(Section):
    """Videos made during training and by `mochi-lora sample`."""

    prompts: list[str] = Field(
        ["a lighthouse on a cliff at dusk, waves breaking below"],
        description="Prompts; embedded by `encode` for use in training.",
    )
    negative_prompt: str = Field("", description="What guidance moves away from; empty is the null prompt of training.")
    seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field([0], min_length=1, description="One video per prompt and seed.")
    frames: Frames = Field(37, description="Frames at 30 per second, 6k+1.")
    height: Size = Field(spec.TRAINED_HEIGHT, description="Pixels, multiple of 16.")
    width: Size = Field(spec.TRAINED_WIDTH, description="Pixels, multiple of 16.")
    preset: Literal["fastmochi"] | None = Field(
        None,
        description="Settings that belong together: fastmochi (8 steps, guidance 1.5, 6 linear steps, threshold_noise 0.1) is "
        "Genmo's for a base distilled to few steps. It stands for these four keys: leave them out.",
    )
    steps: int = Field(64, ge=2, description="Denoising steps.")
    guidance: float | list[float] = Field(6.0, description="Guidance scale, or one per step; 1 is none.")
    linear_steps: int | None = Field(
        None, ge=1, description="Steps in the linear part of the sigma schedule; null is half of them."
    )
    threshold_noise: float = Field(0.025, gt=0, lt=1, description="Noise removed by the linear part.")
    guidance_interval: tuple[Share, Share] = Field(
        (0.0, 1.0), description="Lowest and highest sigma (0 to 1) that are guided; a step outside costs half."
    )
    step_cache: float = Field(
        0.0,
        ge=0,
        description="Expected relative change up to which a step reuses the last one's work (TeaCache), measured on mochi-tiny "
        "alone (docs/performance.md); 0: never.",
    )
    strength: float = Field(1.0, description="Strength of the run's adapter; 0 is the base model, bit for bit.")

    @model_validator(mode="before")
    @classmethod
    def _preset_stands_for_its_keys(cls, given: Any) -> Any:  # noqa: ANN401 - whatever the YAML holds
        preset = PRESETS.get(given.get("preset")) if isinstance(given, dict) else None
        if preset is None:
            return given
        for key in preset.keys() & given.keys():
            if given[key] != preset[key]:
                message = f"preset {given['preset']} has {key} {preset[key]}, but {given[key]} is set: leave one of them out"
                raise ValueError(message)
        return given | preset

    @field_validator("guidance_interval")
    @classmethod
    def _interval_is_one(cls, interval: tuple[float, float]) -> tuple[float, float]:
        if interval[0] >= interval[1]:
            raise ValueError(f"guidance_interval {list(interval)}: give the lowest sigma first, then the highest")
        return interval

    # Fields are checked in the order above: `checked.data` holds the earlier ones that are legal themselves.

    @field_validator("guidance")
    @classmethod
    def _one_scale_per_step(cls, guidance: float | list[float], checked: ValidationInfo) -> float | list[float]:
        if "steps" in checked.data:
            guidance_schedule(guidance, checked.data["steps"])
        return guidance

    @field_validator("linear_steps")
    @classmethod
    def _both_parts_have_steps(cls, linear_steps: int | None, checked: ValidationInfo) -> int | None:
        if "steps" in checked.data:
            length_of_linear_part(checked.data["steps"], linear_steps)
        return linear_steps

    @field_validator("threshold_noise")
    @classmethod
    def _sigma_falls(cls, threshold_noise: float, checked: ValidationInfo) -> float:
        if {"steps", "linear_steps"} <= checked.data.keys():
            linear_quadratic_schedule(checked.data["steps"], threshold_noise, checked.data["linear_steps"])
        return threshold_noise


class EvaluationConfig(Section):
    """What `mochi-lora evaluate` makes and measures: the adapter against its base, same prompts and seeds."""

    trigger: str = Field("", description="Word or words that call the adapter, as the captions have them; needed by evaluate.")
    prompts: list[str] = Field(
        [],
        description="Held-out prompts, each with the trigger: contents that no training clip shows; 7 or more for a verdict.",
    )
    prompts_file: Path | None = Field(
        None,
        description='More prompts: a text file with one a line, or JSONL with {"prompt": ...} and perhaps "set" and "seed".',
    )
    unrelated: list[str] | None = Field(
        None, description="Prompts about other things, without the trigger; null takes eight built-in ones, [] none."
    )
    seeds: int = Field(2, ge=1, description="Videos per prompt and side, seeds from 0.")
    strengths: list[float] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.25],
        description="Strengths at which the trigger prompts are made; [] makes no sweep.",
    )
    curve_checkpoints: int = Field(
        5, ge=0, description="Checkpoints of the run that are compared on the trigger prompts, evenly spaced; 0 is none."
    )
    references: Path | None = Field(
        None,
        description="Clips that show the style: anything data.clips takes; null takes the training clips whose captions hold "
        "the trigger (all, where none does).",
    )
    frames_per_clip: int = Field(16, ge=2, description="Evenly spaced frames of each clip that the image networks see.")
    training_captions: int = Field(
        8, ge=0, description="Training captions that are sampled as well, to see whether their clips come back; 0 is none."
    )
    quality_margin: float = Field(
        0.01, gt=0, description="Loss that still counts as no worse, in the unit of the quality axis's first measure."
    )
    alignment_margin: float = Field(
        0.01, gt=0, description="Loss that still counts as no worse, in the unit of the alignment axis's first measure."
    )
    resamples: int = Field(10_000, ge=100, description="Bootstrap resamples of the prompts behind each interval.")


class BackbonesConfig(Section):
    """The networks that `mochi-lora evaluate` measures with: hub ids, local folders, or builtin:NAME (small, ship offline)."""

    subject: str = Field("facebook/dinov2-base", description="Image embeddings: subject, content, diversity.")
    background: str = Field("openai/clip-vit-base-patch32", description="Image embeddings: background and style distance.")
    text: str | None = Field("openai/clip-vit-large-patch14", description="Frames against prompt; null leaves the measure out.")
    video_text: str | None = Field(
        "microsoft/xclip-base-patch32", description="Whole clip against prompt; null leaves the measure out."
    )
    style: str = Field("yuxi-liu-wired/CSD", description="Style descriptors.")
    aesthetic: str | None = Field(None, description="Safetensors file of LAION's aesthetic head; null leaves the measure out.")
    judge: str | None = Field(None, description="Vision-language model asked what a clip shows; null leaves the measure out.")


class TrackingConfig(Section):
    """Where the numbers go; a metrics.jsonl in the run folder is always written."""

    trackers: list[Literal["wandb", "trackio", "tensorboard"]] = Field(["wandb"], description="Trackers besides metrics.jsonl.")
    project: str = Field("mochi-lora", min_length=1, description="Project name in wandb and trackio.")
    run_name: str | None = Field(None, description="Name of the run in the trackers; null takes the run folder's name.")
    wandb_mode: Literal["online", "offline"] = Field("online", description="offline writes to the run folder; sync it later.")


class Config(Section):
    """One file configures encode, train, sample and evaluate."""

    run: RunConfig = Field(default_factory=RunConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    encode: EncodeConfig = Field(default_factory=EncodeConfig)
    adapter: AdapterConfig = Field(default_factory=AdapterConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    sample: SampleConfig = Field(default_factory=SampleConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    backbones: BackbonesConfig = Field(default_factory=BackbonesConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    prepare: PrepareConfig = Field(default_factory=PrepareConfig)
    split: SplitConfig = Field(default_factory=SplitConfig)
    filter: FilterConfig = Field(default_factory=FilterConfig)
    caption: CaptionConfig = Field(default_factory=CaptionConfig)
