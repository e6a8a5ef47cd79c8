// Checks the emulator: that right kernels run and give what the PTX manual says, and that wrong ones are found out.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "primitives.h"

using namespace deberta_fast;

namespace {

#define CHECK(condition) check((condition), #condition, __LINE__)
void check(bool condition, const char* text, int line) {
  if (condition) return;
  std::fprintf(stderr, "emulator_test.cpp:%d: not so: %s\n", line, text);
  std::exit(1);
}

bool fails_with(const char* error, const char* part) {
  if (error && std::strstr(error, part)) return true;
  std::fprintf(stderr, "error: %s; expected: %s\n", error ? error : "none", part);
  return false;
}

// A source of small numbers, exact in either half.
float small(int i) { return static_cast<float>((i * 37 + i / 7 * 11) % 29 - 14) / 4; }

struct Arguments {
  const void* in;
  void* out;
  int variant;
};

const char* run(void (*kernel)(Arguments), int threads, int shared_bytes, const void* in, void* out, int variant = 0,
                int blocks_x = 1, int blocks_y = 1) {
  return launch(kernel, blocks_x, blocks_y, threads, shared_bytes, nullptr, Arguments{in, out, variant});
}

// ---- Numbers.

// The half by a search over all of them: nearest, even where there are two.
template <class T>
uint32_t nearest_half(float x, uint32_t infinite, double beyond) {
  const uint32_t sign = std::signbit(x) ? 0x8000 : 0;
  const double want = std::fabs(static_cast<double>(x));
  uint32_t below = 0, above = infinite;
  const auto value = [&](uint32_t half) { return half == infinite ? beyond : static_cast<double>(low<T>(half)); };
  while (above - below > 1) {
    const uint32_t middle = (below + above) / 2;
    (value(middle) <= want ? below : above) = middle;
  }
  const double to_below = want - value(below), to_above = value(above) - want;
  return sign | (to_below < to_above || (to_below == to_above && below % 2 == 0) ? below : above);
}

template <class T>
void test_half(uint32_t infinite, double beyond) {
  for (uint32_t half = 0; half < 0x10000; half++) {
    const float x = low<T>(half);
    CHECK(std::isnan(x) == ((half & 0x7fff) > infinite));
    if (std::isnan(x)) {
      CHECK(pack<T>(x, 1.f) == (pack<T>(0.f, 1.f) | 0x7fff));
      continue;
    }
    CHECK(std::isinf(x) == ((half & 0x7fff) == infinite));
    CHECK(pack<T>(x, 0.f) == half);
    CHECK(pack<T>(0.f, x) == half << 16);
    CHECK(emulator::as_bits(high<T>(half << 16)) == emulator::as_bits(x));
    if (std::isinf(x)) continue;
    // The tie to the next, its neighbours, and something in between.
    const uint32_t bits = emulator::as_bits(x);
    const float next =
        (half & 0x7fff) + 1 == infinite ? std::copysign(static_cast<float>(beyond), x) : low<T>(half + 1);
    const float tie = static_cast<float>((static_cast<double>(x) + next) / 2);
    for (float y : {tie, std::nextafter(tie, 0.f), std::nextafter(tie, 2 * tie), emulator::as_float(bits + 1)}) {
      if (!std::isfinite(y)) continue;
      CHECK(pack<T>(y, 0.f) == nearest_half<T>(y, infinite, beyond));
    }
  }
  CHECK(pack<T>(infinity(), -infinity()) == (infinite | (infinite | 0x8000) << 16));
  CHECK(pack<T>(std::numeric_limits<float>::max(), -1e38f) >> 31 == 1);
}

void test_numbers() {
  test_half<Bfloat16>(0x7f80, std::ldexp(1., 128));
  test_half<Float16>(0x7c00, 65536);
  CHECK(low<Float16>(1) == std::ldexp(1.f, -24) && low<Float16>(0x3ff) == 1023 * std::ldexp(1.f, -24));
  CHECK(pack<Float16>(std::ldexp(1.f, -25), std::ldexp(3.f, -25)) == 0x00020000u);
  CHECK(pack<Float16>(65519.f, -65520.f) == 0xfc007bffu);
  CHECK(pack<Bfloat16>(1.00390625f, 1.01171875f) == 0x3f823f80u);
  CHECK(add_pairs<Bfloat16>(pack<Bfloat16>(256, 1), pack<Bfloat16>(1, -3)) == pack<Bfloat16>(256, -2));
  CHECK(add_pairs<Float16>(pack<Float16>(2048, 1), pack<Float16>(3, 0.5f)) == pack<Float16>(2052, 1.5f));
  CHECK(permute_bytes(0x33221100, 0x77665544, 0x7410) == 0x77441100u);
  CHECK(high_product(0x80000000u, 6) == 3);
  CHECK(lowest_bit(0) == -1 && lowest_bit(40) == 3 && lowest_bit(0x80000000u) == 31);
  CHECK(exp2_fast(-infinity()) == 0 && exp2_fast(3) == 8 && log2_fast(8) == 3);
  CHECK(maximum(std::nanf(""), 2) == 2 && fused_multiply_add(2, 3, 4) == 10);
}

// ---- Collectives of a warp.

// Fragments filled by the tables of the PTX manual, element by element.
template <class T>
KERNEL(32, 1)
product(Arguments arguments) {
  const float* a = static_cast<const float*>(arguments.in);  // 16 x 16
  const float* b = a + 256;                                  // 16 x 8
  const float* c = b + 128;                                  // 16 x 8
  const int group = lane() >> 2, in_group = lane() % 4;
  uint32_t wa[4], wb[2];
  float elements[8];
  for (int i = 0; i < 8; i++) {
    const int row = i < 2 || (i >= 4 && i < 6) ? group : group + 8;
    const int column = in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0);
    elements[i] = a[row * 16 + column];
  }
  for (int i = 0; i < 4; i++) wa[i] = pack<T>(elements[2 * i], elements[2 * i + 1]);
  for (int i = 0; i < 4; i++) {
    const int row = in_group * 2 + (i & 1) + (i >= 2 ? 8 : 0);
    elements[i] = b[row * 8 + group];
  }
  for (int i = 0; i < 2; i++) wb[i] = pack<T>(elements[2 * i], elements[2 * i + 1]);
  float wc[4];
  const auto at = [&](int i) { return (i < 2 ? group : group + 8) * 8 + in_group * 2 + (i & 1); };
  for (int i = 0; i < 4; i++) wc[i] = c[at(i)];
  multiply_add<T>(wc, wa, wb[0], wb[1]);
  for (int i = 0; i < 4; i++) static_cast<float*>(arguments.out)[at(i)] = wc[i];
}

