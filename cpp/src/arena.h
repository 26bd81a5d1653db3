// Divides a workspace into aligned pieces.
#pragma once

#include <cstdint>

namespace rosa {

// One line of a GPU's caches, two lines of a CPU's.
constexpr int64_t kArenaAlignment = 128;

// Takes consecutive pieces from a workspace.
class Arena {
 public:
  explicit Arena(void* base) : next_(reinterpret_cast<uintptr_t>(base)) {}
  void* take(int64_t bytes) {
    next_ = (next_ + kArenaAlignment - 1) / kArenaAlignment * kArenaAlignment;
    void* piece = reinterpret_cast<void*>(next_);
    next_ += static_cast<uintptr_t>(bytes);
    return piece;
  }
  uintptr_t end() const { return next_; }

 private:
  uintptr_t next_;
};

// The bytes that `lay_out(arena)` takes in all, for a base of any alignment.
template <class LayOut>
int64_t bytes_of(const LayOut& lay_out) {
  Arena arena(nullptr);
  lay_out(arena);
  return static_cast<int64_t>(arena.end()) + kArenaAlignment - 1;
}

}  // namespace rosa
