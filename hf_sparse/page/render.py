"""The page itself: sections filled into a template."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from hf_sparse.page.maps import HeatMap
from hf_sparse.results import Table


@dataclass(frozen=True)
class Section:
    """What one command found.

    Attributes:
        title: The heading.
        tables: Tables, the most important first.
        facts: What was measured, on what: shown in one line each.
        text: Pieces of a text, each with a share from 0 to 1 by which it is highlighted.
        strips: PNG images with a pixel for each number, shown as wide as the page.
        plots: PNG images.
        maps: Maps of layers.
        details: JSON to unfold, by its heading, such as the configuration.
    """

    title: str
    tables: Sequence[Table] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    text: Sequence[tuple[str, float]] = ()
    strips: Sequence[bytes] = ()
    plots: Sequence[bytes] = ()
    maps: Sequence[HeatMap] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


def render(title: str, sections: Sequence[Section]) -> str:
    """A page with everything in it: no other file, and nothing from the network, is needed to read it."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["json"] = lambda value: json.dumps(value, indent=2)
    environment.filters["base64"] = lambda image: base64.b64encode(image).decode()
    template = environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections) + "\n"
