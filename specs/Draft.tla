------------------------------- MODULE Draft -------------------------------
(* The lifecycle, with its second home for pages, and guesses of what a       *)
(* request will say: a step computes drafts after the last token, and as many *)
(* of them are accepted as are what would have been sampled.                  *)
(*                                                                            *)
(* Rule: every action of HostTier is as it was; a row without drafts          *)
(* completes as it did.  A row with drafts is planned when all of its         *)
(* request's tokens are known, and nothing is planned behind it before it is  *)
(* known how many of them are right.  The rest is rolled back by counting:    *)
(* nothing is copied, rejected positions are computed again, in place.        *)
(* Drafts take only pages that nobody lacks, and give them back.              *)
EXTENDS HostTier

CONSTANT Drafts   \* of one request in one step, at most

VARIABLE draft    \* [Req -> Nat]: drafts in the row that is planned or launched for it

dvars == <<hvars, draft>>

Guessing(r) == draft[r] > 0
Needed(r)   == IF Wants(r) THEN Min(Wanted(r), Chunk) ELSE 0   \* positions that its pages must hold
MayGuess(r) == st[r] = "Decoding" /\ Wants(r) /\ ~InFlight(r)
Guesses(r)  == Min(Drafts, Min(Chunk, Len(Content[r]) - known[r]) - 1)  \* of any use

Reserve(r, p) ==   \* a page for drafts alone
  /\ MayGuess(r)
  /\ NoneLacks
  /\ Room(r) < 1 + Guesses(r)
  /\ p \in FreePages
  /\ ~MovingPage(p)
  /\ tab'  = [tab EXCEPT ![r] = Append(@, p)]
  /\ page' = [page EXCEPT ![p].kind = "Exclusive"]
  /\ UNCHANGED <<st, age, known, planned, done, content, plan, inflight, tier, draft>>

Speculate(r, k) ==   \* the last token, and k guesses after it
  /\ Move("Schedule", r, st[r])
  /\ MayGuess(r)
  /\ k <= Guesses(r)
  /\ 1 + k <= Room(r)
  /\ draft'   = [draft EXCEPT ![r] = k]
  /\ plan'    = [plan EXCEPT ![r] = [from    |-> planned[r],
                                     n       |-> 1 + k,
                                     samples |-> TRUE,
                                     writes  |-> Covers(r, planned[r], 1 + k),
                                     reads   |-> Covers(r, 0, planned[r] + 1 + k)]]
  /\ planned' = [planned EXCEPT ![r] = @ + 1 + k]
  /\ UNCHANGED <<age, tab, known, done, page, content, inflight, tier>>

Trim(r) ==   \* a last page that neither a planned or launched row nor the next one writes
  /\ st[r] \in Live
  /\ tab[r] # <<>>
  /\ Room(r) >= PageSize + Needed(r)
  /\ LET p == tab[r][Len(tab[r])] IN
       /\ page'    = [page EXCEPT ![p] = FreePage]
       /\ content' = [content EXCEPT ![p] = Null]
  /\ tab' = [tab EXCEPT ![r] = SubSeq(@, 1, Len(@) - 1)]
  /\ UNCHANGED <<st, age, known, planned, done, plan, inflight, tier, draft>>

(* Completing a row: how many tokens it gained, and how many of its positions *)
(* are right.  Drafts of a request that drains are dropped with the result.   *)
Gains(r, w) ==
  CASE ~(st[r] \in Live /\ w.samples) -> {0}
    [] Guessing(r)                    -> 1..(draft[r] + 1)
    [] OTHER                          -> {1}
Right(r, w, gain) == IF ~Guessing(r) THEN w.n ELSE IF gain = 0 THEN 1 ELSE gain

AfterGain(r, w, gain, stop) ==
  CASE st[r] \in Live /\ ~w.samples                                          -> st[r]
    [] st[r] \in Live /\ (r \in stop \/ known[r] + gain = Len(Content[r]))   -> "Finishing"
    [] st[r] \in Live                                                        -> "Decoding"
    [] OTHER                                                                 -> st[r]

Written(r, p, w, right) ==   \* a page behind what is right holds nothing that is
  IF \E i \in DOMAIN tab[r] : tab[r][i] = p /\ (i - 1) * PageSize >= w.from + right
  THEN content[p]
  ELSE After(r, p, [w EXCEPT !.n = right])