template <class T>
void test_product() {
  std::vector<float> in(512), out(128);
  for (int i = 0; i < 512; i++) in[i] = small(i);
  CHECK(!run(product<T>, 32, 0, in.data(), out.data()));
  for (int i = 0; i < 16; i++) {
    for (int j = 0; j < 8; j++) {
      float sum = in[384 + i * 8 + j];
      for (int k = 0; k < 16; k++) sum += in[i * 16 + k] * in[256 + k * 8 + j];
      CHECK(out[i * 8 + j] == sum);
    }
  }
}

// Four matrices at a pitch of 48 bytes, one below the other; out: words of each lane, plain and transposed.
KERNEL(32, 1) matrices(Arguments arguments) {
  for (int i = lane(); i < 256; i += 32) {
    store_shared_half(shared_memory() + i / 8 * 48 + i % 8 * 2, static_cast<uint16_t>(i));
  }
  sync_block();
  uint32_t* out = static_cast<uint32_t*>(arguments.out) + lane() * 8;
  uint32_t words[4];
  load_matrices(words, shared_memory() + lane() * 48);
  for (int i = 0; i < 4; i++) out[i] = words[i];
  load_matrices_transposed(words, shared_memory() + lane() * 48);
  for (int i = 0; i < 4; i++) out[4 + i] = words[i];
}

