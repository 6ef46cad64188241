"""Models: pure functions over a parameter tree, and the checkpoints that fill it.

Rule: a family is one file that knows no rank and no collective; reading a checkpoint knows no model
code beyond its table of names.
"""

from tokenspeed.models.build import Model as Model
from tokenspeed.models.build import build as build
from tokenspeed.models.build import compile_config as compile_config
from tokenspeed.models.build import context_max as context_max
from tokenspeed.models.build import default_pages as default_pages
from tokenspeed.models.build import host_pages as host_pages
from tokenspeed.models.build import in_cache_groups as in_cache_groups
from tokenspeed.models.build import open_model as open_model
from tokenspeed.models.build import page_size as page_size
from tokenspeed.models.checkpoint import Checkpoint as Checkpoint
from tokenspeed.models.checkpoint import open_checkpoint as open_checkpoint
from tokenspeed.models.config import LlamaConfig as LlamaConfig
from tokenspeed.models.config import ModelConfig as ModelConfig
from tokenspeed.models.deepseek_config import DeepseekConfig as DeepseekConfig
from tokenspeed.models.dummy import DummyCheckpoint as DummyCheckpoint
from tokenspeed.models.families import Family as Family
from tokenspeed.models.families import find_config as find_config
from tokenspeed.models.families import read_config as read_config
from tokenspeed.models.hub import resolve_model as resolve_model
from tokenspeed.models.memory import Loaded as Loaded
from tokenspeed.models.memory import PeakMemory as PeakMemory
