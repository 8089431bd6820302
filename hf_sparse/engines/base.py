"""`Engine`: what attends to exactly the keys of a selection."""

from __future__ import annotations

from torch import Tensor

from hf_sparse.call import AttentionCall, Selection


class Engine:
    """A way to attend to a selection: subclass it, and pass an instance to `hf_sparse.patch` as `engine`.

    Every engine gives what `reference` gives, the specification, but for rounding.

    Attributes:
        name: What records call it.
    """

    name: str = ""

    def unavailable_reason(self) -> str | None:
        """Why it cannot run on this machine at all; `None` if it can."""
        return None

    def unsupported_reason(self, call: AttentionCall) -> str | None:
        """Why it cannot attend in this call; `None` if it can."""
        return None

    def attend(self, call: AttentionCall, selection: Selection) -> Tensor:
        """Attention to the selected keys alone, where there is no `unsupported_reason`.

        Args:
            call: A block of queries.
            selection: The keys that they keep.

        Returns:
            `(batch, heads, q_len, value_dim)` in the dtype of the values; zeros for a query without keys.
        """
        raise NotImplementedError(f"{type(self).__name__} must define attend(call, selection)")