void test_matrices() {
  std::vector<uint32_t> out(256);
  CHECK(!run(matrices, 32, 32 * 48, nullptr, out.data()));
  for (int lane = 0; lane < 32; lane++) {
    for (int i = 0; i < 4; i++) {
      const uint32_t g = lane / 4, t = lane % 4;
      const auto element = [&](uint32_t row, uint32_t column) { return i * 64 + row * 8 + column; };
      CHECK(out[lane * 8 + i] == (element(g, 2 * t) | element(g, 2 * t + 1) << 16));
      CHECK(out[lane * 8 + 4 + i] == (element(2 * t, g) | element(2 * t + 1, g) << 16));
    }
  }
}

KERNEL(64, 1) exchanges(Arguments arguments) {
  const int number = (block_y() * 3 + block_x()) * 64 + thread();
  float sum = static_cast<float>(number);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const uint32_t odd = ballot(thread() % 2 == warp());
  // Even lanes bring 1 to odd ones where the ballot is right.
  const bool right = odd == (warp() ? 0xaaaaaaaau : 0x55555555u);
  const uint32_t even = shuffle_xor(right && lane() % 2 == 0 ? 1u : 0u, 5);
  static_cast<float*>(arguments.out)[number] = sum + static_cast<float>(even);
}

void test_exchanges() {
  std::vector<float> out(6 * 64);
  CHECK(!run(exchanges, 64, 0, nullptr, out.data(), 0, 3, 2));
  for (int i = 0; i < 6 * 64; i++) CHECK(out[i] == i / 32 * 32 * 32 + 31 * 16 + i % 2);
  CHECK(!run(exchanges, 64, 0, nullptr, nullptr, 0, 0, 2));
  CHECK(run(exchanges, 33, 0, nullptr, nullptr));
  CHECK(run(exchanges, 64, emulator::Machine::kSharedLimit + 1, nullptr, nullptr));
}

// ---- Copies.

// Variants 0: as it must be; 1: the second group is not waited for; 2: no barrier after the wait; 3: a source that is
// not aligned; 4: reads what is still on its way; 5: copies over what others still read; 6: the same after a barrier.
KERNEL(64, 1) copies(Arguments arguments) {
  const char* in = static_cast<const char*>(arguments.in);
  char* at = shared_memory() + thread() * 16;
  copy_async(at, in + thread() * 16 + (arguments.variant == 3 ? 4 : 0), true);
  commit_copies();
  copy_async(at + 1024, in + 1024 + thread() * 16, thread() % 2 == 0);
  commit_copies();
  wait_copies<1>();
  if (arguments.variant == 4) load_shared(at + 1024);
  const Vec16 first = load_shared(at);
  if (arguments.variant != 1) wait_copies<0>();
  if (arguments.variant != 2) sync_block();
  const Vec16 second = load_shared(shared_memory() + 1024 + (thread() ^ 32) * 16);
  if (arguments.variant == 6) sync_block();
  if (arguments.variant >= 5) copy_async(at + 1024, in, true);
  uint32_t* out = static_cast<uint32_t*>(arguments.out) + thread() * 2;
  out[0] = first.x[3];
  out[1] = second.x[0];
}

