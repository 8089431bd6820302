"""The model card of a policy: written from what was measured, into a card that may hold other things too."""

from hf_sparse.card.card import license_in, make_card

__all__ = ["license_in", "make_card"]
