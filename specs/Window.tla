------------------------------- MODULE Window -------------------------------
(* The lifecycle of a model whose every layer has a sliding window: a token   *)
(* sees so many tokens, itself included, and pages behind that are given back.*)
(*                                                                            *)
(* Rule: a page goes when it lies wholly behind what the oldest step in       *)
(* flight can see; no later step sees more.  A hole stays in its place in the *)
(* table.  What was published stays in the cache, and may be evicted in any   *)
(* order: a prefix is found where the pages of the last window before it are  *)
(* there, whatever became of those before.  So a request needs no more pages  *)
(* at once than its window, however long it is.                               *)
EXTENDS Lifecycle

CONSTANTS
  Window,   \* tokens that one sees, itself included
  Hole      \* in a table: a page that was given back; no page

ASSUME Window \in Nat \ {0, 1} /\ Hole \notin Page   \* who sees itself alone reads no KV

Behind(n)    == IF n + 1 < Window THEN 0 ELSE n + 1 - Window   \* what the token after n does not see
Seen(i, n)   == i * PageSize > Behind(n)         \* is any of page i seen by the token after n
Held(r)      == {i \in DOMAIN tab[r] : tab[r][i] # Hole}
SeenPages(n) == (n - 2) \div PageSize + 2   \* that n >= 2 tokens may lie in
FitsWindow(r) ==
  LET whole == PagesFor(Len(Content[r]) - 1) IN
  Min(whole, SeenPages(Window)) <= Cardinality(Page)

Found(r, n) == \A i \in 1..n : Seen(i, n * PageSize) => Hit(KeyOf(r, i)) # {}
MatchSeen(r) == \* the longest prefix of which all that is seen from its end is there
  LET most == (known[r] - 1) \div PageSize
      n == CHOOSE n \in 0..most : Found(r, n) /\ \A m \in 0..most : m > n => ~Found(r, m)
  IN  [i \in 1..n |-> IF Seen(i, n * PageSize) THEN CHOOSE p \in Hit(KeyOf(r, i)) : TRUE ELSE Hole]

Unheld == {p \in Page : page[p].kind = "Shared" /\ page[p].ref = 0}

----------------------------------------------------------------------------
Slide(r) ==      \* the first page that it holds; what is shared stays for others
  /\ st[r] \in Live
  /\ \E i \in Held(r) :
       /\ \A j \in Held(r) : i <= j
       /\ ~Seen(i, done[r])
       /\ LET p == tab[r][i] IN
            /\ page' = [page EXCEPT ![p] = IF page[p].kind = "Exclusive" THEN FreePage
                                           ELSE [page[p] EXCEPT !.ref = @ - 1]]
            /\ content' = [content EXCEPT ![p] = IF page[p].kind = "Exclusive" THEN Null ELSE @]
       /\ tab' = [tab EXCEPT ![r][i] = Hole]
  /\ UNCHANGED <<st, age, known, planned, done, plan, inflight>>

(* The actions of Lifecycle that windows change.                              *)
SlidingSubmit(r) ==
  /\ Move("Submit", r, "Waiting")
  /\ FitsWindow(r)
  /\ age' = Append(age, r)
  /\ UNCHANGED <<tab, known, planned, done, page, content, plan, inflight>>
SlidingAdmit(r) ==
  /\ Move("Admit", r, "Prefilling")
  /\ NoneLacks
  /\ SlotFree
  /\ FirstQueued(r)
  /\ LET m == MatchSeen(r) IN
       /\ tab'     = [tab EXCEPT ![r] = m]
       /\ planned' = [planned EXCEPT ![r] = Len(m) * PageSize]
       /\ done'    = [done EXCEPT ![r] = Len(m) * PageSize]
       /\ page'    = [p \in Page |-> IF p \in Range(m)
                                     THEN [page[p] EXCEPT !.ref = @ + 1] ELSE page[p]]
  /\ UNCHANGED <<age, known, content, plan, inflight>>
SeesOrWrites(r, w) ==    \* pages of the table that a step needs for a request
  {i \in 1..PagesFor(w.from + w.n) : Seen(i, w.from)}
SlidingSchedule(r, n) ==   \* reads what its first token sees, and no hole
  /\ Move("Schedule", r, st[r])
  /\ Wants(r)
  /\ n <= Wanted(r)
  /\ n <= Room(r)
  /\ LET w == [NoWork EXCEPT !.from = planned[r], !.n = n, !.samples = planned[r] + n >= known[r]] IN
       plan' = [plan EXCEPT ![r] = [w EXCEPT !.writes = Covers(r, planned[r], n),
                                             !.reads  = {tab[r][i] : i \in SeesOrWrites(r, w)}]]
  /\ planned' = [planned EXCEPT ![r] = @ + n]
  /\ UNCHANGED <<age, tab, known, done, page, content, inflight>>
