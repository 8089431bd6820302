"""Which keys of a prompt a patched model attends to: as text, and as a picture of layers and positions."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_sparse import selectors
from hf_sparse.attention import LayerState
from hf_sparse.cache import SparseCache
from hf_sparse.call import AttentionCall
from hf_sparse.diagnostics import run_by
from hf_sparse.errors import UserError
from hf_sparse.page.render import Section, render
from hf_sparse.patching import base_model, is_patched, states
from hf_sparse.patching.caches import cache_argument
from hf_sparse.share.source import max_positions
from hf_sparse.visibility import interval_to_mask


@dataclass(frozen=True)
class KeptKeys:
    """The keys that the last token of a prompt attends to. In a notebook, it is shown as a page.

    Attributes:
        tokens: The prompt's tokens as text.
        layers: For each sparse layer, by its index, which tokens each head keeps: bool `(heads, tokens)`.
        dense: Layers that run dense.
    """

    tokens: list[str]
    layers: dict[int, Tensor]
    dense: list[int]

    @property
    def shares(self) -> Tensor:
        """The share of the heads that keep each token, in each sparse layer: float32 `(layers, tokens)`."""
        return torch.stack([kept.float().mean(0) for kept in self.layers.values()])

    def section(self) -> Section:
        """Text and picture, for a page."""
        shares = self.shares
        sizes = [kept.sum(-1).tolist() for kept in self.layers.values()]
        lines = [
            [str(layer), f"{min(own):,}", f"{sum(own) / len(own):,.1f}", f"{max(own):,}"]
            for layer, own in zip(self.layers, sizes, strict=True)
        ]
        return Section(
            title="keys of the last token",
            facts={
                "tokens": f"{len(self.tokens):,}",
                "density": f"{float(shares.mean()):.3f} in {len(self.layers)} sparse layers",
                "dense layers": ", ".join(map(str, self.dense)) or "none",
            },
            text=list(zip(self.tokens, shares.mean(0).tolist(), strict=True)),
            strips=[_picture(shares)] if find_spec("matplotlib") else [],
            tables=[(["layer", "fewest keys of a head", "mean", "most"], lines)],
        )

    def _repr_html_(self) -> str:
        return render("prompt", [self.section()])


@torch.no_grad()
def kept_keys(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> KeptKeys:
    """The keys that the last token of a prompt attends to, as it does while a model writes.

    All tokens but the last are read in one pass, and the last after them.

    Args:
        model: A patched model; its report counts nothing of this.
        tokenizer: Its tokenizer.
        prompt: A text of at least two tokens, and no more than the model was made for.

    Raises:
        ValueError: If the model is not patched, no layer of it is sparse, or the prompt is too short or too long.
    """
    if not is_patched(base_model(model)):
        raise ValueError(f"{type(model).__name__} is not patched: call hf_sparse.patch(model)")
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] < 2:
        raise UserError(f"a prompt must have at least 2 tokens; got {ids.shape[1]}")
    longest = max_positions(model.config)
    if longest is not None and ids.shape[1] > longest:
        raise UserError(f"a prompt must have at most {longest} tokens, the model's maximum; got {ids.shape[1]}")
    found: dict[int, Tensor] = {}
    dense = [state.layer for state in states(base_model(model)).values() if state.dense_reason is not None]
    ids = ids.to(model.device)
    cache = cache_argument(base_model(model), SparseCache(model.config))

    def watched(state: LayerState) -> LayerState:
        def observe(layer: int, call: AttentionCall) -> None:
            if call.query.shape[2] == 1:
                found[layer] = _selected(state, call)[0, :, 0].cpu()

        return state if state.dense_reason is not None else replace(state, observer=observe)

    with run_by(model, watched):
        model(input_ids=ids[:, :-1], **cache, use_cache=True, logits_to_keep=1)
        model(input_ids=ids[:, -1:], **cache, use_cache=True)
    if not found:
        raise UserError(f"all layers of {type(model).__name__} run dense: there is nothing to look at")
    return KeptKeys(_texts(tokenizer, prompt, ids[0].tolist()), found, dense)


def _selected(state: LayerState, call: AttentionCall) -> Tensor:
    """The keys that one query keeps, bool `(1, heads, 1, kv_len)`."""
    plan, heads, kv_len = state.plan(call.ranges), call.query.shape[1], call.key.shape[2]
    if plan is None or plan.dense:
        return interval_to_mask(call.intervals, kv_len).expand(-1, heads, -1, -1)
    if state.selector.ranks_quantised and call.quantised is None:
        call = replace(call, quantised=state.quantised(call.key))
    return selectors.select(state.selector, call, plan.budgets, state.config.always).mask(heads, kv_len)


def _texts(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int]) -> list[str]:
    """The part of the prompt that each token stands for; its own text for a token that stands for none."""
    own = [str(tokenizer.decode([each])) for each in ids]
    if not tokenizer.is_fast:
        return own
    places = tokenizer(prompt, return_offsets_mapping=True).offset_mapping
    return [prompt[start:stop] or text for (start, stop), text in zip(places, own, strict=True)]


def _picture(shares: Tensor) -> bytes:
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, shares.numpy(), vmin=0, vmax=1, cmap="viridis", format="png")
    return out.getvalue()
