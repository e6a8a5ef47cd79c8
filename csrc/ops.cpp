// The operators as torch sees them, on its stable ABI: one build serves torch 2.11 and newer. Tensors become the plain
// structs of params.h, and at::parallel_for shares out the kernels' work.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace deberta_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

const Kernels& kernels_of(const std::string& capability) {
#if defined(__x86_64__)
  if (capability == "avx512") return avx512::kernels;
  if (capability == "avx2") return avx2::kernels;
#endif
  STD_TORCH_CHECK(capability == "plain", "deberta_fast: built without kernels for ", capability);
  return plain::kernels;
}

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }
int64_t share(int64_t n, int64_t parts) { return (n + parts - 1) / parts; }

Element element_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Element::float32;
    case ScalarType::BFloat16:
      return Element::bfloat16;
    case ScalarType::Half:
      return Element::float16;
    default:
      STD_TORCH_CHECK(false, "deberta_fast: dtype must be float32, bfloat16 or float16");
      return Element::float32;
  }
}

Heads heads_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4 && x.stride(3) == 1, "deberta_fast: (B, H, L, D) with a unit last stride");
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Table table_of(const std::optional<Tensor>& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->is_cpu() && x->dim() == 3 && x->stride(2) == 1, "deberta_fast: (H, R, D) with a unit last stride");
  return {x->data_ptr(), x->stride(0), x->stride(1)};
}

