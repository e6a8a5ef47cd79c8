#include "schedule.h"

#include <algorithm>
#include <new>
#include <string>
#include <tuple>
#include <utility>

namespace deberta_fast {
namespace {

// docs/measured.md says how these numbers were found.
constexpr int64_t kMinBlockRows = 59;  // queries of a block in forward if heads and sequences are few
constexpr int64_t kMinPartRows = 192;  // queries and keys of a part in backward
constexpr int64_t kMostItems = 96;     // in backward, because each item has its own gradients of the tables
constexpr int64_t kMostTableFloats = int64_t{8} << 20;  // of the gradients of all items
constexpr int64_t kMostKeptFloats = int64_t{8} << 20;   // of one Scratch that a thread keeps

int64_t remainder(int64_t n, int64_t step) { return (n % step + step) % step; }

// Fills in the fields of a request that the caller leaves open.
struct Schedule {
  Attention& a;
  std::vector<Sequence>& sequences;
  const int64_t size;  // D rounded up
  int64_t longest_query = 0, queries = 0, keys = 0;

  Schedule(const Kernels& kernels, Request& request)
      : a(request.attention), sequences(request.sequences), size(round_up(a.size, kernels.size_step)) {
    a.padded_size = size, a.row_step = kernels.row_step;
    // Kernels that scale queries sum log2(e) s q.
    a.key_gradient_scale = kernels.scales_queries ? static_cast<float>(1 / kLog2e) : a.scale;
    a.longest_key = 0;
    for (const Sequence& sequence : sequences) {
      longest_query = std::max(longest_query, sequence.queries), queries += sequence.queries;
      a.longest_key = std::max(a.longest_key, sequence.keys), keys += sequence.keys;
    }
    a.sequences = sequences.data(), a.sequence_count = static_cast<int64_t>(sequences.size());
    cut_blocks(kernels.fewest_items);
    if (has_positions()) set_distances();
  }

  bool has_positions() const { return a.pos_key.data || a.pos_query.data; }
  int64_t heads_of_sequences() const { return std::max<int64_t>(1, a.heads * a.sequence_count); }

  // Floats of the tables by distance. with_rows: also of those that backward reads.
  int64_t table_floats(const Kernels& kernels, bool with_rows) const {
    if (kernels.expand_tables == nullptr) return 0;
    const int64_t tables = (a.pos_key.data != nullptr) + (a.pos_query.data != nullptr);
    return tables * a.heads * size * (a.pitch + (with_rows ? a.distances : 0));
  }

  void expand_tables(const Kernels& kernels, float* memory, bool with_rows, const ParallelFor& parallel_for) {
    if (kernels.expand_tables == nullptr || !has_positions()) return;
    for (auto [table, by_distance_t, by_distance] :
         {std::tuple{&a.pos_key, &a.key_by_distance_t, &a.key_by_distance},
          std::tuple{&a.pos_query, &a.query_by_distance_t, &a.query_by_distance}}) {
      if (table->data == nullptr) continue;
      *by_distance_t = memory;
      *by_distance = memory + a.heads * size * a.pitch;
      memory += a.heads * size * (a.pitch + (with_rows ? a.distances : 0));
    }
    parallel_for(a.heads, [&](int64_t begin, int64_t end) { kernels.expand_tables(a, with_rows, begin, end); });
  }

 private:
  // A forward block is a stretch, or a part of one if stretches are few.
  void cut_blocks(int64_t fewest_items) {
    const int64_t few = div_up(fewest_items, heads_of_sequences());
    a.parts = std::max<int64_t>(1, std::min(few, std::min(longest_query, a.longest_key) / kMinPartRows));
    const int64_t wanted = std::min(few, div_up(longest_query, kMinBlockRows));
    a.blocks_of_stretch = std::max<int64_t>(1, div_up(wanted, std::max<int64_t>(1, stretches_of(a, longest_query))));
    a.blocks_per_head = 0;
    for (Sequence& sequence : sequences) {
      sequence.first_block = a.blocks_per_head;
      a.blocks_per_head += stretches_of(a, sequence.queries) * a.blocks_of_stretch;
    }
  }

