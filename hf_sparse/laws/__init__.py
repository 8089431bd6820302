"""Budget laws, how many keys k(n) a query that sees n keys attends to, and the budgets of the queries of a call."""

from hf_sparse.laws.budget import (
    LAWS,
    Budget,
    Law,
    LawName,
    bisect,
    match_cost,
    total_cost,
    warn_if_too_slow,
)
from hf_sparse.laws.plan import BudgetPlan, BudgetTable

__all__ = [
    "LAWS",
    "Budget",
    "BudgetPlan",
    "BudgetTable",
    "Law",
    "LawName",
    "bisect",
    "match_cost",
    "total_cost",
    "warn_if_too_slow",
]
