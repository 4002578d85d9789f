"""The learning-compression algorithm in plain torch: no Lightning."""

from lightning_condensa.lc.lagrangian import Lagrangian
from lightning_condensa.lc.response import OptimizerResponse
from lightning_condensa.lc.run import CStep, LCRun
from lightning_condensa.lc.schedules import LCSchedule, PaperSchedule, Plan, Schedule, make_schedule
from lightning_condensa.lc.support import Support

__all__ = [
    "CStep",
    "LCRun",
    "LCSchedule",
    "Lagrangian",
    "OptimizerResponse",
    "PaperSchedule",
    "Plan",
    "Schedule",
    "Support",
    "make_schedule",
]
