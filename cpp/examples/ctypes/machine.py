"""The same table for Python, or whatever can call C: `python machine.py liblifecycle.so`."""

import ctypes
import itertools
import sys

lib = ctypes.CDLL(sys.argv[1])
lib.tokenspeed_state_name.restype = lib.tokenspeed_action_name.restype = ctypes.c_char_p
number = {
    name.decode(): at
    for names in (lib.tokenspeed_state_name, lib.tokenspeed_action_name)
    for at, name in enumerate(itertools.takewhile(bool, map(names, itertools.count())))
}
request, refused = ctypes.c_int(number["New"]), ctypes.c_char_p()  # a machine is its state
for move in ("Submit Waiting", "Admit Prefilling", "Release Finished", "Abort Aborting"):
    action, to = (number[word] for word in move.split())
    lib.tokenspeed_apply(ctypes.byref(request), action, to, ctypes.byref(refused))
    print((refused.value or lib.tokenspeed_state_name(request)).decode())