void test_copies() {
  std::vector<Vec16> in(128);
  for (uint32_t i = 0; i < 128; i++) in[i] = {{i, i + 1000, i + 2000, i + 3000}};
  std::vector<uint32_t> out(128);
  CHECK(!run(copies, 64, 2048, in.data(), out.data()));
  for (uint32_t i = 0; i < 64; i++) CHECK(out[2 * i] == i + 3000 && out[2 * i + 1] == (i % 2 ? 0 : 64 + (i ^ 32)));
  CHECK(fails_with(run(copies, 64, 2048, in.data(), out.data(), 1), "a copy_async not waited for"));
  CHECK(fails_with(run(copies, 64, 2048, in.data(), out.data(), 2), "race with a"));
  CHECK(fails_with(run(copies, 64, 2048, in.data(), out.data(), 3), "source not aligned"));
  CHECK(fails_with(run(copies, 64, 2048, in.data(), out.data(), 4), "a copy_async not waited for"));
  CHECK(fails_with(run(copies, 64, 2048, in.data(), out.data(), 5), "race with a"));
  CHECK(!run(copies, 64, 2048, in.data(), out.data(), 6));
  // Without the detector, the poison shows.
  emulator::options().check_races = false;
  CHECK(!run(copies, 64, 2048, in.data(), out.data(), 1));
  for (int i = 0; i < 64; i++) CHECK(out[2 * i + 1] == ~0u);
  emulator::options().check_races = true;
}

// What a thread sees of its own copy over zeros: before the wait, after a wait without a group, after the wait.
KERNEL(32, 1) landing(Arguments arguments) {
  char* at = shared_memory() + thread() * 16;
  uint32_t* out = static_cast<uint32_t*>(arguments.out) + thread() * 3;
  store_shared(at, Vec16{});
  copy_async(at, arguments.in, true);
  out[0] = load_shared_word(at);
  wait_copies<0>();
  out[1] = load_shared_word(at);
  commit_copies();
  wait_copies<0>();
  out[2] = load_shared_word(at);
}

void test_landing() {
  const Vec16 in = {{5, 6, 7, 8}};
  std::vector<uint32_t> out(96);
  emulator::options().check_races = false;
  CHECK(!run(landing, 32, 512, &in, out.data()));
  for (int i = 0; i < 96; i++) CHECK(out[i] == (i % 3 == 2 ? 5 : ~0u));
  emulator::options() = emulator::Options();
}

// ---- Barriers.

// Reverses its input once within warps, then within the block, again and again. A sum besides, in the same memory.
KERNEL(128, 1) reversal(Arguments arguments) {
  uint32_t x = static_cast<const uint32_t*>(arguments.in)[thread()];
  for (int i = 0; i < 3; i++) {
    store_shared_word(shared_memory() + thread() * 4, x);
    sync_warp();
    x = load_shared_word(shared_memory() + (thread() ^ 31) * 4);
    sync_warp();
    store_shared_word(shared_memory() + thread() * 4, x);
    sync_block();
    x = load_shared_word(shared_memory() + (thread() ^ 127) * 4);
    sync_block();
  }
  static_cast<uint32_t*>(arguments.out)[thread()] = x;
}

void test_barriers() {
  std::vector<uint32_t> in(128), out(128);
  for (int i = 0; i < 128; i++) in[i] = i * i;
  const auto right = [&] {
    for (int i = 0; i < 128; i++) {
      if (out[i] != in[i ^ 96]) return false;
    }
    return true;
  };
  const int before = emulator::barrier_sites();
  CHECK(!run(reversal, 128, 512, in.data(), out.data()) && right());
  CHECK(emulator::barrier_sites() == before + 4);
  for (int site = before; site < before + 4; site++) {
    emulator::options().skip_barrier = site;
    bool shows = false;
    for (uint64_t seed = 1; seed <= 20; seed++) {
      emulator::options().seed = seed;
      emulator::options().check_races = true;
      CHECK(fails_with(run(reversal, 128, 512, in.data(), out.data()), "race with a"));
      emulator::options().check_races = false;
      CHECK(!run(reversal, 128, 512, in.data(), out.data()));
      shows = shows || !right();
    }
    CHECK(shows);
  }
  emulator::options() = emulator::Options();
  for (uint64_t seed = 1; seed <= 20; seed++) {
    emulator::options().seed = seed;
    CHECK(!run(reversal, 128, 512, in.data(), out.data()) && right());
  }
  emulator::options() = emulator::Options();
}

