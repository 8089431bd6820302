"""What hf_sparse aims at, and whether measured runs got there."""

from hf_sparse.goals.judge import MISSED, goals_table, judge
from hf_sparse.goals.quality import QUALITY_GOALS
from hf_sparse.goals.speed import SPEED_GOALS

__all__ = ["MISSED", "QUALITY_GOALS", "SPEED_GOALS", "goals_table", "judge"]
