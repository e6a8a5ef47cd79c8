// Checks where the emulator's products and loads of matrices have their elements, one element at a time, against the
// formulas of the PTX manual: mma.m16n8k16 with .f16 and .bf16, and ldmatrix with .x4.
#include <array>

#include "launched.h"

namespace {

struct Place {
  int row, column;
  bool operator==(const Place& other) const { return row == other.row && column == other.column; }
};

// By lane and by the number of the element in the lane, as the manual names them: groupID, threadID_in_group, a_i.
template <int elements>
using Places = std::array<std::array<Place, elements>, 32>;

template <int elements, class At>
Places<elements> places(At at) {
  Places<elements> table;
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < elements; i++) table[lane][i] = at(lane >> 2, lane % 4, i);
  }
  return table;
}

// Multiplicand A, 16 x 16.
const Places<8> kA = places<8>([](int group, int in_group, int i) {
  const int row = (0 <= i && i < 2) || (4 <= i && i < 6) ? group : group + 8;
  return Place{row, i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8};
});
// Multiplicand B, 16 x 8.
const Places<4> kB = places<4>([](int group, int in_group, int i) {
  return Place{i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8, group};
});
// Accumulators C and D, 16 x 8.
const Places<4> kC =
    places<4>([](int group, int in_group, int i) { return Place{i < 2 ? group : group + 8, in_group * 2 + (i & 1)}; });
// Each 8 x 8 matrix of ldmatrix: a lane has a pair of elements of row groupID, or of column groupID with .trans.
const Places<2> kMatrix = places<2>([](int group, int in_group, int i) { return Place{group, in_group * 2 + i}; });
const Places<2> kTransposed = places<2>([](int group, int in_group, int i) { return Place{in_group * 2 + i, group}; });

// Every place of a matrix belongs to one element.
template <size_t elements>
void check_cover(const std::array<std::array<Place, elements>, 32>& table, int rows, int columns) {
  std::vector<int> times(rows * columns);
  for (const auto& lane : table) {
    for (const Place& place : lane) times[place.row * columns + place.column]++;
  }
  for (int n : times) CHECK(n == 1);
}

// ---- Products. The kernel has registers only, so that all tables are applied here.

struct Registers {
  uint32_t a[32][4], b[32][2];
  float c[32][4];
};

template <class T>
KERNEL(32, 1)
multiply(Arguments arguments) {
  for (int n = 0; n < arguments.variant; n++) {
    const Registers& in = static_cast<const Registers*>(arguments.in)[n];
    float (&c)[4] = static_cast<Registers*>(arguments.out)[n].c[lane()];
    for (int i = 0; i < 4; i++) c[i] = in.c[lane()][i];
    multiply_add<T>(c, in.a[lane()], in.b[lane()][0], in.b[lane()][1]);
  }
}

// Element i is in the low half of word i / 2 if i is even.
template <class T>
void set(uint32_t* words, int i, float x) {
  words[i / 2] |= (pack<T>(x, 0) & 0xffff) << (i % 2 * 16);
}

// One element of A, or of B, is 1. All elements of the other matrix differ; the integers up to 256 are exact.
template <class T>
void test_product_of_each_element(bool of_a) {
  const auto value = [](Place place, int columns) {
    return static_cast<float>(1 + place.row * columns + place.column);
  };
  std::vector<Place> ones;
  std::vector<Registers> in(of_a ? 256 : 128, Registers()), out(in.size(), Registers());
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < (of_a ? 8 : 4); i++) {
      Registers& registers = in[ones.size()];
      ones.push_back(of_a ? kA[lane][i] : kB[lane][i]);
      set<T>(of_a ? registers.a[lane] : registers.b[lane], i, 1);
    }
  }
  for (Registers& registers : in) {
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 8 && !of_a; i++) set<T>(registers.a[lane], i, value(kA[lane][i], 16));
      for (int i = 0; i < 4 && of_a; i++) set<T>(registers.b[lane], i, value(kB[lane][i], 8));
      for (int i = 0; i < 4; i++) registers.c[lane][i] = 1000 * value(kC[lane][i], 8);
    }
  }
  CHECK(!run(multiply<T>, 32, 0, in.data(), out.data(), static_cast<int>(in.size())));
  for (size_t n = 0; n < in.size(); n++) {
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 4; i++) {
        const Place d = kC[lane][i], one = ones[n];
        float sum = 1000 * value(d, 8);
        if (of_a && d.row == one.row) sum += value({one.column, d.column}, 8);
        if (!of_a && d.column == one.column) sum += value({d.row, one.row}, 16);
        CHECK(out[n].c[lane][i] == sum);
      }
    }
  }
}

