----------------------------- MODULE Speculation -----------------------------
(* Drafts at the end of a sequence, a sliding window at its front, and steps  *)
(* launched before it is known how many drafts the last one accepted.         *)
(*                                                                            *)
(* Rule: a page is given back when no launched step can write it and no token *)
(* that will still be computed can see it.  Behind, the drafts of launched    *)
(* steps say how far they can write; in front, the oldest of them says what   *)
(* is still seen.  Nothing is copied: rejected positions are computed again,  *)
(* in place.  Drafts take only pages that nobody lacks, and give way.  Bug    *)
(* classes: FreeUnique for windows (the same page freed twice, vllm#42571),   *)
(* NoReuseInFlight and ContentMatches for drafts.                             *)
(*                                                                            *)
(* Drafts = 0 is a window alone, Window = Length speculation alone.           *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS Req, Page, Hole, PageSize, Drafts, Window, Length, MaxInFlight,
  MaxAhead   \* launched steps of one request; the second runs before the first is judged
VARIABLES
  st,        \* [Req -> {"New", "Running", "Draining", "Ended"}]
  tab,       \* [Req -> Seq(Page or Hole)]
  ref,       \* [Page -> Nat]: tables that hold it
  known,     \* [Req -> Nat]: tokens that the scheduler knows of
  real,      \* [Req -> Nat]: tokens that there are on the device, where steps run
  kv,        \* [Page -> [1..PageSize -> position whose right KV is there, or 0]]
  inflight   \* Seq of [req, drafts, ran, gained]: launched steps of one row, oldest first
vars == <<st, tab, ref, known, real, kv, inflight>>

Min(a, b)  == IF a < b THEN a ELSE b
Minus(a, b) == IF a < b THEN 0 ELSE a - b
PageOf(i)  == (i - 1) \div PageSize + 1
Offset(i)  == ((i - 1) % PageSize) + 1
FreePages  == {p \in Page : ref[p] = 0}
Steps(r)   == {i \in DOMAIN inflight : inflight[i].req = r}
Pending(r) == Cardinality(Steps(r))
ToRun(r)   == {i \in Steps(r) : ~inflight[i].ran}
Held(r)    == {i \in DOMAIN tab[r] : tab[r][i] # Hole}
Holders(p) == {r \in Req : \E i \in DOMAIN tab[r] : tab[r][i] = p}

\* A step computes the last token and the drafts after it: positions n .. n + drafts, where n is
\* the number of tokens.  Each sees Window of them, itself included.
Gains(r)   == Cardinality(UNION {{i * (Drafts + 1) + k : k \in 0..inflight[i].drafts} : i \in Steps(r)})
Ahead(r)   == Min(known[r] + Gains(r), Length)    \* tokens there may be after the launched steps
Behind(n)  == Minus(n, Window)                    \* of n positions, those that the last one does not see
Room(r)    == Len(tab[r]) * PageSize
Wants(r)   == st[r] = "Running" /\ Ahead(r) < Length
Lacks(r)   == Wants(r) /\ Room(r) < Ahead(r)
NoneLacks  == \A r \in Req : ~Lacks(r)

Submit(r) ==
  /\ st[r] = "New"
  /\ st' = [st EXCEPT ![r] = "Running"]
  /\ UNCHANGED <<tab, ref, known, real, kv, inflight>>
Fork(r, c) ==    \* another continuation of the same text shares the pages that are full
  /\ st[r] = "Running" /\ st[c] = "New"
  /\ known[r] > PageSize
  /\ LET full == (known[r] - 1) \div PageSize IN
       /\ \A i \in 1..full : i * PageSize > Behind(full * PageSize + 1) => i \in Held(r)
       /\ tab' = [tab EXCEPT ![c] = SubSeq(tab[r], 1, full)]
       /\ ref' = [p \in Page |-> IF \E i \in 1..full : tab[r][i] = p THEN ref[p] + 1 ELSE ref[p]]
       /\ known' = [known EXCEPT ![c] = full * PageSize + 1]
       /\ real' = [real EXCEPT ![c] = full * PageSize + 1]
  /\ st' = [st EXCEPT ![c] = "Running"]
  /\ UNCHANGED <<kv, inflight>>
Acquire(r) ==    \* for its last token; for drafts only if nobody lacks a page for that
  /\ Wants(r)
  /\ Room(r) < Min(Ahead(r) + Drafts, Length)
  /\ Lacks(r) \/ NoneLacks
  /\ FreePages # {}
  /\ LET p == CHOOSE p \in FreePages : TRUE IN
       /\ tab' = [tab EXCEPT ![r] = Append(@, p)]
       /\ ref' = [ref EXCEPT ![p] = 1]
  /\ UNCHANGED <<st, known, real, kv, inflight>>
Launch(r, drafts) ==
  /\ Wants(r)
  /\ Min(Ahead(r) + drafts, Length) <= Room(r)
  /\ Len(inflight) < MaxInFlight
  /\ Pending(r) < MaxAhead
  /\ inflight' = Append(inflight, [req |-> r, drafts |-> drafts, ran |-> FALSE, gained |-> 0])
  /\ UNCHANGED <<st, tab, ref, known, real, kv>>
Run ==           \* the device; a step behind the last token gains nothing and writes nothing
  /\ \E i \in DOMAIN inflight :
       /\ ~inflight[i].ran /\ \A j \in 1..(i - 1) : inflight[j].ran
       /\ LET r == inflight[i].req
              n == real[r]
              last == Min(n + inflight[i].drafts, Length)
          IN
          \E gained \in IF n = Length THEN {0} ELSE 1..Min(inflight[i].drafts + 1, Length - n) :
            /\ inflight' = [inflight EXCEPT ![i].ran = TRUE, ![i].gained = gained]
            /\ real' = [real EXCEPT ![r] = n + gained]
            /\ kv' = [p \in Page |-> [o \in 1..PageSize |->
                 IF gained > 0 /\ \E k \in n..last : PageOf(k) \in DOMAIN tab[r]
                                                     /\ tab[r][PageOf(k)] = p /\ Offset(k) = o
                 THEN LET k == CHOOSE k \in n..last : tab[r][PageOf(k)] = p /\ Offset(k) = o
                      IN  IF k < n + gained THEN k ELSE 0      \* a rejected draft's KV is wrong
                 ELSE kv[p][o]]]
  /\ UNCHANGED <<st, tab, ref, known>>
Complete ==
  /\ inflight # <<>> /\ Head(inflight).ran
  /\ known' = [known EXCEPT ![Head(inflight).req] = @ + Head(inflight).gained]
  /\ inflight' = Tail(inflight)
  /\ UNCHANGED <<st, tab, ref, real, kv>>

Drop(pages) == /\ ref' = [p \in Page |-> IF p \in pages THEN ref[p] - 1 ELSE ref[p]]
               /\ kv' = [p \in Page |-> IF p \in pages /\ ref[p] = 1
                                        THEN [o \in 1..PageSize |-> 0] ELSE kv[p]]
Trim(r) ==       \* the last page, if only drafts could use it and somebody lacks one
  /\ st[r] = "Running" /\ tab[r] # <<>>
  /\ FreePages = {} /\ ~NoneLacks
  /\ Room(r) - PageSize >= Ahead(r)
  /\ Drop({tab[r][Len(tab[r])]} \ {Hole})
  /\ tab' = [tab EXCEPT ![r] = SubSeq(@, 1, Len(@) - 1)]
  /\ UNCHANGED <<st, known, real, inflight>>
Slide(r) ==      \* the first page, if nobody will look at it again; a hole stays in its place
  /\ st[r] = "Running"
  /\ \E i \in Held(r) :
       /\ \A j \in Held(r) : i <= j
       /\ i * PageSize <= Behind(known[r])
       /\ Drop({tab[r][i]})
       /\ tab' = [tab EXCEPT ![r][i] = Hole]
  /\ UNCHANGED <<st, known, real, inflight>>
Abort(r) ==
  /\ st[r] = "Running"
  /\ st' = [st EXCEPT ![r] = "Draining"]
  /\ UNCHANGED <<tab, ref, known, real, kv, inflight>>
End(r) ==
  /\ st[r] = "Draining" \/ (st[r] = "Running" /\ known[r] = Length)
  /\ Steps(r) = {}
  /\ Drop({tab[r][i] : i \in Held(r)})
  /\ tab' = [tab EXCEPT ![r] = <<>>]
  /\ st' = [st EXCEPT ![r] = "Ended"]
  /\ UNCHANGED <<known, real, inflight>>

Init ==
  /\ st = [r \in Req |-> "New"] /\ tab = [r \in Req |-> <<>>] /\ ref = [p \in Page |-> 0]
  /\ known = [r \in Req |-> 1] /\ real = [r \in Req |-> 1] /\ inflight = <<>>
  /\ kv = [p \in Page |-> [o \in 1..PageSize |-> 0]]
Next ==
  \/ \E r \in Req : \/ Submit(r) \/ Trim(r) \/ Slide(r) \/ Abort(r) \/ End(r)
                    \/ Acquire(r) \/ \E drafts \in 0..Drafts : Launch(r, drafts)
                    \/ \E c \in Req \ {r} : Fork(r, c)
  \/ Run \/ Complete
Fairness ==
  /\ WF_vars(Run) /\ WF_vars(Complete)
  /\ \A r \in Req : /\ WF_vars(Acquire(r) /\ Lacks(r)) /\ WF_vars(\E d \in 0..Drafts : Launch(r, d))
                    /\ WF_vars(End(r)) /\ WF_vars(Slide(r)) /\ WF_vars(Trim(r))
Spec == Init /\ [][Next]_vars /\ Fairness

TypeOK ==
  /\ st \in [Req -> {"New", "Running", "Draining", "Ended"}]
  /\ \A r \in Req : known[r] \in 1..Length /\ real[r] \in 1..Length /\ known[r] <= real[r]
RefExact   == \A p \in Page : ref[p] = Cardinality(Holders(p))
FreeUnique == \A r \in Req : \A i, j \in Held(r) : tab[r][i] = tab[r][j] => i = j
Sees(r)    == {i \in 1..real[r] : i > Behind(real[r])}   \* positions that the next token looks at
Writes(r)  == UNION {real[r]..Min(real[r] + inflight[i].drafts, Length) : i \in ToRun(r)}
NoReuseInFlight ==   \* whatever a step that has not run can see or write is in the table
  \A r \in Req : ToRun(r) # {} /\ real[r] < Length =>
    \A i \in Sees(r) \cup Writes(r) : PageOf(i) \in Held(r)
ContentMatches ==    \* what the next token looks at has been computed right
  \A r \in Req : st[r] = "Running" /\ known[r] < Length =>
    \A i \in Sees(r) \ {real[r]} : PageOf(i) \in Held(r) /\ kv[tab[r][PageOf(i)]][Offset(i)] = i
OneWriter ==         \* nobody writes a page that another reads
  \A r \in Req : real[r] < Length =>
    \A i \in Writes(r) : PageOf(i) \in Held(r) => ref[tab[r][PageOf(i)]] = 1
TerminalReleasesAll == \A r \in Req : st[r] = "Ended" => tab[r] = <<>> /\ Steps(r) = {}
EveryRequestEnds == \A r \in Req : (st[r] = "Running") ~> (st[r] = "Ended")

NeverRejected == \A i \in DOMAIN inflight : ~(inflight[i].ran /\ inflight[i].gained \in 1..inflight[i].drafts)
NeverTwoAhead == \A r \in Req : Cardinality(ToRun(r)) < 2
NeverTrimmed  == [][\A r \in Req : Len(tab'[r]) >= Len(tab[r]) \/ st'[r] = "Ended"]_vars
NeverSlid     == \A r \in Req : Held(r) = DOMAIN tab[r]
NeverSharedSlid == [][\A p \in Page : ref[p] = 2 /\ ref'[p] = 1 => \E r \in Req : st'[r] # st[r]]_vars
=============================================================================
