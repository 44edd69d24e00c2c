"""What a run takes, told before it begins: work, memory, time, disk, and what is in its way."""

from modern_llm.alignment.plan.fit import Fit, StageFit
from modern_llm.alignment.plan.machine import Machine, machine_of
from modern_llm.alignment.plan.show import print_plan

__all__ = ["Fit", "Machine", "StageFit", "machine_of", "print_plan"]
