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
(* through that table, and what happens to pages.  Tokens are counted: a    *)
(* request has so many known, planned and computed, and a page holds        *)
(* PageSize of them.  Planning, launching and completing a step are         *)
(* separate actions with up to MaxInFlight steps launched, because nearly   *)
(* every fatal KV bug on record is a free that races with somebody else's   *)
(* access.                                                                  *)
(***************************************************************************)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS
  Req,          \* request identities; one identity lives once
  Page,         \* device pages
  Token,        \* what contents are made of
  Content,      \* [Req -> Seq(Token)]  all tokens that a request may have, prompt first
  PromptLen,    \* [Req -> Nat]         how many of these are prompt
  Salt,         \* [Req -> Token]       whose cache it uses: prefixes of two salts never meet
  Patience,     \* [Req -> Nat]         later arrivals that may go ahead of it; the urgent have none
  PageSize,     \* tokens in a page
  Chunk,        \* tokens of one request in one step, at most
  Slots,        \* requests that may hold pages at once
  MaxInFlight   \* steps launched and not completed; overlap + 1

PagesFor(n) == (n + PageSize - 1) \div PageSize

ASSUME /\ \A r \in Req : /\ Content[r] \in Seq(Token)
                         /\ PromptLen[r] \in 1..(Len(Content[r]) - 1)
                         /\ Salt[r] \in Token
                         /\ Patience[r] \in Nat
       /\ {PageSize, Chunk, Slots, MaxInFlight} \subseteq Nat \ {0}

VARIABLES
  st,        \* [Req -> State]
  age,       \* Seq(Req): order of submission, oldest first
  tab,       \* [Req -> Seq(Page)]: page table
  known,     \* [Req -> Nat]: tokens that are known; survives preemption
  planned,   \* [Req -> Nat]: tokens that a step has been planned for
  done,      \* [Req -> Nat]: tokens whose KV has been computed
  page,      \* [Page -> PageRec]
  content,   \* [Page -> Seq(Token)]: whose KV the page really holds (nobody can look at it)
  plan,      \* [Req -> Work]: the step being assembled
  inflight   \* Seq([Req -> Work]): launched steps, oldest first

vars == <<st, age, tab, known, planned, done, page, content, plan, inflight>>

----------------------------------------------------------------------------
(* The table                                                                *)

State == {"New", "Waiting", "Prefilling", "Decoding", "Preempted",
          "Finishing", "Aborting", "Finished", "Aborted"}

Edges ==
  [ Submit   |-> {<<"New", "Waiting">>},
    Admit    |-> {<<"Waiting", "Prefilling">>, <<"Preempted", "Prefilling">>},
    Acquire  |-> {<<"Prefilling", "Prefilling">>, <<"Decoding", "Decoding">>},
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
PageRec   == [kind : PageKind, ref : 0..Cardinality(Req), key : Seq(Token)]
Work      == [from : Nat, n : 0..Chunk, samples : BOOLEAN,   \* tokens from+1 .. from+n
              writes : SUBSET Page, reads : SUBSET Page]

Null      == <<>>
FreePage  == [kind |-> "Free", ref |-> 0, key |-> Null]
NoWork    == [from |-> 0, n |-> 0, samples |-> FALSE, writes |-> {}, reads |-> {}]
Empty     == [r \in Req |-> NoWork]
Range(s)  == {s[i] : i \in DOMAIN s}
Min(a, b) == IF a < b THEN a ELSE b

Move(a, r, to) ==
  /\ <<st[r], to>> \in Edges[a]
  /\ st' = [st EXCEPT ![r] = to]

----------------------------------------------------------------------------
(* Guards                                                                   *)

Running        == {r \in Req : st[r] \in Live}
Before(a, b)   == \* whose turn comes first; it is fixed at submission, so that all agree
  \E i, j \in DOMAIN age :
    /\ age[i] = a /\ age[j] = b
    /\ \/ i + Patience[a] < j + Patience[b]
       \/ i + Patience[a] = j + Patience[b] /\ Patience[a] < Patience[b]
PlannedFor(r)  == plan[r].n > 0
InFlight(r)    == \E i \in DOMAIN inflight : inflight[i][r].n > 0
Sampling(r)    == Cardinality({i \in DOMAIN inflight : inflight[i][r].samples})
Pinned(r)      == PlannedFor(r) \/ InFlight(r)
FreePages      == {p \in Page : page[p].kind = "Free"}
Parent(p, q)   == Len(page[p].key) < Len(page[q].key)
                  /\ SubSeq(page[q].key, 1, Len(page[p].key)) = page[p].key
Leaf(p)        == \A q \in Page : page[q].kind = "Shared" => ~Parent(p, q)
Evictable      == {p \in Page : page[p].kind = "Shared" /\ page[p].ref = 0 /\ Leaf(p)}
NoneEvictable  == Evictable = {}

Fits(r)        == PagesFor(Len(Content[r]) - 1) <= Cardinality(Page)  \* the last is not fed back
Wanted(r)      == \* known tokens; or the one that a launched step is about to sample
  CASE known[r] > planned[r] -> known[r] - planned[r]
    [] InFlight(r) /\ planned[r] < Min(known[r] + Sampling(r), Len(Content[r]) - 1) -> 1
    [] OTHER -> 0
Wants(r)       == r \in Running /\ ~PlannedFor(r) /\ Wanted(r) > 0
Room(r)        == Len(tab[r]) * PageSize - planned[r]   \* tokens that its pages can still hold
Lacks(r)       == Wants(r) /\ Room(r) < Min(Wanted(r), Chunk)
NoneLacks      == \A r \in Req : ~Lacks(r)
Starved        == FreePages = {} /\ ~NoneLacks
SlotFree       == Cardinality({r \in Req : "Slot" \in Owns[st[r]]}) < Slots
FirstQueued(r) == \A q \in Req \ {r} : st[q] \in Queued => Before(r, q)
LastRunning(r) == \A q \in Running \ {r} : Before(q, r)
Alone(r)       == Running = {r}
Full           == Len(inflight) >= MaxInFlight

KeyOf(r, i)    == \* page i of r, and all before it, under the root that its salt is
  <<Salt[r]>> \o SubSeq(Content[r], 1, i * PageSize)
Hit(k)         == {p \in Page : page[p].kind = "Shared" /\ page[p].key = k}
Match(r)       == \* longest shared prefix; the last known token is always computed again
  LET most == (known[r] - 1) \div PageSize
      n == CHOOSE n \in 0..most : /\ \A i \in 1..n : Hit(KeyOf(r, i)) # {}
                                  /\ n < most => Hit(KeyOf(r, n + 1)) = {}
  IN  [i \in 1..n |-> CHOOSE p \in Hit(KeyOf(r, i)) : TRUE]

----------------------------------------------------------------------------
(* Requests                                                                 *)

Submit(r) ==     \* what can never fit is refused at the door
  /\ Move("Submit", r, "Waiting")
  /\ Fits(r)
  /\ age' = Append(age, r)
  /\ UNCHANGED <<tab, known, planned, done, page, content, plan, inflight>>

Admit(r) ==      \* looking a prefix up and pinning it is one action
  /\ Move("Admit", r, "Prefilling")
  /\ NoneLacks
  /\ SlotFree
  /\ FirstQueued(r)
  /\ LET m == Match(r) IN
       /\ tab'     = [tab EXCEPT ![r] = m]
       /\ planned' = [planned EXCEPT ![r] = Len(m) * PageSize]
       /\ done'    = [done EXCEPT ![r] = Len(m) * PageSize]
       /\ page'    = [p \in Page |-> IF p \in Range(m)
                                     THEN [page[p] EXCEPT !.ref = @ + 1] ELSE page[p]]
  /\ UNCHANGED <<age, known, content, plan, inflight>>

Abort(r) ==
  /\ \E to \in State : Move("Abort", r, to)
  /\ UNCHANGED <<age, tab, known, planned, done, page, content, plan, inflight>>

GiveBack(r) ==   \* shared pages lose a reference, exclusive pages become free
  LET freed == {p \in Page : p \in Range(tab[r]) /\ page[p].kind = "Exclusive"} IN
  /\ page'    = [p \in Page |->
                   IF p \in freed THEN FreePage
                   ELSE IF p \in Range(tab[r]) THEN [page[p] EXCEPT !.ref = @ - 1]
                   ELSE page[p]]
  /\ content' = [p \in Page |-> IF p \in freed THEN Null ELSE content[p]]
  /\ tab'     = [tab EXCEPT ![r] = <<>>]
  /\ planned' = [planned EXCEPT ![r] = 0]
  /\ done'    = [done EXCEPT ![r] = 0]

