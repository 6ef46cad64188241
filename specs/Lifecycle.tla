------------------------------ MODULE Lifecycle ------------------------------
(***************************************************************************)
(* The life of every request and of every KV page, with steps in flight.    *)
(*                                                                         *)
(* Rule: what is legal stands here and nowhere else.  The C++ lifecycle and *)
(* the Python mirror are printed from this module by `tokenspeed codegen`;  *)
(* the scheduler decides *when* something happens, this decides *whether*.  *)
(*                                                                         *)
(* Reading guide: `Edges` is the table of a request's legal moves, `Owns`   *)
(* says what it holds in each state; each action below is a guard, a move   *)
(* through that table, and what happens to pages.  One page is the unit of  *)
(* KV, and one step fills one page for each request in it.  Planning,       *)
(* launching and completing a step are separate actions with up to          *)
(* MaxInFlight steps launched, because nearly every fatal KV bug on record  *)
(* is a free that races with somebody else's access.                        *)
(***************************************************************************)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS
  Req,          \* request identities; one identity lives once
  Page,         \* device pages
  Key,          \* content keys: a key stands for a page's tokens and all tokens before it
  Null,         \* "no key"
  Content,      \* [Req -> Seq(Key)]  the keys of every page a request may fill, prompt first
  PromptLen,    \* [Req -> Nat]       how many of these are prompt
  Slots,        \* requests that may hold pages at once
  MaxInFlight   \* steps launched and not completed; overlap + 1

ASSUME /\ \A r \in Req : /\ Content[r] \in Seq(Key)
                         /\ PromptLen[r] \in 1..Len(Content[r])
                         /\ Len(Content[r]) <= Cardinality(Page)
       /\ Slots \in Nat \ {0}
       /\ MaxInFlight \in Nat \ {0}

VARIABLES
  st,        \* [Req -> State]
  age,       \* Seq(Req): order of submission, oldest first
  tab,       \* [Req -> Seq(Page)]: page table
  done,      \* [Req -> Nat]: pages whose KV has been computed
  known,     \* [Req -> Nat]: pages whose tokens are known; survives preemption
  page,      \* [Page -> PageRec]
  plan,      \* set of Work being assembled into the next step
  inflight   \* Seq(SUBSET Work): launched steps, oldest first

vars == <<st, age, tab, done, known, page, plan, inflight>>

----------------------------------------------------------------------------
(* The table                                                                *)

State == {"New", "Waiting", "Prefilling", "Decoding", "Preempted",
          "Finishing", "Aborting", "Finished", "Aborted"}

Edges ==
  [ Submit   |-> {<<"New", "Waiting">>},
    Admit    |-> {<<"Waiting", "Prefilling">>, <<"Preempted", "Prefilling">>},
    Schedule |-> {<<"Prefilling", "Prefilling">>, <<"Decoding", "Decoding">>},
    Complete |-> {<<"Prefilling", "Prefilling">>, <<"Prefilling", "Decoding">>,
                  <<"Prefilling", "Finishing">>, <<"Decoding", "Decoding">>,
                  <<"Decoding", "Finishing">>, <<"Finishing", "Finishing">>,
                  <<"Aborting", "Aborting">>},
    Publish  |-> {<<"Prefilling", "Prefilling">>, <<"Decoding", "Decoding">>,
                  <<"Finishing", "Finishing">>},
    Preempt  |-> {<<"Prefilling", "Preempted">>, <<"Decoding", "Preempted">>},
    Abort    |-> {<<"Waiting", "Aborted">>, <<"Preempted", "Aborted">>,
                  <<"Prefilling", "Aborting">>, <<"Decoding", "Aborting">>},
    Release  |-> {<<"Finishing", "Finished">>, <<"Aborting", "Aborted">>} ]

Owns ==
  [ New        |-> {},
    Waiting    |-> {},
    Prefilling |-> {"Slot", "Pages"},
    Decoding   |-> {"Slot", "Pages"},
    Preempted  |-> {},
    Finishing  |-> {"Slot", "Pages"},
    Aborting   |-> {"Slot", "Pages"},
    Finished   |-> {},
    Aborted    |-> {} ]

Live      == {"Prefilling", "Decoding"}
Queued    == {"Waiting", "Preempted"}
Draining  == {"Finishing", "Aborting"}
Terminal  == {"Finished", "Aborted"}
PageKind  == {"Free", "Exclusive", "Shared"}
PageRec   == [kind : PageKind, ref : 0..Cardinality(Req), key : Key \cup {Null}]
Work      == [req : Req, page : Page, reads : SUBSET Page]

FreePage  == [kind |-> "Free", ref |-> 0, key |-> Null]
Range(s)  == {s[i] : i \in DOMAIN s}

Move(a, r, to) ==
  /\ <<st[r], to>> \in Edges[a]
  /\ st' = [st EXCEPT ![r] = to]

----------------------------------------------------------------------------
(* Guards                                                                   *)

Running        == {r \in Req : st[r] \in Live}
Pos(r)         == CHOOSE i \in DOMAIN age : age[i] = r
Older(a, b)    == Pos(a) < Pos(b)
PlannedFor(r)  == \E w \in plan : w.req = r
InFlight(r)    == \E i \in DOMAIN inflight : \E w \in inflight[i] : w.req = r
Pinned(r)      == PlannedFor(r) \/ InFlight(r)
FreePages      == {p \in Page : page[p].kind = "Free"}
Evictable      == {p \in Page : page[p].kind = "Shared" /\ page[p].ref = 0}
NoneEvictable  == Evictable = {}
Wants(r)       == r \in Running /\ ~PlannedFor(r) /\ Len(tab[r]) < Len(Content[r])
Starved        == FreePages = {} /\ \E r \in Req : Wants(r)
SlotFree       == Cardinality({r \in Req : "Slot" \in Owns[st[r]]}) < Slots
FirstQueued(r) == \A q \in Req \ {r} : st[q] \in Queued => Older(r, q)
FirstWants(r)  == \A q \in Req \ {r} : Wants(q) => Older(r, q)
Youngest(r)    == \A q \in Running \ {r} : Older(q, r)
Alone(r)       == Running = {r}
Full           == Len(inflight) >= MaxInFlight

Hit(k)         == {p \in Page : page[p].kind = "Shared" /\ page[p].key = k}
Match(r)       == \* longest shared prefix; the last known page is always computed again
  LET n == CHOOSE n \in 0..(known[r] - 1) :
             /\ \A i \in 1..n : Hit(Content[r][i]) # {}
             /\ n < known[r] - 1 => Hit(Content[r][n + 1]) = {}
  IN  [i \in 1..n |-> CHOOSE p \in Hit(Content[r][i]) : TRUE]

----------------------------------------------------------------------------
(* Requests                                                                 *)

Submit(r) ==
  /\ Move("Submit", r, "Waiting")
  /\ age' = Append(age, r)
  /\ UNCHANGED <<tab, done, known, page, plan, inflight>>

Admit(r) ==      \* looking a prefix up and pinning it is one action
  /\ Move("Admit", r, "Prefilling")
  /\ ~Starved
  /\ SlotFree
  /\ FirstQueued(r)
  /\ LET m == Match(r) IN
       /\ tab'  = [tab EXCEPT ![r] = m]
       /\ done' = [done EXCEPT ![r] = Len(m)]
       /\ page' = [p \in Page |-> IF p \in Range(m)
                                  THEN [page[p] EXCEPT !.ref = @ + 1] ELSE page[p]]
  /\ UNCHANGED <<age, known, plan, inflight>>

Abort(r) ==
  /\ \E to \in State : Move("Abort", r, to)
  /\ UNCHANGED <<age, tab, done, known, page, plan, inflight>>

GiveBack(r) ==   \* shared pages lose a reference, exclusive pages become free
  /\ page' = [p \in Page |->
                IF p \notin Range(tab[r]) THEN page[p]
                ELSE IF page[p].kind = "Shared" THEN [page[p] EXCEPT !.ref = @ - 1]
                ELSE FreePage]
  /\ tab'  = [tab EXCEPT ![r] = <<>>]
  /\ done' = [done EXCEPT ![r] = 0]

