"""From the name in a config to the network: `builtin:...`, `drawn-world`, else a hub id or a local folder."""

import torch

from mochi_lora.errors import UserError
from mochi_lora.measures.builtin_encoders import GramEncoder, PooledEncoder, load_lite_network
from mochi_lora.measures.conse import load_conse
from mochi_lora.measures.drawn_world import DrawnWorldAligner
from mochi_lora.measures.encoders import Aligner, ImageEncoder
from mochi_lora.measures.hub_encoders import load_frame_text, load_image_tower
from mochi_lora.measures.judge_model import load_judge
from mochi_lora.measures.pretrained import config_of, fetch
from mochi_lora.measures.style_encoder import is_csd, load_csd
from mochi_lora.measures.video_text import load_video_text

BUILTIN_IMAGE = "builtin:efficientnet-lite0"
BUILTIN_ALIGNER = "builtin:conse"
BUILTIN_STYLE = "builtin:efficientnet-lite0-gram"
DRAWN_WORLD = "drawn-world"


def load_image_encoder(name: str, device: str | torch.device, purpose: str = "embedding frames") -> ImageEncoder:
    """What content, background, drift, diversity and memorisation are measured with."""
    if name == BUILTIN_IMAGE:
        return PooledEncoder(load_lite_network(device))
    _refuse_unknown_builtin(name, purpose, BUILTIN_IMAGE)
    return load_image_tower(fetch(name, purpose), device)


def load_style(name: str, device: str | torch.device, purpose: str = "style descriptors") -> ImageEncoder:
    """CSD, or the built-in Gram statistics; any other image tower is taken as it is (and sees content as well)."""
    if name == BUILTIN_STYLE:
        return GramEncoder(load_lite_network(device))
    _refuse_unknown_builtin(name, purpose, BUILTIN_STYLE)
    found = fetch(name, purpose)
    return load_csd(found, device) if is_csd(found.folder) else load_image_tower(found, device)


def load_aligner(name: str, device: str | torch.device, purpose: str = "text alignment") -> Aligner:
    """CLIP and SigLIP frame by frame, X-CLIP and PE-AV as a clip, the built-in ConSE, or the drawn world's judge."""
    if name == BUILTIN_ALIGNER:
        return load_conse(device)
    if name == DRAWN_WORLD:
        return DrawnWorldAligner()
    _refuse_unknown_builtin(name, purpose, BUILTIN_ALIGNER)
    found = fetch(name, purpose)
    frame_by_frame = config_of(found)["model_type"] in ("clip", "siglip")
    return load_frame_text(found, device) if frame_by_frame else load_video_text(found, device)


def load_vision_language_judge(name: str, device: str | torch.device, purpose: str = "judging clips") -> Aligner:
    """The optional second tier: a chat model that sees pictures, by hub id or folder."""
    _refuse_unknown_builtin(name, purpose, None)
    return load_judge(fetch(name, purpose), device)


def _refuse_unknown_builtin(name: str, purpose: str, known: str | None) -> None:
    if name.startswith("builtin:") or name == DRAWN_WORLD:
        offer = f"the built-in one is {known}" if known else "there is no built-in one"
        raise UserError(f"{name}: not a backbone for {purpose}; {offer}; otherwise a hub id (OWNER/NAME) or a local folder")
