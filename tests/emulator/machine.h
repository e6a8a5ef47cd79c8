// The machine runs kernels on the CPU, one block after the other. The threads of a block are coroutines, which run in
// an order that a seed decides. They stop only at collectives, where all lanes of a warp (all threads of a block) meet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "coroutine.h"
#include "races.h"
#include "sites.h"

namespace deberta_fast {
namespace emulator {

// They are set between launches.
struct Options {
  uint64_t seed = 1;             // decides the order of blocks, warps and lanes
  bool check_races = true;       // in shared memory
  bool count_conflicts = false;  // of banks, for conflict_table(), and the rest of count_table()
  int skip_barrier = -1;         // the barrier site of this number does nothing
};

class Random {
 public:
  explicit Random(uint64_t seed = 1) : state_(seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du) {
    if (state_ == 0) state_ = 1;
    for (int i = 0; i < 8; i++) next();
  }
  uint32_t next() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ * 0x2545f4914f6cdd1du >> 32);
  }
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(static_cast<uint64_t>(next()) * n >> 32); }

 private:
  uint64_t state_;
};

// The operands and results of the lanes of a warp at a collective.
struct Operands {
  const void* from[32];
  void* to[32];
  uint32_t x[32], y[32];
  uint32_t result[32];
};

class Machine {
 public:
  Options options;
  Sites sites;  // of what is counted
  Sites barriers;
  std::vector<Traffic> traffic;  // of all launches together

  struct Launch {
    const void* kernel;
    std::string arguments;  // their bytes
    int64_t blocks_x, blocks_y;
    int threads, shared_bytes;
    std::vector<Traffic> traffic;
  };
  std::vector<Launch> launches;  // if they are counted
  int64_t launched = 0;
  // The most waits of a thread for a copy after whose issue its warp made no product: nothing hides their latency.
  int exposed_waits = 0;

  using Call = void (*)(const void* kernel, const void* arguments);

  // Returns the first error, or null.
  const char* run(Call call, const void* kernel, const void* arguments, size_t arguments_bytes, int64_t blocks_x,
                  int64_t blocks_y, int threads, int shared_bytes) {
    std::lock_guard<std::mutex> one_at_a_time(mutex_);
    if (blocks_x == 0 || blocks_y == 0) return nullptr;
    if (blocks_x < 0 || blocks_x > 0x7fffffff || blocks_y < 0 || blocks_y > 65535) return "invalid number of blocks";
    if (threads <= 0 || threads > 1024 || threads % 32 != 0) return "invalid number of threads";
    if (shared_bytes < 0 || shared_bytes > kSharedLimit) return "invalid size of shared memory";
    launched++;
    call_ = call;
    kernel_ = kernel;
    arguments_ = arguments;
    shared_bytes_ = shared_bytes;
    threads_ = threads;
    random_ = Random(options.seed);
    stacks_.reserve(threads);
    if (static_cast<int>(lanes_.size()) < threads) lanes_ = std::vector<Lane>(threads);
    warps_.resize(threads / 32);
    failed_ = false;
    std::vector<int64_t> order(blocks_x * blocks_y);
    for (size_t i = 0; i < order.size(); i++) {
      order[i] = static_cast<int64_t>(i);
      std::swap(order[i], order[random_.below(static_cast<uint32_t>(i + 1))]);
    }
    const std::vector<Traffic> before = traffic;
    for (int64_t block : order) {
      run_block(static_cast<int>(block % blocks_x), static_cast<int>(block / blocks_x));
      if (failed_) return error_.c_str();
    }
    if (options.count_conflicts) {
      const void* address = *static_cast<const void* const*>(kernel);
      const std::string bytes(static_cast<const char*>(arguments), arguments_bytes);
      launches.push_back({address, bytes, blocks_x, blocks_y, threads, shared_bytes, traffic});
      std::vector<Traffic>& own = launches.back().traffic;
      for (size_t i = 0; i < before.size(); i++) {
        own[i].requests -= before[i].requests, own[i].wavefronts -= before[i].wavefronts;
        own[i].ideal -= before[i].ideal, own[i].bytes -= before[i].bytes;
      }
    }
    return nullptr;
  }