SlidingPreempt(r) == Preempt(r) /\ Unheld = {}
SlidingEvict(p) ==   \* in any order
  /\ p \in Unheld
  /\ page' = [page EXCEPT ![p] = FreePage]
  /\ content' = [content EXCEPT ![p] = Null]
  /\ UNCHANGED <<st, age, tab, known, planned, done, plan, inflight>>

SlidingNext ==
  \/ \E r \in Req : \/ SlidingSubmit(r) \/ SlidingAdmit(r) \/ Abort(r) \/ Release(r)
                    \/ SlidingPreempt(r) \/ Publish(r) \/ Slide(r)
                    \/ \E p \in Page : Acquire(r, p)
                    \/ \E n \in 1..Chunk : SlidingSchedule(r, n)
  \/ Launch \/ Complete
  \/ \E p \in Page : SlidingEvict(p)

SlidingFairness ==
  /\ \A r \in Req : WF_vars(SlidingAdmit(r)) /\ WF_vars(Release(r)) /\ WF_vars(SlidingPreempt(r))
                    /\ WF_vars(\E p \in Page : Acquire(r, p))
                    /\ WF_vars(\E n \in 1..Chunk : SlidingSchedule(r, n))
                    /\ WF_vars(Slide(r))
  /\ WF_vars(Launch) /\ WF_vars(Complete)
  /\ WF_vars(Starved /\ \E p \in Page : SlidingEvict(p))

SlidingSpec == Init /\ [][SlidingNext]_vars /\ SlidingFairness

----------------------------------------------------------------------------
(* Lifecycle's invariants, of tables with holes: under the same bug classes.  *)
SlidingOK ==
  /\ \A r \in Req : tab[r] \in Seq(Page \cup {Hole}) /\ Len(tab[r]) <= PagesFor(Len(Content[r]))
  /\ \A r \in Req : {known[r], planned[r], done[r]} \subseteq 0..Len(Content[r])
HolesInFront == \A r \in Req : \A i, j \in DOMAIN tab[r] : i < j /\ tab[r][j] = Hole => tab[r][i] = Hole
HeldOnce ==              \* FreeUnique
  /\ \A p \in FreePages : Holders(p) = {} /\ page[p] = FreePage
  /\ \A r \in Req : \A i, j \in Held(r) : tab[r][i] = tab[r][j] => i = j
PagesExact ==            \* AccountingExact
  Cardinality(FreePages) + Cardinality(Unheld)
    + Cardinality({p \in Page : Holders(p) # {}}) = Cardinality(Page)
NoneGivenAway ==         \* NoReuseInFlight: what a step sees or writes is held until it is complete
  \A r \in Req :
    /\ plan[r].n > 0 => SeesOrWrites(r, plan[r]) \subseteq Held(r)
    /\ \A i \in DOMAIN inflight :
         inflight[i][r].n > 0 => SeesOrWrites(r, inflight[i][r]) \subseteq Held(r)
TouchesHeld ==           \* NoReuseInFlight and MatchPins, of the pages that are named in steps
  \A r \in Req : Touches(r) \subseteq Range(tab[r]) \ {Hole}
SeenHeld ==              \* ... and so is what the next one will see
  \A r \in Running : \A i \in 1..PagesFor(planned[r]) : Seen(i, planned[r]) => i \in Held(r)
KeysRight ==             \* KeyInjective
  \A r \in Req : \A i \in Held(r) :
    page[tab[r][i]].kind = "Shared" => page[tab[r][i]].key = KeyOf(r, i)
HeldMatches ==           \* ContentMatches
  /\ \A r \in Req : \A i \in Held(r) :
       done[r] > (i - 1) * PageSize =>
         content[tab[r][i]] = SubSeq(Content[r], 1, Min(i * PageSize, done[r]))
  /\ \A p \in Page : page[p].kind = "Shared" => content[p] = Tail(page[p].key)
LetInSound ==            \* AdmitSound
  /\ \A r \in Req : st[r] # "New" => FitsWindow(r)
  /\ Cardinality({r \in Req : "Slot" \in Owns[st[r]]}) <= Slots
=============================================================================
