// One kernel per tile, number type and direction of the computation, each compiled in a file of its own. The included
// bodies need the names of device.cuh.
#pragma once

#include "cuda/device.cuh"
// first what the bodies use
#include "cuda/exchange.h"
#include "cuda/lstm_persist.h"
#include "cuda/persist_tile.h"
// then what both share
#include "cuda/persist_cell.inl.h"

namespace fastseq::cuda {

struct Kernel {
  const void* function;
  size_t shared;
};
Kernel forward_bfloat16(int tile);
Kernel forward_float16(int tile);
Kernel backward_bfloat16(int tile);
Kernel backward_float16(int tile);

}  // namespace fastseq::cuda
