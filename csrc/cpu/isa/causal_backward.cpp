#include "../causal_backward.h"

#include "unit.h"

SFK_KERNEL(causal_backward, causal_backward, CausalParams)
