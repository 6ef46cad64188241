// GENERATED from specs/Lifecycle.tla by `tokenspeed codegen`. Do not edit: change the spec.
//
// Rule: a machine moves only along the spec's `Edges`; a move outside of them is refused with a
// sentence, and the machine stays where it is. C99 and C++; compile lifecycle_c.c to export it.
#ifndef TOKENSPEED_LIFECYCLE_C_H
#define TOKENSPEED_LIFECYCLE_C_H

#include <stdbool.h>
#include <stddef.h>

#define TOKENSPEED_SPEC "specs/Lifecycle.tla"
#define TOKENSPEED_SPEC_HASH "26ab8f68eb7683c2e7500ac4e48bb5d9f3a508b6035e7f4a67cae58eb1ab6155"
#define TOKENSPEED_SPEC_VERSION "2.0.1"

// How the functions are declared: each includer has its own, unless it exports them.
#ifndef TOKENSPEED_C_API
#define TOKENSPEED_C_API static inline
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Which spec this is, for callers that cannot read the macros.
TOKENSPEED_C_API const char* tokenspeed_spec(void) {
  return TOKENSPEED_SPEC;
}
TOKENSPEED_C_API const char* tokenspeed_spec_hash(void) {
  return TOKENSPEED_SPEC_HASH;
}
TOKENSPEED_C_API const char* tokenspeed_spec_version(void) {
  return TOKENSPEED_SPEC_VERSION;
}

enum tokenspeed_state {
  TOKENSPEED_STATE_New,
  TOKENSPEED_STATE_Waiting,
  TOKENSPEED_STATE_Prefilling,
  TOKENSPEED_STATE_Decoding,
  TOKENSPEED_STATE_Preempted,
  TOKENSPEED_STATE_Finishing,
  TOKENSPEED_STATE_Aborting,
  TOKENSPEED_STATE_Finished,
  TOKENSPEED_STATE_Aborted,
};
#define TOKENSPEED_STATES 9
// Its name in the spec; NULL for a number that is none.
TOKENSPEED_C_API const char* tokenspeed_state_name(int state) {
  static const char* const names[TOKENSPEED_STATES] = {
      "New",       "Waiting",  "Prefilling", "Decoding", "Preempted",
      "Finishing", "Aborting", "Finished",   "Aborted",
  };
  return state >= 0 && state < TOKENSPEED_STATES ? names[state] : NULL;
}

enum tokenspeed_action {
  TOKENSPEED_ACTION_Submit,
  TOKENSPEED_ACTION_Admit,
  TOKENSPEED_ACTION_Acquire,
  TOKENSPEED_ACTION_Schedule,
  TOKENSPEED_ACTION_Complete,
  TOKENSPEED_ACTION_Publish,
  TOKENSPEED_ACTION_Preempt,
  TOKENSPEED_ACTION_Abort,
  TOKENSPEED_ACTION_Release,
};
#define TOKENSPEED_ACTIONS 9
// Its name in the spec; NULL for a number that is none.
TOKENSPEED_C_API const char* tokenspeed_action_name(int action) {
  static const char* const names[TOKENSPEED_ACTIONS] = {
      "Submit",  "Admit",   "Acquire", "Schedule", "Complete",
      "Publish", "Preempt", "Abort",   "Release",
  };
  return action >= 0 && action < TOKENSPEED_ACTIONS ? names[action] : NULL;
}

// What a request may hold, as bits.
enum tokenspeed_resource {
  TOKENSPEED_OWNS_Slot = 1 << 0,
  TOKENSPEED_OWNS_Pages = 1 << 1,
};

