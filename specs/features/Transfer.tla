------------------------------ MODULE Transfer -------------------------------
(* Prefill on one engine, decode on another: KV pages that go over a network. *)
(*                                                                            *)
(* Rule: a page that the network may read or write is not given back, on      *)
(* either side, before the write is acknowledged or the connection is fenced; *)
(* what was received in part is never read.  Either side may abort, a write   *)
(* may fail, the other side may die: whoever is left gets its pages back.     *)
(* Bug classes: NoReuseInFlight (trtllm#12540, #12542), TerminalReleasesAll   *)
(* when the peer dies (vllm#46283).                                           *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS Req, SPages, RPages, Null, Chunks   \* pages of either engine; pages of a request
VARIABLES
  alive,    \* [{"Sender", "Receiver"} -> BOOLEAN]
  sender,   \* [Req -> state at the engine that prefills]
  receiver, \* [Req -> state at the engine that decodes]
  from,     \* [Req -> [1..Chunks -> SPage or 0]]
  into,     \* [Req -> [1..Chunks -> RPage or 0]]
  wire,     \* set of [req, chunk]: writes that were started and not acknowledged
  sent,     \* [Req -> set of chunks that were acknowledged]
  content   \* [RPage -> [req, chunk]]: whose KV it has; Nothing
vars == <<alive, sender, receiver, from, into, wire, sent, content>>

SenderState   == {"New", "Ready", "Draining", "Ended"}
ReceiverState == {"New", "Reserved", "Decoding", "Draining", "Ended"}
SPage      == 1..SPages
RPage      == 1..RPages
None       == [i \in 1..Chunks |-> 0]
Nothing    == [req |-> Null, chunk |-> 0]
Range(f)   == {f[i] : i \in DOMAIN f}
SFree      == SPage \ UNION {Range(from[r]) : r \in Req}
RFree      == RPage \ UNION {Range(into[r]) : r \in Req}
OnWire(r)  == \E w \in wire : w.req = r
Picked(free) == \* the first of the free pages
  [i \in 1..Chunks |-> CHOOSE p \in free : Cardinality({q \in free : q < p}) = i - 1]

Prefill(r) ==    \* computed at the sender
  /\ alive["Sender"] /\ sender[r] = "New" /\ Cardinality(SFree) >= Chunks
  /\ sender' = [sender EXCEPT ![r] = "Ready"]
  /\ from' = [from EXCEPT ![r] = Picked(SFree)]
  /\ UNCHANGED <<alive, receiver, into, wire, sent, content>>
Reserve(r) ==    \* all pages or none, and only for what is held at the other end: no hold and wait
  /\ alive["Receiver"] /\ receiver[r] = "New" /\ Cardinality(RFree) >= Chunks
  /\ alive["Sender"] /\ sender[r] = "Ready"
  /\ receiver' = [receiver EXCEPT ![r] = "Reserved"]
  /\ into' = [into EXCEPT ![r] = Picked(RFree)]
  /\ UNCHANGED <<alive, sender, from, wire, sent, content>>
SendStart(r, i) ==
  /\ alive["Sender"] /\ sender[r] = "Ready"
  /\ alive["Receiver"] /\ receiver[r] = "Reserved"
  /\ i \notin sent[r] /\ [req |-> r, chunk |-> i] \notin wire
  /\ wire' = wire \cup {[req |-> r, chunk |-> i]}
  /\ UNCHANGED <<alive, sender, receiver, from, into, sent, content>>
SendEnd(r, i, good) ==   \* the bytes land, or part of them; both sides hear of it
  /\ alive["Sender"] /\ alive["Receiver"]
  /\ [req |-> r, chunk |-> i] \in wire
  /\ wire' = wire \ {[req |-> r, chunk |-> i]}
  /\ content' = [content EXCEPT ![into[r][i]] = IF good THEN [req |-> r, chunk |-> i] ELSE Nothing]
  /\ sent' = [sent EXCEPT ![r] = IF good THEN @ \cup {i} ELSE @]
  /\ UNCHANGED <<alive, sender, receiver, from, into>>
Fence(r) ==      \* one side is dead: the other cuts the connection, nothing moves afterwards
  /\ alive["Sender"] # alive["Receiver"]
  /\ OnWire(r)
  /\ wire' = {w \in wire : w.req # r}
  /\ content' = [p \in RPage |-> IF \E w \in wire : w.req = r /\ into[r][w.chunk] = p
                                 THEN Nothing ELSE content[p]]
  /\ UNCHANGED <<alive, sender, receiver, from, into, sent>>
Decode(r) ==     \* all of it has arrived
  /\ alive["Receiver"] /\ receiver[r] = "Reserved" /\ sent[r] = 1..Chunks
  /\ receiver' = [receiver EXCEPT ![r] = "Decoding"]
  /\ UNCHANGED <<alive, sender, from, into, wire, sent, content>>
Recompute(r) ==  \* nothing more will come: the receiver computes all of it
  /\ alive["Receiver"] /\ receiver[r] = "Reserved"
  /\ ~alive["Sender"] \/ sender[r] = "Ended"
  /\ ~OnWire(r)
  /\ receiver' = [receiver EXCEPT ![r] = "Decoding"]
  /\ content' = [p \in RPage |-> IF p \in Range(into[r])
                   THEN [req |-> r, chunk |-> CHOOSE i \in 1..Chunks : into[r][i] = p] ELSE content[p]]
  /\ UNCHANGED <<alive, sender, from, into, wire, sent>>

SenderAbort(r) ==
  /\ alive["Sender"] /\ sender[r] = "Ready"
  /\ sender' = [sender EXCEPT ![r] = "Draining"]
  /\ UNCHANGED <<alive, receiver, from, into, wire, sent, content>>
SenderEnd(r) ==  \* sent, refused by the other side, or aborted; not while the network reads
  /\ alive["Sender"]
  /\ \/ sender[r] = "Draining"
     \/ sender[r] = "Ready" /\ (\/ sent[r] = 1..Chunks \/ ~alive["Receiver"]
                                \/ receiver[r] \in {"Draining", "Ended"})
  /\ ~OnWire(r)
  /\ sender' = [sender EXCEPT ![r] = "Ended"]
  /\ from' = [from EXCEPT ![r] = None]
  /\ UNCHANGED <<alive, receiver, into, wire, sent, content>>
ReceiverAbort(r) ==
  /\ alive["Receiver"] /\ receiver[r] \in {"Reserved", "Decoding"}
  /\ receiver' = [receiver EXCEPT ![r] = "Draining"]
  /\ UNCHANGED <<alive, sender, from, into, wire, sent, content>>
ReceiverEnd(r) ==    \* decoded to the end, or aborted; not while the network writes
  /\ alive["Receiver"] /\ receiver[r] \in {"Decoding", "Draining"}
  /\ ~OnWire(r)
  /\ receiver' = [receiver EXCEPT ![r] = "Ended"]
  /\ content' = [p \in RPage |-> IF p \in Range(into[r]) THEN Nothing ELSE content[p]]
  /\ into' = [into EXCEPT ![r] = None]
  /\ UNCHANGED <<alive, sender, from, wire, sent>>
Die(side) ==     \* one of them may; a machine that is down holds nothing
  /\ \A each \in DOMAIN alive : alive[each]
  /\ alive' = [alive EXCEPT ![side] = FALSE]
  /\ UNCHANGED <<sender, receiver, from, into, wire, sent, content>>

Init ==
  /\ alive = [side \in {"Sender", "Receiver"} |-> TRUE]
  /\ sender = [r \in Req |-> "New"] /\ receiver = [r \in Req |-> "New"]
  /\ from = [r \in Req |-> None] /\ into = [r \in Req |-> None]
  /\ wire = {} /\ sent = [r \in Req |-> {}] /\ content = [p \in RPage |-> Nothing]
Next ==
  \/ \E r \in Req :
       \/ Prefill(r) \/ Reserve(r) \/ Fence(r) \/ Decode(r) \/ Recompute(r)
       \/ SenderAbort(r) \/ SenderEnd(r) \/ ReceiverAbort(r) \/ ReceiverEnd(r)
       \/ \E i \in 1..Chunks : SendStart(r, i) \/ (\E good \in BOOLEAN : SendEnd(r, i, good))
  \/ \E side \in DOMAIN alive : Die(side)
Fairness == \A r \in Req :
  /\ WF_vars(Fence(r)) /\ WF_vars(Decode(r)) /\ WF_vars(Recompute(r))
  /\ SF_vars(Prefill(r)) /\ SF_vars(Reserve(r)) /\ WF_vars(SenderEnd(r)) /\ WF_vars(ReceiverEnd(r))
  /\ \A i \in 1..Chunks : /\ WF_vars(SendStart(r, i))
                          /\ WF_vars(\E good \in BOOLEAN : SendEnd(r, i, good))
                          /\ SF_vars(SendEnd(r, i, TRUE))
Spec == Init /\ [][Next]_vars /\ Fairness

TypeOK == /\ sender \in [Req -> SenderState] /\ receiver \in [Req -> ReceiverState]
          /\ \A r \in Req : sent[r] \subseteq 1..Chunks
FreeUnique ==
  /\ \A r, q \in Req : r # q => /\ Range(from[r]) \cap Range(from[q]) \subseteq {0}
                                /\ Range(into[r]) \cap Range(into[q]) \subseteq {0}
NoReuseInFlight ==       \* what the network reads and writes is held for it, where somebody lives
  \A w \in wire : /\ alive["Sender"] => from[w.req][w.chunk] # 0
                  /\ alive["Receiver"] => into[w.req][w.chunk] # 0
ContentMatches ==        \* what is decoded from is all there, and its own
  \A r \in Req : receiver[r] = "Decoding" =>
    \A i \in 1..Chunks : content[into[r][i]] = [req |-> r, chunk |-> i]
TerminalReleasesAll ==
  \A r \in Req : /\ sender[r] \in {"New", "Ended"} => from[r] = None
                 /\ receiver[r] \in {"New", "Ended"} => into[r] = None
SenderReleases   == \A r \in Req : (sender[r] = "Draining" /\ alive["Sender"]) ~> (sender[r] = "Ended" \/ ~alive["Sender"])
ReceiverReleases == \A r \in Req : (receiver[r] = "Draining" /\ alive["Receiver"]) ~> (receiver[r] = "Ended" \/ ~alive["Receiver"])
EveryRequestEnds ==      \* what was prefilled is decoded or given up, whoever dies meanwhile
  \A r \in Req : (sender[r] = "Ready") ~> (sender[r] = "Ended" \/ ~alive["Sender"])
EveryArrivalEnds == \A r \in Req : (receiver[r] = "Reserved") ~> (receiver[r] = "Ended" \/ ~alive["Receiver"])

NeverArrived   == \A r \in Req : sent[r] # 1..Chunks
NeverFenced    == ~(\E r \in Req : OnWire(r) /\ ~alive["Sender"] /\ alive["Receiver"])
NeverRecomputed == \A r \in Req : ~(receiver[r] = "Decoding" /\ sent[r] # 1..Chunks)
NeverAbortedOnWire == \A r \in Req : ~(OnWire(r) /\ sender[r] = "Draining" /\ receiver[r] = "Draining")
=============================================================================
