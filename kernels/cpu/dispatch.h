#pragma once
#include "kernels.h"

// The kernels of the best instruction set that this processor has; throws std::runtime_error when
// ONEMESH_CPU_ISA names none of them.
const Kernels& kernels();
