------------------------------- MODULE Groups -------------------------------
(* Cache groups over one pool: layers that see all, and layers with a sliding *)
(* window, each with pages of their own for the same text.                    *)
(*                                                                            *)
(* Rule: one table a request, in which the groups take turns.  What has no    *)
(* page of every group has no room.  A page goes when the window of its own   *)
(* group has passed it, and any group may take it next.  A prefix is found    *)
(* where each group has what its layers see from there; what nobody holds may *)
(* be evicted in any order.  Bug classes: a page that two groups hold, or     *)
(* that holds the KV of other layers (FreeUnique, ContentMatches), a window   *)
(* measured by another group's (NoReuseInFlight), a pool that is full of      *)
(* halves (EveryRequestEnds).                                                 *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS Req, Page, Hole, PageSize, Full, Sliding, Window, Chunk, Length, Common, MaxInFlight
VARIABLES
  st,        \* [Req -> {"New", "Queued", "Running", "Ended"}]
  age,       \* Seq(Req): oldest first
  tab,       \* [Req -> Seq(Page or Hole)]: entry (i - 1) * groups + g is page i of group g
  planned,   \* [Req -> Nat]: tokens that steps have been launched for
  done,      \* [Req -> Nat]: tokens whose KV is there
  page,      \* [Page -> [kind, ref, key]]
  content,   \* [Page -> key]: whose KV it really holds
  inflight   \* Seq([req, from, n, pages]): launched steps, and the table that they know
vars == <<st, age, tab, planned, done, page, content, inflight>>

Groups      == Full + Sliding         \* how many; those that see all come first
Min(a, b)   == IF a < b THEN a ELSE b
Place(e)    == ((e - 1) \div Groups) + 1
Group(e)    == ((e - 1) % Groups) + 1
Behind(g, n) == IF g <= Full \/ n + 1 < Window THEN 0 ELSE n + 1 - Window
Seen(e, n)  == Place(e) * PageSize > Behind(Group(e), n)    \* by the token after n
Entries(n)  == ((n + PageSize - 1) \div PageSize) * Groups  \* that n tokens lie in
Held(r)     == {e \in DOMAIN tab[r] : tab[r][e] # Hole}
Holders(p)  == {r \in Req : \E e \in DOMAIN tab[r] : tab[r][e] = p}
FreePages   == {p \in Page : page[p].kind = "Free"}
Unheld      == {p \in Page : page[p].kind = "Shared" /\ page[p].ref = 0}
Room(r)     == (Len(tab[r]) \div Groups) * PageSize - planned[r]
Running     == {r \in Req : st[r] = "Running"}
Wants(r)    == r \in Running /\ planned[r] < Length
Lacks(r)    == Wants(r) /\ Room(r) < Min(Length - planned[r], Chunk)
NoneLacks   == \A r \in Req : ~Lacks(r)
Starved     == FreePages = {} /\ ~NoneLacks
Before(a, b) == \E i, j \in DOMAIN age : age[i] = a /\ age[j] = b /\ i < j
InFlight(r) == \E i \in DOMAIN inflight : inflight[i].req = r

NoKey       == [g |-> 0, i |-> 0, of |-> {}]
KeyOf(r, e) == [g |-> Group(e), i |-> Place(e),
                of |-> IF Place(e) * PageSize <= Common THEN Req ELSE {r}]
Hit(k)      == {p \in Page : page[p].kind = "Shared" /\ page[p].key = k}
FreePage    == [kind |-> "Free", ref |-> 0, key |-> NoKey]
Found(r, n) == \A e \in 1..(n * Groups) : Seen(e, n * PageSize) => Hit(KeyOf(r, e)) # {}
Match(r)    ==
  LET most == (Length - 1) \div PageSize
      n == CHOOSE n \in 0..most : Found(r, n) /\ \A m \in 0..most : m > n => ~Found(r, m)
  IN  [e \in 1..(n * Groups) |->
        IF Seen(e, n * PageSize) THEN CHOOSE p \in Hit(KeyOf(r, e)) : TRUE ELSE Hole]

Submit(r) ==
  /\ st[r] = "New"
  /\ st' = [st EXCEPT ![r] = "Queued"]
  /\ age' = Append(age, r)
  /\ UNCHANGED <<tab, planned, done, page, content, inflight>>
Admit(r) ==
  /\ st[r] = "Queued"
  /\ NoneLacks
  /\ \A q \in Req \ {r} : st[q] = "Queued" => Before(r, q)
  /\ LET m == Match(r) IN
       /\ tab' = [tab EXCEPT ![r] = m]
       /\ planned' = [planned EXCEPT ![r] = (Len(m) \div Groups) * PageSize]
       /\ done' = [done EXCEPT ![r] = (Len(m) \div Groups) * PageSize]
       /\ page' = [p \in Page |-> IF \E e \in DOMAIN m : m[e] = p
                                  THEN [page[p] EXCEPT !.ref = @ + 1] ELSE page[p]]
  /\ st' = [st EXCEPT ![r] = "Running"]
  /\ UNCHANGED <<age, content, inflight>>
Acquire(r, p) ==   \* for the group whose turn it is
  /\ Lacks(r)
  /\ p \in FreePages
  /\ tab' = [tab EXCEPT ![r] = Append(@, p)]
  /\ page' = [page EXCEPT ![p].kind = "Exclusive"]
  /\ UNCHANGED <<st, age, planned, done, content, inflight>>
Launch(r, n) ==
  /\ Wants(r)
  /\ n <= Min(Length - planned[r], Room(r))
  /\ Len(inflight) < MaxInFlight
  /\ inflight' = Append(inflight, [req |-> r, from |-> planned[r], n |-> n, pages |-> tab[r]])
  /\ planned' = [planned EXCEPT ![r] = @ + n]
  /\ UNCHANGED <<st, age, tab, done, page, content>>
Writes(w, e) == Place(e) * PageSize > w.from /\ (Place(e) - 1) * PageSize < w.from + w.n
Complete ==        \* the device writes where the table said that it had
  /\ inflight # <<>>
  /\ LET w == Head(inflight) IN
       /\ done' = [done EXCEPT ![w.req] = w.from + w.n]
       /\ content' = [p \in Page |->
            IF \E e \in DOMAIN w.pages : w.pages[e] = p /\ Writes(w, e)
            THEN KeyOf(w.req, CHOOSE e \in DOMAIN w.pages : w.pages[e] = p /\ Writes(w, e))
            ELSE content[p]]
  /\ inflight' = Tail(inflight)
  /\ UNCHANGED <<st, age, tab, planned, page>>
Slide(r) ==        \* the first page of some group that it holds
  /\ r \in Running
  /\ \E e \in Held(r) :
       /\ \A f \in Held(r) : Group(f) = Group(e) => e <= f
       /\ ~Seen(e, done[r])
       /\ page' = [page EXCEPT ![tab[r][e]] = IF @.kind = "Exclusive" THEN FreePage
                                              ELSE [@ EXCEPT !.ref = @ - 1]]
       /\ tab' = [tab EXCEPT ![r][e] = Hole]
  /\ UNCHANGED <<st, age, planned, done, content, inflight>>
