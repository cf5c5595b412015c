// Runs independent tasks on several threads. Which thread runs a task never decides what the task computes.
#pragma once

#include <stdint.h>

namespace cloq {

// Call body(context, task) once for every task in 0 .. tasks-1, on at most `threads` threads including the caller.
void parallel_for(int64_t tasks, int threads, void (*body)(void* context, int64_t task), void* context);

// In words, for describe().
const char* threading();

}  // namespace cloq
