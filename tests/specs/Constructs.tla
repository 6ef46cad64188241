----------------------------- MODULE Constructs -----------------------------
(* One of each construct that the compiler knows, so that the compiled model  *)
(* and the interpreter can be held against each other.                        *)
EXTENDS Integers, Sequences, FiniteSets, TLC
CONSTANTS A, None
VARIABLES fn, log, msgs, box, n

vars == <<fn, log, msgs, box, n>>
Bit(x) == IF x THEN 1 ELSE 0
Counter == INSTANCE Counter WITH value <- n, Limit <- 3

Max(S) == CHOOSE x \in S : \A y \in S : y <= x
Range(f) == {f[x] : x \in DOMAIN f}
Pairs == {p \in A \X A : p[1] # p[2]}
Note == [kind : {"set"}, who : A, bit : BOOLEAN] \cup [kind : {"stop"}]

Init ==
  /\ fn \in [A -> {0, 1}]
  /\ log = <<>>
  /\ msgs = {}
  /\ box = [top |-> None, low |-> [seen |-> {}, mark |-> <<0, FALSE>>]]
  /\ n = -1

Set(a) ==
  /\ Len(log) < 2
  /\ LET old == fn[a]
         flip(x) == (x + 1) % 2
     IN  /\ fn' = [fn EXCEPT ![a] = flip(@)]
         /\ msgs' = msgs \cup {[kind |-> "set", who |-> a, bit |-> old = 1]}
         /\ log' = Append(log, old)
  /\ box' = [box EXCEPT !.low.seen = @ \cup {a}, !.low.mark[1] = Len(log), !.top = a]
  /\ UNCHANGED n

Stop ==
  /\ \E m \in msgs : m.kind = "set" /\ m.bit
  /\ [kind |-> "stop"] \notin msgs
  /\ msgs' = msgs \cup {[kind |-> "stop"]}
  /\ UNCHANGED <<fn, log, box, n>>

Drain ==
  /\ log # <<>>
  /\ \/ log' = Tail(log)
     \/ Len(log) >= 2 /\ log' = SubSeq(log, 2, 2) \o <<Head(log)>>
  /\ \E keep \in SUBSET {m \in msgs : m.kind = "set"} :
       msgs' = IF Cardinality(keep) # 1 THEN msgs ELSE msgs \ {CHOOSE m \in keep : TRUE}
  /\ UNCHANGED <<fn, box, n>>

Turn(a, b) ==
  /\ a # b
  /\ CASE fn[a] = 0 /\ fn[b] = 1 -> fn' = [x \in A |-> fn[IF x = a THEN b ELSE IF x = b THEN a ELSE x]]
       [] fn[a] = 1 /\ fn[b] = 1 -> fn' = [fn EXCEPT ![a] = 0, ![b] = 0]
       [] OTHER -> FALSE /\ fn' = fn
  /\ box' = [box EXCEPT !.low.mark = <<Cardinality(Range(fn)), \E p \in Pairs : p[1] = a>>]
  /\ UNCHANGED <<log, msgs, n>>

Count ==
  /\ n' \in {x \in -1..3 : x > n /\ x <= n + 2}
  /\ IF n > 0 THEN UNCHANGED log ELSE log' = [i \in 1..Len(log) |-> 1 - log[i]]
  /\ UNCHANGED <<fn, msgs, box>>

Idle == ENABLED Stop /\ n = 3 /\ n' = -1 /\ UNCHANGED <<fn, log, msgs, box>>

Next ==
  \/ \E a \in A : Set(a) \/ (\E b \in A : Turn(a, b))
  \/ Stop \/ Drain \/ Count \/ Idle

Spec == Init /\ [][Next]_vars /\ WF_vars(Count) /\ SF_vars(Idle)

TypeOK ==
  /\ fn \in [A -> 0..1]
  /\ log \in Seq({0, 1})
  /\ msgs \subseteq Note
  /\ box \in [top : A \cup {None}, low : [seen : SUBSET A, mark : Nat \X BOOLEAN]]
  /\ n \in Int /\ n \in -1..3
Sums == UNION {{x, 1 - x} : x \in Range(fn)} \subseteq {0, 1} /\ Max({0} \cup Range(fn)) <= 1
Few == Cardinality({m \in msgs : m.kind = "set"}) <= 1
Small == Len(log) <= 1 /\ Cardinality(msgs) <= 1
Counts == Counter!Spec
Never == ~(n = 3 /\ Len(log) = 2)
Symmetric == Permutations(A)
=============================================================================