Publish(r, e) ==   \* one that somebody has published is passed
  /\ r \in Running
  /\ e \in Held(r)
  /\ Place(e) * PageSize <= done[r]
  /\ page[tab[r][e]].kind = "Exclusive"
  /\ Hit(KeyOf(r, e)) = {}
  /\ page' = [page EXCEPT ![tab[r][e]] = [kind |-> "Shared", ref |-> 1, key |-> KeyOf(r, e)]]
  /\ UNCHANGED <<st, age, tab, planned, done, content, inflight>>
Evict(p) ==        \* in any order
  /\ p \in Unheld
  /\ page' = [page EXCEPT ![p] = FreePage]
  /\ UNCHANGED <<st, age, tab, planned, done, content, inflight>>
GiveBack(r) ==
  /\ page' = [p \in Page |-> IF r \notin Holders(p) THEN page[p]
                              ELSE IF page[p].kind = "Exclusive" THEN FreePage
                              ELSE [page[p] EXCEPT !.ref = @ - 1]]
  /\ tab' = [tab EXCEPT ![r] = <<>>]
Preempt(r) ==      \* the last gives way
  /\ r \in Running
  /\ Starved
  /\ Unheld = {}
  /\ \A q \in Running \ {r} : Before(q, r)
  /\ Running # {r}
  /\ ~InFlight(r)
  /\ GiveBack(r)
  /\ st' = [st EXCEPT ![r] = "Queued"]
  /\ planned' = [planned EXCEPT ![r] = 0]
  /\ done' = [done EXCEPT ![r] = 0]
  /\ UNCHANGED <<age, content, inflight>>
