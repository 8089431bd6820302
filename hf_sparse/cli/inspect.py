"""`hf-sparse inspect`: whether a model can be patched, and which keys of a text its last token keeps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from hf_sparse.cli.options import Json, Model, Policy, Revision, read_policy
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError, first_line
from hf_sparse.page import kept_keys, render
from hf_sparse.patching import patched
from hf_sparse.results import check_writable, process_state, text_table, write_whole
from hf_sparse.share.source import ModelSource, check_config, check_loading

_PAGE = Path("results/prompt.html")


def inspect(
    model: Model,
    prompt: Annotated[
        Path | None, typer.Option(help="Load the model, and show which keys the last token of this text keeps.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="HTML page for that.", show_default=str(_PAGE))] = None,
    policy: Policy = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or auto (as stored).", show_default="auto")
    ] = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Say whether a model can be patched, from its configuration alone; exit code 1 if not.

    With --prompt: what sparse attention does to that text.
    """
    for option, value in {"page": page, "policy": policy, "dtype": dtype}.items():
        if prompt is None and value is not None:
            raise UserError(f"--{option} needs a --prompt: without one, the configuration of the model alone is read")
    source = ModelSource.find(model, revision)
    if prompt is not None and source.support.supported:
        own = read_policy(policy, source.policy)
        _show_prompt(source, own, prompt, page or _PAGE, dtype or "auto", as_json=as_json)
        return
    print(json.dumps(asdict(source.support)) if as_json else source.support)
    raise typer.Exit(0 if source.support.supported else 1)


def _show_prompt(
    source: ModelSource, config: SparseAttentionConfig | None, prompt: Path, page: Path, dtype: str, *, as_json: bool
) -> None:
    """Print how many keys each layer keeps for the last token of a text, and write a page that shows which."""
    try:
        text = prompt.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{prompt} cannot be read: {first_line(error)}") from error
    check_writable(page.parent, (page.name,))
    place = str(process_state().device)
    check_loading(dtype, place)
    model = source.model(dtype=dtype, device_map=place)
    used = config or SparseAttentionConfig()
    check_config(model, used)
    with patched(model, used):
        found = kept_keys(model, source.tokenizer(), text)
    section = found.section()
    write_whole(page, render(f"{source.name}: {prompt.name}", [section]).encode())
    if as_json:
        layers = {layer: [own.nonzero().flatten().tolist() for own in kept] for layer, kept in found.layers.items()}
        print(json.dumps({"tokens": found.tokens, "dense_layers": found.dense, "kept": layers}))
        return
    for name, value in section.facts.items():
        print(f"{name}: {value}")
    print(f"\n{text_table(*section.tables[0])}\n\npage: {page}")
