// Fibers: stacks that one operating-system thread switches between, and what sanitizers must be
// told about that.
#pragma once

#include <cstddef>

// By hand, a thread passes a barrier in 25 ns; with ucontext, which makes system calls, in 280 ns.
#if defined(__x86_64__) && !defined(ROSA_SIMT_UCONTEXT)
#define ROSA_SIMT_OWN_SWITCH 1
#else
#define ROSA_SIMT_OWN_SWITCH 0
#include <ucontext.h>
#endif

namespace rosa::simt {

// Where a stack was left.
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

  // `main` never returns. `number` spreads the stacks' tops over the cache's sets: at the same
  // offset into its mapping, every stack would compete for the same few lines.
  Fiber(Main main, int number);
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void* thread = nullptr;  // whom it serves
  void* const identity;    // for ThreadSanitizer

 private:
  static void enter();

  Main main_;
  void* memory_;
};

// ThreadSanitizer's idea of a thread, null without it. Switching makes no thread happen before
// another: only barriers do, as on a GPU.
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

// While it lives, ThreadSanitizer does not look. For what the emulator keeps for itself: only one
// emulated thread runs at a time, whatever ThreadSanitizer is told.
class Quiet {
 public:
  Quiet();
  ~Quiet();
  Quiet(const Quiet&) = delete;
  Quiet& operator=(const Quiet&) = delete;
};

}  // namespace tsan

}  // namespace rosa::simt
