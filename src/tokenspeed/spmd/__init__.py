"""spmd: meshes, placements, the compiler that inserts collectives, and the executor.

Rule: a step is a function of parameters, batch and KV; state lives in the executor and is donated.
"""

from tokenspeed.spmd.collectives import Communicator as Communicator
from tokenspeed.spmd.collectives import ProcessGroups as ProcessGroups
from tokenspeed.spmd.collectives import ThreadGroups as ThreadGroups
from tokenspeed.spmd.compile import Program as Program
from tokenspeed.spmd.compile import compile_model as compile_model
from tokenspeed.spmd.cost import Costs as Costs
from tokenspeed.spmd.cost import Link as Link
from tokenspeed.spmd.executor import Executor as Executor
from tokenspeed.spmd.executor import Pending as Pending
from tokenspeed.spmd.kv import KV as KV
from tokenspeed.spmd.kv import KVSpec as KVSpec
from tokenspeed.spmd.mesh import Mesh as Mesh
from tokenspeed.spmd.module import module as module
from tokenspeed.spmd.placement import REPLICATED as REPLICATED
from tokenspeed.spmd.placement import Boundary as Boundary
from tokenspeed.spmd.placement import Layout as Layout
from tokenspeed.spmd.placement import Partial as Partial
from tokenspeed.spmd.placement import Replicate as Replicate
from tokenspeed.spmd.placement import Shard as Shard
from tokenspeed.spmd.placement import alike as alike
from tokenspeed.spmd.placement import as_batch as as_batch
from tokenspeed.spmd.placement import layout as layout
from tokenspeed.spmd.placement import tokens as tokens
from tokenspeed.spmd.step import StepKV as StepKV
from tokenspeed.spmd.trace import Bucket as Bucket
