// Checks what the kernels take from csrc/cuda/plan.cpp, without a kernel: which pairs are far, which blocks of the
// tables by distance are read, where dA of near pairs lies, and that every head and distance is processed.
#include "plan.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "backward_tile.h"

namespace deberta_fast::cuda {
namespace {

// The launches of plan.cpp.
struct Launched {
  std::vector<Expansion> expansions;
  std::vector<ForwardCall> forward;
  std::vector<BackwardCall> delta, key, query;
  std::vector<TableCall> by_distance, by_row;
} launched;

template <class Call>
const char* keep(std::vector<Call>& calls, const Call& call) {
  calls.push_back(call);
  return nullptr;
}

constexpr int kWarps = 4;

}  // namespace

const char* expand_table(const Expansion& call, void*) { return keep(launched.expansions, call); }
const char* pack_mask(const MaskBits&, void*) { return nullptr; }
const char* forward(const ForwardCall& call, void*) { return keep(launched.forward, call); }
const char* backward_delta(const BackwardCall& call, void*) { return keep(launched.delta, call); }
const char* backward_key(const BackwardCall& call, void*) { return keep(launched.key, call); }
const char* backward_query(const BackwardCall& call, void*) { return keep(launched.query, call); }
const char* backward_by_distance(const TableCall& call, void*) { return keep(launched.by_distance, call); }
const char* backward_by_row(const TableCall& call, void*) { return keep(launched.by_row, call); }
int64_t far_count(const Call& call, const Operand& rows) { return block_count(call, rows, kBackwardRows) * kWarps; }

namespace {

struct Problem {
  int queries, keys, past, future, offset;
  bool c2p = true, p2c = true, packed = false;
  int batches = 1, heads = 1, size = 64;
} problem;

#define CHECK(condition) check((condition), #condition, __LINE__)
void check(bool condition, const char* text, int line) {
  if (condition) return;
  const Problem& p = problem;
  std::fprintf(stderr, "plan_test.cpp:%d: not so: %s\n", line, text);
  std::fprintf(stderr, "(%d x %d, far from %d and %d on, offset %d, terms %d%d, packed %d, %d x %d x %d)\n", p.queries,
               p.keys, p.past, p.future, p.offset, p.c2p, p.p2c, p.packed, p.batches, p.heads, p.size);
  std::exit(1);
}

constexpr int kPastRow = 11, kFutureRow = 3;

// The view of one side, in which delta = offset + direction * distance.
struct View {
  const Operand &rows, &columns;
  int direction;
  BlockInfo block;

