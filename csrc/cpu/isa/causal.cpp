#include "../causal.h"

#include "unit.h"

SFK_KERNEL(causal, causal_forward, CausalParams)