  int block_x() const { return block_x_; }
  int block_y() const { return block_y_; }
  int thread() const { return current_; }
  char* shared() const { return shared_; }

  // Ends the launch and does not return. Nothing on the stack is destroyed, so strings must be freed before.
  void fail(std::string message) {
    if (!failed_) error_.swap(message);
    std::string().swap(message);
    failed_ = true;
    switch_coroutine(lanes_[current_].coroutine, host_, true);
    std::abort();
  }
  void fail(Kind kind, Site site, std::string what) {
    std::string message = where(kind, site) + what;
    std::string().swap(what);
    fail(std::move(message));
  }

  // ---- Collectives.

  // The current lane meets the others of its warp: `bring` stores its operands, the last to arrive runs `work` for all.
  template <class Bring, class Work>
  Operands& meet(Kind kind, Site site, Bring bring, Work work) {
    Warp& warp = warps_[current_ / 32];
    arrive(warp, kind, site);
    bring(warp.operands, current_ % 32);
    if (++warp.arrived < 32) {
      go_on_with(warp);
    } else {
      work(warp.operands);
      if (is_collective(kind)) count(kind, site);
      if (kind == Kind::multiply_add) warp.products++;
      leave(warp);
      go_on_with(choose());
    }
    return warp.operands;
  }

  void sync_warp(Site site) {
    if (barriers.number(Kind::sync_warp, site) == options.skip_barrier) return;
    meet(Kind::sync_warp, site, [](Operands&, int) {}, [&](Operands&) { races_.warp_barrier(current_ / 32); });
  }

  void sync_block(Site site) {
    if (barriers.number(Kind::sync_block, site) == options.skip_barrier) return;
    Warp& warp = warps_[current_ / 32];
    arrive(warp, Kind::sync_block, site);
    if (++warp.arrived < 32) return go_on_with(warp);
    for (const Warp& other : warps_) {
      if (other.finished > 0) fail(Kind::sync_block, site, "other threads have ended");
      if (other.blocked && !(other.site == site)) {
        fail(Kind::sync_block, site, others("other threads wait", other));
      }
    }
    leave(warp);
    warp.blocked = true;
    if (++blocked_ == static_cast<int>(warps_.size())) {
      for (Warp& other : warps_) other.blocked = false;
      blocked_ = 0;
      count(Kind::sync_block, site);
      races_.block_barrier();
    }
    go_on_with(choose());
  }

  // ---- Global memory.