End(r) ==
  /\ r \in Running
  /\ done[r] = Length
  /\ GiveBack(r)
  /\ st' = [st EXCEPT ![r] = "Ended"]
  /\ UNCHANGED <<age, planned, done, content, inflight>>

Init ==
  /\ st = [r \in Req |-> "New"] /\ age = <<>> /\ tab = [r \in Req |-> <<>>]
  /\ planned = [r \in Req |-> 0] /\ done = [r \in Req |-> 0] /\ inflight = <<>>
  /\ page = [p \in Page |-> FreePage] /\ content = [p \in Page |-> NoKey]
Next ==
  \/ \E r \in Req : \/ Submit(r) \/ Admit(r) \/ Slide(r) \/ Preempt(r) \/ End(r)
                    \/ \E p \in Page : Acquire(r, p)
                    \/ \E n \in 1..Chunk : Launch(r, n)
                    \/ \E e \in 1..Entries(Length) : Publish(r, e)
  \/ Complete
  \/ \E p \in Page : Evict(p)
Fairness ==
  /\ WF_vars(Complete) /\ WF_vars(Starved /\ \E p \in Page : Evict(p))
  /\ \A r \in Req : /\ WF_vars(Admit(r)) /\ WF_vars(Slide(r)) /\ WF_vars(Preempt(r)) /\ WF_vars(End(r))
                    /\ WF_vars(\E p \in Page : Acquire(r, p))
                    /\ SF_vars(\E n \in 1..Chunk : Launch(r, n))   \* a step has a row for all
Spec == Init /\ [][Next]_vars /\ Fairness

TypeOK ==
  /\ st \in [Req -> {"New", "Queued", "Running", "Ended"}]
  /\ \A r \in Req : Len(tab[r]) <= Entries(Length) /\ done[r] <= planned[r] /\ planned[r] <= Length
RefExact ==
  \A p \in Page : CASE page[p].kind = "Free"      -> Holders(p) = {}
                     [] page[p].kind = "Exclusive" -> Cardinality(Holders(p)) = 1
                     [] OTHER                      -> page[p].ref = Cardinality(Holders(p))
FreeUnique == \A r \in Req : \A e, f \in Held(r) : tab[r][e] = tab[r][f] => e = f
NoReuseInFlight ==   \* what a launched step sees or writes is still where it was
  \A i \in DOMAIN inflight :
    LET w == inflight[i] IN
    \A e \in DOMAIN w.pages :
      Seen(e, w.from) /\ (Place(e) - 1) * PageSize < w.from + w.n =>
        e \in Held(w.req) /\ tab[w.req][e] = w.pages[e]
SeenHeld ==          \* ... and so is what the next one will see, in every group
  \A r \in Running : \A e \in 1..Entries(planned[r]) : Seen(e, planned[r]) => e \in Held(r)
ContentMatches ==    \* the KV of these layers, and of this text
  /\ \A r \in Running : \A e \in Held(r) :
       done[r] > (Place(e) - 1) * PageSize => content[tab[r][e]] = KeyOf(r, e)
  /\ \A p \in Page : page[p].kind = "Shared" => content[p] = page[p].key
OneCopyPerKey ==
  \A p, q \in Page : page[p].kind = "Shared" /\ page[q].kind = "Shared" /\ page[p].key = page[q].key => p = q
TerminalReleasesAll == \A r \in Req : st[r] \in {"New", "Queued", "Ended"} => tab[r] = <<>> /\ ~InFlight(r)
EveryRequestEnds == \A r \in Req : (st[r] = "Queued") ~> (st[r] = "Ended")

NeverGroupLent ==         \* a page that a sliding group had goes to one that sees all
  \A p \in Page : \A r \in Req : \A e \in Held(r) :
    tab[r][e] = p /\ page[p].kind = "Exclusive" => ~(Group(e) <= Full /\ content[p].g > Full)
NeverGroupHalf == \A r \in Req : ~(st[r] = "Queued" /\ Hit(KeyOf(r, 1)) # {} /\ Match(r) = <<>>)
NeverGroupHole == [][\A r \in Req : st[r] = "Queued" /\ st'[r] = "Running"
                         => \A e \in DOMAIN tab'[r] : tab'[r][e] # Hole]_vars
=============================================================================
