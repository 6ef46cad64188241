------------------------------ MODULE HostTier ------------------------------
(* The lifecycle with a second home for cached pages: blocks of host memory,  *)
(* with copies to and fro that take time, fail, and are acknowledged.         *)
(*                                                                            *)
(* Rule: every action of Lifecycle is as it was, but that nobody takes or     *)
(* evicts what a copy touches; to it a page that is being loaded is still     *)
(* free.  What a copy reads or writes is not given away before the copy is    *)
(* acknowledged, on the device and on the host.  A copy ends after the copy   *)
(* of the page above it, and in vain if that page did not come: so what is on *)
(* the host stands on what is on the host, as on the device.                  *)
EXTENDS Lifecycle

CONSTANT Block   \* pages of host memory

VARIABLES
  host,    \* [Block -> [kind, key]]
  moves,   \* set of [page, block, out]: copies in flight; out: device to host
  stored   \* [Block -> Seq(Token)]: whose KV the block really holds (nobody can look at it)

tier  == <<host, moves, stored>>
hvars == <<vars, host, moves, stored>>

HostKind == {"Free", "Storing", "Present"}
NoBlock  == [kind |-> "Free", key |-> Null]

MovingPage(p)  == \E m \in moves : m.page = p
MovingBlock(b) == \E m \in moves : m.block = b
OnHost(k)      == \E b \in Block : host[b].key = k
Present(k)     == \E b \in Block : host[b] = [kind |-> "Present", key |-> k]
Above(k)       == SubSeq(k, 1, Len(k) - PageSize)   \* of the page above; a salt is a root
Root(k)        == Len(k) = 1
Loading(k)     == \E m \in moves : ~m.out /\ host[m.block].key = k
Storing(k)     == \E b \in Block : host[b] = [kind |-> "Storing", key |-> k]
Untouched(p)   == \A m \in moves : page[p].key \notin {host[m.block].key, Above(host[m.block].key)}
HostLeaf(b)    == \A c \in Block : host[c].key # Null => Above(host[c].key) # host[b].key

StoreStart(p, b) ==   \* under a page that is stored, or is about to be
  /\ page[p].kind = "Shared"
  /\ ~Starved
  /\ host[b].kind = "Free"
  /\ ~OnHost(page[p].key)
  /\ Root(Above(page[p].key)) \/ OnHost(Above(page[p].key))
  /\ host'  = [host EXCEPT ![b] = [kind |-> "Storing", key |-> page[p].key]]
  /\ moves' = moves \cup {[page |-> p, block |-> b, out |-> TRUE]}
  /\ UNCHANGED <<vars, stored>>

StoreEnd(p, b, good) ==   \* acknowledged: the bytes are there; or the copy has failed
  /\ [page |-> p, block |-> b, out |-> TRUE] \in moves
  /\ ~Storing(Above(host[b].key))
  /\ LET came == good /\ (Root(Above(host[b].key)) \/ Present(Above(host[b].key))) IN
       /\ host'   = [host EXCEPT ![b] = IF came THEN [@ EXCEPT !.kind = "Present"] ELSE NoBlock]
       /\ stored' = [stored EXCEPT ![b] = IF came THEN content[p] ELSE Null]
  /\ moves' = moves \ {[page |-> p, block |-> b, out |-> TRUE]}
  /\ UNCHANGED vars

LoadStart(b, p) ==   \* a page that a running request lacks is not taken from it
  /\ host[b].kind = "Present"
  /\ ~MovingBlock(b)
  /\ p \in FreePages
  /\ ~MovingPage(p)
  /\ NoneLacks
  /\ ~Cached(host[b].key)
  /\ LET k == Above(host[b].key) IN Root(k) \/ Cached(k) \/ Loading(k)
  /\ moves' = moves \cup {[page |-> p, block |-> b, out |-> FALSE]}
  /\ UNCHANGED <<vars, host, stored>>

LoadEnd(b, p, good) ==   \* in vain, too, if somebody has computed the same meanwhile
  /\ [page |-> p, block |-> b, out |-> FALSE] \in moves
  /\ ~Loading(Above(host[b].key))
  /\ LET k    == host[b].key
         came == good /\ (Root(Above(k)) \/ Cached(Above(k))) /\ ~Cached(k)
     IN  /\ page'    = [page EXCEPT ![p] = IF came THEN [kind |-> "Shared", ref |-> 0, key |-> k] ELSE @]
         /\ content' = [content EXCEPT ![p] = IF came THEN stored[b] ELSE @]
  /\ moves' = moves \ {[page |-> p, block |-> b, out |-> FALSE]}
  /\ UNCHANGED <<st, age, tab, known, planned, done, plan, inflight, host, stored>>

