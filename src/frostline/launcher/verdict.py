"""What the processes of a stage leave behind for the launcher that started them."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Verdict"]


@dataclass(frozen=True)
class Verdict:
    """How a stage ended on a host.

    Attributes:
        status: ``finished`` (the run), ``moved on`` (another stage follows) or ``failed``.
        message: why it failed.
        stays: whether this host takes part in the next stage.
        first: whether the first rank is on this host.
        ranks: that took part.
        run: the directory of the run.
    """

    status: str
    message: str = ""
    stays: bool = True
    first: bool = True
    ranks: int = 1
    run: str = ""

    def write(self, path: Path) -> None:
        """Leave it at ``path``, whole; several ranks of a host may do so at the same time."""
        temporary = path.with_name(f"{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(asdict(self)), encoding="utf-8")
        os.replace(temporary, path)

    @classmethod
    def read(cls, path: Path) -> Verdict | None:
        """What :meth:`write` wrote; ``None`` where there is nothing."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
