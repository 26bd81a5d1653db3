#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__SANITIZE_THREAD__)
#error "compile the emulator with -fno-sanitize=thread: it tells ThreadSanitizer what kernels do"
#endif

// Functions of the sanitizer that is linked in. Without a sanitizer they are null.
extern "C" {
__attribute__((weak)) void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom,
                                                          size_t size);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom,
                                                           size_t* size);
__attribute__((weak)) void* __tsan_create_fiber(unsigned flags);
__attribute__((weak)) void __tsan_destroy_fiber(void* fiber);
__attribute__((weak)) void* __tsan_get_current_fiber();
__attribute__((weak)) void __tsan_switch_to_fiber(void* fiber, unsigned flags);
__attribute__((weak)) void __tsan_release(void* address);
__attribute__((weak)) void __tsan_acquire(void* address);
__attribute__((weak)) void __tsan_read_range(void* address, unsigned long bytes);
__attribute__((weak)) void __tsan_write_range(void* address, unsigned long bytes);
__attribute__((weak)) void AnnotateIgnoreReadsBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreReadsEnd(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesBegin(const char* file, int line);
__attribute__((weak)) void AnnotateIgnoreWritesEnd(const char* file, int line);
}

namespace rosa::simt {
namespace {

// A stack takes memory only where it is touched. Kernels keep a few KiB of arrays there, and more
// without optimisation.
constexpr size_t kStackBytes = 256 * 1024;

// The two contexts of the switch under way.
thread_local Context* left = nullptr;
thread_local Context* entered = nullptr;

size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

void arrive(void* fake_stack) {
  if (__sanitizer_finish_switch_fiber != nullptr) {
    __sanitizer_finish_switch_fiber(fake_stack, &left->bottom, &left->size);
  }
}

}  // namespace

#if ROSA_SIMT_OWN_SWITCH

// Saves the registers that a called function must preserve, changes stacks, and restores them. The
// first switch to a fiber returns into its entry function.
extern "C" void rosa_simt_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type rosa_simt_switch, @function
rosa_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rosa_simt_switch, . - rosa_simt_switch
)");

#endif

void switch_context(Context& from, Context& to) {
  left = &from;
  entered = &to;
  if (__sanitizer_start_switch_fiber != nullptr) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.size);
  }
#if ROSA_SIMT_OWN_SWITCH
  rosa_simt_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.state, &to.state);
#endif
  arrive(from.fake_stack);
}

Fiber::Fiber(Main main, int number) : identity(tsan::create()), main_(main) {
  // The page below the stack stays inaccessible, so that a stack overflow is a fault.
  const size_t page = page_bytes();
  memory_ = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory_ == MAP_FAILED || mprotect(memory_, page, PROT_NONE) != 0) throw std::bad_alloc();
  char* low = static_cast<char*>(memory_) + page;
  bottom = low;
  size = kStackBytes - static_cast<size_t>(number) * 320 % 4096 / 64 * 64;
#if ROSA_SIMT_OWN_SWITCH
  void** top = reinterpret_cast<void**>(low + size);
  *--top = nullptr;  // enter()'s return address: null ends backtraces, and aligns its frame
  *--top = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer = top;
#else
  getcontext(&state);
  state.uc_stack.ss_sp = low;
  state.uc_stack.ss_size = size;
  state.uc_link = nullptr;
  makecontext(&state, &Fiber::enter, 0);
#endif
}

Fiber::~Fiber() {
  tsan::destroy(identity);
  munmap(memory_, kStackBytes + page_bytes());
}

void Fiber::enter() {
  arrive(nullptr);
  Fiber& fiber = *static_cast<Fiber*>(entered);
  fiber.main_(fiber);
  std::abort();
}

namespace tsan {

bool active() { return __tsan_create_fiber != nullptr; }
void* create() { return active() ? __tsan_create_fiber(0) : nullptr; }
void destroy(void* thread) {
  if (active()) __tsan_destroy_fiber(thread);
}
void* current() { return active() ? __tsan_get_current_fiber() : nullptr; }
void switch_to(void* thread) {
  constexpr unsigned kNoSync = 1;
  if (active()) __tsan_switch_to_fiber(thread, kNoSync);
}
void release(void* address) {
  if (active()) __tsan_release(address);
}
void acquire(void* address) {
  if (active()) __tsan_acquire(address);
}
void read(const void* address, size_t bytes) {
  if (active()) __tsan_read_range(const_cast<void*>(address), bytes);
}
void write(void* address, size_t bytes) {
  if (active()) __tsan_write_range(address, bytes);
}

Quiet::Quiet() {
  if (!active()) return;
  AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
  AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
}
Quiet::~Quiet() {
  if (!active()) return;
  AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
}

}  // namespace tsan

}  // namespace rosa::simt
