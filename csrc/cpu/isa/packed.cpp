#include "../packed.h"

#include "unit.h"

SFK_KERNEL(packed, packed_forward, PackedStreamParams)
SFK_KERNEL(packed_backward, packed_backward, PackedStreamParams)
