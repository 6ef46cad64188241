// The lifecycle as a shared object: cc -std=c99 -shared -fPIC lifecycle_c.c -o liblifecycle.so
// Rule: nothing stands here but the linkage; the functions are those of the generated header.
#define TOKENSPEED_C_API __attribute__((visibility("default")))
#include "lifecycle_c.h"
