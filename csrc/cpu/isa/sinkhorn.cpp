#include "../sinkhorn.h"

#include "unit.h"

SFK_KERNEL(sinkhorn, sinkhorn_forward, SinkhornParams)
SFK_KERNEL(sinkhorn_backward, sinkhorn_backward, SinkhornParams)
