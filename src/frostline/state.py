"""The engine's state on disk: JSON beside safetensors, each replaced whole, never pickle.

``frostline_state.json`` carries the checksum of ``frostline_state.safetensors``, so a pair that was torn by a
kill is recognised and not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from frostline.errors import ResumeError

__all__ = ["FORMAT", "is_complete", "load_state", "save_state"]

FORMAT = 1
_JSON, _TENSORS = "frostline_state.json", "frostline_state.safetensors"


def save_state(directory: str | Path, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write JSON ``values`` and ``tensors`` into ``directory``."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    blob = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    _replace(folder / _TENSORS, blob)
    record = {"format": FORMAT, "sha256": hashlib.sha256(blob).hexdigest(), "state": dict(values)}
    _replace(folder / _JSON, json.dumps(record, indent=1).encode())


def load_state(directory: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what :func:`save_state` wrote.

    Raises:
        ResumeError: no state there, a torn one, or one of another format.
    """
    folder = Path(directory)
    try:
        record = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        digest = hashlib.sha256((folder / _TENSORS).read_bytes()).hexdigest()
        if record["format"] != FORMAT:
            raise ResumeError(f"{folder / _JSON} has format {record['format']}; this version reads format {FORMAT}")
        if digest != record["sha256"]:
            raise ResumeError(f"{folder / _TENSORS} does not match its checksum: the checkpoint is torn")
        return dict(record["state"]), load_file(folder / _TENSORS)
    except FileNotFoundError as error:
        raise ResumeError(f"{folder} has no Frostline state ({Path(error.filename).name} is missing)") from None
    except (json.JSONDecodeError, KeyError, SafetensorError) as error:
        raise ResumeError(f"the Frostline state in {folder} cannot be read: {error}") from None


def is_complete(directory: str | Path) -> bool:
    """Whether ``directory`` holds a state that :func:`load_state` reads."""
    try:
        load_state(directory)
    except ResumeError:
        return False
    return True


def _replace(path: Path, blob: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    with temporary.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
