"""Votes of the members of each group on its older keys: their attention weights, summed.

A member's weights are relative to all that it sees. Triton's kernels take the scores from 8-bit vectors and form
nothing of size rows x kv_len; PyTorch takes exact ones, a chunk of the members at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse.call import AttentionCall
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.kernels import gpu
from hf_sparse.selectors.spans import Spans

# Scores that are alive at a time: they should stay in a processor's cache between the passes over them.
_CHUNK_ELEMENTS = 1 << 20

Vote = Callable[[Tensor, AttentionCall, Tensor, Spans], Tensor]
"""`exact_votes` or `votes_in_8_bits`."""


def for_gpus(inputs: AttentionCall, config: SparseAttentionConfig) -> bool:
    """Whether the votes of this call are work for Triton, if it can."""
    return inputs.key.is_cuda or config.engine == "triton"


def refusal(inputs: AttentionCall) -> str | None:
    """Why Triton's kernels cannot find the votes of this call; `None` if they can."""
    if inputs.softcap is not None:
        return "the Triton kernels rank no scores with a soft cap"
    if inputs.key.shape[3] > gpu.WIDEST:
        return f"a head_dim of {inputs.key.shape[3]} is more than {gpu.WIDEST}"
    return gpu.refusal(inputs.key.device)


def exact_votes(members: Tensor, inputs: AttentionCall, certain: Tensor, spans: Spans) -> Tensor:
    """Votes by PyTorch.

    Args:
        members: Scaled queries `(batch, kv_heads, groups, members, head_dim)`.
        inputs: For the keys and the soft cap.
        certain: `(batch, kv_heads, groups, members)`: log of the summed exponentials of the scores of the sinks and
            local keys that a member sees; inf for a member without a vote.
        spans: Of the groups.

    Returns:
        `(batch, kv_heads, groups, columns)` for the columns before the last one that any row sees; 0 for what is no
        older key of the group.
    """
    batch, kv_heads, groups, size, _ = members.shape
    votes = members.new_zeros(batch, kv_heads, groups, inputs.facts.last_visible)
    first = torch.maximum(spans.first, spans.begin)
    for group, (start, stop) in enumerate(spans.older):
        if start >= stop:
            continue
        keys = inputs.key[:, :, start:stop].to(members.dtype).transpose(-1, -2)
        column = torch.arange(start, stop, device=members.device)
        step = max(1, _CHUNK_ELEMENTS // (batch * kv_heads * (stop - start)))
        for at in range(0, size, step):
            part = slice(at, at + step)
            scores = capped(members[:, :, group, part] @ keys, inputs.softcap)
            seen = (column >= first[:, :, group, part, None]) & (column < spans.low[:, :, group, :, None])
            scores = scores.masked_fill_(~seen, -torch.inf)
            total = torch.logaddexp(scores.logsumexp(-1), certain[:, :, group, part])
            weights = scores.sub_(total[..., None]).exp_()
            # Turned, so that the weights of equal keys are added up alike, to the last bit.
            votes[:, :, group, start:stop] += weights.transpose(-1, -2).contiguous().sum(-1)
    return votes


def votes_in_8_bits(members: Tensor, inputs: AttentionCall, certain: Tensor, spans: Spans) -> Tensor:
    """Votes by Triton's kernels: as `exact_votes`."""
    from hf_sparse.kernels.triton.keys import LAYOUT
    from hf_sparse.kernels.triton.votes import votes

    length = inputs.facts.last_visible
    codes, scales = inputs.own_quantised.up_to(inputs.key, length, LAYOUT)
    return votes(
        members,
        codes[:, :, :length],
        scales[:, :, :length],
        certain,
        spans.begin[:, 0, :, 0],
        spans.low[:, 0, :, 0],
        first=None if spans.alike else spans.first,
    )


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores as they go into the softmax."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
