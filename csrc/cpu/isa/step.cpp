#include "../step.h"

#include "unit.h"

SFK_KERNEL(step, causal_step, StepParams)
