"""Sample videos during training: the model as it stands, prompts from the cache, nothing left behind.

The sampler draws from its own streams, so the training's random state is untouched; the VAE is loaded for the occasion and
dropped afterwards; gradients, mode and adapter weights are as before.
"""

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator

from mochi_lora.config.schema import Config
from mochi_lora.console import console
from mochi_lora.data.prompts import PromptEmbeddings
from mochi_lora.inference.generate import generate_latents, render
from mochi_lora.inference.sampler import Cancelled
from mochi_lora.inference.video import glimpse, video_name, write_contact_sheet, write_mp4
from mochi_lora.model.transformer import VelocityModel
from mochi_lora.parallel.mesh import ALONE, Ranks, gathered
from mochi_lora.runs.decoder import load_decoder
from mochi_lora.runs.folder import sheet_path
from mochi_lora.runs.processes import LONG_WAIT_MINUTES


class Previews:
    """Makes the configured prompts' videos after N completed steps; ranks share the prompts.

    `cancelled` is asked between denoising steps: who sent SIGTERM will not wait for minutes of sampling. Ranks that work on
    one video together must be told the same.
    """

    def __init__(
        self,
        config: Config,
        processes: Accelerator,
        prompts: PromptEmbeddings,
        cancelled: Callable[[], bool],
        ranks: Ranks = ALONE,
    ) -> None:
        sample = config.sample
        self._config = config
        self._processes = processes
        self._cancelled = cancelled
        self._ranks = ranks
        self._jobs = [(prompt, prompts(prompt), seed) for prompt in sample.prompts for seed in sample.seeds]
        self._negative = prompts(sample.negative_prompt)
        self._group = None
        if ranks.layout.world > 1:
            # Of its own: a rank without a share of the videos waits for as long as they take, which is longer than a step
            # may. gloo, since NCCL would abort for it and what is gathered lies on the host.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=LONG_WAIT_MINUTES))
        self.seconds = 0.0  # spent here since the run's start, in this process

    def make(self, model: VelocityModel, done: int) -> dict[str, Path]:
        """Videos of all ranks by caption, under <run>/samples/step-<done>, with a contact sheet beside them.

        Empty, and no sheet, if any rank was cancelled: a resumed run makes them then.
        """
        start = time.monotonic()
        folder = sheet_path(self._config, done).parent
        mine = self._ranks.own(len(self._jobs))
        was_training = model.training
        model.eval()
        latents = self._sample_all(model, mine)
        model.train(was_training)
        finished = all(gathered([latents is not None], self._group))
        sheets = self._decode(model, latents, folder) if latents and finished else []
        rows = sorted(gathered(sheets, self._group), key=lambda row: row[0])
        self.seconds += time.monotonic() - start
        if not finished:
            return {}
        if self._processes.is_main_process:
            sheet = sheet_path(self._config, done)
            write_contact_sheet(sheet, [(caption, frames) for _, caption, _, frames in rows])
            console.print(f"samples  {sheet}", markup=False)
        return {caption: path for _, caption, path, _ in rows}

    def _sample_all(self, model: VelocityModel, numbers: Sequence[int]) -> dict[int, torch.Tensor] | None:
        try:
            made = {number: self._sample(model, number) for number in numbers}
            return {number: latents for number, latents in made.items() if self._ranks.keeps(number)}
        except Cancelled:
            return None

    def _sample(self, model: VelocityModel, number: int) -> torch.Tensor:
        _, prompt, seed = self._jobs[number]
        settings, silent = self._config.sample, lambda _done, _steps: None
        latents = generate_latents(model, prompt, self._negative, settings, seed, on_step=silent, cancelled=self._cancelled)
        return latents.cpu()

    def _decode(self, model: VelocityModel, latents: dict[int, torch.Tensor], folder: Path) -> list[tuple]:
        """(number, caption, path, a few frames) per video; offloading takes the transformer off the GPU meanwhile."""
        config = self._config
        device = self._processes.device
        if model.plan.cpu_offload:
            model.to("cpu")
            torch.cuda.empty_cache()
        vae = load_decoder(config, device)
        rows = []
        for number, latent in latents.items():
            prompt, _, seed = self._jobs[number]
            frames = render(vae, latent)
            path = folder / video_name(number, prompt, seed)
            write_mp4(path, frames)
            rows.append((number, f"{prompt} (seed {seed})", path, glimpse(frames)))
        del vae
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if model.plan.cpu_offload:
            model.to(device)
        return rows
