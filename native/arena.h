// Memory for weights, KV and activations: anonymous pages, 2 MB ones where the system gives them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace hayai {

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kSmallPage = 4096;
constexpr size_t kCacheLine = 64;

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Zeroed memory that is touched lazily. The start lies on a 2 MB border so that huge pages can back
// it from the first byte. One spare page follows the end, because kernels prefetch past it.
class Region {
public:
  Region() = default;
  Region(size_t bytes, bool huge) : size_(bytes) {
    if (bytes == 0) return;
#if defined(__linux__)
    mapped_ = round_up(bytes, kHugePage) + 2 * kHugePage;
    base_ =
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base_ == MAP_FAILED) {
      base_ = nullptr;
      throw std::bad_alloc();
    }
    start_ = reinterpret_cast<uint8_t *>(round_up(reinterpret_cast<uintptr_t>(base_), kHugePage));
    // Whole huge pages only: the last one would be all resident for a few bytes.
    if (huge) madvise(start_, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#else
    (void)huge;
    mapped_ = bytes + 2 * kHugePage;
    base_ = std::calloc(mapped_, 1);
    if (!base_) throw std::bad_alloc();
    start_ = reinterpret_cast<uint8_t *>(round_up(reinterpret_cast<uintptr_t>(base_), kCacheLine));
#endif
  }
  ~Region() { release(); }
  Region(const Region &) = delete;
  Region &operator=(const Region &) = delete;
  Region(Region &&other) noexcept { swap(other); }
  Region &operator=(Region &&other) noexcept {
    swap(other);
    return *this;
  }

  uint8_t *data() const { return start_; }
  size_t size() const { return size_; }

  // Gives the memory behind `used` bytes back to the system: what a huge page brought along.
  void trim(size_t used) {
#if defined(__linux__)
    const size_t keep = round_up(used, kSmallPage), end = round_up(size_, kSmallPage);
    if (base_ && keep < end) madvise(start_ + keep, end - keep, MADV_DONTNEED);
#else
    (void)used;
#endif
  }

private:
  void swap(Region &other) {
    std::swap(base_, other.base_);
    std::swap(start_, other.start_);
    std::swap(mapped_, other.mapped_);
    std::swap(size_, other.size_);
  }
  void release() {
    if (!base_) return;
#if defined(__linux__)
    munmap(base_, mapped_);
#else
    std::free(base_);
#endif
    base_ = nullptr;
  }

  void *base_ = nullptr;
  uint8_t *start_ = nullptr;
  size_t mapped_ = 0, size_ = 0;
};

// Hands out consecutive pieces of one region, each on a cache line.
class Arena {
public:
  Arena(size_t bytes, bool huge) : region_(bytes, huge) {}
  uint8_t *take(size_t bytes) {
    const size_t at = used_;
    used_ = round_up(used_ + bytes, kCacheLine);
    if (used_ > region_.size()) throw std::bad_alloc();
    return region_.data() + at;
  }
  float *take_floats(size_t count) { return reinterpret_cast<float *>(take(count * sizeof(float))); }
  size_t used() const { return used_; }
  void trim() { region_.trim(used_); }

private:
  Region region_;
  size_t used_ = 0;
};

} // namespace hayai
