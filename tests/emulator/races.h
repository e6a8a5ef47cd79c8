// Finds accesses to shared memory that lack a barrier between them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sites.h"

namespace deberta_fast {
namespace emulator {

// Stores the last write and the last reads of each two bytes, with the time of their warp's last barrier before them.
// If two accesses are by different warps, the earlier must lie before the last barrier of the block. If they are by
// different lanes of a warp, it must lie before the last barrier of the warp.
class Races {
 public:
  // Starts a block.
  void start(int shared_bytes, int warps) {
    if (static_cast<int>(cells_.size()) < shared_bytes / 2) cells_.resize(shared_bytes / 2);
    warp_time_.resize(warps);
    block_barrier();
    start_time_ = block_time_;
  }

  void warp_barrier(int warp) { warp_time_[warp] = ++clock_; }
  void block_barrier() {
    block_time_ = ++clock_;
    for (uint32_t& time : warp_time_) time = block_time_;
  }

  // Returns a description of the access that it conflicts with, or the empty string.
  std::string read(int offset, int bytes, int thread, int line) {
    const uint32_t now = warp_time_[thread / 32];
    for (int i = offset / 2; i < (offset + bytes) / 2; i++) {
      Cell& cell = cells_[i];
      if (write_conflicts(cell, thread, now)) return describe_write(cell, i);
      if (cell.read_time < block_time_) {
        cell.reader = static_cast<uint16_t>(thread);
      } else if (!(cell.reader & kSeveralWarps)) {
        const int reader = cell.reader & kThread;
        if (reader / 32 != thread / 32) {
          cell.reader |= kSeveralWarps;
        } else if (cell.read_time != now) {
          cell.reader = static_cast<uint16_t>(thread);
        } else if (reader != thread) {
          cell.reader |= kSeveralLanes;
        }
      }
      cell.read_time = now;
      cell.read_line = static_cast<uint16_t>(line);
    }
    return {};
  }

  // A write `issues` or `lands` a copy. No thread may access the bytes in between.
  enum class Write { plain, issues, lands };
  std::string write(int offset, int bytes, int thread, int line, Write write) {
    const uint32_t now = warp_time_[thread / 32];
    for (int i = offset / 2; i < (offset + bytes) / 2; i++) {
      Cell& cell = cells_[i];
      if (write == Write::lands) cell.writer &= static_cast<uint16_t>(~kPending);
      if (write_conflicts(cell, thread, now)) return describe_write(cell, i);
      if (cell.read_time >= block_time_) {
        const int reader = cell.reader & kThread;
        const bool same_warp = !(cell.reader & kSeveralWarps) && reader / 32 == thread / 32;
        const bool same_thread = same_warp && !(cell.reader & kSeveralLanes) && reader == thread;
        if (!same_warp || (cell.read_time == now && !same_thread)) {
          return "a read by thread " + std::to_string(reader) +
                 (cell.reader & (kSeveralWarps | kSeveralLanes) ? " or others" : "") + " at line " +
                 std::to_string(cell.read_line);
        }
      }
      cell.writer = static_cast<uint16_t>(thread | (write == Write::issues ? kPending : 0));
      cell.write_time = now;
      cell.write_line = static_cast<uint16_t>(line);
    }
    return {};
  }

 private:
  static constexpr int kThread = 0x3ff, kSeveralWarps = 0x8000, kSeveralLanes = 0x4000, kPending = 0x8000;

  struct Cell {
    uint32_t write_time = 0, read_time = 0;
    uint16_t writer = 0, reader = 0, write_line = 0, read_line = 0;
  };

  bool write_conflicts(const Cell& cell, int thread, uint32_t now) const {
    if (cell.write_time < start_time_) return false;
    if (cell.writer & kPending) return true;
    if (cell.write_time < block_time_ || cell.writer == thread) return false;
    return cell.writer / 32 != thread / 32 || cell.write_time == now;
  }

  static std::string describe_write(const Cell& cell, int i) {
    return std::string(cell.writer & kPending ? "a copy_async not waited for" : "a write") + " by thread " +
           std::to_string(cell.writer & kThread) + " at line " + std::to_string(cell.write_line) + ", byte " +
           std::to_string(2 * i);
  }

  std::vector<Cell> cells_;
  std::vector<uint32_t> warp_time_;
  uint32_t clock_ = 0, block_time_ = 0, start_time_ = 0;
};

}  // namespace emulator
}  // namespace deberta_fast