Release(r) ==    \* no page returns while a launched step may touch it
  /\ \E to \in State : Move("Release", r, to)
  /\ ~Pinned(r)
  /\ GiveBack(r)
  /\ UNCHANGED <<age, known, plan, inflight>>

Preempt(r) ==    \* the last in turn gives way; the first can always go on
  /\ Move("Preempt", r, "Preempted")
  /\ Starved
  /\ NoneEvictable
  /\ LastRunning(r)
  /\ ~Alone(r)
  /\ ~Pinned(r)
  /\ GiveBack(r)
  /\ UNCHANGED <<age, known, plan, inflight>>

----------------------------------------------------------------------------
(* Steps                                                                    *)

Acquire(r, p) == \* a page for the tokens of its next step
  /\ Move("Acquire", r, st[r])
  /\ Lacks(r)
  /\ p \in FreePages
  /\ tab'  = [tab EXCEPT ![r] = Append(@, p)]
  /\ page' = [page EXCEPT ![p].kind = "Exclusive"]
  /\ UNCHANGED <<age, known, planned, done, content, plan, inflight>>

Covers(r, from, n) == \* the pages of tokens from+1 .. from+n
  {tab[r][i] : i \in {i \in DOMAIN tab[r] : i * PageSize > from /\ (i - 1) * PageSize < from + n}}