// Accesses of two threads to the same bytes, or beside each other.
KERNEL(64, 1) accesses(Arguments arguments) {
  char* shared = shared_memory();
  switch (arguments.variant) {
    case 0:  // Two halves of a word: no race.
      store_shared_half(shared + thread() * 2, 1);
      break;
    case 1:  // The same value, but a race.
      if (thread() % 32 < 2) store_shared_word(shared, 1);
      break;
    case 2:  // All read, one of another warp writes.
      load_shared_word(shared);
      if (thread() == 40) store_shared_word(shared, 1);
      break;
    case 3:  // A barrier of a warp orders nothing for the other.
      if (warp() == 0) store_shared(shared + lane() * 16, Vec16{{1, 2, 3, 4}});
      sync_warp();
      if (warp() == 1) load_shared(shared + lane() * 16);
      break;
    case 4:  // Nor does a collective that is none.
      store_shared_word(shared + thread() * 4, 1);
      ballot(true);
      load_shared_word(shared + (thread() ^ 1) * 4);
      break;
    case 5:  // All read what was written before a barrier: no race. Its own, again and again, besides.
      store_shared_word(shared + thread() * 4, 1);
      store_shared_word(shared + thread() * 4, load_shared_word(shared + thread() * 4) + 1);
      sync_block();
      for (int i = 0; i < 64; i++) load_shared_word(shared + (thread() + i) % 64 * 4);
      break;
    case 6:
      load_shared(shared + 1024 - 16 + (thread() == 17) * 16);
      break;
    case 7:
      if (thread() == 3) store_shared_word(shared - 4, 1);
      break;
    case 8:
      if (thread() == 3) load_shared(shared + 8);
      break;
    case 9:
      if (thread() == 3) store_shared_half(shared + 1, 0);
      break;
    case 10: {
      uint32_t words[4];
      load_matrices(words, shared + lane() * 34);
      break;
    }
    case 11:
      load_global(static_cast<const char*>(arguments.in) + 4);
      break;
    case 12:  // Not yet written: poison.
      static_cast<uint32_t*>(arguments.out)[thread()] = load_shared_word(shared + thread() * 4);
      break;
    case 13:  // A thread of another warp reads between a thread's read and write, if not after both.
      if (thread() == 40 || warp() == 0) load_shared_word(shared);
      for (int i = 0; i < 5; i++) ballot(true);
      if (thread() == 40) store_shared_word(shared, 1);
      break;
    case 14:  // The same within a warp.
      if (thread() == 4 || thread() == 5) load_shared_word(shared);
      ballot(true);
      if (thread() == 4) store_shared_word(shared, 1);
      break;
  }
}

void test_accesses() {
  Vec16 in = {};
  std::vector<uint32_t> out(64);
  const char* const expected[] = {nullptr,         "race with a write", "race with a",
                                  "race with a",   "race with a",       nullptr,
                                  "out of bounds", "byte -4 of",        "not aligned",
                                  "not aligned",   "not aligned",       "load_global at emulator_test",
                                  nullptr,         "race with a",       "race with a read"};
  for (uint64_t seed = 1; seed <= 20; seed++) {
    emulator::options().seed = seed;
    for (int variant = 0; variant < 15; variant++) {
      const char* error = run(accesses, 64, 1024, &in, out.data(), variant);
      CHECK(expected[variant] ? fails_with(error, expected[variant]) : !error);
    }
  }
  for (uint32_t x : out) CHECK(x == ~0u);
  emulator::options() = emulator::Options();
}

