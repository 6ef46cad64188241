----------------------------- MODULE CopyOnWrite -----------------------------
(* Requests that share a page which is only partly filled, and write on.      *)
(*                                                                            *)
(* Rule: a page is written only by a request that alone holds it; who wants   *)
(* to write a shared one copies it first.  The copy takes time and may fail:  *)
(* until it is acknowledged it holds its source and its destination, and the  *)
(* request goes on holding the source.  Nobody shares a page into which a     *)
(* launched step is writing.  Bug classes: OneWriter, NoReuseInFlight,        *)
(* ContentMatches for a page that is shared while its tail is written.        *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS Req, Page, PageSize, Length
VARIABLES
  st,       \* [Req -> {"New", "Running", "Draining", "Ended"}]
  text,     \* [Req -> Seq(Req)]: its tokens, each by the name of who sampled it
  tab,      \* [Req -> Seq(Page)]
  ref,      \* [Page -> Nat]: tables and copies that hold it
  content,  \* [Page -> Seq(Req)]: the tokens whose KV it has
  writes,   \* set of [req, page]: launched steps that append to a page
  copies    \* set of [req, from, to]: started and not acknowledged
vars == <<st, text, tab, ref, content, writes, copies>>

FreePages  == {p \in Page : ref[p] = 0}
NextFree   == CHOOSE p \in FreePages : TRUE
LastOf(r)  == tab[r][Len(tab[r])]
Holds(r, p) == \E i \in DOMAIN tab[r] : tab[r][i] = p
Writing(r) == \E w \in writes : w.req = r
Copying(r) == \E c \in copies : c.req = r
Full(r)    == Len(text[r]) = Len(tab[r]) * PageSize
Wants(r)   == st[r] = "Running" /\ Len(text[r]) < Length /\ ~Writing(r) /\ ~Copying(r)

Submit(r) ==
  /\ st[r] = "New"
  /\ st' = [st EXCEPT ![r] = "Running"]
  /\ UNCHANGED <<text, tab, ref, content, writes, copies>>
Fork(r, c) ==    \* all of its pages, the last one partly filled
  /\ st[r] = "Running" /\ st[c] = "New" /\ text[r] # <<>>
  /\ ~Writing(r)
  /\ ~Copying(r)
  /\ st' = [st EXCEPT ![c] = "Running"]
  /\ text' = [text EXCEPT ![c] = text[r]]
  /\ tab' = [tab EXCEPT ![c] = tab[r]]
  /\ ref' = [p \in Page |-> IF Holds(r, p) THEN ref[p] + 1 ELSE ref[p]]
  /\ UNCHANGED <<content, writes, copies>>
Acquire(r) ==
  /\ Wants(r) /\ Full(r) /\ FreePages # {}
  /\ tab' = [tab EXCEPT ![r] = Append(@, NextFree)]
  /\ ref' = [ref EXCEPT ![NextFree] = 1]
  /\ UNCHANGED <<st, text, content, writes, copies>>
Launch(r) ==     \* a step that appends a token
  /\ Wants(r) /\ ~Full(r)
  /\ ref[LastOf(r)] = 1
  /\ writes' = writes \cup {[req |-> r, page |-> LastOf(r)]}
  /\ UNCHANGED <<st, text, tab, ref, content, copies>>
Complete(r) ==
  /\ \E w \in writes :
       /\ w.req = r
       /\ writes' = writes \ {w}
       /\ content' = [content EXCEPT ![w.page] = Append(@, r)]
       /\ text' = [text EXCEPT ![r] = Append(@, r)]
  /\ UNCHANGED <<st, tab, ref, copies>>
CopyStart(r) ==
  /\ Wants(r) /\ ~Full(r)
  /\ ref[LastOf(r)] > 1
  /\ FreePages # {}
  /\ copies' = copies \cup {[req |-> r, from |-> LastOf(r), to |-> NextFree]}
  /\ ref' = [ref EXCEPT ![LastOf(r)] = @ + 1, ![NextFree] = 1]
  /\ UNCHANGED <<st, text, tab, content, writes>>
CopyEnd(r, good) ==   \* what the source holds now is there; or the copy has failed, or is not wanted
  /\ \E c \in copies :
       LET taken == good /\ st[r] = "Running" IN
       /\ c.req = r
       /\ copies' = copies \ {c}
       /\ content' = [content EXCEPT ![c.to] = IF taken THEN content[c.from] ELSE <<>>,
                                      ![c.from] = IF taken /\ ref[c.from] = 2 THEN <<>> ELSE @]
       /\ tab' = IF taken THEN [tab EXCEPT ![r][Len(tab[r])] = c.to] ELSE tab
       /\ ref' = IF taken THEN [ref EXCEPT ![c.from] = @ - 2]
                 ELSE [ref EXCEPT ![c.from] = @ - 1, ![c.to] = 0]
  /\ UNCHANGED <<st, text, writes>>
