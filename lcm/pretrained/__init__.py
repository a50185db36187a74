"""Pretrained models in and out: Hugging Face folders, one mapping for each family."""

from lcm.pretrained.assemble import assemble
from lcm.pretrained.export import save_folder
from lcm.pretrained.families import REGISTRY
from lcm.pretrained.folder import Folder
from lcm.pretrained.model import Model, changed, load
from lcm.pretrained.source import Source

__all__ = ["REGISTRY", "Folder", "Model", "Source", "assemble", "changed", "load", "save_folder"]
