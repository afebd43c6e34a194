"""The cache folder: converted bases, tokenized rows, file digests, compiled products. Deleting it loses only time."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder for what can be made again: ``$LORAFLEET_CACHE``, or ``lorafleet`` in the platform's cache folder.

    Not created here; whoever writes into it creates it.
    """
    if given := os.environ.get("LORAFLEET_CACHE"):
        return Path(given).expanduser().absolute()
    home = Path.home()
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "lorafleet"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "lorafleet" / "Cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "lorafleet"
