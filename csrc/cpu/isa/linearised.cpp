#include "../linearised.h"

#include "unit.h"

SFK_KERNEL(linearised, linearised_pass, LinearisedParams)
