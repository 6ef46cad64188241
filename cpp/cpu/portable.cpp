// The kernels for portable; CMakeLists.txt says which flags this file is compiled with.
#define TOKENSPEED_CPU_TABLE kPortable
#define TOKENSPEED_CPU_ISA "portable"
#include "kernels.inc"
