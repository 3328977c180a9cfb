#include "../attention_backward.h"

#include "unit.h"

SFK_KERNEL(attention_backward, attention_backward, AttentionParams)
