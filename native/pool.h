// Threads that run one job together, and the barrier they meet at.
//
// A decode step has about 150 barriers and lasts a millisecond or two, so waiting must cost well under
// a microsecond while everybody runs. But a thread that spins for a partner that has lost its core
// burns the very time the partner needs. Hence three stages: spin (kSpinNs), yield (kYieldNs), sleep.
// What a thread lost to others on its core is wall time less its own CPU time less its waits; when steps
// keep losing time that way the governor drops to fewer threads, and tries again later. (Waiting alone is
// no sign: a partner may simply have had more to do.)
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace hayai {

constexpr int64_t kSpinNs = 20'000, kYieldNs = 100'000;

int64_t now_ns();
int64_t thread_cpu_ns(); // CPU time of the calling thread; 0 where the system can't tell

// A 32-bit word that threads wait on until it changes.
class WaitWord {
public:
  uint32_t load() const { return value_.load(std::memory_order_acquire); }
  // Blocks until the value differs from `seen`; returns nanoseconds waited beyond the spin stage (0 if
  // the word changed while spinning).
  int64_t wait_change(uint32_t seen);
  void advance();

private:
  alignas(64) std::atomic<uint32_t> value_{0};
  std::atomic<uint32_t> sleepers_{0};
};

class Pool {
public:
  explicit Pool(int max_threads);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int max_threads() const { return max_threads_; }
  // Runs job(thread) on `threads` threads, the caller being thread 0; returns when all are done.
  void run(int threads, const std::function<void(int)> &job);
  // For use inside a job: returns when all threads of the job have arrived.
  void barrier(int thread);
  // Of the last job: the most that a thread lost to others on its core, and all waits beyond spinning.
  int64_t lost_ns() const { return lost_.load(std::memory_order_relaxed); }
  int64_t waited_ns() const { return waited_.load(std::memory_order_relaxed); }

private:
  void stop();
  void worker(int thread);
  void work(int thread);

  const int max_threads_;
  const int64_t process_; // whose threads these are
  int active_ = 1;
  const std::function<void(int)> *job_ = nullptr;
  alignas(64) std::atomic<int> arrived_{0};
  WaitWord generation_;
  WaitWord start_;
  alignas(64) std::atomic<int> finished_{0};
  WaitWord done_;
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> lost_{0}, waited_{0};
  struct alignas(64) ThreadWait {
    int64_t ns = 0;
  };
  std::vector<ThreadWait> waits_;
  std::vector<std::thread> threads_;
};

// How many threads the next step should use. Pure logic, fed with what each step saw.
class Governor {
public:
  explicit Governor(int max_threads) : max_threads_(max_threads), current_(max_threads) {}
  int threads() const { return current_; }
  void step_done(int threads, int64_t lost_ns, int64_t step_ns);

private:
  static constexpr int kPatience = 3, kFirstPause = 64, kLongestPause = 2048;
  static constexpr int64_t kMinLostNs = 300'000; // less is an interrupt
  const int max_threads_;
  int current_;
  int bad_ = 0;             // steps that lost time lately; one clean step takes one back
  int pause_ = kFirstPause; // steps to stay low before trying again
  int until_retry_ = 0;
  int clean_ = 0;
};

} // namespace hayai
