// Threads for all that runs without torch. They must survive a fork.
#pragma once

#include "core/parallel.h"

namespace fastseq::deploy {

// A team of at most `threads`, from one pool per process that grows on demand and sleeps between calls. Calls from
// several Python threads take turns.
core::Team team(int threads);

}  // namespace fastseq::deploy
