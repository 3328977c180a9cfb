#include "../sinkhorn.h"

#include "unit.h"

SFK_KERNEL(sinkhorn, sinkhorn_forward, SinkhornParams)
SFK_KERNEL(started, started_forward, StartedParams)
SFK_KERNEL(sinkhorn_backward, sinkhorn_backward, SinkhornParams)
