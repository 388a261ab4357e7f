"""What a run asks of the machine: the model's dimensions, the largest clip, the adapter, the videos in between.

Numbers only: predictions (`footprint`, `pace`) and the choice of a plan are made from them before any weight is read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mochi_lora.engine.precision import Precision
from mochi_lora.spec import Bucket

_TYPICAL_CAPTION = 128  # tokens; of S = 11,250 and more they hardly count


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a Mochi transformer by what they meet: every visual token, every text token, or each sample once."""

    layers: int
    heads: int
    head_size: int
    text_width: int
    visual: int  # per block: q, k, v, out, both feed-forward matrices
    text: int  # per block but the last, which has only q, k and v
    last_text: int
    modulation: int  # per block but the last
    last_modulation: int
    outside: int  # of the blocks: embeddings, caption pooler, last projection
    patch: int  # numbers of a latent video that one visual token stands for
    float32: int  # q/k norms and positions, float32 at every precision; not in the counts above

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "ModelSize":
        """From the arguments of `MochiTransformer3DModel` (diffusers 0.42.1); what they leave out is Mochi-1's."""
        published = {
            "num_layers": 48, "num_attention_heads": 24, "attention_head_dim": 128, "pooled_projection_dim": 1536,
            "in_channels": 12, "patch_size": 2, "text_embed_dim": 4096, "time_embed_dim": 256,
        }  # fmt: skip
        known = {name: config.get(name) or value for name, value in published.items()}
        heads, head_size, text = (
            known[name] for name in ("num_attention_heads", "attention_head_dim", "pooled_projection_dim")
        )
        width, embedding = heads * head_size, known["text_embed_dim"]
        patch = known["in_channels"] * known["patch_size"] ** 2
        hidden, text_hidden = (int(8 * size / 3) for size in (width, text))
        time = (known["time_embed_dim"] + 1 + width + 1) * width
        pooler = (embedding + 1) * (2 * embedding + embedding + width)
        ends = (patch + 1) * width + (width + 1) * (2 * width + patch)
        return cls(
            layers=known["num_layers"],
            heads=heads,
            head_size=head_size,
            text_width=text,
            visual=4 * width * width + width + 3 * width * hidden,
            text=4 * width * text + text + 3 * text * text_hidden,
            last_text=3 * width * text,
            modulation=(width + 1) * 4 * (width + text),
            last_modulation=(width + 1) * (4 * width + text),
            outside=time + pooler + (embedding + 1) * text + ends,
            patch=patch,
            float32=4 * head_size * known["num_layers"] + 3 * heads * head_size // 2,
        )

    @property
    def width(self) -> int:
        """Of the visual stream."""
        return self.heads * self.head_size

    @property
    def parameters(self) -> int:
        """All of them."""
        between = (self.layers - 1) * (self.text + self.modulation) + self.last_text + self.last_modulation
        return self.layers * self.visual + between + self.outside + self.float32

    def linears(self) -> Iterator[tuple[str, int, int]]:
        """(name, input features, output features) of every linear in the blocks, by diffusers' names."""
        width, text = self.width, self.text_width
        hidden, text_hidden = (int(8 * size / 3) for size in (width, text))
        inside = {
            "norm1.linear": (width, 4 * width), "norm1_context.linear": (width, 4 * text),
            "attn1.to_q": (width, width), "attn1.to_k": (width, width), "attn1.to_v": (width, width),
            "attn1.to_out.0": (width, width), "attn1.add_q_proj": (text, width), "attn1.add_k_proj": (text, width),
            "attn1.add_v_proj": (text, width), "attn1.to_add_out": (width, text), "ff.net.0.proj": (width, 2 * hidden),
            "ff.net.2": (hidden, width), "ff_context.net.0.proj": (text, 2 * text_hidden),
            "ff_context.net.2": (text_hidden, text),
        }  # fmt: skip
        gone = ("norm1_context.linear", "attn1.to_add_out", "ff_context.net.0.proj", "ff_context.net.2")
        for block in range(self.layers):
            last = block == self.layers - 1
            for name, (inputs, outputs) in inside.items():
                if not (last and name in gone):
                    yield f"transformer_blocks.{block}.{name}", inputs, outputs
            if last:
                yield f"transformer_blocks.{block}.norm1_context.linear_1", width, text


@dataclass(frozen=True)
class AdapterSize:
    """What is trained."""

    parameters: int
    optimizer_bytes: int  # per parameter: 8 for Adam's two moments, 2 in 8 bits
    averaged: bool  # a moving average is kept

    @property
    def bytes(self) -> int:
        """On the device once training runs: float32 factors, their gradients, the optimiser's state, the average."""
        return self.parameters * (4 + 4 + self.optimizer_bytes + 4 * self.averaged)


@dataclass(frozen=True)
class Films:
    """The videos a run makes."""

    bucket: Bucket
    steps: int
    guided: bool  # two passes per denoising step
    decoding_gib: float  # the VAE with its weights, at work on one such video
    vae_gib: float = 0.0  # its weights alone: where nothing is trained, it waits beside the transformer


@dataclass(frozen=True)
class Workload:
    """One process's share of a run. Without an adapter nothing is trained: `bucket` is then what is only looked at."""

    model: ModelSize
    bucket: Bucket  # the largest
    batch: int
    micro_steps: int
    adapter: AdapterSize | None
    films: Films | None
    text_tokens: int = _TYPICAL_CAPTION
    stored: Precision | None = None  # the base lies there quantised, and can be nothing else
    beside_gib: float = 0.0  # other models on the device; where parts take turns, they are elsewhere while these work
    processes: int = 1  # on this host: each wants its pinned memory
    context: int = 1  # ranks that share the visual tokens
    world: int = 1  # processes of the launch, on all hosts

    @cached_property  # asked for thousands of plans
    def tokens(self) -> int:
        """This process's visual tokens of one pass."""
        return self.batch * self.bucket.tokens // self.context
