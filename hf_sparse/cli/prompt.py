"""`hf-sparse inspect --prompt`: which keys of a text the last token keeps."""

from __future__ import annotations

import json
from pathlib import Path

from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError, first_line
from hf_sparse.page import kept_keys, render
from hf_sparse.patching import patched
from hf_sparse.results import check_writable, process_state, text_table, write_whole
from hf_sparse.share.source import ModelSource, check_config, check_loading


def show_prompt(
    source: ModelSource, config: SparseAttentionConfig | None, prompt: Path, page: Path, dtype: str, *, as_json: bool
) -> None:
    """Print how many keys each layer keeps for the last token of a text, and write a page that shows which.

    Args:
        source: The model.
        config: How to patch it; the default configuration if `None`.
        prompt: A text file.
        page: The file to write.
        dtype: Of the weights.
        as_json: Print the positions that each head of each layer keeps instead.

    Raises:
        UserError: if the text cannot be read or the page not be written, or the configuration does not suit the model.
    """
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
