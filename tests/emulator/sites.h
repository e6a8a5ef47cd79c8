// Places in the source of a kernel, and what happens there: traffic to shared memory with its bank conflicts, traffic
// to global memory, collectives.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace deberta_fast {
namespace emulator {

struct Site {
  int line;
  const char* file;

  static constexpr Site here(int line = __builtin_LINE(), const char* file = __builtin_FILE()) { return {line, file}; }

  bool operator==(const Site& other) const {
    return line == other.line && (file == other.file || std::strcmp(file, other.file) == 0);
  }

  std::string text() const {
    const char* slash = std::strrchr(file, '/');
    return std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  }
};

enum class Kind {
  sync_block,
  sync_warp,
  shuffle_xor,
  shuffle,
  ballot,
  multiply_add,
  load_matrices,
  load_matrices_transposed,
  load_shared,
  store_shared,
  load_shared_word,
  store_shared_word,
  store_shared_half,
  copy_async,
  copy_async_word,
  wait_copies,
  load_global,
  store_global,
};

inline const char* name(Kind kind) {
  static const char* const names[] = {"sync_block",
                                      "sync_warp",
                                      "shuffle_xor",
                                      "shuffle",
                                      "ballot",
                                      "multiply_add",
                                      "load_matrices",
                                      "load_matrices_transposed",
                                      "load_shared",
                                      "store_shared",
                                      "load_shared_word",
                                      "store_shared_word",
                                      "store_shared_half",
                                      "copy_async",
                                      "copy_async_word",
                                      "wait_copies",
                                      "load_global",
                                      "store_global"};
  return names[static_cast<int>(kind)];
}

inline bool is_global(Kind kind) { return kind == Kind::load_global || kind == Kind::store_global; }

// Whether lanes meet without an access to memory.
inline bool is_collective(Kind kind) { return kind <= Kind::multiply_add; }

// Numbers sites in the order of their first use.
class Sites {
 public:
  int number(Kind kind, Site site) {
    const uintptr_t file = reinterpret_cast<uintptr_t>(site.file);
    Slot& slot = recent_[(site.line * 29u + static_cast<unsigned>(kind) * 7u + (file >> 3)) % kSlots];
    if (slot.number >= 0 && slot.kind == kind && slot.site.line == site.line && slot.site.file == site.file) {
      return slot.number;
    }
    int i = 0;
    while (i < size() && !(all_[i].kind == kind && all_[i].site == site)) i++;
    if (i == size()) all_.push_back({kind, site, i});
    slot = {kind, site, i};
    return i;
  }

  int size() const { return static_cast<int>(all_.size()); }
  Site site(int i) const { return all_[i].site; }
  Kind kind(int i) const { return all_[i].kind; }

 private:
  struct Slot {
    Kind kind = Kind::sync_block;
    Site site = {0, nullptr};
    int number = -1;
  };
  static constexpr int kSlots = 256;
  Slot recent_[kSlots];
  std::vector<Slot> all_;
};

// The traffic at one site. A request is that of a warp, or of a block at its barrier. In shared memory a wavefront
// serves each of the 32 banks once; in global memory it serves a line of 128 bytes. `ideal` is the number of wavefronts
// without a conflict, or if neighbouring lanes read neighbouring bytes.
struct Traffic {
  Kind kind;
  Site site;
  int64_t requests = 0, wavefronts = 0, ideal = 0;
  int64_t bytes = 0;  // from or to global memory
};

// The traffic at the site of this number.
inline Traffic& traffic_at(std::vector<Traffic>& traffic, const Sites& sites, int number) {
  while (static_cast<int>(traffic.size()) <= number) {
    const int next = static_cast<int>(traffic.size());
    traffic.push_back({sites.kind(next), sites.site(next)});
  }
  return traffic[number];
}

// The accesses of one warp since its lanes last met. The k-th access of each lane at a site belongs to the k-th request
// there. Counting restarts at each meeting, so a lane that skips an access is out of step only until the next meeting.
class WarpTraffic {
 public:
  void add(int site, int lane, uint64_t offset) {
    if (site >= static_cast<int>(open_.size())) open_.resize(site + 1);
    Open& open = open_[site];
    if (open.requests.empty()) touched_.push_back(site);
    const size_t k = open.seen[lane]++;
    if (k >= open.requests.size()) open.requests.resize(k + 1);
    open.requests[k].lanes |= 1u << lane;
    open.requests[k].offset[lane] = offset;
  }

  void flush(const Sites& sites, std::vector<Traffic>& traffic) {
    for (int i : touched_) {
      Traffic& at = traffic_at(traffic, sites, i);
      for (const Request& request : open_[i].requests) count(request, at);
      open_[i].requests.clear();
      std::memset(open_[i].seen, 0, sizeof(open_[i].seen));
    }
    touched_.clear();
  }

 private:
  struct Request {
    uint32_t lanes = 0;
    uint64_t offset[32];  // in shared memory; of global memory, the address
  };
  struct Open {
    uint32_t seen[32] = {};
    std::vector<Request> requests;
  };

  static void count(const Request& request, Traffic& traffic) {
    // Accesses of 16 bytes per lane are served for eight lanes at a time.
    const bool narrow = traffic.kind == Kind::load_shared_word || traffic.kind == Kind::store_shared_word ||
                        traffic.kind == Kind::store_shared_half || traffic.kind == Kind::copy_async_word;
    const int lanes = narrow ? 32 : 8, words = narrow ? 1 : 4;
    const bool global = is_global(traffic.kind);
    const uint64_t unit = global ? 128 : 4;
    // Lines are counted from the first byte, since memory on the CPU is aligned to fewer bytes than on a GPU.
    uint64_t base = global ? ~uint64_t{0} : 0;
    for (int i = 0; i < 32 && global; i++) {
      if (request.lanes >> i & 1) base = std::min(base, request.offset[i]);
    }
    traffic.requests++;
    for (int first = 0; first < 32; first += lanes) {
      uint64_t touched[32];
      int n = 0;
      for (int i = first; i < first + lanes; i++) {
        for (int j = 0; j < words && (request.lanes >> i & 1); j++)
          touched[n++] = (request.offset[i] - base + 4 * j) / unit;
      }
      if (n == 0) continue;
      traffic.bytes += global ? 4 * n : 0;
      std::sort(touched, touched + n);
      n = static_cast<int>(std::unique(touched, touched + n) - touched);
      int banks[32] = {};
      for (int i = 0; i < n; i++) banks[touched[i] % 32]++;
      traffic.wavefronts += global ? n : *std::max_element(banks, banks + 32);
      traffic.ideal++;
    }
  }

  std::vector<Open> open_;
  std::vector<int> touched_;
};

inline std::string table(const std::vector<Traffic>& traffic) {
  std::string text;
  char line[256];
  std::snprintf(line, sizeof(line), "%-28s %-26s %10s %10s %10s\n", "site", "kind", "requests", "wavefronts", "ideal");
  text += line;
  for (const Traffic& t : traffic) {
    if (t.requests == 0 || is_collective(t.kind) || is_global(t.kind)) continue;
    std::snprintf(line, sizeof(line), "%-28s %-26s %10lld %10lld %10lld\n", t.site.text().c_str(), name(t.kind),
                  static_cast<long long>(t.requests), static_cast<long long>(t.wavefronts),
                  static_cast<long long>(t.ideal));
    text += line;
  }
  return text;
}

}  // namespace emulator
}  // namespace deberta_fast
