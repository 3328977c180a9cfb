#include "../masked/backward.h"
#include "unit.h"

SFK_KERNEL(masked_backward, masked_backward, MaskedParams)
