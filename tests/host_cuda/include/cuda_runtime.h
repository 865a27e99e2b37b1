// Stands in for CUDA's header of this name where a .cu file is compiled as C++.
#pragma once

// What span.h and launch.h ask for.
#define RDARTS_ON_HOST

#include "on_host/arithmetic.h"
#include "on_host/atomics.h"
#include "on_host/keywords.h"
#include "on_host/launch.h"
#include "on_host/machine.h"
#include "on_host/memory.h"
#include "on_host/runtime.h"
#include "on_host/vectors.h"
#include "on_host/warp.h"
