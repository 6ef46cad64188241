---------------------------- MODULE MCLifecycle ----------------------------
(* Bounded models of Lifecycle: every request has the same prompt and would  *)
(* generate the same, so that all of its pages can be shared.                *)
EXTENDS Lifecycle
CONSTANTS k1, k2, k3, k4, PLen, MLen
MCContent == [r \in Req |-> SubSeq(<<k1, k2, k3, k4>>, 1, MLen)]
MCPromptLen == [r \in Req |-> PLen]
=============================================================================
