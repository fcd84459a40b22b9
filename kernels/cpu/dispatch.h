#pragma once
#include "kernels.h"

// The kernels of the best instruction set that this processor has; throws std::runtime_error when there are none.
const Kernels& kernels();