  // Checks that tiles of `tile_columns` from `begin` to `end` have only far pairs with the block of rows.
  void check_far(int begin, int end, int tile_columns, int row) const {
    const int first = tile_columns * begin, last = std::min(tile_columns * end, block.columns) - 1;
    if (first > last) return;
    const int last_row = std::min(block.first_row + kBackwardRows, block.rows) - 1;
    for (int distance : {first - last_row, last - block.first_row}) {
      const int delta = problem.offset + direction * distance;
      CHECK(delta >= problem.past ? row == kPastRow : delta <= problem.future && row == kFutureRow);
    }
  }
};

// Checks that the block of 32 distances from this one on is in the table.
void check_block(const Operand& side, int distance) {
  const int from_first = distance - side.first_distance;
  CHECK(from_first >= 0 && from_first % kDistances == 0 && from_first / kDistances < side.blocks);
}

// Visits groups of 32 rows, from which warps count distances, whether they own 16 rows or 32.
template <class Function>
void for_groups(const BlockInfo& block, int first_column, Function function) {
  for (int group = 0; group < kBackwardRows; group += 32) function(first_column - block.first_row - group);
}

// Checks the blocks that write_row_band and write_column_band read. near_scores reads some of the latter.
void check_score_tables(const View& view, int first_column, int tile_columns) {
  if (view.rows.score_table != nullptr)
    for_groups(view.block, first_column, [&](int first) {
      for (int distance = -32; distance < tile_columns; distance += 32) check_block(view.rows, first + distance);
    });
  if (view.columns.score_table != nullptr)
    for (int group = 0; group < tile_columns; group += 32)
      for (int distance = -32; distance < kBackwardRows; distance += 32)
        check_block(view.columns, view.block.first_row - first_column - group + distance);
}

// Checks the blocks that GradientBand reads: at each tile of 32, and after any tile, which may be the last.
void check_gradient_table(const View& view, int begin, int end) {
  if (view.rows.table.data == nullptr || begin >= end) return;
  for (int tile = begin; tile <= end; ++tile)
    for_groups(view.block, 32 * tile, [&](int first) { check_block(view.rows, first - 32); });
}

void check_forward(View view) {
  for (view.block.first_row = 0; view.block.first_row < view.block.rows; view.block.first_row += 128) {
    const Segments found = find_segments(view.rows, view.block, 128, 64);
    CHECK(0 <= found.near_begin && found.near_begin <= found.near_end && found.near_end <= found.end);
    CHECK(found.end == (view.block.columns + 63) / 64);
    view.check_far(0, found.near_begin, 64, view.rows.far_left);
    view.check_far(found.near_end, found.end, 64, view.rows.far_right);
    for (int tile = found.near_begin; tile < found.near_end; ++tile) check_score_tables(view, 64 * tile, 64);
  }
}

// Whether blocks of 128 are near, by row block and column block, seen from the side of the rows.
using Near = std::vector<std::vector<bool>>;

Near check_backward(View view, const BackwardCall& backward, bool keys) {
  Near near;
  for (view.block.first_row = 0; view.block.first_row < view.block.rows; view.block.first_row += kBackwardRows) {
    const Segments found = find_segments(view.rows, view.block, kBackwardRows, kBackwardRows);
    CHECK(0 <= found.near_begin && found.near_begin <= found.near_end && found.near_end <= found.end);
    view.check_far(0, found.near_begin, kBackwardRows, view.rows.far_left);
    view.check_far(found.near_end, found.end, kBackwardRows, view.rows.far_right);
    const int tiles = (view.block.columns + 31) / 32;
    const int begin = std::min(4 * found.near_begin, tiles), end = std::min(4 * found.near_end, tiles);
    check_gradient_table(view, begin, end);
    if (keys) {
      for (int tile = begin; tile < end; ++tile) check_score_tables(view, 32 * tile, 32);
      CHECK(found.near_end - found.near_begin <= backward.near_blocks);
    }
    near.emplace_back(found.end);
    for (int block = found.near_begin; block < found.near_end; ++block) near.back()[block] = true;
  }
  return near;
}

// Each near square of 64 has its diagonal, and the squares in the table's blocks are those whose dA is stored.
void check_diagonals(const TableCall& table, const Near& near, int rows, int columns) {
  for (int row = 0; row < rows; row += 64)
    for (int column = 0; column < columns; column += 64) {
      const bool is_near = near[row / 128][column / 128];
      const int distance = column / 128 - row / 128, diagonal = (column - row) / 64 - table.first_diagonal;
      CHECK(is_near == (distance >= table.first_block && distance <= table.last_block));
      if (is_near) CHECK(diagonal >= 0 && diagonal < table.diagonals);
    }
}

// Checks that the shares of the launches contain every head once.
template <class Function>
void check_shares(size_t launches, Function share) {
  int next = 0;
  for (size_t i = 0; i < launches; ++i) {
    const auto [first, count] = share(i);
    CHECK(first == next && count > 0);
    next += count;
  }
  CHECK(next == problem.heads);
}

void check_memory(const BackwardCall& backward, const TableCall* tables[2]) {
  const Call& call = backward.call;
  const auto end = [](const auto* memory, int64_t count) { return reinterpret_cast<const char*>(memory + count); };
  const auto begins = [](const auto* memory) { return reinterpret_cast<const char*>(memory); };
  // The parts of memory, in the order in which plan.cpp takes them.
  std::vector<std::pair<const char*, const char*>> parts;
  const int64_t statistics = int64_t{call.heads} * backward.statistic_rows;
  parts.push_back({begins(backward.lse2), end(backward.lse2, statistics)});
  parts.push_back({begins(backward.delta), end(backward.delta, statistics)});
  const int64_t key_blocks = block_count(call, call.key, kBackwardRows);
  if (key_blocks > 0 && backward.near_blocks > 0)
    parts.push_back({near_tile(backward, 0, 0, 0), near_tile(backward, key_blocks - 1, backward.head_count - 1,
                                                             backward.near_blocks * kTilesPerBlock)});
  for (const bool keys : {false, true}) {
    if (tables[keys] == nullptr) continue;
    const int64_t of_head = int64_t{keys ? backward.key_far_count : backward.query_far_count} * 2 * call.size;
    const float* sums = keys ? backward.far_key_sums : backward.far_query_sums;
    parts.push_back({begins(sums), end(sums, backward.head_count * of_head)});
  }
  for (const bool keys : {false, true}) {
    if (tables[keys] == nullptr) continue;
    const TableCall& table = *tables[keys];
    const int64_t programs = int64_t{backward.head_count} * table.diagonals * table.splits;
    parts.push_back({begins(table.sums), end(table.sums, programs * 128 * call.size)});
  }
  for (size_t i = 0; i + 1 < parts.size(); ++i) CHECK(parts[i].second <= parts[i + 1].first);
}

void check_problem(const Problem& given) {
  problem = given;
  static char something[16];
  Request request;
  Call& call = request.call;
  call.batches = problem.batches, call.heads = problem.heads, call.size = problem.size;
  call.query.length = problem.queries, call.key.length = problem.keys;
  static const int32_t ends = 0;  // they are not read here
  if (problem.packed) call.ends = &ends, call.packed_rows = int64_t{problem.batches} * problem.queries;
  if (problem.c2p) call.query.table.data = something;
  if (problem.p2c) call.key.table.data = something;
  request.far_past = problem.past, request.far_future = problem.future, request.query_offset = problem.offset;
  request.past_row = kPastRow, request.future_row = kFutureRow, request.table_rows = 16;

  // Gradients of tables that are not requested are not launched.
  launched = {};
  Workspace unwanted(something);
  CHECK(run_backward(request, {}, unwanted, nullptr) == nullptr && !launched.key.empty());
  CHECK(launched.by_distance.empty() && launched.by_row.empty());

  launched = {};
  Gradients gradients;
  if (problem.c2p) gradients.grad_pos_key = something;
  if (problem.p2c) gradients.grad_pos_query = something;
  Workspace counted, workspace(something);  // its memory is not accessed
  // Where warps make their scores alone, an absent term has a table of zeros.
  const size_t given_tables = problem.c2p + problem.p2c;
  const size_t expansions = given_tables > 0 && padded_size(problem.size) <= kAloneSize ? 2 : given_tables;
  CHECK(run_forward(request, {}, {}, counted, nullptr) == nullptr && launched.forward.empty());
  CHECK(run_forward(request, {}, {}, workspace, nullptr) == nullptr && launched.forward.size() == 1);
  CHECK(counted.bytes() == workspace.bytes() && launched.expansions.size() == expansions);
  CHECK(run_backward(request, gradients, counted, nullptr) == nullptr && launched.delta.empty());
  CHECK(run_backward(request, gradients, workspace, nullptr) == nullptr && launched.delta.size() == 1);
  CHECK(counted.bytes() == workspace.bytes());

  // Each share of heads has every launch.
  const size_t terms = problem.c2p + problem.p2c;
  CHECK(launched.by_distance.size() == terms * launched.key.size());
  CHECK(launched.by_row.size() == terms * launched.key.size());
  const auto of = [](const BackwardCall& x) { return std::pair(x.first_head, x.head_count); };
  check_shares(launched.key.size(), [&](size_t i) { return of(launched.key[i]); });
  check_shares(launched.query.size(), [&](size_t i) { return of(launched.query[i]); });
  const TableCall* tables[2] = {};
  for (size_t term = 0; term < terms; ++term) {
    check_shares(launched.key.size(), [&](size_t i) { return of(launched.by_distance[terms * i + term].backward); });
    check_shares(launched.key.size(), [&](size_t i) { return of(launched.by_row[terms * i + term].backward); });
    const TableCall& table = launched.by_distance[term];
    const TableCall& by_row = launched.by_row[term];
    tables[table.keys] = &table;
    CHECK(by_row.first_diagonal == table.first_diagonal && by_row.diagonals == table.diagonals);
    CHECK(by_row.splits == table.splits && table.splits > 0 && by_row.sums == table.sums);
    const Operand& rows = table.keys ? table.backward.call.key : table.backward.call.query;
    CHECK(by_row.keys == table.keys && by_row.table_rows == request.table_rows);
    const Call& by_row_call = by_row.backward.call;
    const Operand& by_row_rows = table.keys ? by_row_call.key : by_row_call.query;
    CHECK(by_row_rows.far_left == rows.far_left && by_row_rows.far_right == rows.far_right);
    const BackwardCall &backward = table.backward, &by_row_backward = by_row.backward;
    CHECK(by_row_backward.far_key_sums == backward.far_key_sums);
    CHECK(by_row_backward.far_query_sums == backward.far_query_sums);
    CHECK(by_row_backward.key_far_count == backward.key_far_count);
    CHECK(by_row_backward.query_far_count == backward.query_far_count);
  }
  if (terms == 0) return;
  check_memory(launched.key[0], tables);

  // A packed sequence may be shorter than the longest.
  const std::vector<int> shorter = {1, problem.queries / 2, problem.queries - 1, problem.queries};
  for (int length : problem.packed ? shorter : std::vector{0}) {
    const int queries = problem.packed ? length : problem.queries, keys = problem.packed ? length : problem.keys;
    BlockInfo of_queries = {}, of_keys = {};
    of_queries.rows = of_keys.columns = queries, of_queries.columns = of_keys.rows = keys;
    const Call& forward = launched.forward[0].call;
    check_forward({forward.query, forward.key, -1, of_queries});
    const BackwardCall& backward = launched.key[0];
    const Operand &query = backward.call.query, &key = backward.call.key;
    const Near by_query = check_backward({query, key, -1, of_queries}, backward, false);
    const Near by_key = check_backward({key, query, 1, of_keys}, backward, true);
    for (size_t i = 0; i < by_query.size(); ++i)
      for (size_t j = 0; j < by_key.size(); ++j) CHECK(by_query[i][j] == by_key[j][i]);
    if (tables[false] != nullptr) check_diagonals(*tables[false], by_query, queries, keys);
    if (tables[true] != nullptr) check_diagonals(*tables[true], by_key, keys, queries);
  }
}

// Checks all places of the far limits in a block of 128.
void test_edges() {
  constexpr int lengths[] = {1, 64, 65, 129, 290};
  constexpr int limits[][2] = {{0, -1}, {1, -1}, {26, -26}, {200, -7}, {500, -500}};
  for (int queries : lengths)
    for (int keys : lengths)
      for (const auto& limit : limits)
        for (int offset = -64; offset < 64; ++offset)
          check_problem({queries, keys, limit[0], limit[1], offset + keys - queries});
}

void test_more(int problems) {
  std::mt19937 random(1);
  const auto up_to = [&](int most) { return static_cast<int>(random() % (most + 1)); };
  for (int i = 0; i < problems; ++i) {
    Problem p = {};
    const int longest = i % 8 == 0 ? 3000 : 700;
    p.queries = 1 + up_to(longest), p.keys = 1 + up_to(longest);
    p.past = up_to(up_to(3) == 0 ? 1200 : 60), p.future = -1 - up_to(up_to(3) == 0 ? 1200 : 60);
    p.offset = up_to(2) == 0 ? 0 : up_to(2 * longest) - longest;
    if (up_to(9) == 0) p.offset = up_to(1) == 0 ? 1 << 27 : -(1 << 27);
    p.c2p = up_to(3) != 0, p.p2c = up_to(3) != 0, p.packed = up_to(2) == 0;
    if (p.packed) p.keys = p.queries, p.offset = 0;
    p.batches = 1 + up_to(3), p.heads = 1 + up_to(15), p.size = 32 * (1 + up_to(3));
    check_problem(p);
  }
}

}  // namespace
}  // namespace deberta_fast::cuda

int main() {
  deberta_fast::cuda::limit_near_bytes(int64_t{1} << 20);  // several launches share the heads
  deberta_fast::cuda::test_edges();
  deberta_fast::cuda::test_more(2000);
  std::puts("ok");
}
