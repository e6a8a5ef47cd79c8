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
  std::vector<Preparation> prepare;
  std::vector<ForwardCall> forward;
  std::vector<BackwardCall> key;
  std::vector<TableCall> query, by_row;
} launched;

template <class Call>
const char* keep(std::vector<Call>& calls, const Call& call) {
  calls.push_back(call);
  return nullptr;
}

constexpr int kWarps = 4;

}  // namespace

const char* prepare(const Preparation& call, void*) { return keep(launched.prepare, call); }
const char* forward(const ForwardCall& call, void*) { return keep(launched.forward, call); }
const char* backward_key(const BackwardCall& call, void*) { return keep(launched.key, call); }
const char* backward_query(const TableCall& call, void*) { return keep(launched.query, call); }
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

// Checks that each near square of 64 is on one diagonal, and that these are the squares whose dA is stored.
void check_diagonals(const Diagonals& diagonals, const Near& near, int queries, int keys) {
  const int query_squares = (queries + 63) / 64, key_squares = (keys + 63) / 64;
  std::vector<std::vector<int>> found(query_squares, std::vector<int>(key_squares));
  for (int d = 0; d < diagonals.count; ++d) {
    const DiagonalSquares squares = diagonals.squares(d, query_squares, key_squares);
    for (int i = 0; i < squares.count; ++i) {
      const int query = squares.first + i * squares.step, key = query + diagonals.first + d;
      CHECK(query >= 0 && query < query_squares && key >= 0 && key < key_squares);
      ++found[query][key];
    }
  }
  for (int query = 0; query < query_squares; ++query)
    for (int key = 0; key < key_squares; ++key) CHECK(found[query][key] == (near[query / 2][key / 2] ? 1 : 0));
}

// Checks that every diagonal has shares, in proportion to its squares in the longest sequence.
void check_proportions(const Diagonals& diagonals) {
  int64_t all = 0, before = 0;
  const auto squares = [&](int d) {
    return diagonals.squares(d, diagonals.query_squares, diagonals.key_squares).count;
  };
  for (int d = 0; d < diagonals.count; ++d) all += squares(d);
  for (int d = 0; d < diagonals.count; before += squares(d++)) {
    CHECK(diagonals.first_share(d + 1) > diagonals.first_share(d));
    const double exact = d + double(diagonals.shares - diagonals.count) * before / all;
    CHECK(diagonals.first_share(d) <= exact && diagonals.first_share(d) > exact - 1);
  }
  CHECK(diagonals.first_share(0) == 0 && diagonals.first_share(diagonals.count) == diagonals.shares);
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

void check_memory(const TableCall& table) {
  const BackwardCall& backward = table.backward;
  const Call& call = backward.call;
  const bool all = launched.by_row[0].backward.head_count == call.heads;  // sums are held for all heads
  const int sum_heads = all ? call.heads : backward.head_count;
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
    if (table.grad_tables[keys] == nullptr) continue;
    const int64_t of_head = int64_t{keys ? backward.key_far_count : backward.query_far_count} * 2 * call.size;
    const float* sums = keys ? backward.far_key_sums : backward.far_query_sums;
    parts.push_back({begins(sums), end(sums, sum_heads * of_head)});
  }
  parts.push_back({begins(table.first_share), end(table.first_share, table.diagonals.count + 1)});
  for (const bool keys : {false, true}) {
    if (table.grad_tables[keys] == nullptr) continue;
    const int64_t programs = int64_t{sum_heads} * table.diagonals.shares;
    parts.push_back({begins(table.sums[keys]), end(table.sums[keys], programs * 128 * call.size)});
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
  CHECK(launched.by_row.empty() && launched.query[0].diagonals.shares == 0);

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
  CHECK(counted.bytes() == workspace.bytes() && launched.prepare.size() == 1 && !launched.prepare[0].backward);
  const auto& scores = launched.prepare[0].scores;
  CHECK(size_t(scores[0] != nullptr) + size_t(scores[1] != nullptr) == expansions);
  CHECK(run_backward(request, gradients, counted, nullptr) == nullptr && launched.prepare.size() == 1);
  CHECK(run_backward(request, gradients, workspace, nullptr) == nullptr && launched.prepare.size() == 2);
  CHECK(counted.bytes() == workspace.bytes() && launched.prepare[1].backward);

  // Each share of heads has every launch. Rows are summed once for all heads, or once for each share.
  const auto of = [](const BackwardCall& x) { return std::pair(x.first_head, x.head_count); };
  check_shares(launched.key.size(), [&](size_t i) { return of(launched.key[i]); });
  check_shares(launched.query.size(), [&](size_t i) { return of(launched.query[i].backward); });
  if (!problem.c2p && !problem.p2c) return CHECK(launched.by_row.empty());
  CHECK(launched.by_row.size() == 1 || launched.by_row.size() == launched.key.size());
  check_shares(launched.by_row.size(), [&](size_t i) { return of(launched.by_row[i].backward); });
  const TableCall& table = launched.query[0];
  for (size_t i = 0; i < launched.query.size(); ++i) {
    const TableCall& by_row = launched.by_row[launched.by_row.size() == 1 ? 0 : i];
    const BackwardCall &query = launched.query[i].backward, &key = launched.key[i], &row = by_row.backward;
    CHECK(query.sum_head == query.first_head - row.first_head && row.sum_head == 0);
    CHECK(key.sum_head == query.sum_head && key.first_head == query.first_head && key.near == query.near);
    CHECK(row.far_key_sums == key.far_key_sums && row.key_far_count == key.key_far_count);
    CHECK(row.far_query_sums == query.far_query_sums && row.query_far_count == query.query_far_count);
    for (const TableCall* x : std::vector<const TableCall*>{&launched.query[i], &by_row, &launched.prepare[1].table}) {
      CHECK(x->sums[0] == table.sums[0] && x->sums[1] == table.sums[1] && x->first_share == table.first_share);
      CHECK(x->diagonals.shares == table.diagonals.shares && x->diagonals.first == table.diagonals.first);
      CHECK(x->diagonals.count == table.diagonals.count && x->table_rows == request.table_rows);
    }
  }
  check_memory(table);
  if (table.diagonals.count > 0) check_proportions(table.diagonals);

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
    check_diagonals(table.diagonals, by_query, queries, keys);
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
