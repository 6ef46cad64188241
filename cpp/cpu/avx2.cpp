// The kernels for avx2; CMakeLists.txt says which flags this file is compiled with.
#define TOKENSPEED_CPU_TABLE kAvx2
#define TOKENSPEED_CPU_ISA "avx2"
#include "kernels.inc"
