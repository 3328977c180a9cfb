#include "../attention.h"

#include "unit.h"

SFK_KERNEL(attention, attention_forward, AttentionParams)
