------------------------------ MODULE HostTier ------------------------------
(* A second home for cached pages: blocks of host memory, with copies to and  *)
(* fro that take time, fail, and are acknowledged.                            *)
(*                                                                            *)
(* Rule: what a copy reads or writes is not given away before the copy is     *)
(* acknowledged, on the device and on the host; and a page is fetched only    *)
(* with pages to spare, so that fetching never undoes an eviction that a      *)
(* running request waits for.                                                 *)
EXTENDS Naturals, FiniteSets

CONSTANTS Page, Block, Key, Null, Wants   \* Wants: pages that running requests may want at once
VARIABLES
  page,     \* [Page -> [kind, key]]
  host,     \* [Block -> [kind, key]]
  moves,    \* set of [page, block, out]: copies in flight; out: device to host
  content,  \* [Page -> Key or Null]: what the page really holds
  stored,   \* [Block -> Key or Null]: what the block really holds
  using,    \* set of pages that running requests read or write
  wants     \* pages that running requests lack
vars == <<page, host, moves, content, stored, using, wants>>

Free      == [kind |-> "Free", key |-> Null]
FreePages == {p \in Page : page[p].kind = "Free"}
MovingPage(p)  == \E m \in moves : m.page = p
MovingBlock(b) == \E m \in moves : m.block = b
OnDevice(k) == \E p \in Page : page[p].key = k
OnHost(k)   == \E b \in Block : host[b].key = k
Idle(p)     == page[p].kind = "Shared" /\ p \notin using /\ ~MovingPage(p)
Spare       == Cardinality(FreePages) > wants
Starved     == wants > 0 /\ FreePages = {}

Want ==          \* a running request comes to lack a page ...
  /\ wants < Wants
  /\ wants' = wants + 1
  /\ UNCHANGED <<page, host, moves, content, stored, using>>
Take(p) ==       \* ... and takes one
  /\ wants > 0
  /\ p \in FreePages
  /\ page' = [page EXCEPT ![p] = [kind |-> "Exclusive", key |-> Null]]
  /\ using' = using \cup {p}
  /\ wants' = wants - 1
  /\ UNCHANGED <<host, moves, content, stored>>
Publish(p, k) == \* computed; the request goes on reading it
  /\ page[p].kind = "Exclusive" /\ ~OnDevice(k)
  /\ page' = [page EXCEPT ![p] = [kind |-> "Shared", key |-> k]]
  /\ content' = [content EXCEPT ![p] = k]
  /\ UNCHANGED <<host, moves, stored, using, wants>>
Use(p) ==
  /\ page[p].kind = "Shared"
  /\ using' = using \cup {p}
  /\ UNCHANGED <<page, host, moves, content, stored, wants>>
Leave(p) ==      \* a request ends, or is preempted, also while its page is being stored
  /\ p \in using
  /\ using' = using \ {p}
  /\ page' = IF page[p].kind = "Exclusive" THEN [page EXCEPT ![p] = Free] ELSE page
  /\ UNCHANGED <<host, moves, content, stored, wants>>
Evict(p) ==
  /\ Idle(p)
  /\ page' = [page EXCEPT ![p] = Free]
  /\ content' = [content EXCEPT ![p] = Null]
  /\ UNCHANGED <<host, moves, stored, using, wants>>

StoreStart(p, b) ==
  /\ page[p].kind = "Shared" /\ ~MovingPage(p)
  /\ ~Starved
  /\ host[b].kind = "Free" /\ ~OnHost(page[p].key)
  /\ host' = [host EXCEPT ![b] = [kind |-> "Storing", key |-> page[p].key]]
  /\ moves' = moves \cup {[page |-> p, block |-> b, out |-> TRUE]}
  /\ UNCHANGED <<page, content, stored, using, wants>>
