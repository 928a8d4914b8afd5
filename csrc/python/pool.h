// Threads for the numpy door. It cannot borrow torch's, and must survive a fork.
#pragma once

#include "core/parallel.h"

namespace fastseq::python_door {

// A team of at most `threads`, from one pool per process that grows on demand and sleeps between calls. Calls from
// several Python threads take turns.
core::Team team(int threads);

}  // namespace fastseq::python_door
