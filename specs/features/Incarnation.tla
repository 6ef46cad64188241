----------------------------- MODULE Incarnation -----------------------------
(* Request identities that are used again, and events that come late or twice.*)
(*                                                                            *)
(* Rule: an event acts only on the life that it was meant for; on any other   *)
(* it does nothing.  Bug class EpochMatch: an abort kills the next request of *)
(* the same id, a late completion stops the engine.                           *)
EXTENDS Naturals

CONSTANTS Id, Lives
VARIABLES
  alive,       \* [Id -> BOOLEAN]
  incarnation, \* [Id -> 0..Lives]
  events,      \* set of [id, incarnation, kind] that may arrive, once or more
  ended        \* set of [id, meant, hit]: whom an event was meant for, whom it ended
vars == <<alive, incarnation, events, ended>>
Kinds == {"Abort", "Complete"}

Submit(i) ==
  /\ ~alive[i] /\ incarnation[i] < Lives
  /\ alive' = [alive EXCEPT ![i] = TRUE]
  /\ incarnation' = [incarnation EXCEPT ![i] = @ + 1]
  /\ UNCHANGED <<events, ended>>
Send(i, kind) ==
  /\ alive[i]
  /\ events' = events \cup {[id |-> i, incarnation |-> incarnation[i], kind |-> kind]}
  /\ UNCHANGED <<alive, incarnation, ended>>
Meant(e) == alive[e.id] /\ incarnation[e.id] = e.incarnation
Deliver(e) ==    \* it stays in `events`: networks repeat themselves
  /\ Meant(e)
  /\ alive' = [alive EXCEPT ![e.id] = FALSE]
  /\ ended' = ended \cup {[id |-> e.id, meant |-> e.incarnation, hit |-> incarnation[e.id]]}
  /\ UNCHANGED <<incarnation, events>>
Finish(i) ==     \* it ends by itself, events about it notwithstanding
  /\ alive[i]
  /\ alive' = [alive EXCEPT ![i] = FALSE]
  /\ UNCHANGED <<incarnation, events, ended>>

Init ==
  /\ alive = [i \in Id |-> FALSE] /\ incarnation = [i \in Id |-> 0]
  /\ events = {} /\ ended = {}
Next ==
  \/ \E i \in Id : Submit(i) \/ Finish(i) \/ (\E kind \in Kinds : Send(i, kind))
  \/ \E e \in events : Deliver(e)
Spec == Init /\ [][Next]_vars /\ \A i \in Id : WF_vars(Finish(i))

EpochMatch == \A x \in ended : x.meant = x.hit
EveryLifeEnds == \A i \in Id : alive[i] ~> ~alive[i]
NeverLate == \A e \in events : alive[e.id] => incarnation[e.id] = e.incarnation
=============================================================================
