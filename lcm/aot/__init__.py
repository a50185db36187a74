"""Compiling for TPUs that are not here: memory, FLOPs and the schedules of kernels."""

from lcm.aot.flops import Work, work
from lcm.aot.program import Program, compile
from lcm.aot.schedule import Schedule, schedules
from lcm.aot.topology import mesh

__all__ = ["Program", "Schedule", "Work", "compile", "mesh", "schedules", "work"]