// The spec's `Edges`.
TOKENSPEED_C_API bool tokenspeed_edge(int action, int from, int to) {
  switch (action) {
    case TOKENSPEED_ACTION_Submit:
      return (from == TOKENSPEED_STATE_New && to == TOKENSPEED_STATE_Waiting);
    case TOKENSPEED_ACTION_Admit:
      return (from == TOKENSPEED_STATE_Waiting && to == TOKENSPEED_STATE_Prefilling) ||
             (from == TOKENSPEED_STATE_Preempted && to == TOKENSPEED_STATE_Prefilling);
    case TOKENSPEED_ACTION_Acquire:
      return (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Prefilling) ||
             (from == TOKENSPEED_STATE_Decoding && to == TOKENSPEED_STATE_Decoding);
    case TOKENSPEED_ACTION_Schedule:
      return (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Prefilling) ||
             (from == TOKENSPEED_STATE_Decoding && to == TOKENSPEED_STATE_Decoding);
    case TOKENSPEED_ACTION_Complete:
      return (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Prefilling) ||
             (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Decoding) ||
             (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Finishing) ||
             (from == TOKENSPEED_STATE_Decoding && to == TOKENSPEED_STATE_Decoding) ||
             (from == TOKENSPEED_STATE_Decoding && to == TOKENSPEED_STATE_Finishing) ||
             (from == TOKENSPEED_STATE_Finishing && to == TOKENSPEED_STATE_Finishing) ||
             (from == TOKENSPEED_STATE_Aborting && to == TOKENSPEED_STATE_Aborting);
    case TOKENSPEED_ACTION_Publish:
      return (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Prefilling) ||
             (from == TOKENSPEED_STATE_Decoding && to == TOKENSPEED_STATE_Decoding) ||
             (from == TOKENSPEED_STATE_Finishing && to == TOKENSPEED_STATE_Finishing);
    case TOKENSPEED_ACTION_Preempt:
      return (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Preempted) ||
             (from == TOKENSPEED_STATE_Decoding && to == TOKENSPEED_STATE_Preempted);
    case TOKENSPEED_ACTION_Abort:
      return (from == TOKENSPEED_STATE_Waiting && to == TOKENSPEED_STATE_Aborted) ||
             (from == TOKENSPEED_STATE_Prefilling && to == TOKENSPEED_STATE_Aborting) ||
             (from == TOKENSPEED_STATE_Decoding && to == TOKENSPEED_STATE_Aborting) ||
             (from == TOKENSPEED_STATE_Preempted && to == TOKENSPEED_STATE_Aborted);
    case TOKENSPEED_ACTION_Release:
      return (from == TOKENSPEED_STATE_Finishing && to == TOKENSPEED_STATE_Finished) ||
             (from == TOKENSPEED_STATE_Aborting && to == TOKENSPEED_STATE_Aborted);
    default:
      return false;
  }
}

// Is there any move of this action out of this state?
TOKENSPEED_C_API bool tokenspeed_can(int action, int from) {
  for (int to = 0; to < TOKENSPEED_STATES; ++to) {
    if (tokenspeed_edge(action, from, to)) return true;
  }
  return false;
}

// Does nothing lead out of this state?
TOKENSPEED_C_API bool tokenspeed_ended(int state) {
  for (int action = 0; action < TOKENSPEED_ACTIONS; ++action) {
    if (tokenspeed_can(action, state)) return false;
  }
  return tokenspeed_state_name(state) != NULL;
}

// The spec's `Owns`: the TOKENSPEED_OWNS_ bits of what a request in this state holds.
TOKENSPEED_C_API unsigned tokenspeed_owns(int state) {
  switch (state) {
    case TOKENSPEED_STATE_Prefilling:
    case TOKENSPEED_STATE_Decoding:
    case TOKENSPEED_STATE_Finishing:
    case TOKENSPEED_STATE_Aborting:
      return TOKENSPEED_OWNS_Slot | TOKENSPEED_OWNS_Pages;
    default:
      return 0;
  }
}

// How a sentence ends about an action that a state does not have.
#define TOKENSPEED_NOT_IN_New " is not legal in New. Legal here: Submit. See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Waiting \
  " is not legal in Waiting. Legal here: Admit, Abort. See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Prefilling                                                         \
  " is not legal in Prefilling. Legal here: Acquire, Schedule, Complete, Publish, Preempt, " \
  "Abort. See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Decoding                                                                \
  " is not legal in Decoding. Legal here: Acquire, Schedule, Complete, Publish, Preempt, Abort. " \
  "See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Preempted \
  " is not legal in Preempted. Legal here: Admit, Abort. See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Finishing \
  " is not legal in Finishing. Legal here: Complete, Publish, Release. See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Aborting \
  " is not legal in Aborting. Legal here: Complete, Release. See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Finished \
  " is not legal in Finished. Legal here: nothing. See specs/Lifecycle.tla"
