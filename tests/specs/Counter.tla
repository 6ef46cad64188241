------------------------------- MODULE Counter -------------------------------
(* What Constructs' n does: it grows, and starts again at the limit.           *)
EXTENDS Integers
CONSTANT Limit
VARIABLE value
Init == value = -1
Up == value' > value /\ value' <= Limit
Again == value = Limit /\ value' = -1
Next == Up \/ Again
Spec == Init /\ [][Next]_value
=============================================================================
