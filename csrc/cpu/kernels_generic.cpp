#define SFK_TABLE kGenericTable
#define SFK_ISA "generic"
#include "kernels.inc"
