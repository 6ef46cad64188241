------------------------------ MODULE Sessions -------------------------------
(* Turns of a conversation: what one leaves in the cache is worth more to the *)
(* next than a stranger's pages are to anybody.                               *)
(*                                                                            *)
(* Rule: a finished turn may ask that its pages be kept, within a bound and   *)
(* for a time.  Kept pages go last, but they go: whoever is let in counts     *)
(* them as room, so a hint never blocks a request.  A newer turn supersedes   *)
(* the older one; a hint is its last turn's, or says that the next is near.   *)
(* Pages are fetched for a turn that has not come only while nobody waits,    *)
(* from what nobody is promised or has asked to be kept; what is on its way   *)
(* counts as room, too.                                                       *)
EXTENDS Naturals, FiniteSets

CONSTANTS Session, Page, Null, Need, Bound, Ttl, Turns  \* Need: pages of a turn
VARIABLES
  st,       \* [Session -> {"Idle", "Waiting", "Running"}]
  turn,     \* [Session -> 0..Turns]: turns that have come
  of,       \* [Page -> Session or Null]: whose KV it has; Null: it is free
  holds,    \* [Session -> SUBSET Page]: of the running turn
  kept,     \* [Session -> SUBSET Page]: of the last turn, by its hint
  left,     \* [Session -> 0..Ttl]: time until the hint lapses
  loading   \* SUBSET Page: being fetched for a session
vars == <<st, turn, of, holds, kept, left, loading>>

Free      == {p \in Page : of[p] = Null}
Held(p)   == \E s \in Session : p \in holds[s]
Kept(p)   == \E s \in Session : p \in kept[s]
Cached    == {p \in Page : of[p] # Null /\ ~Held(p) /\ p \notin loading}
Hits(s)   == {p \in Cached : of[p] = s}
Running   == {s \in Session : st[s] = "Running"}
Lacks(s)  == st[s] = "Running" /\ Cardinality(holds[s]) < Need
Promised  == Need * Cardinality(Running) - Cardinality(UNION {holds[s] : s \in Running})
Spare     == Cardinality(Free \cup Cached)
Room      == Spare + Cardinality(loading)
AllKept   == UNION {kept[s] : s \in Session}
Starved   == Free = {} /\ \E s \in Session : Lacks(s)
NoneWaits == \A s \in Session : st[s] # "Waiting" /\ ~Lacks(s)
MayFetch(s) == /\ left[s] > 0 /\ st[s] = "Idle"
               /\ Cardinality({q \in Page : of[q] = s}) < Need
               /\ NoneWaits
               /\ Promised < Spare

Submit(s) ==     \* the next turn; it supersedes one that waits or runs
  /\ turn[s] < Turns
  /\ turn' = [turn EXCEPT ![s] = @ + 1]
  /\ st' = [st EXCEPT ![s] = "Waiting"]
  /\ holds' = [holds EXCEPT ![s] = {}]
  /\ UNCHANGED <<of, kept, left, loading>>
Admit(s) ==      \* all or nothing; what others asked to be kept is room, too
  /\ st[s] = "Waiting"
  /\ Promised + Need <= Room
  /\ \A p \in loading : of[p] # s
  /\ st' = [st EXCEPT ![s] = "Running"]
  /\ holds' = [holds EXCEPT ![s] = Hits(s)]
  /\ kept' = [kept EXCEPT ![s] = {}]
  /\ left' = [left EXCEPT ![s] = 0]
  /\ UNCHANGED <<turn, of, loading>>
Acquire(s, p) ==
  /\ Lacks(s)
  /\ p \in Free
  /\ of' = [of EXCEPT ![p] = s]
  /\ holds' = [holds EXCEPT ![s] = @ \cup {p}]
  /\ UNCHANGED <<st, turn, kept, left, loading>>
Evict(p) ==      \* what somebody asked for goes after everything else
  /\ p \in Cached
  /\ Starved \/ (Free = {} /\ ~Kept(p) /\ \E s \in Session : MayFetch(s) /\ of[p] # s)
  /\ Kept(p) => Cached \subseteq AllKept
  /\ of' = [of EXCEPT ![p] = Null]
  /\ kept' = [s \in Session |-> kept[s] \ {p}]
  /\ UNCHANGED <<st, turn, holds, left, loading>>
Finish(s) ==     \* with or without a hint
  /\ st[s] = "Running" /\ ~Lacks(s)
  /\ \E keep \in SUBSET holds[s] :
       /\ Cardinality(AllKept) + Cardinality(keep) <= Bound
       /\ kept' = [kept EXCEPT ![s] = keep]
       /\ left' = [left EXCEPT ![s] = IF keep = {} THEN 0 ELSE Ttl]
  /\ st' = [st EXCEPT ![s] = "Idle"]
  /\ holds' = [holds EXCEPT ![s] = {}]
  /\ UNCHANGED <<turn, of, loading>>

Drop(s) ==       \* the client says that there will be no next turn
  /\ left[s] > 0
  /\ kept' = [kept EXCEPT ![s] = {}]
  /\ left' = [left EXCEPT ![s] = 0]
  /\ UNCHANGED <<st, turn, of, holds, loading>>
Tick ==          \* time passes, for all alike
  /\ \E s \in Session : left[s] > 0
  /\ left' = [s \in Session |-> IF left[s] > 0 THEN left[s] - 1 ELSE 0]
  /\ kept' = [s \in Session |-> IF left[s] > 1 THEN kept[s] ELSE {}]
  /\ UNCHANGED <<st, turn, of, holds, loading>>
Expect(s) ==     \* the client says that the next turn is near
  /\ st[s] = "Idle" /\ turn[s] > 0 /\ left[s] = 0
  /\ left' = [left EXCEPT ![s] = Ttl]
  /\ UNCHANGED <<st, turn, of, holds, kept, loading>>
Prefetch(s, p) == \* a page that the next turn will want, from a slower tier
  /\ MayFetch(s)
  /\ p \in Free
  /\ of' = [of EXCEPT ![p] = s]
  /\ loading' = loading \cup {p}
  /\ UNCHANGED <<st, turn, holds, kept, left>>
Fetched(p, good) ==   \* kept like what a turn asks to be kept, if there is room and time
  /\ p \in loading
  /\ loading' = loading \ {p}
  /\ of' = IF good THEN of ELSE [of EXCEPT ![p] = Null]
  /\ kept' = [s \in Session |-> IF good /\ s = of[p] /\ st[s] = "Idle" /\ left[s] > 0
                                     /\ Cardinality(AllKept) < Bound
                                  THEN kept[s] \cup {p} ELSE kept[s]]
  /\ UNCHANGED <<st, turn, holds, left>>

Init ==
  /\ st = [s \in Session |-> "Idle"] /\ turn = [s \in Session |-> 0]
  /\ of = [p \in Page |-> Null] /\ loading = {}
  /\ holds = [s \in Session |-> {}] /\ kept = [s \in Session |-> {}]
  /\ left = [s \in Session |-> 0]
Next ==
  \/ \E s \in Session : \/ Submit(s) \/ Admit(s) \/ Finish(s) \/ Drop(s) \/ Expect(s)
                        \/ \E p \in Page : Acquire(s, p) \/ Prefetch(s, p)
  \/ \E p \in Page : Evict(p) \/ (\E good \in BOOLEAN : Fetched(p, good))
  \/ Tick
Fairness ==
  /\ \A s \in Session : /\ WF_vars(Admit(s)) /\ WF_vars(Finish(s))
                        /\ WF_vars(\E p \in Page : Acquire(s, p))
  /\ WF_vars(Starved /\ \E p \in Page : Evict(p)) /\ WF_vars(Tick)
  /\ \A p \in Page : WF_vars(\E good \in BOOLEAN : Fetched(p, good))
Spec == Init /\ [][Next]_vars /\ Fairness

TypeOK ==
  /\ st \in [Session -> {"Idle", "Waiting", "Running"}]
  /\ turn \in [Session -> 0..Turns] /\ left \in [Session -> 0..Ttl]
  /\ of \in [Page -> Session \cup {Null}] /\ loading \subseteq Page
  /\ holds \in [Session -> SUBSET Page] /\ kept \in [Session -> SUBSET Page]
RefExact ==              \* a page is held by the session whose KV it has, while that one runs
  \A s \in Session : /\ \A p \in holds[s] \cup kept[s] : of[p] = s
                     /\ st[s] # "Running" => holds[s] = {}
NoReuseInFlight == \A p \in loading : of[p] # Null /\ ~Held(p)
KeptBounded == Cardinality(AllKept) <= Bound /\ \A s \in Session : kept[s] # {} => left[s] > 0
AdmitSound == Promised <= Room
Outlives ==              \* what is kept goes only when there is nothing else
  [][\A p \in Cached \cap AllKept : of'[p] = Null => Cached \subseteq AllKept]_vars
EveryTurnEnds == \A s \in Session : st[s] = "Waiting" ~> st[s] = "Idle"
HintsEnd == \A s \in Session : left[s] > 0 ~> left[s] = 0

NeverKeptEvicted == [][\A p \in AllKept : of'[p] # Null]_vars
NeverSuperseded == [][\A s \in Session : st[s] = "Running" => st'[s] # "Waiting"]_vars
NeverMadeRoom == \* a cached page goes for one that is fetched ahead
  [][\A p \in Cached : of'[p] = Null => Starved]_vars
NeverPrefetched == [][\A p \in loading : p \in loading' \/ of'[p] = Null]_vars
=============================================================================
