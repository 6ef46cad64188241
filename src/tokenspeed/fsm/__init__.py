"""The lifecycle as data: spec compiler, interpreter (the oracle), checker, generated mirror.

Rule: the spec is the source. Nothing here decides what is legal, and nothing here imports torch.

    specs/*.tla ─ syntax ─► Module ─ model ─► Evaluator ─ check ─► counts, shortest traces
                             └─ lifecycle ─► Lifecycle ─ emit_* ─► generated
"""

from tokenspeed.fsm.check import Report as Report
from tokenspeed.fsm.check import check as check
from tokenspeed.fsm.lifecycle import Lifecycle as Lifecycle
from tokenspeed.fsm.lifecycle import read_lifecycle as read_lifecycle

# mirror.py and monitor.py are imported by name: they need the generated tables, which this package
# must be able to print when there are none yet.
