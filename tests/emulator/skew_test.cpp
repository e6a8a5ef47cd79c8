// Checks the index arithmetic of csrc/cuda/skew.h at all indices: plain loops write and read as the lanes of kernels
// do.
#include "skew.h"

#include <cstdio>
#include <cstdlib>
#include <vector>

using namespace deberta_fast;

namespace {

#define CHECK(condition) check((condition), #condition, __LINE__)
void check(bool condition, const char* text, int line) {
  if (condition) return;
  std::fprintf(stderr, "skew_test.cpp:%d: not so: %s\n", line, text);
  std::exit(1);
}

// A lane has eight neighbouring columns, and each of four lanes has two of the eight columns of a product.
void test_columns() {
  std::vector<int> seen(64);
  for (int position = 0; position < 64; position++) seen[column_at(position)]++;
  for (int times : seen) CHECK(times == 1);
  for (int group = 0; group < 2; group++)
    for (int k = 0; k < 4; k++)
      for (int t = 0; t < 4; t++)
        for (int s = 0; s < 2; s++) CHECK(column_at(32 * group + 8 * k + 2 * t + s) == 32 * group + 8 * t + 2 * k + s);
  // The column of a position is the sum of those of its fragment and of its place in the fragment.
  for (int position = 0; position < 64; position++)
    CHECK(column_at(position) == column_at(position & ~7) + column_at(position & 7));
}

// The two columns of a lane in eight positions are eight apart, and the other bits of a column come from these two places.
void test_swapped_columns() {
  std::vector<int> seen(64);
  for (int position = 0; position < 64; position++) {
    const int column = swapped_column(position);
    seen[column]++;
    CHECK(column / 16 == position / 16);
    CHECK(column == swapped_column(position & ~7) + swapped_column(position & 7));
    if (position % 2 == 0) CHECK(swapped_column(position + 1) == column + 8 && column % 16 < 8);
  }
  for (int times : seen) CHECK(times == 1);
}

// ---- Bands. A cell holds the last write to it.

struct Cell {
  int owner = -1, distance = 0;  // a row or a position
  int phase = -1;                // the number of barriers before it
};

class Band {
 public:
  Band(int halves, int margin) : cells_(halves), margin_(margin) {}
  void barrier() { phase_++; }

  // Writes a cell, which must not be written twice between barriers.
  void write(int at, int owner, int distance) {
    Cell& cell = find(at);
    CHECK(cell.phase != phase_);
    cell = {owner, distance, phase_};
  }
  const Cell& read(int at) { return find(at); }

 private:
  Cell& find(int at) {
    CHECK(at + margin_ >= 0 && at + margin_ < static_cast<int>(cells_.size()));
    return cells_[at + margin_];
  }

  std::vector<Cell> cells_;
  int margin_, phase_ = 0;
};

// Checks the rows of warps 0 and 1 of a block, at four consecutive tiles, then at two more after a gap.
void test_row_band(int rows, int columns) {
  const int pitch = row_band_pitch(columns);
  CHECK(pitch % 8 == 0 && kRowBandMargin % 8 == 0 && row_band_halves(rows, columns) % 8 == 0);
  for (int before : {0, rows % kDistances}) {
    Band band(row_band_halves(rows, columns), kRowBandMargin);
    for (int tile : {0, 1, 2, 3, 10, 11}) {
      // The band counts distances from the tile's.
      const auto write = [&](int distance) {
        for (int row = 0; row < rows; row++)
          for (int t = 0; t < 4; t++) {
            const int first = row_band(row % 8, before + 8 * t, columns) + row_band(row & ~7, distance, columns);
            CHECK(first == row_band(row, before + distance + 8 * t, columns));
            CHECK(row_band(row & ~7, distance, columns) % 2 == 0);  // so only the lane decides whether the first is odd
            for (int i = 0; i < 8; i++) band.write(first + i, row, columns * tile + before + distance + 8 * t + i);
          }
      };
      band.barrier();
      if (tile == 0 || tile == 10) {
        write(-kDistances);
      } else {
        std::vector<Cell> overhang;
        for (int row = 0; row < rows; row++)
          for (int i = 0; i < 32; i++) overhang.push_back(band.read(row * pitch + columns + i));
        for (int row = 0; row < rows; row++)
          for (int i = 0; i < 32; i++) {
            const Cell& cell = overhang[32 * row + i];
            band.write(row * pitch + i, cell.owner, cell.distance);
          }
      }
      band.barrier();
      for (int distance = 0; distance < columns; distance += kDistances) write(distance);
      band.barrier();
      for (int row = 0; row < rows; row++)
        for (int column = 0; column < columns; column++) {
          const Cell& cell = band.read(row * pitch + column);
          CHECK(cell.owner == row && cell.distance == columns * tile + column - row);
        }
    }
  }
}

void test_column_band(int rows, int columns) {
  const int pitch = column_band_pitch(rows);
  CHECK(pitch % 8 == 0);
  Band band(columns * pitch, 0);
  for (int group = 0; group < columns / 32; group++)
    for (int distance = -kDistances; distance < rows; distance += kDistances)
      for (int part = 0; part < 32; part += 8)
        for (int lane = 0; lane < 32; lane++) {
          const int position = 32 * group + part + lane / 4, offset = distance + 8 * (lane % 4);
          const int first =
              column_band(32 * group + lane / 4, offset, rows) + column_band(part, 0, rows) - column_band(0, 0, rows);
          CHECK(first == column_band(position, offset, rows));
          CHECK((column_band(part, 0, rows) - column_band(0, 0, rows)) % 2 == 0);
          for (int i = 0; i < 8; i++) {
            CHECK((first + i) / pitch == position);
            band.write(first + i, position, offset + i);
          }
        }
  band.barrier();
  for (int position = 0; position < columns; position++)
    for (int row = 0; row < rows; row++) {
      const Cell& cell = band.read(position * pitch + 32 + row);
      CHECK(cell.owner == position && cell.distance == row - column_at(position & 31));
    }
}

// A tile's gradients of a row's scores lie in the order of their distances, from -32 on.
void test_gradient_band(int rows, int columns) {
  Band band(row_band_halves(rows, columns), kRowBandMargin);
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < columns; column++) band.write(gradient_band(row, column, columns), row, column - row);
  band.barrier();
  for (int row = 0; row < rows; row++)
    for (int distance = -row; distance < columns - row; distance++) {
      const Cell& cell = band.read(row * row_band_pitch(columns) + 32 + distance);
      CHECK(32 + distance >= 0 && 32 + distance < row_band_pitch(columns));
      CHECK(cell.owner == row && cell.distance == distance);
    }
}

