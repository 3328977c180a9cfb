#include "../masked/forward.h"
#include "unit.h"

SFK_KERNEL(masked, masked_forward, MaskedParams)
