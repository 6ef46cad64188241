// The kernels for amx; CMakeLists.txt says which flags this file is compiled with.
#define TOKENSPEED_CPU_TABLE kAmx
#define TOKENSPEED_CPU_ISA "amx"
#include "kernels.inc"
