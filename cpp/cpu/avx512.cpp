// The kernels for avx512-vnni; CMakeLists.txt says which flags this file is compiled with.
#define TOKENSPEED_CPU_TABLE kAvx512Vnni
#define TOKENSPEED_CPU_ISA "avx512-vnni"
#include "kernels.inc"