// ---- Loads. Lane l gives the address of row l % 8 of matrix l / 8.

struct Addresses {
  uint16_t in[256];  // what shared memory holds
  int offset[32];    // of each lane's row, in elements
};

KERNEL(32, 1) load(Arguments arguments) {
  const Addresses& in = *static_cast<const Addresses*>(arguments.in);
  for (int i = lane(); i < 256; i += 32) store_shared_half(shared_memory() + 2 * i, in.in[i]);
  sync_warp();
  uint32_t (&words)[4] = static_cast<Registers*>(arguments.out)->a[lane()];
  const char* row = shared_memory() + 2 * in.offset[lane()];
  if (arguments.variant) {
    load_matrices_transposed(words, row);
  } else {
    load_matrices(words, row);
  }
}

// Loads with one element of shared memory marked after the other; `expected` says which element that is.
template <class Expected>
void test_each_load(bool transposed, const int (&offset)[32], Expected expected) {
  for (int marked = 0; marked < 256; marked++) {
    Addresses in = {};
    in.in[marked] = 1;
    std::copy(offset, offset + 32, in.offset);
    Registers out = {};
    CHECK(!run(load, 32, 512, &in, &out, transposed));
    for (int lane = 0; lane < 32; lane++) {
      for (int i = 0; i < 8; i++) {
        CHECK((out.a[lane][i / 2] >> (i % 2 * 16) & 0xffff) == (expected(lane, i) == marked));
      }
    }
  }
}

void test_loads() {
  int offset[32];
  // Four matrices one below the other.
  for (int lane = 0; lane < 32; lane++) offset[lane] = 8 * lane;
  for (bool transposed : {false, true}) {
    test_each_load(transposed, offset, [&](int lane, int i) {
      const Place place = (transposed ? kTransposed : kMatrix)[lane][i % 2];
      return i / 2 * 64 + place.row * 8 + place.column;
    });
  }
  // A left operand from 16 rows of 16 elements.
  for (int lane = 0; lane < 32; lane++) offset[lane] = 16 * (lane % 16) + 8 * (lane / 16);
  test_each_load(false, offset, [](int lane, int i) { return 16 * kA[lane][i].row + kA[lane][i].column; });
  // Two right operands from their 16 rows, b0 and b1 of each, with columns 0-7 and 8-15.
  test_each_load(true, offset, [](int lane, int i) {
    const Place place = kB[lane][i % 4];
    return 16 * place.row + place.column + i / 4 * 8;
  });
  // The same from rows that are the columns of the operands.
  for (int lane = 0; lane < 32; lane++) offset[lane] = 16 * (lane / 16 * 8 + lane % 8) + 8 * (lane / 8 % 2);
  test_each_load(false, offset, [](int lane, int i) {
    const Place place = kB[lane][i % 4];
    return 16 * (place.column + i / 4 * 8) + place.row;
  });
}

}  // namespace

int main() {
  check_cover(kA, 16, 16), check_cover(kB, 16, 8), check_cover(kC, 16, 8);
  check_cover(kMatrix, 8, 8), check_cover(kTransposed, 8, 8);
  for (bool of_a : {false, true}) {
    test_product_of_each_element<Bfloat16>(of_a);
    test_product_of_each_element<Float16>(of_a);
  }
  test_loads();
  std::puts("ok");
}
