#include "pool.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#endif

namespace hayai {

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

#if defined(__linux__)
int64_t thread_cpu_ns() {
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}
#else
int64_t thread_cpu_ns() { return 0; }
#endif

#if defined(__unix__) || defined(__APPLE__)
static int64_t process_id() { return getpid(); }
#else
static int64_t process_id() { return 0; }
#endif

static inline void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

#if defined(__linux__)
static void futex_wait(std::atomic<uint32_t> *word, uint32_t seen) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}
static void futex_wake_all(std::atomic<uint32_t> *word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t *>(word), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}
static void yield_core() { sched_yield(); }
#else
static void futex_wait(std::atomic<uint32_t> *, uint32_t) {
  std::this_thread::sleep_for(std::chrono::microseconds(200));
}
static void futex_wake_all(std::atomic<uint32_t> *) {}
static void yield_core() { std::this_thread::yield(); }
#endif

int64_t WaitWord::wait_change(uint32_t seen) {
  // The clock is read every 64 pauses only: reading it costs as much as the wait usually lasts.
  int64_t started = 0;
  for (;;) {
    for (int i = 0; i < 64; i++) {
      if (load() != seen) return 0;
      cpu_pause();
    }
    const int64_t t = now_ns();
    if (!started)
      started = t;
    else if (t - started > kSpinNs)
      break;
  }
  while (load() == seen) {
    if (now_ns() - started < kYieldNs) {
      yield_core();
      continue;
    }
    sleepers_.fetch_add(1, std::memory_order_seq_cst);
    if (value_.load(std::memory_order_seq_cst) == seen) futex_wait(&value_, seen);
    sleepers_.fetch_sub(1, std::memory_order_relaxed);
  }
  return now_ns() - started;
}

void WaitWord::advance() {
  value_.fetch_add(1, std::memory_order_seq_cst);
  if (sleepers_.load(std::memory_order_seq_cst) != 0) futex_wake_all(&value_);
}

Pool::Pool(int max_threads) : max_threads_(max_threads), process_(process_id()), waits_(size_t(max_threads)) {
  try {
    for (int t = 1; t < max_threads; t++) threads_.emplace_back([this, t] { worker(t); });
  } catch (const std::system_error &error) {
    stop();
    throw std::runtime_error("could start only " + std::to_string(threads_.size() + 1) + " of " +
                             std::to_string(max_threads) + " threads: " + error.what());
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stop_.store(true, std::memory_order_release);
  start_.advance();
  for (auto &thread : threads_)
    if (process_ == process_id())
      thread.join();
    else
      thread.detach(); // a forked child has none of the threads
}

void Pool::worker(int thread) {
  uint32_t seen = 0;
  for (;;) {
    start_.wait_change(seen);
    seen = start_.load();
    if (stop_.load(std::memory_order_acquire)) return;
    if (thread < active_) (*job_)(thread);
    // Idle threads report too: `active_` and `job_` may only change when nobody can still read them.
    if (finished_.fetch_add(1, std::memory_order_acq_rel) + 1 == max_threads_ - 1) done_.advance();
  }
}

// One thread's part of a job, with an account of the time that it did not get.
void Pool::work(int thread) {
  waits_[size_t(thread)].ns = 0;
  const int64_t wall = now_ns(), cpu = thread_cpu_ns();
  (*job_)(thread);
  const int64_t used = thread_cpu_ns() - cpu, waited = waits_[size_t(thread)].ns;
  const int64_t lost = cpu == 0 ? 0 : now_ns() - wall - used - waited;
  waited_.fetch_add(waited, std::memory_order_relaxed);
  int64_t most = lost_.load(std::memory_order_relaxed);
  while (lost > most && !lost_.compare_exchange_weak(most, lost, std::memory_order_relaxed)) {
  }
}

void Pool::run(int threads, const std::function<void(int)> &job) {
  lost_.store(0, std::memory_order_relaxed);
  waited_.store(0, std::memory_order_relaxed);
  job_ = &job;
  if (threads <= 1 || max_threads_ == 1) {
    active_ = 1;
    work(0);
    return;
  }
  if (process_ != process_id())
    throw std::runtime_error("this process was forked after the model was loaded, and a fork has no compute "
                             "threads: load the model in the process that runs it");
  active_ = threads < max_threads_ ? threads : max_threads_;
  finished_.store(0, std::memory_order_relaxed);
  start_.advance();
  work(0);
  // The count decides, the word only wakes: a worker may still owe the advance of the job before this one.
  const auto all_finished = [this] { return finished_.load(std::memory_order_acquire) == max_threads_ - 1; };
  while (!all_finished()) {
    const uint32_t seen = done_.load();
    if (!all_finished()) done_.wait_change(seen);
  }
}

void Pool::barrier(int thread) {
  if (active_ == 1) return;
  const uint32_t seen = generation_.load();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.advance();
    return;
  }
  waits_[size_t(thread)].ns += generation_.wait_change(seen);
}

void Governor::step_done(int threads, int64_t lost_ns, int64_t step_ns) {
  if (max_threads_ == 1) return;
  if (threads < max_threads_) {
    if (--until_retry_ <= 0) {
      current_ = max_threads_;
      bad_ = kPatience - 1; // on probation: one disturbed step sends it down again
      clean_ = 0;
    }
    return;
  }
  if (lost_ns < kMinLostNs || lost_ns * 8 < step_ns) {
    if (bad_ > 0) bad_--;
    if (++clean_ >= 4 * kFirstPause) pause_ = kFirstPause;
    return;
  }
  clean_ = 0;
  if (++bad_ < kPatience) return;
  current_ = max_threads_ > 2 ? (max_threads_ + 1) / 2 : 1;
  until_retry_ = pause_;
  pause_ = pause_ * 2 < kLongestPause ? pause_ * 2 : kLongestPause;
  bad_ = 0;
}

} // namespace hayai