Schedule(r, n) ==
  /\ Move("Schedule", r, st[r])
  /\ Wants(r)
  /\ n <= Wanted(r)
  /\ n <= Room(r)
  /\ plan'    = [plan EXCEPT ![r] = [from    |-> planned[r],
                                     n       |-> n,
                                     samples |-> planned[r] + n >= known[r],
                                     writes  |-> Covers(r, planned[r], n),
                                     reads   |-> Covers(r, 0, planned[r] + n)]]
  /\ planned' = [planned EXCEPT ![r] = @ + n]
  /\ UNCHANGED <<age, tab, known, done, page, content, inflight>>

Launch ==
  /\ plan # Empty
  /\ ~Full
  /\ inflight' = Append(inflight, plan)
  /\ plan' = Empty
  /\ UNCHANGED <<st, age, tab, known, planned, done, page, content>>

AfterComplete(r, w, stop) ==
  CASE st[r] \in Live /\ ~w.samples                              -> st[r]
    [] st[r] \in Live /\ (r \in stop \/ known[r] + 1 = Len(Content[r])) -> "Finishing"
    [] st[r] \in Live                                            -> "Decoding"
    [] OTHER                                                     -> st[r]

After(r, p, w) == \* what p holds once w has written its part; a gap before it stays a gap
  LET i == CHOOSE i \in DOMAIN tab[r] : tab[r][i] = p IN
  IF w.from <= (i - 1) * PageSize \/ content[p] = SubSeq(Content[r], 1, w.from)
  THEN SubSeq(Content[r], 1, Min(i * PageSize, w.from + w.n))
  ELSE content[p]

Complete ==      \* results of draining requests are dropped
  /\ inflight # <<>>
  /\ LET step  == Head(inflight)
         batch == {r \in Req : step[r].n > 0}
     IN
     \E stop \in SUBSET {r \in batch : st[r] \in Live /\ step[r].samples} :
       /\ \A r \in batch : <<st[r], AfterComplete(r, step[r], stop)>> \in Edges["Complete"]
       /\ st'      = [r \in Req |-> IF r \in batch THEN AfterComplete(r, step[r], stop) ELSE st[r]]
       /\ done'    = [r \in Req |-> IF r \in batch THEN step[r].from + step[r].n ELSE done[r]]
       /\ known'   = [r \in Req |-> IF r \in batch /\ st[r] \in Live /\ step[r].samples
                                    THEN known[r] + 1 ELSE known[r]]
       /\ content' = [p \in Page |->
            IF \E r \in batch : p \in step[r].writes
            THEN LET r == CHOOSE r \in batch : p \in step[r].writes IN After(r, p, step[r])
            ELSE content[p]]
  /\ inflight' = Tail(inflight)
  /\ UNCHANGED <<age, tab, planned, page, plan>>