StoreEnd(p, b, good) ==   \* acknowledged: the bytes are there; or the copy has failed
  /\ [page |-> p, block |-> b, out |-> TRUE] \in moves
  /\ moves' = moves \ {[page |-> p, block |-> b, out |-> TRUE]}
  /\ host' = [host EXCEPT ![b] = IF good THEN [@ EXCEPT !.kind = "Present"] ELSE Free]
  /\ stored' = [stored EXCEPT ![b] = IF good THEN content[p] ELSE Null]
  /\ UNCHANGED <<page, content, using, wants>>
LoadStart(b, p) ==
  /\ host[b].kind = "Present"
  /\ p \in FreePages
  /\ Spare
  /\ ~OnDevice(host[b].key)
  /\ page' = [page EXCEPT ![p] = [kind |-> "Loading", key |-> host[b].key]]
  /\ moves' = moves \cup {[page |-> p, block |-> b, out |-> FALSE]}
  /\ UNCHANGED <<host, content, stored, using, wants>>
LoadEnd(b, p, good) ==
  /\ [page |-> p, block |-> b, out |-> FALSE] \in moves
  /\ moves' = moves \ {[page |-> p, block |-> b, out |-> FALSE]}
  /\ page' = [page EXCEPT ![p] = IF good THEN [@ EXCEPT !.kind = "Shared"] ELSE Free]
  /\ content' = [content EXCEPT ![p] = IF good THEN stored[b] ELSE Null]
  /\ UNCHANGED <<host, stored, using, wants>>
HostDrop(b) ==
  /\ host[b].kind = "Present"
  /\ ~MovingBlock(b)
  /\ host' = [host EXCEPT ![b] = Free]
  /\ stored' = [stored EXCEPT ![b] = Null]
  /\ UNCHANGED <<page, moves, content, using, wants>>

Init ==
  /\ page = [p \in Page |-> Free] /\ host = [b \in Block |-> Free] /\ moves = {}
  /\ content = [p \in Page |-> Null] /\ stored = [b \in Block |-> Null]
  /\ using = {} /\ wants = 0
Next ==
  \/ Want
  \/ \E p \in Page : Take(p) \/ Use(p) \/ Leave(p) \/ Evict(p) \/ (\E k \in Key : Publish(p, k))
  \/ \E p \in Page, b \in Block :
       StoreStart(p, b) \/ LoadStart(b, p)
       \/ (\E good \in BOOLEAN : StoreEnd(p, b, good) \/ LoadEnd(b, p, good))
  \/ \E b \in Block : HostDrop(b)
Fairness ==
  /\ WF_vars(\E p \in Page : Take(p))
  /\ \A p \in Page : WF_vars(Leave(p)) /\ SF_vars(Evict(p) /\ Starved)
  /\ \A p \in Page, b \in Block :
       WF_vars(\E good \in BOOLEAN : StoreEnd(p, b, good) \/ LoadEnd(b, p, good))
Spec == Init /\ [][Next]_vars /\ Fairness

FreeUnique == \A p \in FreePages : p \notin using /\ page[p].key = Null
NoReuseInFlight == \A m \in moves : page[m.page].kind # "Free"
HostPinned ==            \* a block that a copy reads or writes stays what it was for the copy
  \A m \in moves : /\ host[m.block].kind = IF m.out THEN "Storing" ELSE "Present"
                   /\ host[m.block].key = page[m.page].key
                   /\ \A n \in moves : n.block = m.block => n = m
ContentMatches ==
  /\ \A p \in Page : page[p].kind = "Shared" => content[p] = page[p].key
  /\ \A b \in Block : host[b].kind = "Present" => stored[b] = host[b].key
OneCopyPerKey == \A p, q \in Page : page[p].key # Null /\ page[p].key = page[q].key => p = q
ShortageEnds == wants > 0 ~> wants = 0   \* no Evict, Load, Evict for ever
MovesEnd == \A p \in Page : MovingPage(p) ~> ~MovingPage(p)
NeverLoaded == \A m \in moves : m.out
NeverStoredWhileUsed == \A m \in moves : m.page \notin using
=============================================================================
