"""From the name in a config to the network: `builtin:...`, `drawn-world`, else a hub id or a local folder.

What is found is on this machine (the hub's files are fetched) and of a kind that can be loaded; no weight is read until it is.
"""

from collections.abc import Callable
from functools import partial

import torch

from mochi_lora.config.schema import BackbonesConfig
from mochi_lora.errors import UserError
from mochi_lora.measures.aesthetic_head import TOWER
from mochi_lora.measures.builtin_encoders import GramEncoder, PooledEncoder, load_lite_network, require_lite_network
from mochi_lora.measures.conse import load_conse, require_conse
from mochi_lora.measures.drawn_world import DrawnWorldAligner
from mochi_lora.measures.encoders import Aligner, ImageEncoder
from mochi_lora.measures.hub_encoders import FRAME_TEXT_KINDS, IMAGE_KINDS, load_frame_text, load_image_tower
from mochi_lora.measures.judge_model import load_judge
from mochi_lora.measures.pretrained import fetch, kind_of
from mochi_lora.measures.style_encoder import is_csd, load_csd
from mochi_lora.measures.video_text import VIDEO_TEXT_KINDS, load_video_text

BUILTIN_IMAGE = "builtin:efficientnet-lite0"
BUILTIN_ALIGNER = "builtin:conse"
BUILTIN_STYLE = "builtin:efficientnet-lite0-gram"
DRAWN_WORLD = "drawn-world"

_Device = str | torch.device


def load_image_encoder(name: str, device: _Device, purpose: str = "embedding frames") -> ImageEncoder:
    """What content, background, drift and diversity are measured with."""
    return _image_encoder(name, purpose)(device)


def load_style(name: str, device: _Device, purpose: str = "style descriptors") -> ImageEncoder:
    """CSD, or the built-in Gram statistics; any other image tower is taken as it is (and sees content as well)."""
    return _style(name, purpose)(device)


def load_aligner(name: str, device: _Device, purpose: str = "text alignment") -> Aligner:
    """CLIP and SigLIP frame by frame, X-CLIP and PE-AV as a clip, the built-in ConSE, or the drawn world's judge."""
    return _aligner(name, purpose)(device)


def load_vision_language_judge(name: str, device: _Device, purpose: str = "judging clips") -> Aligner:
    """The optional second tier: a chat model that sees pictures, by hub id or folder."""
    return _judge(name, purpose)(device)


def unavailable(backbones: BackbonesConfig) -> dict[str, UserError]:
    """Why a network cannot be had, by the key of `backbones` that asks for it; empty where all can.

    Loads none of them; downloads what is on the hub alone.
    """
    asked: dict[str, Callable[[], object]] = {
        "subject": partial(_image_encoder, backbones.subject, "embedding frames"),
        "background": partial(_image_encoder, backbones.background, "embedding frames"),
        "style": partial(_style, backbones.style, "style descriptors"),
    }
    for key, name in (("text", backbones.text), ("video_text", backbones.video_text)):
        if name is not None:
            asked[key] = partial(_aligner, name, "text alignment")
    if backbones.judge is not None:
        asked["judge"] = partial(_judge, backbones.judge, "judging clips")
    if backbones.aesthetic is not None:
        asked["aesthetic"] = partial(_image_encoder, TOWER, "aesthetic quality")
    found = {}
    for key, find in asked.items():
        try:
            find()
        except UserError as error:
            found[key] = error
    return found


def _image_encoder(name: str, purpose: str) -> Callable[[_Device], ImageEncoder]:
    if name == BUILTIN_IMAGE:
        require_lite_network()
        return lambda device: PooledEncoder(load_lite_network(device))
    _refuse_unknown_builtin(name, purpose, BUILTIN_IMAGE)
    found = fetch(name, purpose)
    kind_of(found, IMAGE_KINDS)
    return partial(load_image_tower, found)


def _style(name: str, purpose: str) -> Callable[[_Device], ImageEncoder]:
    if name == BUILTIN_STYLE:
        require_lite_network()
        return lambda device: GramEncoder(load_lite_network(device))
    _refuse_unknown_builtin(name, purpose, BUILTIN_STYLE)
    found = fetch(name, purpose)
    if is_csd(found.folder):
        return partial(load_csd, found)
    kind_of(found, IMAGE_KINDS)
    return partial(load_image_tower, found)


def _aligner(name: str, purpose: str) -> Callable[[_Device], Aligner]:
    if name == BUILTIN_ALIGNER:
        require_conse()
        return load_conse
    if name == DRAWN_WORLD:
        return lambda _device: DrawnWorldAligner()
    _refuse_unknown_builtin(name, purpose, BUILTIN_ALIGNER)
    found = fetch(name, purpose)
    kind = kind_of(found, (*FRAME_TEXT_KINDS, *VIDEO_TEXT_KINDS))
    return partial(load_frame_text if kind in FRAME_TEXT_KINDS else load_video_text, found)


def _judge(name: str, purpose: str) -> Callable[[_Device], Aligner]:
    _refuse_unknown_builtin(name, purpose, None)
    return partial(load_judge, fetch(name, purpose))


def _refuse_unknown_builtin(name: str, purpose: str, known: str | None) -> None:
    if name.startswith("builtin:") or name == DRAWN_WORLD:
        offer = f"the built-in one is {known}" if known else "there is no built-in one"
        raise UserError(f"{name}: not a backbone for {purpose}; {offer}; otherwise a hub id (OWNER/NAME) or a local folder")