Release(r) ==    \* no page returns while a launched step may touch it
  /\ \E to \in State : Move("Release", r, to)
  /\ ~Pinned(r)
  /\ GiveBack(r)
  /\ UNCHANGED <<age, known, plan, inflight>>

Preempt(r) ==    \* the youngest gives way; the oldest can always go on
  /\ Move("Preempt", r, "Preempted")
  /\ Starved
  /\ NoneEvictable
  /\ Youngest(r)
  /\ ~Alone(r)
  /\ ~Pinned(r)
  /\ GiveBack(r)
  /\ UNCHANGED <<age, known, plan, inflight>>

----------------------------------------------------------------------------
(* Steps                                                                    *)

Schedule(r, p) ==
  /\ Move("Schedule", r, st[r])
  /\ Wants(r)
  /\ FirstWants(r)
  /\ p \in FreePages
  /\ tab'  = [tab EXCEPT ![r] = Append(@, p)]
  /\ page' = [page EXCEPT ![p] = [kind |-> "Exclusive", ref |-> 0, key |-> Null]]
  /\ plan' = plan \cup {[req |-> r, page |-> p, reads |-> Range(tab[r])]}
  /\ UNCHANGED <<age, done, known, inflight>>

Launch ==
  /\ plan # {}
  /\ ~Full
  /\ inflight' = Append(inflight, plan)
  /\ plan' = {}
  /\ UNCHANGED <<st, age, tab, done, known, page>>

