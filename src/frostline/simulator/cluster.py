"""What a simulation is told: how a model weighs and works (:class:`Profile`), and the machines (:class:`Cluster`).

Times are in seconds, sizes in bytes (a number, or "12 GiB", "500MB"). What a profile says "a sample" is for one sample
on one rank, on the kind of device that the cluster is made of.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

from frostline.settings import Bytes

__all__ = ["Blocks", "Cluster", "Input", "Link", "Part", "Profile"]


Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Input(BaseModel):
    """Base of what stands in an input file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Part(Input):
    """The stem, a block or the head.

    ``forward_seconds`` and ``backward_seconds`` are those of one sample; without the second the backward pass takes
    twice the forward pass (input gradient and weight gradient). ``parameter_bytes`` are also the bytes of its
    gradient. ``activation_bytes`` is what one sample leaves for the backward pass. ``update_seconds``: of the
    optimizer's update of what it holds, once a step in which it trains.
    """

    forward_seconds: Seconds
    backward_seconds: Seconds | None = None
    parameter_bytes: Bytes
    activation_bytes: Bytes
    update_seconds: Seconds = 0.0

    @property
    def backward(self) -> float:
        """Seconds of the backward pass for one sample."""
        return 2 * self.forward_seconds if self.backward_seconds is None else self.backward_seconds


class Blocks(Part):
    """``count`` equal blocks, one after the other."""

    count: int = Field(default=1, ge=1, le=10_000)


class Profile(Input):
    """A model, part by part, from input to output.

    ``optimizer_state``: bytes that the optimizer keeps for each byte of what trains (AdamW: 2; SGD with momentum: 1).
    ``sample_bytes``: what a sample takes of memory wherever the frost line is (its inputs, working memory).
    ``step_seconds``: of a step, whatever its size and depth (launching kernels; the optimizer's update, where no part
    says its own).
    """

    name: str = ""
    stem: Part
    blocks: list[Blocks] = Field(min_length=1)
    head: Part
    optimizer_state: float = Field(default=2.0, ge=0.0, allow_inf_nan=False)
    sample_bytes: Bytes = ByteSize(0)
    step_seconds: Seconds = 0.0

    @model_validator(mode="after")
    def _takes_time(self) -> Profile:
        if not any(part.forward_seconds for part in self.parts):
            raise ValueError("forward_seconds is 0 for every part: a step must take time")
        return self

    @property
    def size(self) -> int:
        """N, the number of blocks."""
        return sum(block.count for block in self.blocks)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The stem, N blocks and the head."""
        return (self.stem, *(block for block in self.blocks for _ in range(block.count)), self.head)

    def below(self, depth: int) -> tuple[Part, ...]:
        """The prefix at ``depth``; the stem freezes with block 0."""
        return self.parts[: depth + 1] if depth else ()

    def above(self, depth: int) -> tuple[Part, ...]:
        """What trains at ``depth``; the head always does."""
        return self.parts[depth + 1 :] if depth else self.parts


class Link(Input):
    """One way between two ends of a ring: alpha (``latency_seconds`` of a message) and beta (``bytes_per_second``)."""

    bytes_per_second: float = Field(gt=0.0)
    latency_seconds: Seconds = 0.0


class Cluster(Input):
    """Equal hosts with equal devices, one rank to a device.

    ``between`` is a host's link, which its ranks share; ``inside`` joins the ranks of one host. ``overlap`` is the
    share of the backward pass during which gradients travel unseen: 0 sends when it has ended, 1 hides as much as it
    lasts. ``restart_seconds`` is what a change of stage costs where several ranks train. Without a price, cost is in
    rank-hours.
    """

    name: str = ""
    device_memory: Bytes = Field(gt=0)
    between: Link
    inside: Link | None = None
    ranks_per_host: int = Field(default=1, ge=1)
    price_per_rank_hour: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    # Building the wrapper anew after a freeze took PipeTransformer about 20 s; a job that starts again takes longer.
    restart_seconds: Seconds = 20.0
    # DDP sends buckets while gradients are made, but the last ones, of the lowest parts, come when all else is done.
    overlap: float = Field(default=0.5, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _hosts_are_joined(self) -> Cluster:
        if self.ranks_per_host > 1 and self.inside is None:
            raise ValueError(f"ranks_per_host={self.ranks_per_host} needs inside, the link between ranks of one host")
        return self
