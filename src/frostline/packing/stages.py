"""The stages of a launched run: which ranks and batches it has had, in the file that all who take part read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from frostline.errors import ResumeError

__all__ = ["STAGES", "Job", "Look", "Stage", "Stages"]

STAGES = "stages.json"


@dataclass(frozen=True)
class Stage:
    """A stretch of a run with the same ranks and batches.

    Attributes:
        number: 0 for the first.
        ranks: processes.
        rows: samples in a micro-batch of one rank.
        accumulation: micro-batches in a step.
        samples: trained on before it.
        depth: of the frost line where it begins.
        rate: times the recipe's learning rate.
    """

    number: int
    ranks: int
    rows: int
    accumulation: int = 1
    samples: int = 0
    depth: int = 0
    rate: float = 1.0

    @property
    def batch(self) -> int:
        """Samples in an optimizer step."""
        return self.ranks * self.rows * self.accumulation

    def checkpoints(self, folder: Path) -> Path:
        """Where its checkpoints are, in the ``folder`` of the run's checkpoints."""
        return folder / f"stage-{self.number}" if self.number else folder

    def numbers(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "batch": self.batch}

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> Stage:
        """The stage whose :meth:`numbers` these are."""
        return cls(**{name: value for name, value in numbers.items() if name != "batch"})


@dataclass(frozen=True)
class Job:
    """What was measured of a run when it began: packing goes by it in every stage.

    Attributes:
        rows: samples in a micro-batch of the first stage.
        peaks: bytes of a rank at the peak of a step, by depth of the frost line; the entries are for micro-batches of
            ``rows`` samples, of twice as many, and so on.
        row_seconds: of the forward and backward pass for each further row, where only the last block trains.
        cap: bytes that a rank may take.
        adaptive: whether the optimizer is of the Adam family.
    """

    rows: int
    peaks: list[list[int]]
    row_seconds: float
    cap: int
    adaptive: bool

    def peak(self, rows: int, depth: int) -> int:
        """Bytes at the peak of a step with ``rows`` samples in a micro-batch, a whole number of those of the first."""
        return self.peaks[depth][rows // self.rows - 1]

    def per_row(self, depth: int) -> float:
        """Seconds for each further row: of 3N passes of a block, forward and backward, k frozen ones save 2k."""
        blocks = len(self.peaks) - 1
        return self.row_seconds * (3 * blocks - 2 * depth) / (3 * blocks - 2 * (blocks - 1))


@dataclass(frozen=True)
class Look:
    """What was found when the frost line had moved: ``stage`` is the next one, or ``None`` where none pays.

    ``samples`` had been trained on; ``numbers`` are those behind it. A run that a kill takes back to before it comes by
    again, and must find the same, though clocks would say something else.
    """

    samples: int
    depth: int
    stage: Stage | None
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Stages:
    """All stages of a run so far, the last one being at work, and every look at the next.

    Attributes:
        launch: names the launch that began the run: one that is killed before its first checkpoint may begin again.
        per_host: ranks on a host in the first stage.
        job: what was measured; ``None`` where nothing is packed.
    """

    launch: str
    per_host: int
    stages: list[Stage]
    looks: list[Look] = field(default_factory=list)
    job: Job | None = None

    @property
    def current(self) -> Stage:
        return self.stages[-1]

    @property
    def unit(self) -> int:
        """Samples in a batch of the first stage: every batch is a whole number of these."""
        return self.stages[0].batch

    def look_at(self, samples: int) -> Look | None:
        """What was found after that many samples, if that has been looked at."""
        return next((look for look in self.looks if look.samples == samples), None)

    def write(self, run: Path) -> None:
        """Put the file into the directory of the run, whole."""
        content = {
            "launch": self.launch,
            "per_host": self.per_host,
            "job": asdict(self.job) if self.job is not None else None,
            "stages": [stage.numbers() for stage in self.stages],
            "looks": [
                {**asdict(look), "stage": look.stage.numbers() if look.stage is not None else None}
                for look in self.looks
            ],
        }
        temporary = run / f"{STAGES}.tmp"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, run / STAGES)

    @classmethod
    def read(cls, run: Path) -> Stages | None:
        """What :meth:`write` wrote; ``None`` where there is nothing.

        Raises:
            ResumeError: something else is in the file.
        """
        path = run / STAGES
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            looks = [
                Look(**{**look, "stage": Stage.from_numbers(look["stage"]) if look["stage"] else None})
                for look in content["looks"]
            ]
            stages = [Stage.from_numbers(stage) for stage in content["stages"]]
            job = Job(**content["job"]) if content["job"] is not None else None
            return cls(content["launch"], content["per_host"], stages, looks, job)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{str(path)!r} cannot be read: {error}") from None