Abort(r) ==
  /\ st[r] = "Running"
  /\ st' = [st EXCEPT ![r] = "Draining"]
  /\ UNCHANGED <<text, tab, ref, content, writes, copies>>
End(r) ==
  /\ st[r] = "Draining" \/ (st[r] = "Running" /\ Len(text[r]) = Length)
  /\ ~Writing(r)
  /\ ~Copying(r)
  /\ st' = [st EXCEPT ![r] = "Ended"]
  /\ ref' = [p \in Page |-> IF Holds(r, p) THEN ref[p] - 1 ELSE ref[p]]
  /\ content' = [p \in Page |-> IF Holds(r, p) /\ ref[p] = 1 THEN <<>> ELSE content[p]]
  /\ tab' = [tab EXCEPT ![r] = <<>>]
  /\ UNCHANGED <<text, writes, copies>>

Init ==
  /\ st = [r \in Req |-> "New"] /\ text = [r \in Req |-> <<>>] /\ tab = [r \in Req |-> <<>>]
  /\ ref = [p \in Page |-> 0] /\ content = [p \in Page |-> <<>>] /\ writes = {} /\ copies = {}
Next == \E r \in Req :
  \/ Submit(r) \/ Acquire(r) \/ Launch(r) \/ Complete(r) \/ CopyStart(r) \/ Abort(r) \/ End(r)
  \/ (\E good \in BOOLEAN : CopyEnd(r, good))
  \/ (\E c \in Req \ {r} : Fork(r, c))
Fairness == \A r \in Req :
  /\ WF_vars(Acquire(r)) /\ WF_vars(Launch(r)) /\ WF_vars(Complete(r)) /\ WF_vars(End(r))
  /\ WF_vars(CopyStart(r)) /\ SF_vars(CopyEnd(r, TRUE)) /\ WF_vars(\E good \in BOOLEAN : CopyEnd(r, good))
Spec == Init /\ [][Next]_vars /\ Fairness

Holders(p) == Cardinality({r \in Req : Holds(r, p)})
RefExact ==
  \A p \in Page : ref[p] = Holders(p) + Cardinality({c \in copies : p \in {c.from, c.to}})
NoReuseInFlight == \A p \in FreePages : /\ \A c \in copies : p \notin {c.from, c.to}
                                        /\ \A w \in writes : p # w.page
OneWriter ==             \* what is written is held by its writer alone, and nobody copies it
  \A w \in writes : /\ {r \in Req : Holds(r, w.page)} = {w.req}
                    /\ \A c \in copies : w.page # c.from
ContentMatches ==        \* a request finds its own tokens in its pages
  \A r \in Req : \A i \in DOMAIN tab[r] :
    content[tab[r][i]] = SubSeq(text[r], (i - 1) * PageSize + 1,
                                IF i * PageSize < Len(text[r]) THEN i * PageSize ELSE Len(text[r]))
TerminalReleasesAll == \A r \in Req : st[r] = "Ended" => tab[r] = <<>> /\ ~Writing(r) /\ ~Copying(r)
EveryRequestEnds == \A r \in Req : (st[r] = "Running") ~> (st[r] = "Ended")

NeverCopied == [][\A r \in Req : tab[r] # <<>> /\ tab'[r] # <<>> => tab'[r][1] = tab[r][1]]_vars
NeverCopyInVain == \A c \in copies : st[c.req] # "Draining"
NeverLastHolder ==       \* the copy's source may come to be held by nobody else
  \A c \in copies : ref[c.from] > 2
=============================================================================
