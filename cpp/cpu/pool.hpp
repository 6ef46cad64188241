// Threads that share the work of one call.
//
// Rule: the caller works too and waits for nobody who has not begun, so a call ends with no worker
// at all (after a fork, on a busy machine). Workers spin for a moment between two calls of a step,
// then sleep. One call at a time shares its work; one that comes beside it does its own.
#pragma once

#include <cstdint>

namespace tokenspeed::cpu {

// Does items [begin, end) of a call.
using Work = void (*)(void* of, std::int64_t begin, std::int64_t end);

// Runs `work` on [0, items) in pieces of `piece`, on up to `threads` threads.
void share(Work work, void* of, std::int64_t items, std::int64_t piece, int threads);

// The same for a function object.
template <class Function>
void share(std::int64_t items, std::int64_t piece, int threads, Function& function) {
  share([](void* of, std::int64_t begin,
           std::int64_t end) { (*static_cast<Function*>(of))(begin, end); },
        &function, items, piece, threads);
}

}  // namespace tokenspeed::cpu
