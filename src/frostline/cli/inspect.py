"""``frostline inspect``: where a model can be frozen, and what each block weighs and costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

    from frostline.inspection import Inspection, Part

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: `frostline inspect minilm`, `frostline inspect facebook/bart-base --blocks "
        "model.decoder.layers`. Saved bytes and times are those of the whole batch in train mode."
    )
    def inspect(
        model: Annotated[str, typer.Argument(help="Asset, local folder or hub id.", show_default=False)],
        blocks: Annotated[
            str | None,
            typer.Option(help="Dotted path of the list of blocks, where another than the one found is meant."),
        ] = None,
        batch: Annotated[int, typer.Option(help="Samples in the made-up batch.")] = 8,
        length: Annotated[int, typer.Option(help="Tokens per sample (text only).")] = 64,
        memory: Annotated[
            bool,
            typer.Option(
                "--memory", help="Also count what the backward pass keeps at each memory level, by block and operation."
            ),
        ] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    ) -> None:
        """Print a model's stem, blocks and head: what freezes together, its size, and its measured time."""
        import json

        from frostline.inspection import inspect_model

        found = inspect_model(_load(model), blocks=blocks, batch=batch, length=length, memory=memory)
        if as_json:
            print(json.dumps(found.numbers(), indent=2))
        else:
            _show(found)


def _load(name: str) -> nn.Module:
    """Text and image models with a classification head, as recipes train them; others as their checkpoint says."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    )

    import frostline.tasks.efficientnet_lite  # noqa: F401 (registers its classes)
    from frostline.errors import ModelError
    from frostline.tasks.classification import model_path

    path = model_path(name)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        factory: Any = transformers.AutoModel
        if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
            factory = transformers.AutoModelForSequenceClassification
            if config.get_text_config().pad_token_id is None:
                # GPT-2 and Llama classify the last token that is no padding, so they must be told which that is.
                config.get_text_config().pad_token_id = 0
        elif type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
            factory = transformers.AutoModelForImageClassification
        elif config.architectures:
            factory = getattr(transformers, config.architectures[0], factory)
        model: nn.Module = factory.from_pretrained(path, config=config)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"cannot load model {name!r}: {reason}") from error
    return model


def _show(found: Inspection) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    size = f"{found.batch} x {found.length} tokens" if found.length is not None else f"{found.batch} samples"
    unit = "token" if any(part.boundary_bytes_per_token is not None for part in found.parts) else "sample"
    print(f"{found.model}: {found.blocks} blocks in {found.stack!r}, batch {size}")
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("part", no_wrap=True)
    for heading in ("parameters", "bytes", f"record/{unit}", "saved", "fwd ms", "bwd ms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part in found.parts:
        table.add_row(*_cells(part, unit))
    Console().print(table)
    if found.memory:
        _show_memory(found)
    for part in found.parts:
        if together := _together(part, found.stack):
            print(f"{part.name}: {together}")
    bounds = found.bounds()
    if bounds is not None:
        shares = ", ".join(f"{depth}: {share:.2f}" for depth, share in enumerate(bounds))
        print(
            f"bound of a step by depth, as a share of the full step, from these times (no cache, backward "
            f"{_ratio(found):.1f} x forward, optimizer left out): {shares}"
        )
    for limit in found.limits:
        print(f"limit: {limit}")


def _show_memory(found: Inspection) -> None:
    """What the backward pass keeps at each level: once by part, once by operation."""
    from rich import box
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table

    plain = found.memory[0]
    parts = [(part.name, [kept.by_part()[i] for kept in found.memory]) for i, part in enumerate(found.parts)]
    operations = [(name, [kept.by_operation().get(name, 0) for kept in found.memory]) for name in plain.by_operation()]
    # Attention that is computed again keeps its inputs under its own name.
    others = {name for kept in found.memory for name in kept.by_operation()} - set(plain.by_operation())
    operations += [(name, [kept.by_operation().get(name, 0) for kept in found.memory]) for name in sorted(others)]
    for title, rows in (("kept by part", parts), ("kept by operation", operations)):
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column(title, overflow="fold")  # what shrinks where the terminal is narrow: numbers stay whole
        for kept in found.memory:
            table.add_column(kept.level, justify="right", no_wrap=True)
        for name, sizes in [*rows, ("all", [kept.total for kept in found.memory])]:
            table.add_row(name, *(decimal(size) for size in sizes))
        Console().print(table)
    shares = ", ".join(f"{kept.level} {plain.total / kept.total:.1f}x" for kept in found.memory[1:] if kept.total)
    print(f"smaller by: {shares}")


def _cells(part: Part, unit: str) -> list[str]:
    from rich.filesize import decimal

    record = part.boundary_bytes_per_token if unit == "token" else part.boundary_bytes_per_sample
    return [
        part.name,
        f"{part.parameters:,}",
        decimal(part.bytes),
        "-" if record is None else f"{record:,} B",
        "-" if part.saved_bytes is None else decimal(part.saved_bytes),
        *("-" if s is None else f"{1000 * s:.1f}" for s in (part.forward_seconds, part.backward_seconds)),
    ]


def _together(part: Part, stack: str) -> str:
    """What freezes together, where it is more than the block that the title's path and a number name."""
    if part.name == "head":
        return f"never freezes: {part.path or 'no parameters'}"
    plain = part.path.rpartition(".")[0] == stack
    return ", ".join([*([] if plain or not part.path else [part.path]), *part.freezes_with])


def _ratio(found: Inspection) -> float:
    forward = sum(part.forward_seconds or 0.0 for part in found.parts)
    return sum(part.backward_seconds or 0.0 for part in found.parts) / forward
