"""The verbs that look at and look after what a store holds."""

from __future__ import annotations

import json
import time
from typing import Annotated, Any

import typer

from flows import options as o
from flows import server
from flows.options import print_json

Reference = Annotated[
    str,
    typer.Argument(help="Set, run (id or its beginning), model (digits@champion), dataset (digits@version), or URI."),
]
ModelName = Annotated[str, typer.Argument(help="Name of the registered model.")]


def add_to(app: typer.Typer) -> None:
    """Give the command its verbs."""
    for verb in (promote, rollback, lineage, reproduce, verify):
        app.command()(verb)
    app.command(name="list")(list_kind)


def promote(
    model: ModelName,
    version: Annotated[int, typer.Argument(help="Version that becomes the champion.")],
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Make a version the champion, whatever the gate said."""
    from diffusion_core import tracking
    from diffusion_core.tracking import approval

    place = server.place(store)
    tracking.promote(model, version, place)
    _say_champion(model, version, place, as_json)
    approval.answer_by_promotion(place, model, version)


def rollback(model: ModelName, store: o.Store = None, as_json: o.Json = False) -> None:
    """Give the alias champion back to the version that held it before."""
    from diffusion_core import tracking

    _say_champion(model, tracking.rollback(model, server.place(store)), server.place(store), as_json)


def lineage(
    reference: Reference,
    image: Annotated[int | None, typer.Option("--image", help="Image id, of an image set.", min=0)] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Say where something comes from: image, shard, set, model version, run, dataset version, source."""
    from diffusion_core.catalog.lineage import lineage as trace

    steps = trace(reference, server.place(store), image)
    if as_json:
        print_json(steps)
        return
    for depth, step in enumerate(steps):
        details = {name: value for name, value in step.items() if name not in ("what", "id") and value is not None}
        typer.echo(f"{'' if depth == 0 else '└ from '}{step['what']} {step['id']}")
        for name, value in details.items():
            shown = value if isinstance(value, str) else json.dumps(value)
            typer.echo(f"      {name.replace('_', ' ')}: {shown}")


def reproduce(
    reference: Reference,
    image: Annotated[
        list[int] | None, typer.Option("--image", help="Image id; may be given several times.", min=0)
    ] = None,
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """Make images of a set again (default: its first one) and compare the pixels with what is recorded."""
    from diffusion_core.catalog import find
    from diffusion_core.catalog.reproduce import reproduce as make_again
    from diffusion_core.generation.imageset import open_imageset

    place = server.place(store)
    images = open_imageset(find.image_set(reference, place))
    ids = image or [first for first, _ in images.ranges()[:1]]
    rows = make_again(reference, place, ids)
    if as_json:
        print_json(rows)
    for row in rows if not as_json else []:
        typer.echo(
            f"image {row['image_id']}: {'the same pixels' if row['same'] else 'OTHER PIXELS'}, sha256 {row['sha256']}"
        )
        if not row["same"]:
            typer.echo(f"  recorded: {row['recorded']}, made on {row['recorded_on']}; this machine is {row['made_on']}")
    if not all(row["same"] for row in rows):
        raise typer.Exit(1)


def verify(reference: Reference, store: o.Store = None, as_json: o.Json = False) -> None:
    """Read a set, a dataset version or a bundle again and compare every digest with what is recorded."""
    from diffusion_core.catalog.verify import verify as check

    what, problems = check(reference, server.place(store))
    if as_json:
        print_json({"verified": what, "problems": problems})
    else:
        typer.echo("\n".join([what, *(problems or ["as recorded"])]))
    if problems:
        raise typer.Exit(1)


def list_kind(
    kind: Annotated[str, typer.Argument(help="models, datasets, imagesets or runs.")],
    store: o.Store = None,
    as_json: o.Json = False,
) -> None:
    """List what a store holds."""
    from diffusion_core.catalog.listing import KINDS
    from diffusion_core.config import UserError

    if kind not in KINDS:
        raise UserError(f"list {kind}: there is no such list; accepted are {', '.join(KINDS)}.")
    from diffusion_core.stages.checks import check_readable

    check_readable(server.place(store))
    rows = KINDS[kind](server.place(store))
    if as_json:
        print_json(rows)
    else:
        typer.echo(aligned_rows(rows) or f"no {kind} in {server.place(store)}")


def _say_champion(model: str, version: int, store: str, as_json: bool) -> None:
    """Tell the person, and the Prefect server if there is one."""
    from diffusion_core.stages.register import champion_changed
    from diffusion_core.tracking import champion_before

    if as_json:
        print_json({"model": model, "version": version, "alias": "champion"})
    else:
        typer.echo(f"models:/{model}@champion is now version {version}")
    before = champion_before(store, model)
    server.tell([champion_changed(model, version, before, "Set by hand.", by_hand=True)], store)


def aligned_rows(rows: list[dict[str, Any]]) -> str:
    """Rows of one kind as a table with a head; empty without rows."""
    if not rows:
        return ""
    lines = [list(rows[0]), *([_shown(name, value) for name, value in row.items()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _shown(name: str, value: Any) -> str:
    """A value of a listing, for people."""
    if name == "bytes":
        return f"{value / 1e6:.1f} MB"
    if name == "changed":
        hours = (time.time() - value) / 3600
        return f"{hours:.1f} h ago" if hours < 48 else f"{hours / 24:.0f} days ago"
    return str(value)
