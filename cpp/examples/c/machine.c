// The same table for C: a machine a request; what is no edge is refused, and the machine stays.
#include <stdio.h>
#include <tokenspeed/lifecycle_c.h>
int main(void) {
  static const int life[][2] = {
      {TOKENSPEED_ACTION_Submit, TOKENSPEED_STATE_Waiting},
      {TOKENSPEED_ACTION_Preempt, TOKENSPEED_STATE_Preempted},
      {TOKENSPEED_ACTION_Admit, TOKENSPEED_STATE_Prefilling},
      {TOKENSPEED_ACTION_Complete, TOKENSPEED_STATE_Finishing},
      {TOKENSPEED_ACTION_Release, TOKENSPEED_STATE_Finished},
  };
  tokenspeed_machine request = {0};
  for (size_t at = 0; at < sizeof life / sizeof *life; ++at) {
    const char* refused;
    tokenspeed_apply(&request, life[at][0], life[at][1], &refused);
    puts(refused ? refused : tokenspeed_state_name(request.state));
  }
}
