----------------------------- MODULE MCHostTier -----------------------------
(* Bounded models of HostTier; the requests are MCLifecycle's.                *)
EXTENDS MCLifecycle, HostTier

(* What must be possible: invariants that must fail.                         *)
NeverLoaded          == \A m \in moves : m.out
NeverStoredWhileUsed == \A m \in moves : m.out => page[m.page].ref = 0
NeverAlreadyComputed == \A m \in moves : ~m.out => ~Cached(host[m.block].key)
=============================================================================