----------------------------------------------------------------------------
(* The prefix cache                                                         *)

Cached(k)      == \E q \in Page : page[q].kind = "Shared" /\ page[q].key = k
Unpublished(r) == {i \in DOMAIN tab[r] : \E p \in Page : tab[r][i] = p /\ page[p].kind = "Exclusive"}
FirstOwn(r)    == CHOOSE i \in Unpublished(r) : \A j \in Unpublished(r) : i <= j

Publish(r) ==    \* page by page, after the KV is computed, and once a key
  /\ Move("Publish", r, st[r])
  /\ Unpublished(r) # {}
  /\ LET i == FirstOwn(r)
         p == tab[r][i]
     IN  /\ i * PageSize <= Min(done[r], known[r])
         /\ ~Cached(KeyOf(r, i))
         /\ page' = [page EXCEPT ![p] = [kind |-> "Shared", ref |-> 1, key |-> KeyOf(r, i)]]
  /\ UNCHANGED <<age, tab, known, planned, done, content, plan, inflight>>

Evict(p) ==      \* children before parents
  /\ p \in Evictable
  /\ page' = [page EXCEPT ![p] = FreePage]
  /\ content' = [content EXCEPT ![p] = Null]
  /\ UNCHANGED <<st, age, tab, known, planned, done, plan, inflight>>

----------------------------------------------------------------------------
Init ==
  /\ st = [r \in Req |-> "New"]
  /\ age = <<>>
  /\ tab = [r \in Req |-> <<>>]
  /\ known = [r \in Req |-> PromptLen[r]]
  /\ planned = [r \in Req |-> 0]
  /\ done = [r \in Req |-> 0]
  /\ page = [p \in Page |-> FreePage]
  /\ content = [p \in Page |-> Null]
  /\ plan = Empty
  /\ inflight = <<>>

Next ==
  \/ \E r \in Req : \/ Submit(r) \/ Admit(r) \/ Abort(r) \/ Release(r) \/ Preempt(r) \/ Publish(r)
                    \/ \E p \in Page : Acquire(r, p)
                    \/ \E n \in 1..Chunk : Schedule(r, n)
  \/ Launch \/ Complete
  \/ \E p \in Page : Evict(p)

Fairness ==
  /\ \A r \in Req : WF_vars(Admit(r)) /\ WF_vars(Release(r)) /\ WF_vars(Preempt(r))
                    /\ WF_vars(\E p \in Page : Acquire(r, p))
                    /\ WF_vars(\E n \in 1..Chunk : Schedule(r, n))
  /\ WF_vars(Launch) /\ WF_vars(Complete)
  /\ WF_vars(Starved /\ \E p \in Page : Evict(p))

Spec == Init /\ [][Next]_vars /\ Fairness

----------------------------------------------------------------------------
(* Safety                                                                   *)

TypeOK ==
  /\ st \in [Req -> State]
  /\ age \in Seq(Req) /\ Len(age) <= Cardinality(Req)
  /\ \A r \in Req : tab[r] \in Seq(Page) /\ Len(tab[r]) <= PagesFor(Len(Content[r]))
  /\ \A r \in Req : {known[r], planned[r], done[r]} \subseteq 0..Len(Content[r])
  /\ page \in [Page -> PageRec]
  /\ content \in [Page -> Seq(Token)]
  /\ plan \in [Req -> Work]
  /\ \A i \in DOMAIN inflight : inflight[i] \in [Req -> Work]

Holders(p) == {r \in Req : p \in Range(tab[r])}
Touches(r) == plan[r].reads \cup plan[r].writes
              \cup UNION {inflight[i][r].reads \cup inflight[i][r].writes : i \in DOMAIN inflight}

FreeUnique ==            \* a free page is nobody's, and no page is twice in a table
  /\ \A p \in FreePages : Holders(p) = {} /\ page[p] = FreePage
  /\ \A r \in Req : \A i, j \in DOMAIN tab[r] : tab[r][i] = tab[r][j] => i = j
