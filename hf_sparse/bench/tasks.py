"""The tasks that are timed, the methods that do them, and the settings of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

from hf_sparse.bench.timing import Rounds
from hf_sparse.config import SparseAttentionConfig
from hf_sparse.errors import UserError
from hf_sparse.measure.windows import check_lengths

COMMAND = "bench"

SPARSE = "hf_sparse"
"""The patched attention: append to the cache, select keys, attend to them."""

SDPA, MASKED, FLEX = "sdpa", "masked-sdpa", "flex"

PACKED, DENSE_LAYER = "packed-sdpa", "dense-layer"
"""SDPA with the heads that share keys as the rows of one query; and how dense layers of a patched model decode."""

DYNAMIC, STATIC = "dynamic-cache", "static-cache"

IN_PLACE, LOSSLESS = "in-place-cache", "lossless"
"""Stock attention with the cache of a patched model, and its lossless generation: measured if asked for."""

COMPILED = {f"{name}, compiled": name for name in (DYNAMIC, STATIC, SPARSE)}
"""The same under `torch.compile`, in models after full caches, if asked for -> what is compiled."""

OPTIONAL = (MASKED, FLEX, STATIC)
"""Dense methods that can be left out."""

BASELINES = {"decode": SDPA, "prefill": SDPA, "cached": DYNAMIC, "generate": DYNAMIC, "padded": DYNAMIC}
"""Task -> the dense method that break-even is against; or that of `LAYER_BASELINES` which stays ahead the longest.

`decode` and `prefill` are one attention layer. `cached`, `generate` and `padded` are a model that generates: after full
caches, after a prompt, and after a prompt behind one pad token, as in batches of unequal texts.
"""

LAYER_BASELINES = (SDPA, PACKED, DENSE_LAYER)
"""Dense ways of one layer, any of which break-even may be against."""

TASKS = tuple(BASELINES)
LAYER_TASKS = TASKS[:2]

LENGTHS = {
    "decode": [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144],
    "prefill": [1024, 2048, 4096, 8192, 16384, 32768],
    "cached": [8192, 32768, 131072],
    "generate": [8192, 32768],
    "padded": [],
}
QUICK_LENGTHS = {
    "decode": [1024, 4096, 16384],
    "prefill": [512, 1024, 2048],
    "cached": [4096, 16384],
    "generate": [1024],
    "padded": [],
}


@dataclass(frozen=True)
class BenchSettings:
    """What is measured, and how often.

    Attributes:
        lengths: Task -> rising lengths: keys that a decoded query sees, queries and keys of a prefill, cached tokens,
            or tokens of a prompt. Empty for tasks that are not measured.
        config: Of the patch.
        new_tokens: Tokens to generate.
        left_out: Dense methods that are not measured.
        rounds: How often each task is repeated.
        seed: Of random weights, inputs and prompts.
        lossless: Whether models also generate with `IN_PLACE` and `LOSSLESS`.
        compiled: Whether models after full caches also generate by each of `COMPILED`.

    Raises:
        UserError: if nothing is left to measure, or a method cannot be left out.
    """

    lengths: Mapping[str, Sequence[int]]
    config: SparseAttentionConfig
    new_tokens: int
    left_out: frozenset[str]
    rounds: Rounds
    seed: int
    lossless: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if not any(self.lengths.values()):
            options = ", ".join(f"--{task}" for task in TASKS)
            raise UserError(f"nothing is left to measure: give lengths to one of {options}")
        if unknown := sorted(self.left_out - set(OPTIONAL)):
            raise UserError(f"leave-out takes some of {', '.join(OPTIONAL)}; got {unknown[0]!r}")
        if self.compiled and not self.lengths["cached"]:
            raise UserError("--compiled needs lengths of --cached: models are compiled after full caches")

    @property
    def times_layer(self) -> bool:
        """Whether one layer is measured."""
        return any(self.lengths[task] for task in LAYER_TASKS)

    @property
    def prompt_lengths(self) -> list[int]:
        """Tokens of all prompts, rising. After a full cache, the prompt's last token is the first that is read."""
        whole = (self.lengths[task] for task in ("generate", "padded"))
        return sorted({*chain(*whole), *(length + 1 for length in self.lengths["cached"])})


def task_lengths(
    task: str, given: Sequence[int] | None, new_tokens: int, max_positions: int | None, *, quick: bool
) -> list[int]:
    """The lengths of a task: those `given`, or the default ones, `quick` or not, that fit into `max_positions`.

    After those of a model, `new_tokens` are generated; one layer has no limit.

    Raises:
        UserError: if the given lengths do not rise, or are too long for the model.
    """
    extra = 0 if task in LAYER_TASKS else new_tokens + (task == "cached")
    most = None if task in LAYER_TASKS else max_positions
    if given is None:
        default = (QUICK_LENGTHS if quick else LENGTHS)[task]
        return [length for length in default if most is None or length + extra <= most]
    if given:
        check_lengths(given, 1, None)
        if most is not None and given[-1] + extra > most:
            raise UserError(
                f"--{task} {given[-1]} and the {extra} tokens that follow are above the model's maximum of {most} "
                "tokens"
            )
    return list(given)