Last(r) == done[r] + 1 = Len(Content[r])

AfterComplete(r, stop) ==
  CASE st[r] = "Prefilling" /\ done[r] + 1 < known[r] -> "Prefilling"
    [] st[r] \in Live /\ (Last(r) \/ r \in stop)      -> "Finishing"
    [] st[r] \in Live                                 -> "Decoding"
    [] OTHER                                          -> st[r]

Complete ==      \* results of draining requests are dropped
  /\ inflight # <<>>
  /\ LET batch == {w.req : w \in Head(inflight)} IN
     \E stop \in SUBSET {r \in batch : st[r] \in Live /\ done[r] + 1 >= known[r]} :
       /\ \A r \in batch : <<st[r], AfterComplete(r, stop)>> \in Edges["Complete"]
       /\ st'    = [r \in Req |-> IF r \in batch THEN AfterComplete(r, stop) ELSE st[r]]
       /\ done'  = [r \in Req |-> IF r \in batch THEN done[r] + 1 ELSE done[r]]
       /\ known' = [r \in Req |-> IF /\ r \in batch
                                     /\ AfterComplete(r, stop) = "Decoding"
                                  THEN done[r] + 2 ELSE known[r]]
  /\ inflight' = Tail(inflight)
  /\ UNCHANGED <<age, tab, page, plan>>

----------------------------------------------------------------------------
(* The prefix cache                                                         *)

Computed(r, p)  == \E i \in 1..done[r] : i <= known[r] /\ tab[r][i] = p
KeyOf(r, p)     == Content[r][CHOOSE i \in DOMAIN tab[r] : tab[r][i] = p]
Cached(k)       == \E q \in Page : page[q].key = k

Publish(r, p) == \* after the KV is computed, and once a key
  /\ Move("Publish", r, st[r])
  /\ Computed(r, p)
  /\ page[p].kind = "Exclusive"
  /\ ~Cached(KeyOf(r, p))
  /\ page' = [page EXCEPT ![p] = [kind |-> "Shared", ref |-> 1, key |-> KeyOf(r, p)]]
  /\ UNCHANGED <<age, tab, done, known, plan, inflight>>

Evict(p) ==
  /\ p \in Evictable
  /\ page' = [page EXCEPT ![p] = FreePage]
  /\ UNCHANGED <<st, age, tab, done, known, plan, inflight>>

