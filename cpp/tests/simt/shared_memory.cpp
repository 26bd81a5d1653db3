// Shared memory: where it is, what it holds before a block begins, and what lies past its end.
#include <cstdlib>
#include <cstring>
#include <new>

#include "simt/state.h"

#ifndef __has_feature
#define __has_feature(x) 0
#endif

namespace rosa::simt {
namespace {

// All ones is NaN in every floating-point type, and -1 as an integer.
constexpr unsigned char kPoison = 0xFF;
// Fills the bytes past the end, if there is no AddressSanitizer.
constexpr unsigned char kGuard = 0xA5;
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
constexpr int64_t kGuardBytes = 0;
#else
constexpr int64_t kGuardBytes = 64;
#endif
constexpr int64_t kDynamicAlignment = 1024, kStaticAlignment = 16;
constexpr int64_t kWindowAlignment = 1024;

int64_t round_up(int64_t bytes, int64_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

void SharedMemory::Region::allocate(int64_t alignment) {
  void* memory = nullptr;
  if (posix_memalign(&memory, static_cast<size_t>(alignment),
                     static_cast<size_t>(bytes + kGuardBytes)) != 0) {
    throw std::bad_alloc();
  }
  data = static_cast<unsigned char*>(memory);
  std::memset(data + bytes, kGuard, static_cast<size_t>(kGuardBytes));
}

void SharedMemory::Region::poison() { std::memset(data, kPoison, static_cast<size_t>(bytes)); }

void SharedMemory::begin_block(int64_t dynamic_bytes, int64_t limit) {
  limit_ = limit;
  if (dynamic_.bytes != dynamic_bytes || dynamic_.data == nullptr) {
    std::free(dynamic_.data);
    dynamic_.data = nullptr;
    dynamic_.bytes = dynamic_bytes;
    dynamic_.allocate(kDynamicAlignment);
  }
  dynamic_.poison();
  for (Region& region : static_) region.used = false;
  static_bytes_ = 0;
  if (tsan::active()) {
    arena_.bytes = kDefaultSharedBytes;
    arena_.allocate(kStaticAlignment);
    arena_.poison();
  }
}

void* SharedMemory::declared(const void* declaration, int64_t bytes) {
  const tsan::Quiet quiet;
  Region* region = nullptr;
  for (Region& known : static_) {
    if (known.declaration == declaration) region = &known;
  }
  if (region != nullptr && region->used) return region->data;
  const int64_t offset = round_up(static_bytes_, kStaticAlignment);
  if (offset + bytes > kDefaultSharedBytes ||
      round_up(dynamic_.bytes, kStaticAlignment) + offset + bytes > limit_) {
    return nullptr;
  }
  if (region == nullptr) {
    static_.emplace_back();
    region = &static_.back();
    region->declaration = declaration;
    region->bytes = bytes;
    if (arena_.data == nullptr) region->allocate(kStaticAlignment);
  }
  region->used = true;
  region->address = static_cast<uint32_t>(round_up(dynamic_.bytes, kWindowAlignment) + offset);
  static_bytes_ = offset + bytes;
  if (arena_.data != nullptr) {
    region->data = arena_.data + offset;
  } else {
    region->poison();
  }
  return region->data;
}

bool SharedMemory::intact() const {
  const auto whole = [](const Region& region) {
    for (int64_t i = 0; i < kGuardBytes; ++i) {
      if (region.data[region.bytes + i] != kGuard) return false;
    }
    return true;
  };
  bool intact = whole(dynamic_);
  if (arena_.data != nullptr) return intact && whole(arena_);
  for (const Region& region : static_) intact = intact && whole(region);
  return intact;
}

void SharedMemory::release() {
  std::free(dynamic_.data);
  dynamic_ = {};
  if (arena_.data == nullptr) {
    for (const Region& region : static_) std::free(region.data);
  }
  static_.clear();
  std::free(arena_.data);
  arena_ = {};
}

bool SharedMemory::find(const void* pointer, int64_t bytes, uint32_t* address) const {
  const unsigned char* at = static_cast<const unsigned char*>(pointer);
  const auto inside = [&](const Region& region) {
    return at >= region.data && at + bytes <= region.data + region.bytes;
  };
  const Region* found = inside(dynamic_) ? &dynamic_ : nullptr;
  for (const Region& region : static_) {
    if (region.used && inside(region)) found = &region;
  }
  if (found == nullptr) return false;
  *address = found->address + static_cast<uint32_t>(at - found->data);
  return true;
}

unsigned char* SharedMemory::at(uint32_t address, int64_t bytes) const {
  const auto holds = [&](const Region& region) {
    return address >= region.address && address + bytes <= region.address + region.bytes;
  };
  if (holds(dynamic_)) return dynamic_.data + address;
  for (const Region& region : static_) {
    if (region.used && holds(region)) return region.data + (address - region.address);
  }
  return nullptr;
}

unsigned char* dynamic_shared() { return here().shared.dynamic(); }

void* static_shared(const void* declaration, int64_t bytes, Where where) {
  Block& block = here();
  void* data = block.shared.declared(declaration, bytes);
  if (data == nullptr) {
    block.fail(where, "static shared memory exceeds " + std::to_string(kDefaultSharedBytes) +
                          " bytes, or with the dynamic part it is more than the " +
                          std::to_string(block.shared.limit()) + " bytes of this launch");
  }
  return data;
}

uint32_t shared_address(const void* pointer, Where where) {
  uint32_t address = 0;
  if (!here().shared.find(pointer, 1, &address)) {
    here().fail(where, "the address is not shared memory");
  }
  return address;
}

}  // namespace rosa::simt
