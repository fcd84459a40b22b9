// The kernels of one instruction set as a table; `dispatch.cpp` chooses among the tables.
#include "kernels.h"

#define DECLARE(name, args) KERNEL(name) args;
EVERY_KERNEL(DECLARE)

#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
#define ENTRY(name, args) , JOINED(name, ISA)
extern "C" __attribute__((visibility("hidden"))) const Kernels JOINED(kernels, ISA) = {TEXT(ISA) EVERY_KERNEL(ENTRY)};
