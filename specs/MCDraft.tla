------------------------------ MODULE MCDraft ------------------------------
(* Bounded models of Draft; the requests are MCLifecycle's.                   *)
EXTENDS MCLifecycle, Draft

(* What must be possible: invariants and properties that must fail.          *)
NeverGuessing    == \A r \in Req : draft[r] = 0
NeverAllRight    == [][\A r \in Req : draft[r] = Drafts => known'[r] # known[r] + Drafts + 1]_dvars
NeverSomeWrong   == [][\A r \in Req : known'[r] = known[r] \/ known'[r] = known[r] + draft[r] + 1]_dvars
NeverGivenBack   == [][\A r \in Req : Len(tab'[r]) >= Len(tab[r]) \/ st'[r] # st[r]]_dvars
NeverEndedInside == [][\A r \in Req : st[r] = "Decoding" /\ st'[r] = "Finishing"
                         => known'[r] = known[r] + draft[r] + 1]_dvars
NeverDroppedGuess == \A r \in Req : ~(st[r] = "Aborting" /\ InFlight(r) /\ draft[r] > 0)
=============================================================================
