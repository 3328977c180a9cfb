#include "../features.h"

#include "unit.h"

SFK_KERNEL(features, features_forward, FeatureParams)
SFK_KERNEL(features_backward, features_backward, FeatureParams)
