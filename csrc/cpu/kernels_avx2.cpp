#define SFK_TABLE kAvx2Table
#define SFK_ISA "avx2"
#include "kernels.inc"
