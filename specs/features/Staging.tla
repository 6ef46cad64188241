------------------------------- MODULE Staging -------------------------------
(* Host buffers that an asynchronous copy reads while later steps are being   *)
(* prepared.                                                                  *)
(*                                                                            *)
(* Rule: a buffer is not written while a copy that was started may still read *)
(* it.  The copy is not atomic: it starts, and its bytes are read when it      *)
(* ends.  Bug class StageImmutable: a page table overwritten under overlap.   *)
EXTENDS Naturals, FiniteSets

CONSTANTS Buffer, Steps, MaxInFlight
VARIABLES
  stage,     \* [Buffer -> step whose data the buffer holds; 0: none]
  copies,    \* set of [buffer, step]: copies that were started and have not ended
  step,      \* the last step that was prepared
  got        \* [1..Steps -> step whose data the device read for it; 0: nothing yet]
vars == <<stage, copies, step, got>>

Reading(b) == \E c \in copies : c.buffer = b
Waits(b)   == stage[b] # 0 /\ got[stage[b]] = 0 /\ ~Reading(b)   \* prepared, not yet copied

Prepare(b) ==    \* the next step's data is written where nobody reads
  /\ step < Steps
  /\ ~Reading(b)
  /\ ~Waits(b)
  /\ step' = step + 1
  /\ stage' = [stage EXCEPT ![b] = step + 1]
  /\ UNCHANGED <<copies, got>>
Copy(b) ==
  /\ Waits(b)
  /\ Cardinality(copies) < MaxInFlight
  /\ copies' = copies \cup {[buffer |-> b, step |-> stage[b]]}
  /\ UNCHANGED <<stage, step, got>>
Arrive(b) ==     \* the device has what the buffer holds now
  /\ \E c \in copies : /\ c.buffer = b
                       /\ got' = [got EXCEPT ![c.step] = stage[b]]
                       /\ copies' = copies \ {c}
  /\ UNCHANGED <<stage, step>>

Init == stage = [b \in Buffer |-> 0] /\ copies = {} /\ step = 0 /\ got = [s \in 1..Steps |-> 0]
Next == \E b \in Buffer : Prepare(b) \/ Copy(b) \/ Arrive(b)
Fairness == \A b \in Buffer : WF_vars(Prepare(b)) /\ WF_vars(Copy(b)) /\ WF_vars(Arrive(b))
Spec == Init /\ [][Next]_vars /\ Fairness

StageImmutable == \A c \in copies : stage[c.buffer] = c.step
ContentMatches == \A s \in 1..Steps : got[s] \in {0, s}
EveryStepArrives == <>(\A s \in 1..Steps : got[s] = s)
NeverTwoCopies == Cardinality(copies) < 2
=============================================================================