  // 16 bytes.
  void global(Kind kind, Site site, const void* at) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(at);
    if (address % 16 != 0) fail(kind, site, "not aligned to 16");
    if (options.count_conflicts) add_traffic(kind, site, address);
  }

  // ---- Shared memory.

  // These functions check an access of the current thread before it happens.
  void reads(Kind kind, Site site, const void* from, int bytes) {
    const int offset = check(kind, site, from, bytes);
    if (!options.check_races) return;
    std::string conflict = races_.read(offset, bytes, current_, site.line);
    if (!conflict.empty()) race(kind, site, offset, std::move(conflict));
  }
  void writes(Kind kind, Site site, const void* to, int bytes, Races::Write write = Races::Write::plain) {
    const int offset = check(kind, site, to, bytes);
    if (!options.check_races) return;
    std::string conflict = races_.write(offset, bytes, current_, site.line, write);
    if (!conflict.empty()) race(kind, site, offset, std::move(conflict));
  }

  void copy_async(Kind kind, int bytes, void* to, const void* from, bool valid, Site site) {
    if (valid && reinterpret_cast<uintptr_t>(from) % bytes != 0) {
      fail(kind, site, "source not aligned to " + std::to_string(bytes));
    }
    writes(kind, site, to, bytes, Races::Write::issues);
    if (options.count_conflicts && valid) traffic_at(traffic, sites, sites.number(kind, site)).bytes += bytes;
    std::memset(to, 0xff, bytes);
    lanes_[current_].copies.push_back({to, from, bytes, valid, site, warps_[current_ / 32].products});
  }

  void commit_copies() {
    Lane& lane = lanes_[current_];
    lane.groups.push_back(lane.copies.size());
  }

  void wait_copies(int pending) {
    Lane& lane = lanes_[current_];
    const size_t keep = std::min<size_t>(pending, lane.groups.size());
    const size_t groups = lane.groups.size() - keep;
    if (groups == 0) return;
    const size_t copies = lane.groups[groups - 1];
    bool exposed = false;
    for (size_t i = 0; i < copies; i++) {
      const Copy& copy = lane.copies[i];
      if (options.check_races) {
        const int offset = static_cast<int>(static_cast<char*>(copy.to) - shared_);
        std::string conflict = races_.write(offset, copy.bytes, current_, copy.site.line, Races::Write::lands);
        if (!conflict.empty()) race(Kind::wait_copies, copy.site, offset, std::move(conflict));
      }
      if (copy.valid) {
        std::memcpy(copy.to, copy.from, copy.bytes);
      } else {
        std::memset(copy.to, 0, copy.bytes);
      }
      exposed |= copy.products == warps_[current_ / 32].products;
    }
    if (exposed) exposed_waits = std::max(exposed_waits, ++lane.exposed);
    lane.copies.erase(lane.copies.begin(), lane.copies.begin() + copies);
    lane.groups.erase(lane.groups.begin(), lane.groups.begin() + groups);
    for (size_t& end : lane.groups) end -= copies;
  }

  static constexpr int kSharedLimit = 232448;

 private:
  struct Copy {
    void* to;
    const void* from;
    int bytes;
    bool valid;
    Site site;
    int64_t products;  // of the warp before it was issued
  };

  struct Lane {
    Coroutine coroutine;
    std::vector<Copy> copies;    // not landed yet
    std::vector<size_t> groups;  // the ends of the committed groups in `copies`
    int exposed = 0;             // waits so far for a copy that no product followed
  };

  struct Warp {
    int first = 0;      // the number of its first thread
    uint8_t order[32];  // in which the lanes run
    int next = 0;       // index into `order`
    int arrived = 0;    // the number of lanes at the collective below
    Kind kind = Kind::sync_block;
    Site site = {0, ""};
    int finished = 0;      // the number of finished lanes
    bool blocked = false;  // all lanes are at a barrier of the block
    int64_t products = 0;  // on tensor cores, so far
    Operands operands;
    WarpTraffic traffic;
  };

  std::string where(Kind kind, Site site) const {
    return std::string(name(kind)) + " at " + site.text() + ", block (" + std::to_string(block_x_) + ", " +
           std::to_string(block_y_) + "), thread " + std::to_string(current_) + ": ";
  }

  static std::string others(const char* what, const Warp& warp) {
    return std::string(what) + " in " + name(warp.kind) + " at " + warp.site.text();
  }

  // It is out of line, so that an access stays short.
  __attribute__((noinline)) void race(Kind kind, Site site, int offset, std::string conflict) {
    conflict.insert(0, "byte " + std::to_string(offset) + " of shared memory: race with ");
    fail(kind, site, std::move(conflict));
  }

  __attribute__((noinline)) void fail_access(Kind kind, Site site, int64_t offset, int bytes, const char* what) {
    fail(kind, site,
         std::to_string(bytes) + " bytes at byte " + std::to_string(offset) + " of " + std::to_string(shared_bytes_) +
             " of shared memory: " + what);
  }

  int check(Kind kind, Site site, const void* at, int bytes) {
    const int64_t offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(at)) -
                           static_cast<int64_t>(reinterpret_cast<uintptr_t>(shared_));
    if (offset < 0 || offset + bytes > shared_bytes_) fail_access(kind, site, offset, bytes, "out of bounds");
    if (offset % bytes != 0) fail_access(kind, site, offset, bytes, "not aligned");
    if (options.count_conflicts) add_traffic(kind, site, static_cast<uint64_t>(offset));
    return static_cast<int>(offset);
  }

  void add_traffic(Kind kind, Site site, uint64_t at) {
    warps_[current_ / 32].traffic.add(sites.number(kind, site), current_ % 32, at);
  }

  void count(Kind kind, Site site) {
    if (options.count_conflicts) traffic_at(traffic, sites, sites.number(kind, site)).requests++;
  }

  void arrive(Warp& warp, Kind kind, Site site) {
    if (warp.finished > 0) fail(kind, site, "other lanes of the warp have ended");
    if (warp.arrived == 0) {
      warp.kind = kind;
      warp.site = site;
    } else if (warp.kind != kind || !(warp.site == site)) {
      fail(kind, site, others("other lanes of the warp wait", warp));
    }
  }

  // The meeting is over: all lanes of the warp may go on.
  void leave(Warp& warp) {
    warp.arrived = 0;
    warp.next = 0;
    for (int i = 31; i > 0; i--) std::swap(warp.order[i], warp.order[random_.below(i + 1)]);
    if (options.count_conflicts) warp.traffic.flush(sites, traffic);
  }

  void go_on_with(Warp& warp) {
    const int from = current_;
    current_ = warp.first + warp.order[warp.next++];
    if (current_ != from) switch_coroutine(lanes_[from].coroutine, lanes_[current_].coroutine);
  }

  // Chooses the warp to run next: often the same again, so that others fall far behind.
  Warp& choose() {
    Warp& warp = warps_[current_ / 32];
    if (!warp.blocked && warp.finished < 32 && random_.below(16) < stay_) return warp;
    int candidates[32];
    int n = 0;
    for (const Warp& other : warps_) {
      if (!other.blocked && other.finished < 32) candidates[n++] = other.first / 32;
    }
    return warps_[candidates[random_.below(n)]];
  }

  static void enter();

  // The current thread has returned from the kernel.
  void finish() {
    const int from = current_;
    Warp& warp = warps_[from / 32];
    if (Stacks::overflowed(lanes_[from].coroutine)) fail("stack overflow");
    if (warp.arrived > 0) fail(warp.kind, warp.site, "this thread ends while other lanes of the warp wait");
    if (blocked_ > 0) {
      for (const Warp& other : warps_) {
        if (other.blocked) fail(Kind::sync_block, other.site, "this thread ends while others of the block wait");
      }
    }
    Coroutine* to = &host_;
    finished_++;
    if (++warp.finished < 32) {
      current_ = warp.first + warp.order[warp.next++];
      to = &lanes_[current_].coroutine;
    } else {
      if (options.count_conflicts) warp.traffic.flush(sites, traffic);
      if (finished_ < threads_) {
        Warp& other = choose();
        current_ = other.first + other.order[other.next++];
        to = &lanes_[current_].coroutine;
      }
    }
    switch_coroutine(lanes_[from].coroutine, *to, true);
    std::abort();
  }

  void run_block(int x, int y) {
    block_x_ = x;
    block_y_ = y;
    void* memory = nullptr;
    if (posix_memalign(&memory, 16, shared_bytes_) != 0) std::abort();
    shared_ = static_cast<char*>(memory);
    if (shared_bytes_ > 0) std::memset(shared_, 0xff, shared_bytes_);
    const uint32_t stays[] = {0, 8, 15};
    stay_ = stays[random_.below(3)];
    finished_ = blocked_ = 0;
    races_.start(shared_bytes_, static_cast<int>(warps_.size()));
    for (int i = 0; i < threads_; i++) {
      stacks_.prepare(lanes_[i].coroutine, i, enter, dirty_);
      lanes_[i].copies.clear();
      lanes_[i].groups.clear();
      lanes_[i].exposed = 0;
    }
    dirty_ = false;
    for (size_t i = 0; i < warps_.size(); i++) {
      Warp& warp = warps_[i];
      warp.first = static_cast<int>(i) * 32;
      warp.finished = 0;
      warp.blocked = false;
      warp.traffic = WarpTraffic();
      for (int j = 0; j < 32; j++) warp.order[j] = static_cast<uint8_t>(j);
      leave(warp);
    }
    current_ = static_cast<int>(random_.below(static_cast<uint32_t>(warps_.size()))) * 32;
    Warp& first = warps_[current_ / 32];
    current_ = first.first + first.order[first.next++];
    from_host_ = true;
    switch_coroutine(host_, lanes_[current_].coroutine);
    dirty_ = failed_;
    std::free(memory);
    shared_ = nullptr;
  }

  std::mutex mutex_;
  Call call_ = nullptr;
  const void* kernel_ = nullptr;
  const void* arguments_ = nullptr;
  int shared_bytes_ = 0, threads_ = 0;
  int block_x_ = 0, block_y_ = 0;
  int current_ = 0;    // the number of the current thread
  int finished_ = 0;   // the number of finished threads
  int blocked_ = 0;    // the number of blocked warps
  uint32_t stay_ = 0;  // the same warp runs again with a probability of stay_ / 16
  char* shared_ = nullptr;
  Random random_;
  Races races_;
  Stacks stacks_;
  Coroutine host_;
  std::vector<Lane> lanes_;
  std::vector<Warp> warps_;
  bool from_host_ = false;
  bool failed_ = false, dirty_ = false;
  std::string error_;
};