----------------------------------------------------------------------------
Init ==
  /\ st = [r \in Req |-> "New"]
  /\ age = <<>>
  /\ tab = [r \in Req |-> <<>>]
  /\ done = [r \in Req |-> 0]
  /\ known = [r \in Req |-> PromptLen[r]]
  /\ page = [p \in Page |-> FreePage]
  /\ plan = {}
  /\ inflight = <<>>

Next ==
  \/ \E r \in Req : Submit(r) \/ Admit(r) \/ Abort(r) \/ Release(r) \/ Preempt(r)
  \/ \E r \in Req, p \in Page : Schedule(r, p) \/ Publish(r, p)
  \/ Launch \/ Complete
  \/ \E p \in Page : Evict(p)

Fairness ==
  /\ \A r \in Req : WF_vars(Admit(r)) /\ WF_vars(Release(r)) /\ WF_vars(Preempt(r))
                    /\ WF_vars(\E p \in Page : Schedule(r, p))
  /\ WF_vars(Launch) /\ WF_vars(Complete)
  /\ \A p \in Page : WF_vars(Evict(p) /\ Starved)

Spec == Init /\ [][Next]_vars /\ Fairness

----------------------------------------------------------------------------
(* Safety                                                                   *)

TypeOK ==
  /\ st \in [Req -> State]
  /\ age \in Seq(Req) /\ Len(age) <= Cardinality(Req)
  /\ \A r \in Req : tab[r] \in Seq(Page) /\ Len(tab[r]) <= Len(Content[r])
  /\ \A r \in Req : done[r] \in 0..Len(Content[r]) /\ known[r] \in 1..Len(Content[r])
  /\ page \in [Page -> PageRec]
  /\ plan \subseteq Work
  /\ \A i \in DOMAIN inflight : inflight[i] \subseteq Work

Holders(p) == {r \in Req : p \in Range(tab[r])}
AllWork    == plan \cup UNION {inflight[i] : i \in DOMAIN inflight}

OwnsExactly ==           \* what a state does not own, a request in it does not hold
  \A r \in Req : "Pages" \notin Owns[st[r]] => tab[r] = <<>> /\ ~Pinned(r)
SlotsBounded == Cardinality({r \in Req : "Slot" \in Owns[st[r]]}) <= Slots
NoDoubleMap == \A r \in Req : \A i, j \in DOMAIN tab[r] : tab[r][i] = tab[r][j] => i = j
Conservation ==          \* each page is with exactly the holders that its record says
  \A p \in Page :
    CASE page[p].kind = "Free"      -> Holders(p) = {} /\ page[p].key = Null
      [] page[p].kind = "Exclusive" -> Cardinality(Holders(p)) = 1 /\ page[p].key = Null
      [] page[p].kind = "Shared"    -> Cardinality(Holders(p)) = page[p].ref
                                       /\ page[p].key # Null
OneCopyPerKey == \A p, q \in Page : page[p].key # Null /\ page[p].key = page[q].key => p = q
OneWriter     == \A v, w \in AllWork : v.page = w.page => v = w
WritesExclusive ==
  \A w \in AllWork : page[w.page].kind = "Exclusive" /\ w.req \in Holders(w.page)
ReadsHeld ==             \* nothing that a planned or launched step reads is given away
  \A w \in AllWork : \A p \in w.reads : page[p].kind # "Free" /\ w.req \in Holders(p)
ContentMatches ==        \* a shared page in a table holds the tokens of its place there
  \A r \in Req : \A i \in DOMAIN tab[r] :
    page[tab[r][i]].kind = "Shared" => page[tab[r][i]].key = Content[r][i]

Safety == /\ TypeOK /\ OwnsExactly /\ SlotsBounded /\ NoDoubleMap /\ Conservation
          /\ OneCopyPerKey /\ OneWriter /\ WritesExclusive /\ ReadsHeld /\ ContentMatches

(* Liveness and action properties                                           *)

EveryRequestEnds == \A r \in Req : (st[r] = "Waiting") ~> (st[r] \in Terminal)
DrainOnly == [][\A r \in Req : st[r] \in Draining => st'[r] \in {st[r]} \cup Terminal]_vars
==============================================================================