  // Sets the distances of the expanded tables: those of near pairs, and a margin for padding. The first and the last one
  // lie multiples of row_step from the distance of query 0 and key 0.
  void set_distances() {
    const int64_t margin = 32 + 2 * a.row_step;
    const int64_t first = std::max(1 - longest_query - a.query_offset, -a.far_past - kMaxBlockRows);
    const int64_t last = std::min(a.longest_key - 1 - a.query_offset, -a.far_future + kMaxBlockRows);
    a.first_distance = first - margin - remainder(first + a.query_offset, a.row_step);
    a.distances = round_up(std::max(last - first, int64_t{0}) + 2 * margin, a.row_step) + 1;
    a.first_reached = std::max(a.first_distance, 1 - longest_query - a.query_offset);
    const int64_t last_reached = std::min(a.first_distance + a.distances, a.longest_key - a.query_offset) - 1;
    a.reached = std::max<int64_t>(last_reached - a.first_reached + 1, 0);
    // An odd number of cache lines per row puts the cells of a column into different cache sets.
    a.pitch = round_up(a.distances, 16);
    if (a.pitch / 16 % 2 == 0) a.pitch += 16;
    // Slots fall as distances grow. If no pair has one of the distances, all pairs are far, and the expanded tables
    // include their row.
    const int64_t lowest = a.reached > 0 ? a.first_reached : a.first_distance;
    const int64_t highest = a.reached > 0 ? a.first_reached + a.reached - 1 : a.first_distance + a.distances - 1;
    a.first_used_row = slot_of(a, -highest), a.used_rows = slot_of(a, -lowest) + 1 - a.first_used_row;
    set_runs(lowest, highest);
  }

  // Distances that no pair has count to the run next to them.
  void set_runs(int64_t lowest, int64_t highest) {
    for (int64_t t = 0; t < a.distances; ++t) {
      const auto slot = static_cast<int32_t>(slot_of(a, -std::clamp(a.first_distance + t, lowest, highest)));
      if (key_slots_.empty() || key_slots_.back() != slot) key_slots_.push_back(slot);
      key_runs_.push_back(static_cast<int32_t>(key_slots_.size()) - 1);
    }
    query_slots_.assign(key_slots_.rbegin(), key_slots_.rend());
    for (auto run = key_runs_.rbegin(); run != key_runs_.rend(); ++run) query_runs_.push_back(key_runs_.back() - *run);
    a.run_count = static_cast<int64_t>(key_slots_.size());
    a.key_runs = {key_runs_.data(), key_slots_.data(), a.first_distance};
    a.query_runs = {query_runs_.data(), query_slots_.data(), 1 - a.first_distance - a.distances};
  }

  std::vector<int32_t> key_runs_, key_slots_, query_runs_, query_slots_;
};

// Divides backward into items and places the memory for their sums.
class Shares {
 public:
  Shares(const Schedule& call, Backward& b) : call_(call), b_(b) {
    cut_groups();
    int64_t queries = 0, keys = 0;
    for (const Sequence& sequence : call.sequences) {
      query_starts_.push_back(queries), key_starts_.push_back(keys);
      queries += sequence.queries, keys += sequence.keys;
    }
    b.query_starts = query_starts_.data(), b.key_starts = key_starts_.data();
  }

  int64_t items() const { return call_.a.heads * b_.groups * call_.a.parts; }

  int64_t floats() const {
    const int64_t tables = (b_.grad_pos_key != nullptr) + (b_.grad_pos_query != nullptr);
    return query_floats() + 2 * key_floats() + tables * table_floats();
  }

  void place(float* memory) {
    std::fill_n(memory, query_floats() + 2 * key_floats(), 0.0f);
    b_.query_sums = memory;
    b_.key_sums = b_.query_sums + query_floats();
    b_.value_sums = b_.key_sums + key_floats();
    float* const tables = b_.value_sums + key_floats();
    b_.pos_key_sums = b_.grad_pos_key ? tables : nullptr;
    b_.pos_query_sums = b_.grad_pos_query ? tables + (b_.grad_pos_key ? table_floats() : 0) : nullptr;
  }

 private:
  int64_t query_floats() const { return call_.a.parts > 1 ? call_.queries * call_.a.heads * call_.size : 0; }
  int64_t key_floats() const { return call_.a.parts > 1 ? call_.keys * call_.a.heads * call_.size : 0; }
  int64_t table_floats() const { return call_.has_positions() ? items() * call_.a.used_rows * call_.size : 0; }