#define TOKENSPEED_NOT_IN_Aborted \
  " is not legal in Aborted. Legal here: nothing. See specs/Lifecycle.tla"

// Why a move is not in the table: a sentence that names it and the spec; NULL if it is there.
TOKENSPEED_C_API const char* tokenspeed_refusal(int action, int from, int to) {
  static const char* const sentences[TOKENSPEED_ACTIONS][TOKENSPEED_STATES] = {
      {"Submit leads from New only to Waiting. See specs/Lifecycle.tla",
       "Submit" TOKENSPEED_NOT_IN_Waiting, "Submit" TOKENSPEED_NOT_IN_Prefilling,
       "Submit" TOKENSPEED_NOT_IN_Decoding, "Submit" TOKENSPEED_NOT_IN_Preempted,
       "Submit" TOKENSPEED_NOT_IN_Finishing, "Submit" TOKENSPEED_NOT_IN_Aborting,
       "Submit" TOKENSPEED_NOT_IN_Finished, "Submit" TOKENSPEED_NOT_IN_Aborted},
      {"Admit" TOKENSPEED_NOT_IN_New,
       "Admit leads from Waiting only to Prefilling. See specs/Lifecycle.tla",
       "Admit" TOKENSPEED_NOT_IN_Prefilling, "Admit" TOKENSPEED_NOT_IN_Decoding,
       "Admit leads from Preempted only to Prefilling. See specs/Lifecycle.tla",
       "Admit" TOKENSPEED_NOT_IN_Finishing, "Admit" TOKENSPEED_NOT_IN_Aborting,
       "Admit" TOKENSPEED_NOT_IN_Finished, "Admit" TOKENSPEED_NOT_IN_Aborted},
      {"Acquire" TOKENSPEED_NOT_IN_New, "Acquire" TOKENSPEED_NOT_IN_Waiting,
       "Acquire leads from Prefilling only to Prefilling. See specs/Lifecycle.tla",
       "Acquire leads from Decoding only to Decoding. See specs/Lifecycle.tla",
       "Acquire" TOKENSPEED_NOT_IN_Preempted, "Acquire" TOKENSPEED_NOT_IN_Finishing,
       "Acquire" TOKENSPEED_NOT_IN_Aborting, "Acquire" TOKENSPEED_NOT_IN_Finished,
       "Acquire" TOKENSPEED_NOT_IN_Aborted},
      {"Schedule" TOKENSPEED_NOT_IN_New, "Schedule" TOKENSPEED_NOT_IN_Waiting,
       "Schedule leads from Prefilling only to Prefilling. See specs/Lifecycle.tla",
       "Schedule leads from Decoding only to Decoding. See specs/Lifecycle.tla",
       "Schedule" TOKENSPEED_NOT_IN_Preempted, "Schedule" TOKENSPEED_NOT_IN_Finishing,
       "Schedule" TOKENSPEED_NOT_IN_Aborting, "Schedule" TOKENSPEED_NOT_IN_Finished,
       "Schedule" TOKENSPEED_NOT_IN_Aborted},
      {"Complete" TOKENSPEED_NOT_IN_New, "Complete" TOKENSPEED_NOT_IN_Waiting,
       "Complete leads from Prefilling only to Prefilling, Decoding, Finishing. See "
       "specs/Lifecycle.tla",
       "Complete leads from Decoding only to Decoding, Finishing. See specs/Lifecycle.tla",
       "Complete" TOKENSPEED_NOT_IN_Preempted,
       "Complete leads from Finishing only to Finishing. See specs/Lifecycle.tla",
       "Complete leads from Aborting only to Aborting. See specs/Lifecycle.tla",
       "Complete" TOKENSPEED_NOT_IN_Finished, "Complete" TOKENSPEED_NOT_IN_Aborted},
      {"Publish" TOKENSPEED_NOT_IN_New, "Publish" TOKENSPEED_NOT_IN_Waiting,
       "Publish leads from Prefilling only to Prefilling. See specs/Lifecycle.tla",
       "Publish leads from Decoding only to Decoding. See specs/Lifecycle.tla",
       "Publish" TOKENSPEED_NOT_IN_Preempted,
       "Publish leads from Finishing only to Finishing. See specs/Lifecycle.tla",
       "Publish" TOKENSPEED_NOT_IN_Aborting, "Publish" TOKENSPEED_NOT_IN_Finished,
       "Publish" TOKENSPEED_NOT_IN_Aborted},
      {"Preempt" TOKENSPEED_NOT_IN_New, "Preempt" TOKENSPEED_NOT_IN_Waiting,
       "Preempt leads from Prefilling only to Preempted. See specs/Lifecycle.tla",
       "Preempt leads from Decoding only to Preempted. See specs/Lifecycle.tla",
       "Preempt" TOKENSPEED_NOT_IN_Preempted, "Preempt" TOKENSPEED_NOT_IN_Finishing,
       "Preempt" TOKENSPEED_NOT_IN_Aborting, "Preempt" TOKENSPEED_NOT_IN_Finished,
       "Preempt" TOKENSPEED_NOT_IN_Aborted},
      {"Abort" TOKENSPEED_NOT_IN_New,
       "Abort leads from Waiting only to Aborted. See specs/Lifecycle.tla",
       "Abort leads from Prefilling only to Aborting. See specs/Lifecycle.tla",
       "Abort leads from Decoding only to Aborting. See specs/Lifecycle.tla",
       "Abort leads from Preempted only to Aborted. See specs/Lifecycle.tla",
       "Abort" TOKENSPEED_NOT_IN_Finishing, "Abort" TOKENSPEED_NOT_IN_Aborting,
       "Abort" TOKENSPEED_NOT_IN_Finished, "Abort" TOKENSPEED_NOT_IN_Aborted},
      {"Release" TOKENSPEED_NOT_IN_New, "Release" TOKENSPEED_NOT_IN_Waiting,
       "Release" TOKENSPEED_NOT_IN_Prefilling, "Release" TOKENSPEED_NOT_IN_Decoding,
       "Release" TOKENSPEED_NOT_IN_Preempted,
       "Release leads from Finishing only to Finished. See specs/Lifecycle.tla",
       "Release leads from Aborting only to Aborted. See specs/Lifecycle.tla",
       "Release" TOKENSPEED_NOT_IN_Finished, "Release" TOKENSPEED_NOT_IN_Aborted},
  };
  if (tokenspeed_edge(action, from, to)) return NULL;
  if (!tokenspeed_state_name(from) || !tokenspeed_state_name(to)) {
    return "no such state. See specs/Lifecycle.tla";
  }
  if (!tokenspeed_action_name(action)) return "no such action. See specs/Lifecycle.tla";
  return sentences[action][from];
}

