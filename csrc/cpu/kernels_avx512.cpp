#define SFK_TABLE kAvx512Table
#define SFK_ISA "avx512"
#include "kernels.inc"