RefExact ==              \* each page is with exactly the holders that its record says
  \A p \in Page :
    CASE page[p].kind = "Exclusive" -> Cardinality(Holders(p)) = 1 /\ page[p].key = Null
      [] page[p].kind = "Shared"    -> Cardinality(Holders(p)) = page[p].ref /\ page[p].key # Null
      [] OTHER                      -> TRUE
AccountingExact ==       \* free, evictable in time, and held: each page is one of them
  Cardinality(FreePages) + Cardinality({p \in Page : page[p].kind = "Shared" /\ page[p].ref = 0})
    + Cardinality(UNION {Range(tab[r]) : r \in Req}) = Cardinality(Page)
NoReuseInFlight ==       \* what a planned or launched step touches has not been given away
  \A r \in Req : \A p \in Touches(r) : page[p].kind # "Free"
MatchPins ==             \* ... and is pinned by the request that it is touched for
  \A r \in Req : /\ Touches(r) \subseteq Range(tab[r])
                  /\ \A p \in Range(tab[r]) : page[p].kind = "Shared" => page[p].ref > 0
KeyInjective ==          \* a hit is on the same tokens and salt, not on a key that looks alike
  \A r \in Req : \A i \in DOMAIN tab[r] :
    page[tab[r][i]].kind = "Shared" => page[tab[r][i]].key = KeyOf(r, i)
OneWriter ==             \* a page is written for one request, while it alone holds it
  \A r \in Req : \A i \in DOMAIN inflight : \A p \in inflight[i][r].writes : Holders(p) = {r}
InputsKnown ==           \* only what is known is fed, or what a step in flight will have sampled
  \A r \in Running : planned[r] <= known[r] + Sampling(r)
ContentMatches ==        \* whoever reads a page finds the KV of its own tokens there
  /\ \A r \in Req : \A i \in DOMAIN tab[r] :
       done[r] > (i - 1) * PageSize =>
         content[tab[r][i]] = SubSeq(Content[r], 1, Min(i * PageSize, done[r]))
  /\ \A p \in Page : page[p].kind = "Shared" => content[p] = Tail(page[p].key)
OneCopyPerKey ==
  \A p, q \in Page :
    page[p].kind = "Shared" /\ page[q].kind = "Shared" /\ page[p].key = page[q].key => p = q
NoDangling ==            \* a shared page stands on its shared parents
  \A p \in Page : page[p].kind = "Shared" =>
    \A i \in 1..((Len(page[p].key) - 1) \div PageSize) : Cached(SubSeq(page[p].key, 1, i * PageSize + 1))
TerminalReleasesAll ==   \* what a state does not own, a request in it does not hold
  \A r \in Req : "Pages" \notin Owns[st[r]] => tab[r] = <<>> /\ ~Pinned(r)
AdmitSound ==            \* nobody is let in who could not finish alone, nor more than there is room for
  /\ \A r \in Req : st[r] # "New" => Fits(r)
  /\ Cardinality({r \in Req : "Slot" \in Owns[st[r]]}) <= Slots

Safety == /\ TypeOK /\ FreeUnique /\ RefExact /\ AccountingExact /\ NoReuseInFlight /\ MatchPins
          /\ KeyInjective /\ OneWriter /\ InputsKnown /\ ContentMatches /\ OneCopyPerKey
          /\ NoDangling /\ TerminalReleasesAll /\ AdmitSound

(* Liveness, and properties of steps                                        *)

EveryRequestEnds == \A r \in Req : (st[r] = "Waiting") ~> (st[r] \in Terminal)
PreemptProgress  == \A r \in Req : (st[r] = "Preempted") ~> (st[r] \in Draining \cup Terminal)
DrainEnds        == \A r \in Req : (st[r] \in Draining) ~> (st[r] \in Terminal)
PatienceKept == \* nobody is let in ahead of who came so much earlier
  [][\A r, q \in Req : st[r] \in Queued /\ st[q] \in Queued /\ st'[q] = "Prefilling" =>
       \A i, j \in DOMAIN age : age[i] = r /\ age[j] = q => j <= i + Patience[r]]_vars
DrainOnly == [][\A r \in Req : st[r] \in Draining => st'[r] \in {st[r]} \cup Terminal]_vars
==============================================================================
