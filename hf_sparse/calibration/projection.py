"""The output projection of an attention layer, cut into a slice for each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Names under which models keep the projection behind their heads.
_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo")


@torch.no_grad()
def output_weights(attention: nn.Module, heads: int, value_dim: int) -> Tensor:
    """The slices W_h of the output projection: the layer adds the sum of W_h o_h to the residual stream. float32.

    They are `(heads, hidden, value_dim)`, `value_dim` the size of a head's output. Where no projection is found under a
    usual name, the identity: heads then count by the size of their outputs.
    """
    width = heads * value_dim
    projection = next((m for name in _NAMES if isinstance(m := getattr(attention, name, None), nn.Module)), None)
    if projection is None:
        columns = torch.eye(width)
    else:
        # Through the module itself, so that quantised weights and adapters count as they are; without its bias.
        own = next(p for p in projection.parameters())
        eye = torch.eye(width, device=own.device, dtype=own.dtype if own.is_floating_point() else torch.float32)
        columns = (projection(eye) - projection(torch.zeros_like(eye[:1]))).float()
    return columns.view(heads, value_dim, -1).transpose(1, 2)
