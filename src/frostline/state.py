"""The engine's state on disk: JSON beside safetensors, never pickle.

``frostline_state.json`` carries the checksum of its tensors. New tensors are laid down beside the old ones, then the
JSON is replaced whole, which decides; only then do they take the old ones' name. A kill at any point leaves the old
pair or the new one, and a pair that does not match is recognised and not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from frostline.errors import ResumeError

__all__ = ["FORMAT", "fingerprint", "has_state", "is_complete", "load_state", "save_state"]

FORMAT = 1
_JSON, _TENSORS = "frostline_state.json", "frostline_state.safetensors"
_NEW = f"{_TENSORS}.new"


def fingerprint(model: nn.Module, blocks: int) -> dict[str, Any]:
    """What a state says of the (unwrapped) model it belongs to: class, number of blocks, a hash of names and shapes."""
    named = sorted((name, tuple(parameter.shape)) for name, parameter in model.named_parameters())
    digest = hashlib.sha256(repr(named).encode()).hexdigest()[:16]
    return {"class": type(model).__name__, "blocks": blocks, "parameters": digest}


def save_state(directory: str | Path, values: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Write JSON ``values`` and ``tensors`` into ``directory``."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    blob = save({name: value.detach().cpu().contiguous() for name, value in tensors.items()})
    _finish(folder)
    _write(folder / _NEW, blob)
    record = {"format": FORMAT, "sha256": hashlib.sha256(blob).hexdigest(), "state": dict(values)}
    _replace(folder / _JSON, json.dumps(record).encode())
    os.replace(folder / _NEW, folder / _TENSORS)


def load_state(directory: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Read what :func:`save_state` wrote.

    Raises:
        ResumeError: no state there, a torn one, or one of another format.
    """
    folder = Path(directory)
    try:
        record = json.loads((folder / _JSON).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ResumeError(f"{folder / _JSON} has format {record['format']}; this version reads format {FORMAT}")
        values, digest = dict(record["state"]), record["sha256"]
        # Killed between its last two steps, save_state leaves the tensors under their first name.
        blob = next((b for b in _blobs(folder) if hashlib.sha256(b).hexdigest() == digest), None)
        if blob is None:
            raise ResumeError(f"{folder / _TENSORS} does not match its checksum: the checkpoint is torn")
        return values, load(blob)
    except FileNotFoundError as error:
        raise ResumeError(f"{folder} has no Frostline state ({Path(error.filename).name} is missing)") from None
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ResumeError(f"the Frostline state in {folder} cannot be read: {error}") from None


def has_state(directory: str | Path) -> bool:
    """Whether there is a state of ours in ``directory``, whole or torn."""
    return any((Path(directory) / name).exists() for name in (_JSON, _TENSORS, _NEW))


def is_complete(directory: str | Path) -> bool:
    """Whether ``directory`` holds a state that :func:`load_state` reads."""
    try:
        load_state(directory)
    except ResumeError:
        return False
    return True


def _finish(folder: Path) -> None:
    """Give tensors that a killed :func:`save_state` left under their first name their own, before it is used again."""
    if (folder / _NEW).exists() and is_complete(folder):
        digest = json.loads((folder / _JSON).read_text(encoding="utf-8"))["sha256"]
        if hashlib.sha256((folder / _NEW).read_bytes()).hexdigest() == digest:
            os.replace(folder / _NEW, folder / _TENSORS)


def _blobs(folder: Path) -> Iterator[bytes]:
    # Where there is neither, the error names the one that should be there.
    for name in [n for n in (_TENSORS, _NEW) if (folder / n).exists()] or [_TENSORS]:
        yield (folder / name).read_bytes()


def _write(path: Path, blob: bytes) -> None:
    with path.open("wb") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, blob: bytes) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    _write(temporary, blob)
    os.replace(temporary, path)
