"""Patched models as folders and as repositories on the Hub: save, load, publish."""

from hf_sparse.hub.pretrained import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
