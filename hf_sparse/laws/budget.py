"""Budget laws: how many keys k(n) a query that sees n keys attends to.

The power law k(n) = alpha * n^C is the adaptive window of arXiv 2404.02690 (abstract and section 7); the other
laws exist to be compared with it, at equal cost (`match_cost`). Nothing in here knows about models.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from hf_sparse.errors import UserError

LawName = Literal["power", "fixed", "fraction", "log"]
LAWS: tuple[str, ...] = get_args(LawName)

Law = Callable[[Tensor], Tensor]
"""A law of a user's own: visible keys n >= 1, float64 of any shape, to keys k(n) of the same shape, before clamping."""

# ceil() of a product that is a whole number in exact arithmetic must not depend on the last bit of pow().
_ROUNDING_GUARD = 1e-9


@dataclass(frozen=True)
class Budget:
    """A law with its clamps: n visible keys -> k kept keys, both counts of keys.

    | law        | k(n) before clamping                |
    |------------|-------------------------------------|
    | `power`    | ceil(alpha * n ** exponent)         |
    | `fixed`    | keys                                |
    | `fraction` | ceil(fraction * n)                  |
    | `log`      | ceil(alpha * ln n)                  |
    | a function | ceil(function(n))                   |

    Then k is clamped to `[min_keys, max_keys]`, and to n: a query cannot keep more than it sees. A query that sees
    fewer than `dense_below` keys keeps them all. `alpha` and `exponent` may be tuples, one value per head.
    """

    law: LawName | Law = "power"
    alpha: float | tuple[float, ...] = 16.0
    exponent: float | tuple[float, ...] = 0.5
    keys: int = 512
    fraction: float = 0.2
    min_keys: int = 1
    max_keys: int | None = None
    dense_below: int = 0

    def __call__(self, visible: Tensor) -> Tensor:
        """Kept keys for `visible` (any shape, integer); per-head laws add a leading dimension of heads.

        Computed in float64 on the CPU, so that every device keeps the same number of keys.
        """
        n = visible.detach().cpu().to(torch.float64)
        per_head = isinstance(self.alpha, tuple) or isinstance(self.exponent, tuple)
        alpha = torch.tensor(self.alpha, dtype=torch.float64, device="cpu")
        exponent = torch.tensor(self.exponent, dtype=torch.float64, device="cpu")
        if per_head:
            heads = max(alpha.numel(), exponent.numel())
            alpha, exponent = (x.expand(heads).view(heads, *[1] * n.dim()) for x in (alpha, exponent))
        match self.law:
            case "power":
                k = alpha * n**exponent
            case "fixed":
                k = torch.full_like(n, self.keys)
            case "fraction":
                k = self.fraction * n
            case "log":
                k = alpha * n.clamp(min=1).log()
            case law:
                k = _own(law, n)
        k = (k * (1 - _ROUNDING_GUARD)).ceil_().clamp_(min=self.min_keys, max=self.max_keys)
        k = torch.where(n < self.dense_below, n, torch.minimum(k, n))
        return k.to(torch.int64).to(visible.device)

    def table(self, longest: int) -> Tensor:
        """k(0), k(1), ..., k(longest): int64 `(longest + 1,)`, or `(heads, longest + 1)` for per-head laws."""
        return self(torch.arange(longest + 1, device="cpu"))


def bisect(
    holds: Callable[[float], bool], low: float, high: float, steps: int = 60, *, logarithmic: bool = False
) -> tuple[float, float]:
    """The interval in which a monotone condition turns from true to false, after `steps` halvings of `[low, high]`.

    Args:
        holds: True at low values, false from some value on. It is not called with `low` or `high`: if it holds
            everywhere the result ends at `high`, if nowhere it starts at `low`.
        low: Lower end.
        high: Upper end.
        steps: Halvings.
        logarithmic: Whether to halve the logarithm of the interval; both ends must be above 0.
    """
    if logarithmic:
        low, high = bisect(lambda value: holds(math.exp(value)), math.log(low), math.log(high), steps)
        return math.exp(low), math.exp(high)
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low, high


def _own(law: Law, n: Tensor) -> Tensor:
    """k(n) by a law of a user's own, checked."""
    name = getattr(law, "__name__", type(law).__name__)
    k = law(n.clamp(min=1))  # A query that sees no key keeps none, whatever a law would say.
    if not isinstance(k, Tensor) or k.shape != n.shape:
        found = tuple(k.shape) if isinstance(k, Tensor) else type(k).__name__
        raise UserError(
            f"law {name!r} must map a float64 tensor of visible keys to kept keys of the same shape, {tuple(n.shape)}; "
            f"got {found}"
        )
    k = k.to(torch.float64)
    if not bool(k.isfinite().all()):
        raise UserError(f"law {name!r} must give finite numbers of keys; got {k[~k.isfinite()][0].item()}")
    return k


def total_cost(budget: Budget, lengths: Iterable[int]) -> int:
    """Attended keys, summed over the causal queries (n = 1 ... L) of one sequence for each L in `lengths`."""
    lengths = list(lengths)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"lengths must be positive numbers of tokens, got {lengths}")
    running = budget.table(max(lengths)).double().cumsum(-1)
    if running.dim() > 1:
        running = running.mean(0)
    return round(sum(running[length].item() for length in lengths))


def match_cost(budget: Budget, law: LawName, lengths: Iterable[int], exponent: float | None = None) -> Budget:
    """The budget of another `law` that attends to as many keys as `budget` does over `lengths`.

    The clamps and `dense_below` are kept. What is solved for is `keys` (`fixed`, to the nearest whole key),
    `fraction`, or `alpha` (`power`, at `exponent`, and `log`).
    """
    lengths = list(lengths)
    target = total_cost(budget, lengths)
    base = replace(budget, law=law, alpha=1.0, exponent=0.5 if exponent is None else exponent)

    def with_parameter(value: float) -> Budget:
        match law:
            case "fixed":
                return replace(base, keys=round(value))
            case "fraction":
                return replace(base, fraction=value)
            case "power" | "log":
                return replace(base, alpha=value)

    low, high = 1e-6, 1.0 if law == "fraction" else float(max(lengths))
    if law == "fixed":
        low = 1.0
    # The cost is a non-decreasing step function of the parameter: bisect to the step, then take the nearer side.
    low, high = bisect(lambda value: total_cost(with_parameter(value), lengths) < target, low, high)
    candidates = [with_parameter(math.floor(low)), with_parameter(math.ceil(high))] if law == "fixed" else []
    candidates += [with_parameter(low), with_parameter(high)]
    return min(candidates, key=lambda b: abs(total_cost(b, lengths) - target))


def warn_if_too_slow(budget: Budget) -> None:
    """Warn when k(n) grows no faster than log n: there the paper's error bound does not vanish with n.

    Source: abstract of arXiv 2404.02690, on stable o(log n)-sparse attention.
    """
    exponents = budget.exponent if isinstance(budget.exponent, tuple) else (budget.exponent,)
    slow = budget.law in ("fixed", "log") or (budget.law == "power" and min(exponents) == 0)
    if slow or budget.max_keys is not None:
        what = f"law={budget.law!r}" if slow else f"max_keys={budget.max_keys}"
        warnings.warn(
            f"{what} makes the kept keys grow no faster than log(n) with the n visible keys: the error of such "
            "a budget need not vanish with n (arXiv 2404.02690). law='power' with exponent > 0 does not have this "
            "limit.",
            UserWarning,
            stacklevel=3,
        )