  // Divides the sequences into groups of about equal work.
  void cut_groups() {
    const int64_t items_per_group = std::max<int64_t>(1, call_.a.heads * call_.a.parts);
    int64_t most_groups = div_up(kMostItems, items_per_group);
    if (call_.has_positions())
      most_groups = std::min(most_groups, kMostTableFloats / (2 * call_.a.used_rows * call_.size * items_per_group));
    most_groups = std::max<int64_t>(1, most_groups);
    const auto work = [](const Sequence& s) { return static_cast<double>(s.queries + 1) * (s.keys + 1); };
    double total = 0, done = 0;
    for (const Sequence& sequence : call_.sequences) total += work(sequence);
    for (const Sequence& sequence : call_.sequences) {
      done += work(sequence);
      const bool last = &sequence == &call_.sequences.back();
      if (last || done * most_groups >= total * (group_ends_.size() + 1)) {
        group_ends_.push_back(&sequence - call_.sequences.data() + 1);
      }
    }
    b_.groups = static_cast<int64_t>(group_ends_.size()), b_.group_ends = group_ends_.data();
  }

  const Schedule& call_;
  Backward& b_;
  std::vector<int64_t> group_ends_, query_starts_, key_starts_;
};

// Torch turns this exception into a MemoryError with its message.
class OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(int64_t bytes)
      : message_("deberta_fast: out of memory: the CPU kernels need " + std::to_string(bytes) +
                 " bytes more for one thread") {}
  const char* what() const noexcept override { return message_.c_str(); }

 private:
  std::string message_;
};

struct Kept {
  float* data = nullptr;
  int64_t floats = 0;

  Kept() = default;
  Kept& operator=(Kept&& other) noexcept {
    std::swap(data, other.data), std::swap(floats, other.floats);
    return *this;
  }
  ~Kept() { std::free(data); }
};
thread_local Kept kept[2];

}  // namespace

void run_forward(const Kernels& kernels, Request& request, const Forward& forward, const ParallelFor& parallel_for) {
  Schedule call(kernels, request);
  const Scratch memory(call.table_floats(kernels, false));
  call.expand_tables(kernels, memory.data(), false, parallel_for);
  parallel_for(call.a.heads * call.a.blocks_per_head,
               [&](int64_t begin, int64_t end) { kernels.forward(call.a, forward, begin, end); });
}

void run_backward(const Kernels& kernels, Request& request, Backward& b, const ParallelFor& parallel_for) {
  Schedule call(kernels, request);
  Shares work(call, b);
  const Attention& a = call.a;
  const int64_t tables = call.table_floats(kernels, true);
  const Scratch memory(tables + work.floats());
  call.expand_tables(kernels, memory.data(), true, parallel_for);
  work.place(memory.data() + tables);
  for (int64_t wave = 0; wave < a.parts; ++wave) {
    parallel_for(work.items(), [&](int64_t begin, int64_t end) { kernels.backward(a, b, wave, begin, end); });
  }
  if (a.parts > 1) {
    parallel_for(a.heads * a.sequence_count, [&](int64_t begin, int64_t end) { kernels.store_sums(a, b, begin, end); });
  }
  for (const auto& [sums, scale, gradient] : {std::tuple{b.pos_key_sums, a.key_gradient_scale, b.grad_pos_key},
                                              std::tuple{b.pos_query_sums, a.scale, b.grad_pos_query}}) {
    if (gradient == nullptr) continue;
    parallel_for(a.heads, [&, sums = sums, scale = scale, gradient = gradient](int64_t begin, int64_t end) {
      kernels.store_table(a, b, sums, scale, gradient, begin, end);
    });
  }
}

Scratch::Scratch(int64_t floats) {
  if (floats == 0) return;
  for (Kept& memory : kept) {
    if (memory.floats >= floats) {
      std::swap(data_, memory.data), std::swap(floats_, memory.floats);
      return;
    }
  }
  const int64_t bytes = round_up(floats * 4, 64);
  data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
  if (data_ == nullptr) throw OutOfMemory(bytes);
  floats_ = bytes / 4;
}

Scratch& Scratch::operator=(Scratch&& other) noexcept {
  std::swap(data_, other.data_), std::swap(floats_, other.floats_);
  return *this;
}

// Keeps the memory in the place of a smaller one.
Scratch::~Scratch() {
  if (floats_ <= kMostKeptFloats) {
    Kept& smaller = kept[0].floats <= kept[1].floats ? kept[0] : kept[1];
    if (smaller.floats < floats_) std::swap(data_, smaller.data), std::swap(floats_, smaller.floats);
  }
  std::free(data_);
}

int64_t release_memory() {
  int64_t floats = 0;
  for (Kept& memory : kept) {
    floats += memory.floats;
    memory = Kept();
  }
  return floats * 4;
}

}  // namespace deberta_fast
