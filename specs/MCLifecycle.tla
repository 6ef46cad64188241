---------------------------- MODULE MCLifecycle ----------------------------
(* Bounded models of Lifecycle.  All requests have `Length` tokens, `Prompt`  *)
(* of them prompt; the first `Common` are the same, then each has its own.    *)
(* The request `TooLong`, if there is one, could never fit; `Salted` has a    *)
(* salt of its own, and `Patient` lets one later arrival ahead.                *)
EXTENDS Lifecycle, TLC
CONSTANTS Prompt, Length, Common, TooLong, Salted, Patient

MCToken     == Req \cup {"common"}
MCLength(r) == IF r = TooLong THEN PageSize * Cardinality(Page) + 2 ELSE Length
MCContent   == [r \in Req |-> [i \in 1..MCLength(r) |-> IF i <= Common THEN "common" ELSE r]]
MCPromptLen == [r \in Req |-> Prompt]
MCSalt      == [r \in Req |-> IF r = Salted THEN r ELSE "common"]
MCPatience  == [r \in Req |-> IF r = Patient THEN 1 ELSE 0]
Symmetric   == Permutations(Req) \cup Permutations(Page)

----------------------------------------------------------------------------
(* What must be possible, one a configuration in reach/: each is an invariant *)
(* that must fail, so that nothing above holds because nothing happens.       *)
NeverWaiting    == \A r \in Req : st[r] # "Waiting"
NeverPrefilling == \A r \in Req : st[r] # "Prefilling"
NeverDecoding   == \A r \in Req : st[r] # "Decoding"
NeverPreempted  == \A r \in Req : st[r] # "Preempted"
NeverFinishing  == \A r \in Req : st[r] # "Finishing"
NeverAborting   == \A r \in Req : st[r] # "Aborting"
NeverFinished   == \A r \in Req : st[r] # "Finished"
NeverAborted    == \A r \in Req : st[r] # "Aborted"
NeverResumed    == [][\A r \in Req : st[r] = "Preempted" => st'[r] # "Prefilling"]_vars
NeverTwins      == \A p, q \in Page : p # q /\ page[p].kind = "Shared" /\ page[q].kind = "Shared"
                                    => content[p] # content[q]
NeverTwoHolders == \A p \in Page : Cardinality(Holders(p)) < 2
NeverHit        == \A r \in Req : ~(st[r] = "Prefilling" /\ done[r] > 0 /\ InFlight(r) = FALSE
                                    /\ page[tab[r][1]].ref = 1 /\ planned[r] = done[r])
NeverEvicted    == [][\A p \in Page : page[p].kind = "Shared" => page'[p].kind # "Free"]_vars
NeverFull       == ~Full
NeverAhead      == \A r \in Req : planned[r] <= known[r]
NeverStarved    == ~Starved
NeverPassed     == [][\A r, q \in Req :
  r # q /\ st[r] = "Waiting" /\ st[q] = "Waiting" /\ st'[q] = "Prefilling" =>
    \A i, j \in DOMAIN age : age[i] = r /\ age[j] = q => j < i]_vars
NeverDropped    == \A r \in Req : ~(st[r] = "Finishing" /\ InFlight(r))
=============================================================================
