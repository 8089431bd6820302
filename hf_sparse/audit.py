"""A certificate for rows that are sampled at run time: how far sparse attention was from dense attention there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse.attention import LayerState, attend
from hf_sparse.call import AttentionCall
from hf_sparse.monitor import LayerCounters
from hf_sparse.row_errors import DenseRows, row_errors
from hf_sparse.selectors.grouped import ROWS


class LayerAudit:
    """The observer of one sparse layer: of every call it measures neighbouring rows at a random place.

    Their dense attention is formed, and their sparse attention a second time, so that the layer itself runs as ever.

    Args:
        state: The layer's.
        rows: Rows that are measured of a call, of each sequence; all rows of a call that has fewer.
        seed: Of the places.
    """

    def __init__(self, state: LayerState, rows: int, seed: int) -> None:
        self._state = replace(state, counters=LayerCounters(), observer=None)
        self._rows = rows
        self._generator = torch.Generator().manual_seed(seed)
        self._measured: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def __call__(self, layer: int, inputs: AttentionCall) -> None:
        """Measure some rows of a call."""
        length = inputs.query.shape[2]
        start = int(torch.randint(max(1, length - self._rows + 1), (), generator=self._generator))
        stop = min(length, start + self._rows)
        # Rows of a group choose keys together: with so many neighbours on either side, all groups are whole.
        first, last = max(0, start - ROWS + 1), min(length, stop + ROWS - 1)
        _, weights = attend(self._state, replace(inputs.rows(first, last), dropout=0.0), want_weights=True)
        assert weights is not None
        keep = weights[:, :, start - first : stop - first] > 0
        errors = row_errors(DenseRows.of(inputs.rows(start, stop)), keep)
        pair = [errors[name].transpose(0, 1).flatten(1) for name in ("retained_mass", "output_error")]
        seen = ~pair[0][0].isnan()
        self._measured.append((pair[0][:, seen].cpu(), pair[1][:, seen].cpu()))

    def report(self) -> list[dict[str, Any]]:
        """One dictionary per query head: see `SparsityReport.audit`. Empty before any call."""
        if not self._measured:
            return []
        mass, error = (torch.cat(parts, dim=1) for parts in zip(*self._measured, strict=True))
        return [
            {
                "layer": self._state.layer,
                "head": head,
                "rows": mass.shape[1],
                "retained_mass": mass[head].mean().item(),
                "least_retained_mass": mass[head].min().item(),
                "output_error": error[head].mean().item(),
                "largest_output_error": error[head].max().item(),
            }
            for head in range(len(mass) if mass.numel() else 0)
        ]