CompleteAs(gain) ==   \* [Req -> Nat]
  /\ inflight # <<>>
  /\ LET step  == Head(inflight)
         batch == {r \in Req : step[r].n > 0}
     IN
     \E stop \in SUBSET {r \in batch : st[r] \in Live /\ step[r].samples} :
       /\ \A r \in Req : IF r \in batch THEN gain[r] \in Gains(r, step[r]) ELSE gain[r] = 0
       /\ \A r \in batch : <<st[r], AfterGain(r, step[r], gain[r], stop)>> \in Edges["Complete"]
       /\ st'      = [r \in Req |-> IF r \in batch THEN AfterGain(r, step[r], gain[r], stop) ELSE st[r]]
       /\ known'   = [r \in Req |-> known[r] + gain[r]]
       /\ done'    = [r \in Req |-> IF r \in batch THEN step[r].from + Right(r, step[r], gain[r])
                                    ELSE done[r]]
       /\ planned' = [r \in Req |-> IF r \in batch /\ Guessing(r)
                                    THEN step[r].from + Right(r, step[r], gain[r]) ELSE planned[r]]
       /\ content' = [p \in Page |->
            IF \E r \in batch : p \in step[r].writes
            THEN LET r == CHOOSE r \in batch : p \in step[r].writes
                 IN  Written(r, p, step[r], Right(r, step[r], gain[r]))
            ELSE content[p]]
       /\ draft'   = [r \in Req |-> IF r \in batch THEN 0 ELSE draft[r]]
  /\ inflight' = Tail(inflight)
  /\ UNCHANGED <<age, tab, page, plan, tier>>
DraftComplete == \E gain \in [Req -> 0..(Drafts + 1)] : CompleteAs(gain)

----------------------------------------------------------------------------
DraftInit == TierInit /\ draft = [r \in Req |-> 0]

DraftSubmit(r)      == TierSubmit(r) /\ UNCHANGED draft
DraftAdmit(r)       == TierAdmit(r) /\ UNCHANGED draft
DraftAbort(r)       == TierAbort(r) /\ UNCHANGED draft
DraftRelease(r)     == TierRelease(r) /\ UNCHANGED draft
DraftPreempt(r)     == TierPreempt(r) /\ UNCHANGED draft
DraftPublish(r)     == TierPublish(r) /\ UNCHANGED draft
DraftAcquire(r, p)  == TierAcquire(r, p) /\ UNCHANGED draft
DraftSchedule(r, n) == TierSchedule(r, n) /\ UNCHANGED draft
DraftLaunch         == TierLaunch /\ UNCHANGED draft
DraftEvict(p)       == TierEvict(p) /\ UNCHANGED draft
DraftStoreStart(p, b)     == StoreStart(p, b) /\ UNCHANGED draft
DraftStoreEnd(p, b, good) == StoreEnd(p, b, good) /\ UNCHANGED draft
DraftLoadStart(b, p)      == LoadStart(b, p) /\ UNCHANGED draft
DraftLoadEnd(b, p, good)  == LoadEnd(b, p, good) /\ UNCHANGED draft
DraftHostDrop(b)          == HostDrop(b) /\ UNCHANGED draft

DraftNext ==
  \/ \E r \in Req : \/ DraftSubmit(r) \/ DraftAdmit(r) \/ DraftAbort(r) \/ DraftRelease(r)
                    \/ DraftPreempt(r) \/ DraftPublish(r) \/ Trim(r)
                    \/ \E p \in Page : DraftAcquire(r, p) \/ Reserve(r, p)
                    \/ \E n \in 1..Chunk : DraftSchedule(r, n)
                    \/ \E k \in 1..Drafts : Speculate(r, k)
  \/ DraftLaunch \/ DraftComplete
  \/ \E p \in Page : DraftEvict(p)
  \/ \E p \in Page, b \in Block :
       DraftStoreStart(p, b) \/ DraftLoadStart(b, p)
       \/ (\E good \in BOOLEAN : DraftStoreEnd(p, b, good) \/ DraftLoadEnd(b, p, good))
  \/ \E b \in Block : DraftHostDrop(b)

DraftFairness ==
  /\ \A r \in Req : WF_dvars(DraftAdmit(r)) /\ WF_dvars(DraftRelease(r)) /\ WF_dvars(DraftPreempt(r))
                    /\ WF_dvars(\E p \in Page : DraftAcquire(r, p))
                    /\ WF_dvars(\E n \in 1..Chunk : DraftSchedule(r, n))
                    /\ WF_dvars(Trim(r))
  /\ WF_dvars(DraftLaunch) /\ WF_dvars(DraftComplete)
  /\ WF_dvars(Starved /\ \E p \in Page : DraftEvict(p))
  /\ \A p \in Page, b \in Block :
       WF_dvars(\E good \in BOOLEAN : DraftStoreEnd(p, b, good) \/ DraftLoadEnd(b, p, good))

DraftSpec == DraftInit /\ [][DraftNext]_dvars /\ DraftFairness

----------------------------------------------------------------------------
DraftOK == draft \in [Req -> 0..Drafts]
InputsGuessed ==       \* what is fed is known, or will have been sampled, or is a draft
  \A r \in Running : planned[r] <= known[r] + Sampling(r) + draft[r]
DraftAlone ==          \* of a request with drafts under way no other row is
  \A r \in Req : Guessing(r) =>
    Cardinality({i \in DOMAIN inflight : inflight[i][r].n > 0}) + (IF PlannedFor(r) THEN 1 ELSE 0) = 1
DraftSafety == DraftOK /\ InputsGuessed /\ DraftAlone
=============================================================================
