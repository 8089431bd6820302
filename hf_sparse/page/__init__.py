"""One self-contained HTML page of results: sortable tables, plots, maps of layers, configuration and environment."""

from hf_sparse.page.maps import HeatMap, laws_by_head, mass_by_layer
from hf_sparse.page.prompt import KeptKeys, kept_keys
from hf_sparse.page.render import Section, render

__all__ = ["HeatMap", "KeptKeys", "Section", "kept_keys", "laws_by_head", "mass_by_layer", "render"]
