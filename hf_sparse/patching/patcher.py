"""`patch` and its inverse."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from hf_sparse.attention import NAME, STATE, LayerState
from hf_sparse.config import Policy, SparseAttentionConfig, origin_of
from hf_sparse.config import files as policy_files
from hf_sparse.engines import find_engine
from hf_sparse.interface import register
from hf_sparse.laws import BudgetTable, warn_if_too_slow
from hf_sparse.monitor import DraftCounters, SparsityReport, make_report
from hf_sparse.patching.caches import CacheCosts, CacheHooks, install, remove
from hf_sparse.patching.configs import OwnConfigs, asked_for
from hf_sparse.patching.suitability import check_calibration, warn_of_another_base
from hf_sparse.patching.support import SupportReport, inspect

register()

_HANDLE = "_hf_sparse_patch"

# Fields without which a calibration is no longer that of the configuration.
_LAW = frozenset({"law", "alpha", "exponent", "keys", "fraction", "per_head"})

ConfigLike = SparseAttentionConfig | Policy | str | os.PathLike[str] | None
ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class _Patch:
    """What `unpatch` puts back, and the policy that the model was patched with.

    Attributes:
        configs: The model's configuration objects.
        policy: The configuration of all layers, with what came with it if it was read from somewhere.
        hooks: What makes the model's own caches ours.
        drafts: What `hf_sparse.generate_lossless` counts.
    """

    configs: OwnConfigs
    policy: Policy
    hooks: CacheHooks
    drafts: DraftCounters


def patch(model: ModelT, config: ConfigLike = None, **fields: Any) -> ModelT:
    """Make a causal language model attend sparsely, in place.

    Weights are not touched, and `unpatch` restores the model bit for bit. Patching a patched model replaces its
    configuration and starts its counters anew; with the configuration it has already, nothing happens, unless
    `set_attn_implementation` made it something else meanwhile. While it is patched, the model works on copies of its
    configuration objects, so that other models which share them stay dense.

    Args:
        model: A causal language model whose attention goes through transformers' `AttentionInterface`, or a PEFT
            model around one.
        config: What to attend to: a configuration, a policy, or the name of one (a Hub id, a folder or a
            `sparse_config.json`); the default `SparseAttentionConfig` if `None`.
        **fields: Fields of `SparseAttentionConfig` that replace those of `config`.

    Returns:
        `model` itself.

    Raises:
        ValueError: If the model cannot be patched, with the reason, a field is wrong, a published configuration
            cannot be read, or it was calibrated for a model of another shape. The model is unchanged.
        TypeError: If `model` or `config` is something else, or a field does not exist.
    """
    base = base_model(model)
    policy = _policy(base, config, fields)
    config = policy.config
    if is_patched(base) and policy_of(base).config == config:
        _hold(base, policy)
        return model
    support = inspect(base)
    if not support.supported:
        raise ValueError(str(support))
    if not is_patched(base) and states(base):
        raise ValueError(
            f"parts of this {type(base).__name__} are patched as those of another model, inside or around it: unpatch "
            "that one first"
        )
    reasons = _dense_reasons(support, config)
    engine = find_engine(config.engine)
    if engine is not None and (reason := engine.unavailable_reason()):
        raise ValueError(f"engine {engine.name!r} cannot run here: {reason}; engine 'auto' does without")
    if config.calibration is not None:
        check_calibration(config.calibration, support, base.config)
    warn_if_too_slow(config.budget())
    sparse = [layer.layer for layer in support.layers if layer.layer not in reasons]
    # Layers with the same law share its budgets. A law of a user's own may have no hash.
    tables: list[BudgetTable] = []
    made: dict[nn.Module, LayerState] = {}
    for layer in support.layers:
        law = config.budget(layer.layer)
        if (table := next((known for known in tables if known.law == law), None)) is None:
            tables.append(table := BudgetTable(law))
        state = LayerState(layer.layer, config, reasons.get(layer.layer), budgets=table)
        # One layer sees what all see: it alone warns of queries that see more than the laws were fitted on.
        if config.calibration is not None and layer.layer == min(sparse, default=None):
            state.fitted_to = config.calibration.fitted_to or None
        made[base.get_submodule(layer.name)] = state
    restore = _restorer(base)
    try:
        _hold(base, policy, made)
        handle: _Patch = getattr(base, _HANDLE)
        handle.drafts, handle.hooks.forward.costs = DraftCounters(), CacheCosts()
    except BaseException:  # KeyboardInterrupt, too, may come between any two lines.
        restore()
        raise
    return model


def unpatch(model: ModelT) -> ModelT:
    """Undo `patch`: the same configuration objects and bit-identical logits as before. Returns `model`.

    What was changed in the configuration of the patched model, as by `resize_token_embeddings`, stays changed.
    """
    base = base_model(model)
    handle: _Patch | None = getattr(base, _HANDLE, None)
    if handle is None:
        return model
    handle.configs.put_back(base)
    for module in states(base):
        delattr(module, STATE)
    remove(base, handle.hooks)
    delattr(base, _HANDLE)
    return model


@contextmanager
def patched(model: ModelT, config: ConfigLike = None, **fields: Any) -> Iterator[ModelT]:
    """`patch` for the length of a `with` block. What the model was before, patched or not, is restored after it."""
    restore = _restorer(base_model(model))
    try:
        yield patch(model, config, **fields)
    finally:
        restore()


def is_patched(model: nn.Module) -> bool:
    """Whether `model` is patched."""
    return hasattr(base_model(model), _HANDLE)


def report(model: nn.Module) -> SparsityReport:
    """What each layer and head of a patched model has attended to since it was patched.

    Raises:
        ValueError: If the model is not patched.
    """
    base = base_model(model)
    if not is_patched(base):
        raise ValueError(f"{type(base).__name__} is not patched: there is nothing to report")
    handle: _Patch = getattr(base, _HANDLE)
    found = sorted(states(base).values(), key=lambda state: state.layer)
    # Not every observer has something to report.
    audits: list[list[dict[str, Any]]] = [getattr(state.observer, "report", list)() for state in found]
    notes = (*handle.hooks.forward.costs.notes(), *_notes_of_others(base))
    counted = make_report({state.layer: state.counters for state in found}, notes)
    return replace(counted, audit=[head for heads in audits for head in heads], drafts=replace(handle.drafts))


def drafts_of(model: nn.Module) -> DraftCounters:
    """Where `hf_sparse.generate_lossless` counts what it does with a patched model."""
    handle: _Patch = getattr(base_model(model), _HANDLE)
    return handle.drafts


def policy_of(model: nn.Module) -> Policy:
    """What a model was patched with.

    Raises:
        ValueError: If the model is not patched.
    """
    base = base_model(model)
    handle: _Patch | None = getattr(base, _HANDLE, None)
    if handle is None:
        raise ValueError(f"{type(base).__name__} is not patched")
    return handle.policy


def base_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model, inside a PEFT wrapper or not."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    if not isinstance(model, PreTrainedModel) and get_base_model is not None:
        model = get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"expected a transformers model; got {type(model).__name__}")
    return model


def states(model: nn.Module) -> dict[nn.Module, LayerState]:
    """The attention modules of a patched model, and what they know; empty if it is not patched."""
    return {module: vars(module)[STATE] for module in model.modules() if STATE in vars(module)}


def _hold(model: PreTrainedModel, policy: Policy, layers: Mapping[nn.Module, LayerState] | None = None) -> None:
    """Make `model` ask for our attention and our caches, and remember the policy and what its `layers` know.

    Before anything is changed, the model knows what `unpatch` puts back.
    """
    if is_patched(model):
        handle: _Patch = getattr(model, _HANDLE)
        handle.policy = policy
        handle.configs.name_us(model)
    else:
        handle = _Patch(OwnConfigs(model), policy, CacheHooks.of(model), DraftCounters())
        setattr(model, _HANDLE, handle)
        handle.configs.put_in(model)
        install(model, handle.hooks)
    for module, state in (layers or {}).items():
        setattr(module, STATE, state)


def _restorer(model: PreTrainedModel) -> Callable[[], None]:
    """What makes `model` again what it is now, patched or not."""
    before, held = states(model), getattr(model, _HANDLE, None)
    # Read now, for a patch in between replaces them in `held`.
    kept = None if held is None else (held.policy, held.drafts, held.hooks.forward.costs)

    def restore() -> None:
        if kept is None:
            unpatch(model)
            return
        policy, drafts, costs = kept
        _hold(model, policy, before)
        handle: _Patch = getattr(model, _HANDLE)
        handle.drafts, handle.hooks.forward.costs = drafts, costs

    return restore


def _notes_of_others(model: PreTrainedModel) -> Iterator[str]:
    for name in sorted(asked_for(model) - {NAME}):
        yield (
            f"the attention implementation was set to {name!r} after patching, which is dense and not counted, until "
            "the model is patched again"
        )


def _policy(model: PreTrainedModel, config: ConfigLike, fields: Mapping[str, Any]) -> Policy:
    """What to patch with. A policy whose configuration is changed loses what was measured of it."""
    if isinstance(config, Policy):
        policy = config
    elif config is None or isinstance(config, SparseAttentionConfig):
        policy = Policy(config or SparseAttentionConfig())
    elif isinstance(config, str | os.PathLike):
        policy = policy_files.load(config)
        origin = origin_of(model)
        # A model may also come from the weights beside its policy.
        if origin.name != policy.origin.name and warn_of_another_base(policy, origin):
            policy = replace(policy, quality=())
    else:
        raise TypeError(
            f"config must be a SparseAttentionConfig, the name of a published one, or None; got {type(config).__name__}"
        )
    known = SparseAttentionConfig.__dataclass_fields__
    if unknown := sorted(fields.keys() - known.keys()):
        raise TypeError(f"{unknown[0]!r} is not a field of SparseAttentionConfig, which are {', '.join(known)}")
    changed = replace(policy.config, **fields)
    if changed == policy.config:
        return policy
    if fields.keys() & _LAW and "calibration" not in fields:
        changed = replace(changed, calibration=None)
    return replace(policy, config=changed, quality=())


def _dense_reasons(support: SupportReport, config: SparseAttentionConfig) -> dict[int, str]:
    """Why layers stay dense. Checks what in `config` depends on the model."""
    layers = {layer.layer: layer for layer in support.layers}
    for field, named in (("dense_layers", config.dense_layers or ()), ("per_head", config.per_head or {})):
        unknown = sorted(set(named) - set(layers))
        if unknown:
            raise ValueError(
                f"{field} names layers {unknown}, but the attention layers of {support.architecture} are "
                f"{sorted(layers)}"
            )
    for index, laws in (config.per_head or {}).items():
        if len(laws) != layers[index].heads:
            raise ValueError(
                f"per_head[{index}] has {len(laws)} laws, but layer {index} of {support.architecture} has "
                f"{layers[index].heads} query heads"
            )
    if config.dense_layers is not None:
        return dict.fromkeys(config.dense_layers, "in dense_layers")
    return support.default_dense_reasons()
