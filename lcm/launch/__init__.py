"""`lcm launch`: a config on a TPU slice of the cloud, by one script that can be read beforehand."""

from lcm.launch.command import run
from lcm.launch.script import script
from lcm.launch.spec import Launch, check
from lcm.launch.tpus import Slice, find

__all__ = ["Launch", "Slice", "check", "find", "run", "script"]
