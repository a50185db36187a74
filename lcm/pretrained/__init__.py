"""Pretrained models in and out: Hugging Face folders, one mapping for each family."""

from lcm.pretrained.assemble import assemble
from lcm.pretrained.folder import Folder
from lcm.pretrained.source import Source

__all__ = ["Folder", "Source", "assemble"]
