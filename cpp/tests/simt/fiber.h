// Fibers: stacks that one operating-system thread switches between. The sanitizers are told of
// every switch.
#pragma once

#include <cstddef>

// With the assembly switch, a thread passes a barrier in 25 ns. With ucontext, which makes system
// calls, it takes 280 ns.
#if defined(__x86_64__) && !defined(ROSA_SIMT_UCONTEXT)
#define ROSA_SIMT_OWN_SWITCH 1
#else
#define ROSA_SIMT_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace rosa::simt {

// The place at which a stack was left.
struct Context {
#if ROSA_SIMT_OWN_SWITCH
  void* stack_pointer = nullptr;
#else
  ucontext_t state;
#endif
  // For AddressSanitizer.
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake_stack = nullptr;
};

// Leaves `from` and goes on in `to`; returns when something switches back to `from`.
void switch_context(Context& from, Context& to);

class Fiber : public Context {
 public:
  using Main = void (*)(Fiber&);

  // `main` never returns. `number` shifts the top of the stack, so that stacks are spread over the
  // cache's sets. Without the shift, all stacks would compete for the same few lines.
  Fiber(Main main, int number);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void* thread = nullptr;  // the emulated thread that it runs
  void* const identity;    // for ThreadSanitizer

 private:
  static void enter();

  Main main_;
  void* memory_;
};

// ThreadSanitizer's handles of threads. They are null without ThreadSanitizer. A switch does not
// make one thread happen before another. Only barriers do, as on a GPU.
namespace tsan {

bool active();
void* create();
void destroy(void* thread);
void* current();
void switch_to(void* thread);
void release(void* address);
void acquire(void* address);
void read(const void* address, size_t bytes);
void write(void* address, size_t bytes);

// While it lives, ThreadSanitizer ignores accesses. It is for the emulator's own data, on which
// there are no races: only one emulated thread runs at a time, whatever ThreadSanitizer is told.
class Quiet {
 public:
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

}  // namespace tsan

}  // namespace rosa::simt
