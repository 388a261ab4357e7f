"""`mochi-lora publish` and `train --push-to-hub`: the folder that `mochi-lora card` wrote, and nothing else, to the hub."""

import glob
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mochi_lora.commands.card import WEIGHTS, public_files
from mochi_lora.config.requests import HubTarget
from mochi_lora.console import console
from mochi_lora.errors import UserError
from mochi_lora.files import write_text
from mochi_lora.model.transfer import NETWORK_ERRORS
from mochi_lora.report.card import NAME as README
from mochi_lora.report.card import with_repository

_LOG_IN = "run `hf auth login` with a token that may write, or set HF_TOKEN"


def run(folder: Path, target: HubTarget) -> str:
    """Upload the folder into a repository made for it if there is none; returns the page's address.

    Raises UserError for a folder that holds anything else, for a missing right, and where --private would come too late.
    """
    require_right(target)
    files = public_files(folder)
    if lacking := sorted({README, WEIGHTS} - set(files)):
        raise UserError(f"{folder}: lacks {', '.join(lacking)}; run `mochi-lora card` first")
    api = HfApi()
    with _hub_named(target):
        api.create_repo(target.repository, repo_type="model", private=target.private or None, exist_ok=True)
        if target.private and not api.model_info(target.repository).private:
            message = f"--private: {target.repository} is there already, and everybody can see it; nothing was uploaded"
            raise UserError(f"{message}. Make it private in its settings on the hub, or give another --repo")
        card = (folder / README).read_text(encoding="utf-8")
        write_text(folder / README, with_repository(card, target.repository))
        names = [glob.escape(name) for name in files]
        done = api.upload_folder(
            repo_id=target.repository, folder_path=folder, allow_patterns=names, commit_message="Adapter and model card"
        )
    address = f"{api.endpoint}/{target.repository}"
    console.print(f"hub      {len(files)} files: {address} (commit {done.oid[:12]})", markup=False)
    return address


def require_right(target: HubTarget) -> None:
    """Raises UserError unless the name is one and the hub knows who is asking: before a training, not after it."""
    try:
        validate_repo_id(target.repository)
    except HFValidationError as error:
        raise UserError(f"{target.repository}: no name of a repository ({error})") from error
    if target.repository.count("/") != 1:
        raise UserError(f"{target.repository}: expected OWNER/NAME, such as me/mochi-clay-style")
    if get_token() is None:
        raise UserError(f"{target.repository}: nobody is logged in to the hub on this machine; {_LOG_IN}")
    with _hub_named(target):
        HfApi().whoami()


@contextmanager
def _hub_named(target: HubTarget) -> Iterator[None]:
    """What the hub answers, as something a person can mend."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise UserError(f"{target.repository}: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        told = {
            401: f"the hub does not accept the token; {_LOG_IN}",
            403: f"the token may not write to {target.repository}; {_LOG_IN}, or choose an OWNER that is yours",
        }
        message = told.get(status, f"the hub refused ({error}); run `mochi-lora publish` again later")
        raise UserError(f"{target.repository}: {message}") from error
    except NETWORK_ERRORS as error:
        message = f"{target.repository}: the hub at {HfApi().endpoint} cannot be reached ({error})"
        raise UserError(f"{message}; check the network, then run `mochi-lora publish` again") from error
