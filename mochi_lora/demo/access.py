"""Who may open the page: the rules about hosts and passwords."""

import hmac
import ipaddress
import os
from collections.abc import Callable
from pathlib import Path

from mochi_lora.errors import UserError

USER = "mochi"


def read_password(source: str) -> str:
    """The password in the environment variable called `source`, or else in the file. Never on the command line, which
    every user of the machine can read. Raises UserError where there is none.
    """
    if source in os.environ:
        password = os.environ[source]
    else:
        try:
            password = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            message = f"--password {source}: neither an environment variable nor a readable text file ({error})"
            raise UserError(f"{message}; put the password into one of them and give its name") from error
    if not password.strip():
        raise UserError(f"--password {source}: is empty; put a password there")
    return password.strip()


def require_guarded(host: str, password: str | None, *, open_to_anyone: bool) -> None:
    """Raises UserError where others than this machine's users could reach the page, and nothing was said about them."""
    if is_loopback(host) or password is not None or open_to_anyone:
        return
    raise UserError(
        f"--host {host}: whoever reaches this machine could use its GPU. Give --password FILE_OR_ENV, or keep the default host "
        "and come through a tunnel (ssh -L 7860:127.0.0.1:7860 USER@MACHINE); --open-to-anyone means it as it stands"
    )


def is_loopback(host: str) -> bool:
    """Whether `host` can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name: where it leads is not known here
        return False


def login(password: str) -> Callable[[str, str], bool]:
    """Gradio's question about a login; takes as long for any wrong password."""

    def is_right(user: str, given: str) -> bool:
        wanted = f"{USER}\0{password}".encode()
        return hmac.compare_digest(f"{user.strip()}\0{given}".encode(), wanted)

    return is_right
