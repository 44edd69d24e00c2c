"""What a run takes before it begins: sizes, work, memory, time, disk, and what stands in its way."""

from modern_llm.alignment.plan.fit import Fit, StageFit
from modern_llm.alignment.plan.machine import Machine, machine_of
from modern_llm.alignment.plan.show import print_plan

__all__ = ["Fit", "Machine", "StageFit", "machine_of", "print_plan"]