HostDrop(b) ==   \* children before parents
  /\ host[b].kind = "Present"
  /\ ~MovingBlock(b)
  /\ HostLeaf(b)
  /\ host'   = [host EXCEPT ![b] = NoBlock]
  /\ stored' = [stored EXCEPT ![b] = Null]
  /\ UNCHANGED <<vars, moves>>

----------------------------------------------------------------------------
TierInit ==
  /\ Init
  /\ host = [b \in Block |-> NoBlock]
  /\ moves = {}
  /\ stored = [b \in Block |-> Null]

(* The actions of Lifecycle, with what a copy touches out of reach.          *)
TierSubmit(r)      == Submit(r) /\ UNCHANGED tier
TierAdmit(r)       == Admit(r) /\ UNCHANGED tier
TierAbort(r)       == Abort(r) /\ UNCHANGED tier
TierRelease(r)     == Release(r) /\ UNCHANGED tier
TierPreempt(r)     == Preempt(r) /\ UNCHANGED tier
TierPublish(r)     == Publish(r) /\ UNCHANGED tier
TierAcquire(r, p)  == Acquire(r, p) /\ ~MovingPage(p) /\ UNCHANGED tier
TierSchedule(r, n) == Schedule(r, n) /\ UNCHANGED tier
TierLaunch         == Launch /\ UNCHANGED tier
TierComplete       == Complete /\ UNCHANGED tier
TierEvict(p)       == Evict(p) /\ Untouched(p) /\ UNCHANGED tier

TierNext ==
  \/ \E r \in Req : \/ TierSubmit(r) \/ TierAdmit(r) \/ TierAbort(r) \/ TierRelease(r)
                    \/ TierPreempt(r) \/ TierPublish(r)
                    \/ \E p \in Page : TierAcquire(r, p)
                    \/ \E n \in 1..Chunk : TierSchedule(r, n)
  \/ TierLaunch \/ TierComplete
  \/ \E p \in Page : TierEvict(p)
  \/ \E p \in Page, b \in Block :
       StoreStart(p, b) \/ LoadStart(b, p)
       \/ (\E good \in BOOLEAN : StoreEnd(p, b, good) \/ LoadEnd(b, p, good))
  \/ \E b \in Block : HostDrop(b)

TierFairness ==
  /\ \A r \in Req : WF_hvars(TierAdmit(r)) /\ WF_hvars(TierRelease(r)) /\ WF_hvars(TierPreempt(r))
                    /\ WF_hvars(\E p \in Page : TierAcquire(r, p))
                    /\ WF_hvars(\E n \in 1..Chunk : TierSchedule(r, n))
  /\ WF_hvars(TierLaunch) /\ WF_hvars(TierComplete)
  /\ WF_hvars(Starved /\ \E p \in Page : TierEvict(p))
  /\ \A p \in Page, b \in Block :
       WF_hvars(\E good \in BOOLEAN : StoreEnd(p, b, good) \/ LoadEnd(b, p, good))

TierSpec == TierInit /\ [][TierNext]_hvars /\ TierFairness

----------------------------------------------------------------------------
TierOK ==
  /\ host \in [Block -> [kind : HostKind, key : Seq(Token)]]
  /\ moves \subseteq [page : Page, block : Block, out : BOOLEAN]
  /\ stored \in [Block -> Seq(Token)]
HostPinned ==            \* a block that a copy reads or writes stays what it was for the copy
  \A m \in moves : /\ host[m.block].kind = IF m.out THEN "Storing" ELSE "Present"
                   /\ \A n \in moves : n.block = m.block => n = m
MovesPinned ==           \* and so does the page
  \A m \in moves : /\ m.out => page[m.page].kind = "Shared" /\ page[m.page].key = host[m.block].key
                   /\ ~m.out => page[m.page].kind = "Free" /\ Holders(m.page) = {}
                   /\ \A n \in moves : n.page = m.page => n = m
HostContentMatches == \A b \in Block : host[b].kind = "Present" => stored[b] = Tail(host[b].key)
OneBlockPerKey == \A b, c \in Block : host[b].key # Null /\ host[b].key = host[c].key => b = c
HostStands ==            \* what is on the host stands on what is on the host
  \A b \in Block : host[b].kind = "Present" => Root(Above(host[b].key)) \/ Present(Above(host[b].key))
TierSafety == TierOK /\ HostPinned /\ MovesPinned /\ HostContentMatches /\ OneBlockPerKey /\ HostStands

MovesEnd == \A p \in Page : MovingPage(p) ~> ~MovingPage(p)
=============================================================================
