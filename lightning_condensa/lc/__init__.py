"""The learning-compression algorithm in plain torch: no Lightning."""

from lightning_condensa.lc.lagrangian import Lagrangian
from lightning_condensa.lc.paper import PaperSchedule
from lightning_condensa.lc.plan import Plan, Schedule
from lightning_condensa.lc.proximal import Proximal
from lightning_condensa.lc.ramps import PolynomialRamp, Ramp
from lightning_condensa.lc.run import CStep, LCRun
from lightning_condensa.lc.schedules import LCSchedule, make_schedule
from lightning_condensa.lc.support import Support

__all__ = [
    "CStep",
    "LCRun",
    "LCSchedule",
    "Lagrangian",
    "PaperSchedule",
    "Plan",
    "PolynomialRamp",
    "Proximal",
    "Ramp",
    "Schedule",
    "Support",
    "make_schedule",
]
