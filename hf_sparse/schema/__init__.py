"""What saved files may hold: checks of their fields, calibration and quality records, and descriptions of user code."""

from hf_sparse.schema.calibration import TARGETS, CalibrationRecord, Target
from hf_sparse.schema.checks import shown
from hf_sparse.schema.custom import describe
from hf_sparse.schema.quality import DENSE, QualityRecord

__all__ = ["DENSE", "TARGETS", "CalibrationRecord", "QualityRecord", "Target", "describe", "shown"]