// It is never freed. An access needs no check, unlike one to a static of a function.
inline Machine* const the_machine = new Machine;

inline void Machine::enter() {
  Machine& machine = *the_machine;
  entered_coroutine(machine.from_host_ ? &machine.host_ : nullptr);
  machine.from_host_ = false;
  machine.call_(machine.kernel_, machine.arguments_);
  machine.finish();
}

inline Options& options() { return the_machine->options; }
// The number of barriers in the source of the kernels that have run. skip_barrier is less than this.
inline int barrier_sites() { return the_machine->barriers.size(); }
inline std::string barrier_site(int i) {
  return std::string(name(the_machine->barriers.kind(i))) + " at " + the_machine->barriers.site(i).text();
}
// Bank conflicts since they were last cleared.
inline const std::vector<Traffic>& conflicts() { return the_machine->traffic; }
inline std::string conflict_table() { return table(the_machine->traffic); }
inline void clear_counts() {
  for (Traffic& t : the_machine->traffic) t.requests = t.wavefronts = t.ideal = t.bytes = 0;
  the_machine->launches.clear();
  the_machine->launched = the_machine->exposed_waits = 0;
}

// A line for each launch since then, with the kernel's address relative to `base` and the bytes of its arguments, and
// one for each of its sites.
inline std::string count_table(const char* base) {
  std::string text;
  const auto add = [&](auto... words) { ((text += words, text += ' '), ...), text.back() = '\n'; };
  const auto number = [](int64_t x) { return std::to_string(x); };
  for (const Machine::Launch& launch : the_machine->launches) {
    std::string bytes;
    for (unsigned char byte : launch.arguments) bytes += {"0123456789abcdef"[byte / 16], "0123456789abcdef"[byte % 16]};
    add("launch", number(static_cast<const char*>(launch.kernel) - base), number(launch.blocks_x),
        number(launch.blocks_y), number(launch.threads), number(launch.shared_bytes), bytes);
    for (const Traffic& t : launch.traffic) {
      if (t.requests != 0)
        add(name(t.kind), t.site.text(), number(t.requests), number(t.wavefronts), number(t.ideal), number(t.bytes));
    }
  }
  return text;
}

}  // namespace emulator
}  // namespace deberta_fast
