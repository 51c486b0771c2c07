"""W&B's settings: the user's own, and no others.

W&B also reads wandb/settings in the current folder. A stranger who wrote the files of that folder
would choose the server that gets the user's key.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from trainer.config.shown import shown

log = logging.getLogger(__name__)

TRUSTED = "GRAFT_TRUST_WANDB_SETTINGS"  # allows the settings of the current folder


def own_only() -> None:
    """Make W&B read its settings from the environment and the user's own file only, in this
    process. A file in the current folder is ignored with a warning, unless
    $GRAFT_TRUST_WANDB_SETTINGS is true."""
    from wandb.sdk.lib import settings_file
    from wandb.sdk.wandb_settings import Settings

    if getattr(Settings.read_system_settings, "own_only", False):
        return
    whole = Settings.read_system_settings

    def read(self: Any) -> Any:
        local = Path(self.settings_workspace)
        if not local.exists():
            return whole(self)
        if os.environ.get(TRUSTED, "").lower() == "true":
            log.info("W&B: using the settings of %s", local)
            return whole(self)
        log.warning(
            "W&B: %s is ignored, since it may come from a stranger and names the server that gets"
            " your key. To use it, export %s=true",
            shown(str(local)),
            TRUSTED,
        )
        own = Path(self.settings_system) if self.settings_system else None
        # a path below a file does not exist
        return settings_file.SettingsFiles(
            global_settings=own, local_settings=Path(os.devnull, "none")
        )

    read.own_only = True  # type: ignore[attr-defined]
    read.whole = whole  # type: ignore[attr-defined]
    Settings.read_system_settings = read  # type: ignore[method-assign]


def report_server(run: Any) -> None:
    """Log the server of an online run if it is not W&B's own."""
    from wandb.sdk.wandb_settings import Settings

    server = str(getattr(getattr(run, "settings", None), "base_url", "")).rstrip("/")
    if server and server != str(Settings.model_fields["base_url"].default).rstrip("/"):
        log.info("W&B: this run is sent to %s", shown(server))


def has_key() -> bool:
    """Return whether W&B has a key for the server that its settings name, or for its default."""
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib import wbauth
    from wandb.sdk.wandb_settings import Settings

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own_only()
    settings = Settings()
    settings.update_from_system_settings()
    settings.update_from_env_vars(dict(os.environ))
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        # wandb itself knows which entries of the netrc file belong to a server of several names
        return wbauth.read_netrc_auth(host=settings.base_url) is not None
    except AuthenticationError:
        return True  # there is one, and wandb says what is wrong with it