// ---- Tables: products of tensor cores, whose operands lanes hold as primitives.h says.

int number(int i, int j) { return (i * 37 + j * 101 + i * j) % 23 - 11; }

void test_scores(int size) {
  const int reads = size / 32;
  std::vector<int> seen(kDistances * size);
  std::vector<int> sums(16 * kDistances);
  for (int product = 0; product < 4; product++)
    for (int read = 0; read < reads; read++)
      for (int lane = 0; lane < 32; lane++)
        for (int word = 0; word < 4; word++)
          for (int half = 0; half < 2; half++) {
            const TableCell cell = score_cell(size, product * reads + read, lane, word, half);
            CHECK(cell.distance >= 0 && cell.distance < kDistances && cell.element >= 0 && cell.element < size);
            seen[cell.distance * size + cell.element]++;
            const int g = lane / 4, t = lane % 4, step = 2 * read + word / 2;
            const int k = 16 * step + 8 * (word % 2) + 2 * t + half;  // the column of the left operand that it meets
            for (int row = 0; row < 16; row++)
              sums[row * kDistances + 8 * product + g] += number(row, k) * number(cell.distance, cell.element);
          }
  for (int times : seen) CHECK(times == 1);
  for (int row = 0; row < 16; row++)
    for (int column = 0; column < kDistances; column++) {
      int expected = 0;
      for (int k = 0; k < size; k++) expected += number(row, k) * number(column_at(column), k);
      CHECK(sums[row * kDistances + column] == expected);
    }
}

// The operands of scores that a warp makes alone: rows of the left one are distances in order, columns of the right one
// are in the order of swapped_column.
void test_alone(int size) {
  std::vector<int> seen(kDistances * size), also_seen(kDistances * size);
  for (int i = 0; i < size / 8; i++)
    for (int lane = 0; lane < 32; lane++)
      for (int word = 0; word < 4; word++)
        for (int half = 0; half < 2; half++) {
          const TableCell cell = left_cell(size, i, lane, word, half);
          const int g = lane / 4, t = lane % 4, steps = size / 16;
          CHECK(cell.distance == 16 * (i / steps) + g + (word % 2 == 1 ? 8 : 0));
          CHECK(cell.element == 16 * (i % steps) + 2 * t + half + (word >= 2 ? 8 : 0));
          seen[cell.distance * size + cell.element]++;
          const TableCell right = right_cell(size, i, lane, word, half);
          CHECK(right.distance == 16 * (i / steps) + swapped_column(8 * (word / 2) + g));
          CHECK(right.element == 16 * (i % steps) + 8 * (word % 2) + 2 * t + half);
          also_seen[right.distance * size + right.element]++;
        }
  for (int times : seen) CHECK(times == 1);
  for (int times : also_seen) CHECK(times == 1);
}

void test_gradients(int size) {
  std::vector<int> seen(kDistances * size);
  std::vector<int> sums(16 * size);
  for (int product = 0; product < size / 8; product++)
    for (int lane = 0; lane < 32; lane++)
      for (int word = 0; word < 4; word++)
        for (int half = 0; half < 2; half++) {
          const TableCell cell = gradient_cell(product, lane, word, half);
          CHECK(cell.distance >= 0 && cell.distance < kDistances && cell.element >= 0 && cell.element < size);
          seen[cell.distance * size + cell.element]++;
          const int g = lane / 4, t = lane % 4, k = 16 * (word / 2) + 8 * (word % 2) + 2 * t + half;
          for (int row = 0; row < 16; row++)
            sums[row * size + 8 * product + g] += number(row, k) * number(cell.distance, cell.element);
        }
  for (int times : seen) CHECK(times == 1);
  for (int row = 0; row < 16; row++)
    for (int element = 0; element < size; element++) {
      int expected = 0;
      for (int k = 0; k < kDistances; k++) expected += number(row, k) * number(k, element);
      CHECK(sums[row * size + element] == expected);
    }
}

}  // namespace

int main() {
  test_columns();
  test_swapped_columns();
  for (int columns : {32, 64}) {
    for (int rows : {16, 32}) test_row_band(rows, columns);
    for (int rows : {16, 32}) test_gradient_band(rows, columns);
    for (int rows : {64, 128}) test_column_band(rows, columns);
  }
  for (int size : {32, 64, 96, 128}) test_scores(size), test_alone(size), test_gradients(size);
  std::puts("ok");
}