// One request. Zeroed memory is a request that nobody knows yet: the start of the table.
typedef struct tokenspeed_machine {
  int state;  // a tokenspeed_state: New = 0
} tokenspeed_machine;

enum tokenspeed_status {
  TOKENSPEED_OK = 0,
  TOKENSPEED_ILLEGAL = 1,    // the action is not legal in the machine's state
  TOKENSPEED_ELSEWHERE = 2,  // it is, but does not lead to there
  TOKENSPEED_UNKNOWN = 3,    // a number that is no action or no state
};

// Move along an edge; a tokenspeed_status. If it is not TOKENSPEED_OK the machine stays, and *error
// is the sentence (static, never freed). `error` may be NULL, `machine` may not.
TOKENSPEED_C_API int tokenspeed_apply(tokenspeed_machine* machine, int action, int to,
                                      const char** error) {
  const int from = machine->state;
  const char* const refused = tokenspeed_refusal(action, from, to);
  if (error) *error = refused;
  if (!refused) {
    machine->state = to;
    return TOKENSPEED_OK;
  }
  if (!tokenspeed_action_name(action) || !tokenspeed_state_name(from) ||
      !tokenspeed_state_name(to)) {
    return TOKENSPEED_UNKNOWN;
  }
  return tokenspeed_can(action, from) ? TOKENSPEED_ELSEWHERE : TOKENSPEED_ILLEGAL;
}

#ifdef __cplusplus
}
#endif

#endif  // TOKENSPEED_LIFECYCLE_C_H