Statistic statistic_of(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 3 && x.scalar_type() == ScalarType::Float, "deberta_fast: (B, H, L) float32");
  return {static_cast<float*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// The arguments that forward and backward share, and the memory that their structs point to.
struct Call {
  Attention attention{};
  std::vector<Sequence> sequences;
  int64_t longest_query = 0, longest_key = 0;
  const Kernels& kernels;

  Call(const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& pos_key,
       const std::optional<Tensor>& pos_query, const std::optional<Tensor>& mask,
       const std::optional<Tensor>& cu_seqlens, const std::optional<Tensor>& seed, const std::optional<Tensor>& slots,
       int64_t far_past, int64_t far_future, int64_t first_slot, int64_t query_offset, double scale, double dropout_p,
       const std::string& capability)
      : kernels(kernels_of(capability)) {
    Attention& a = attention;
    a.element = element_of(query);
    a.heads = query.size(1), a.size = query.size(3);
    a.scale = static_cast<float>(scale), a.query_offset = query_offset;
    a.query = heads_of(query), a.key = heads_of(key), a.value = heads_of(value);
    a.pos_key = table_of(pos_key), a.pos_query = table_of(pos_query);
    if (slots) {
      a.slots = static_cast<const int32_t*>(slots->data_ptr()), a.reach = slots->size(0) / 2;
      a.first_slot = first_slot, a.table_rows = pos_key ? pos_key->size(1) : pos_query->size(1);
      a.far_past = far_past, a.far_future = far_future;
    }
    if (mask) {
      const auto stride = [&](int64_t d) { return mask->size(d) == 1 && d != 3 ? 0 : mask->stride(d); };
      a.mask = static_cast<const uint8_t*>(mask->data_ptr());
      a.mask_batch = stride(0), a.mask_head = stride(1), a.mask_query = stride(2), a.mask_key = stride(3);
    }
    if (dropout_p > 0) {
      a.dropout = true;
      a.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
      a.drop_below = static_cast<uint64_t>(std::nearbyint(dropout_p * 0x1p32));
      a.keep_scale = static_cast<float>(1 / (1 - dropout_p));
    }
    add_sequences(query, key, cu_seqlens);
    set_distances();
  }

  // Floats that `expand_tables` needs.
  int64_t table_floats(bool with_rows) const {
    const Attention& a = attention;
    const int64_t rows = with_rows ? a.distances : 0, tables = (a.pos_key.data != nullptr) + (a.pos_query.data != nullptr);
    return tables * a.heads * round_up(a.size, kernels.lanes) * (a.pitch + rows);
  }

  // The tables by distance. with_rows: also those that backward reads.
  void expand_tables(float* memory, bool with_rows) {
    Attention& a = attention;
    const int64_t size = round_up(a.size, kernels.lanes);
    for (auto [table, by_distance_t, by_distance] :
         {std::tuple{&a.pos_key, &a.key_by_distance_t, &a.key_by_distance},
          std::tuple{&a.pos_query, &a.query_by_distance_t, &a.query_by_distance}}) {
      if (table->data == nullptr) continue;
      *by_distance_t = memory;
      memory += a.heads * size * a.pitch;
      if (!with_rows) continue;
      *by_distance = memory;
      memory += a.heads * size * a.distances;
    }
    if (table_floats(false) == 0) return;
    parallel_for(0, a.heads, 1, [&](int64_t begin, int64_t end) { kernels.expand_tables(a, with_rows, begin, end); });
  }

  // Query blocks of even size. By shape alone: neither results nor gradients depend on the number of threads.
  void cut_blocks() {
    Attention& a = attention;
    const int64_t alone = std::max<int64_t>(1, a.heads * static_cast<int64_t>(sequences.size()));
    // Where heads are few, blocks are smaller, so that there is something to share out.
    const int64_t wanted = std::min(share(kFewestItems, alone), share(longest_query, kMinBlockRows));
    const int64_t blocks = std::max({share(longest_query, kMaxBlockRows), wanted, int64_t{1}});
    a.block_rows = std::max<int64_t>(1, share(longest_query, blocks));
    for (Sequence& sequence : sequences) {
      sequence.first_block = a.blocks_per_head;
      a.blocks_per_head += share(sequence.queries, a.block_rows);
    }
  }

 private:
  static constexpr int64_t kFewestItems = 24, kMinBlockRows = 59;

  void add_sequences(const Tensor& query, const Tensor& key, const std::optional<Tensor>& cu_seqlens) {
    if (cu_seqlens) {
      const auto* ends = static_cast<const int32_t*>(cu_seqlens->data_ptr());
      const int64_t step = cu_seqlens->stride(0);
      for (int64_t s = 0; s + 1 < cu_seqlens->size(0); ++s) {
        const int64_t start = ends[s * step], length = ends[(s + 1) * step] - start;
        sequences.push_back({0, start, start, length, length, 0});
      }
    } else {
      for (int64_t b = 0; b < query.size(0); ++b) sequences.push_back({b, 0, 0, query.size(2), key.size(2), 0});
    }
    for (const Sequence& sequence : sequences) {
      longest_query = std::max(longest_query, sequence.queries);
      longest_key = std::max(longest_key, sequence.keys);
    }
    attention.sequences = sequences.data();
    attention.sequence_count = static_cast<int64_t>(sequences.size());
  }

  // The distances that near pairs reach, and beyond them what whole vectors and the keys that fill them up read.
  void set_distances() {
    Attention& a = attention;
    constexpr int64_t kMargin = 32;
    const int64_t first = std::max(1 - longest_query - a.query_offset, -a.far_past - kMaxBlockRows);
    const int64_t last = std::min(longest_key - 1 - a.query_offset, -a.far_future + kMaxBlockRows);
    a.first_distance = first - kMargin;
    a.distances = std::max<int64_t>(last - first, 0) + 1 + 2 * kMargin;
    // An odd number of cache lines: the rows of a column then fall into different sets.
    a.pitch = round_up(a.distances, 16) / 16 % 2 ? round_up(a.distances, 16) : round_up(a.distances, 16) + 16;
    if (a.slots == nullptr) return;
    const auto row = [&](int64_t delta) {
      return std::clamp<int64_t>(a.slots[std::clamp(delta, -a.reach, a.reach) + a.reach] - a.first_slot, 0, a.table_rows - 1);
    };
    a.first_used_row = row(1 - a.first_distance - a.distances);
    a.used_rows = row(-a.first_distance) + 1 - a.first_used_row;
  }
};

void cpu_forward(Tensor output, Tensor lse, Tensor query, Tensor key, Tensor value, std::optional<Tensor> pos_key,
                 std::optional<Tensor> pos_query, std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens,
                 std::optional<Tensor> seed, std::optional<Tensor> slots, int64_t far_past, int64_t far_future,
                 int64_t first_slot, int64_t query_offset, double scale, double dropout_p, std::string capability) {
  Call call(query, key, value, pos_key, pos_query, mask, cu_seqlens, seed, slots, far_past, far_future, first_slot,
            query_offset, scale, dropout_p, capability);
  const Forward f{heads_of(output), statistic_of(lse)};
  call.cut_blocks();
  const ThreadMemory memory(kCallScratch, call.table_floats(false));
  call.expand_tables(memory.data(), false);
  const Attention& a = call.attention;
  parallel_for(0, a.heads * a.blocks_per_head, 1,
               [&](int64_t begin, int64_t end) { call.kernels.forward(a, f, begin, end); });
}

// How backward shares out its work, and the memory that the shares add up in.
struct BackwardCall {
  Backward backward{};

  explicit BackwardCall(const Call& call) : call_(call) {
    const Attention& a = call.attention;
    const int64_t size = round_up(a.size, call.kernels.lanes), alone = std::max<int64_t>(1, a.heads * a.sequence_count);
    const int64_t room = std::min(call.longest_query, call.longest_key) / kMinPartRows;
    backward.parts = std::max<int64_t>(1, std::min(share(kFewestItems, alone), room));
    cut_groups(size);
    int64_t queries = 0, keys = 0;
    for (const Sequence& sequence : call.sequences) {
      query_starts_.push_back(queries), key_starts_.push_back(keys);
      queries += sequence.queries, keys += sequence.keys;
    }
    backward.query_starts = query_starts_.data(), backward.key_starts = key_starts_.data();
    if (backward.parts > 1) query_floats_ = queries * a.heads * size, key_floats_ = keys * a.heads * size;
    if (a.pos_key.data) pos_key_floats_ = items() * a.used_rows * size;
    if (a.pos_query.data) pos_query_floats_ = items() * a.used_rows * size;
  }

  // Floats that `place` needs.
  int64_t floats() const { return query_floats_ + 2 * key_floats_ + pos_key_floats_ + pos_query_floats_; }

  // Where the shares add up: zeros for those that several items share, one after the other.
  void place(float* memory) {
    std::fill_n(memory, query_floats_ + 2 * key_floats_, 0.0f);
    backward.query_sums = memory;
    backward.key_sums = backward.query_sums + query_floats_;
    backward.value_sums = backward.key_sums + key_floats_;
    backward.pos_key_sums = backward.value_sums + key_floats_;
    backward.pos_query_sums = backward.pos_key_sums + pos_key_floats_;
  }

  int64_t items() const { return call_.attention.heads * backward.groups * backward.parts; }

 private:
  static constexpr int64_t kFewestItems = 24, kMostItems = 96, kMinPartRows = 192, kTableFloats = int64_t{8} << 20;

  // Groups of sequences of about the same work: enough of them to share out, few enough for their tables' gradients.
  void cut_groups(int64_t size) {
    const Attention& a = call_.attention;
    const int64_t each = std::max<int64_t>(1, a.heads * backward.parts);
    const int64_t tables = 2 * a.used_rows * size * each;
    const int64_t most = std::max<int64_t>(1, std::min(share(kMostItems, each), tables ? kTableFloats / tables : kMostItems));
    const auto work = [](const Sequence& s) { return static_cast<double>(s.queries) * s.keys + s.queries + s.keys + 1; };
    double total = 0, done = 0;
    for (const Sequence& sequence : call_.sequences) total += work(sequence);
    for (int64_t s = 0; s < a.sequence_count; ++s) {
      done += work(call_.sequences[s]);
      const bool full = done * most >= total * (group_ends_.size() + 1) * (1 - 1e-9);
      if (full || s + 1 == a.sequence_count) group_ends_.push_back(s + 1);
    }
    backward.groups = static_cast<int64_t>(group_ends_.size()), backward.group_ends = group_ends_.data();
  }

  const Call& call_;
  std::vector<int64_t> group_ends_, query_starts_, key_starts_;
  int64_t query_floats_ = 0, key_floats_ = 0, pos_key_floats_ = 0, pos_query_floats_ = 0;
};

void cpu_backward(Tensor grad_query, Tensor grad_key, Tensor grad_value, std::optional<Tensor> grad_pos_key,
                  std::optional<Tensor> grad_pos_query, Tensor output, Tensor lse, Tensor grad_output, Tensor grad_lse,
                  Tensor query, Tensor key, Tensor value, std::optional<Tensor> pos_key, std::optional<Tensor> pos_query,
                  std::optional<Tensor> mask, std::optional<Tensor> cu_seqlens, std::optional<Tensor> seed,
                  std::optional<Tensor> slots, int64_t far_past, int64_t far_future, int64_t first_slot,
                  int64_t query_offset, double scale, double dropout_p, std::string capability) {
  Call call(query, key, value, pos_key, pos_query, mask, cu_seqlens, seed, slots, far_past, far_future, first_slot,
            query_offset, scale, dropout_p, capability);
  BackwardCall shares(call);
  const ThreadMemory memory(kCallScratch, call.table_floats(true) + shares.floats());
  call.expand_tables(memory.data(), true);
  shares.place(memory.data() + call.table_floats(true));
  Backward& b = shares.backward;
  b.output = heads_of(output), b.grad_output = heads_of(grad_output);
  b.lse = statistic_of(lse), b.grad_lse = statistic_of(grad_lse);
  b.grad_query = heads_of(grad_query), b.grad_key = heads_of(grad_key), b.grad_value = heads_of(grad_value);

  const Attention& a = call.attention;
  const Kernels& kernels = call.kernels;
  for (int64_t wave = 0; wave < b.parts; ++wave) {
    parallel_for(0, shares.items(), 1,
                 [&](int64_t begin, int64_t end) { kernels.backward(a, b, wave, begin, end); });
  }
  if (b.parts > 1) {
    parallel_for(0, a.heads * a.sequence_count, 1,
                 [&](int64_t begin, int64_t end) { kernels.store_sums(a, b, begin, end); });
  }
  const auto store_table = [&](const float* sums, float factor, const std::optional<Tensor>& gradient) {
    if (!gradient) return;
    STD_TORCH_CHECK(gradient->is_contiguous(), "deberta_fast: the gradient of a table must be contiguous");
    void* data = gradient->data_ptr();
    parallel_for(0, a.heads, 1, [&](int64_t begin, int64_t end) {
      kernels.store_table(a, b, sums, factor, data, begin, end);
    });
  };
  store_table(b.pos_key_sums, static_cast<float>(1 / 1.4426950408889634), grad_pos_key);  // made with log2(e) s q
  store_table(b.pos_query_sums, a.scale, grad_pos_query);
}

STABLE_TORCH_LIBRARY_IMPL(deberta_fast, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&cpu_backward));
}

struct Kept {
  float* data = nullptr;
  int64_t floats = 0;
  ~Kept() { std::free(data); }
};
thread_local Kept kept[kMemoryUses];
constexpr int64_t kKeptFloats[kMemoryUses] = {int64_t{4} << 20, int64_t{16} << 20};  // at most, from call to call

}  // namespace

ThreadMemory::ThreadMemory(MemoryUse use, int64_t floats) : use_(use) {
  Kept& memory = kept[use];
  if (memory.floats < floats) {
    std::free(memory.data);
    memory.floats = 0;
    memory.data = static_cast<float*>(std::aligned_alloc(64, round_up(floats * 4, 64)));
    if (memory.data == nullptr) throw std::bad_alloc();
    memory.floats = floats;
  }
  data_ = memory.data;
}

ThreadMemory& ThreadMemory::operator=(ThreadMemory&& other) noexcept {
  std::swap(use_, other.use_);
  std::swap(data_, other.data_);
  return *this;
}

ThreadMemory::~ThreadMemory() {
  if (data_ == nullptr || kept[use_].floats <= kKeptFloats[use_]) return;
  std::free(kept[use_].data);
  kept[use_].data = nullptr, kept[use_].floats = 0;
}

}  // namespace deberta_fast

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