// Threads that do not meet.
KERNEL(64, 1) divergence(Arguments arguments) {
  switch (arguments.variant) {
    case 0:
      if (lane() == 3) {
        ballot(true);
      } else {
        shuffle_xor(1.f, 1);
      }
      break;
    case 1:
      if (lane() < 16) {
        sync_warp();
      } else {
        sync_warp();
      }
      break;
    case 2:
      if (lane() != 7) sync_warp();
      break;
    case 3:
      if (warp() == 0) sync_block();
      break;
    case 4:
      if (warp() == 0) {
        sync_block();
      } else {
        sync_block();
      }
      break;
    case 5:
      for (int i = 0; i <= thread(); i++) sync_block();
      break;
  }
}

void test_divergence() {
  const char* const expected[] = {"other lanes of the warp wait", "other lanes of the warp wait", "", "", "wait", ""};
  for (uint64_t seed = 1; seed <= 10; seed++) {
    emulator::options().seed = seed;
    for (int variant = 0; variant < 6; variant++) {
      CHECK(fails_with(run(divergence, 64, 0, nullptr, nullptr, variant), expected[variant]));
    }
  }
  emulator::options() = emulator::Options();
  // The machine is as good as new.
  test_product<Float16>();
}

// ---- Bank conflicts.

KERNEL(32, 1) banks(Arguments arguments) {
  char* shared = shared_memory();
  uint32_t words[4];
  switch (arguments.variant) {
    case 0:
      load_shared_word(shared + lane() * 4);
      break;
    case 1:
      load_shared_word(shared + lane() * 128);
      break;
    case 2:
      load_shared_word(shared + 64);
      break;
    case 3:
      store_shared(shared + lane() * 16, Vec16{});
      break;
    case 4:
      load_shared(shared + lane() * 32);
      break;
    case 5:
      load_matrices(words, shared + lane() * 128);
      break;
    case 6:
      load_matrices_transposed(words, shared + lane() * 144);
      break;
    case 7:
      store_shared_half(shared + lane() * 2, 1);
      break;
    case 8:
      store_shared_half(shared + lane() * 66, 1);
      break;
    case 9:
      copy_async(shared + lane() * 64, arguments.in, true);
      break;
    case 10:  // Predicated, twice; lanes that skip the first are in step again after a collective.
      for (int i = 0; i < 2; i++) {
        if (i == 1 || lane() < 2) load_shared_word(shared + lane() * 128);
        sync_warp();
      }
      break;
  }
}

void test_banks() {
  struct Expected {
    int64_t requests, wavefronts, ideal;
  };
  const Expected expected[] = {{1, 1, 1}, {1, 32, 1}, {1, 1, 1}, {1, 4, 4},  {1, 8, 4}, {1, 32, 4},
                               {1, 4, 4}, {1, 1, 1},  {1, 1, 1}, {1, 16, 4}, {2, 34, 2}};
  Vec16 in = {};
  emulator::options().count_conflicts = true;
  for (int variant = 0; variant < 11; variant++) {
    emulator::clear_conflicts();
    CHECK(!run(banks, 32, 32 * 144, &in, nullptr, variant, 5));
    Expected found = {};
    for (const emulator::Traffic& traffic : emulator::conflicts()) {
      found.requests += traffic.requests;
      found.wavefronts += traffic.wavefronts;
      found.ideal += traffic.ideal;
    }
    const Expected& want = expected[variant];
    CHECK(found.requests == 5 * want.requests && found.ideal == 5 * want.ideal);
    CHECK(found.wavefronts == 5 * want.wavefronts);
  }
  CHECK(emulator::conflict_table().find("emulator_test.cpp:") != std::string::npos);
  emulator::clear_conflicts();
  emulator::options() = emulator::Options();
}

}  // namespace

int main() {
  test_numbers();
  test_product<Bfloat16>();
  test_product<Float16>();
  test_matrices();
  test_exchanges();
  test_copies();
  test_landing();
  test_barriers();
  test_accesses();
  test_divergence();
  test_banks();
  std::puts("ok");
}
