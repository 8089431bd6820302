"""Patched models as folders and Hub repositories: find, save, load and publish them, each with its model card."""

from hf_sparse.share.publish import from_pretrained, push_to_hub, save_pretrained

__all__ = ["from_pretrained", "push_to_hub", "save_pretrained"]
