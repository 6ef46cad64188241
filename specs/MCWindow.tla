------------------------------ MODULE MCWindow ------------------------------
(* Bounded models of Window; the requests are MCLifecycle's.                  *)
EXTENDS MCLifecycle, Window

(* What must be possible: invariants that must fail.                         *)
NeverHole          == \A r \in Req : Held(r) = DOMAIN tab[r]
NeverSharedHole    == [][\A p \in Page : page[p].ref = 2 /\ page'[p].ref = 1
                                         => \E r \in Req : st'[r] # st[r]]_vars
NeverHitBehindHole == [][\A r \in Req : st[r] \in Queued /\ st'[r] = "Prefilling" /\ tab'[r] # <<>>
                                        => tab'[r][1] # Hole]_vars
NeverGapInCache    == \A p \in Page : page[p].kind = "Shared" =>
  \A i \in 1..((Len(page[p].key) - 1) \div PageSize) :
    Cached(SubSeq(page[p].key, 1, i * PageSize + 1))
NeverBeyondPool    == \A r \in Req : Len(tab[r]) <= Cardinality(Page)
=============================================================================
