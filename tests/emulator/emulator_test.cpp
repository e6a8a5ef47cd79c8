// Checks that the emulator gives the results that the PTX manual defines, and finds copies that are not waited for.
#include "launched.h"

namespace {

// ---- Numbers.

// Finds the nearest half by a search over all halves, and the even one of two that are equally near.
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
    // The tie between x and the next half, its neighbours, and the float after x.
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

KERNEL(64, 1) exchanges(Arguments arguments) {
  const int number = (block_y() * 3 + block_x()) * 64 + thread();
  float sum = static_cast<float>(number);
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  const uint32_t odd = ballot(thread() % 2 == warp());
  // Even lanes send 1 to odd lanes if the ballot is right.
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

// Variant 0 is right; 1 does not wait for the second group; 2 has no barrier after the wait; 3 has a source that is not
// aligned; 4 reads a copy that has not landed; 5 copies over bytes that others still read; 6 does so after a barrier.
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
  // If races are not checked, the poison shows.
  emulator::options().check_races = false;
  CHECK(!run(copies, 64, 2048, in.data(), out.data(), 1));
  for (int i = 0; i < 64; i++) CHECK(out[2 * i + 1] == ~0u);
  emulator::options().check_races = true;
}

// Reads a thread's own copy over zeros: before any wait, after a wait without a group, and after a wait for the group.
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

KERNEL(64, 1) totals(Arguments arguments) {
  const char* in = static_cast<const char*>(arguments.in);
  const Vec16 words = load_global(in + (warp() == 0 ? 16 : 128) * (lane() % (warp() == 0 ? 32 : 16)));
  uint32_t sum = words.x[0];
  for (int mask = 4; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  store_global(static_cast<char*>(arguments.out) + 16 * (lane() % 32), {{sum, ballot(sum != 0), 0, 0}});
}

// What a launch does is counted for it alone.
void test_counts() {
  std::vector<Vec16> in(128);
  std::vector<uint32_t> out(128);
  emulator::options().count_conflicts = true;
  emulator::clear_counts();
  for (int variant : {0, 6}) CHECK(!run(copies, 64, 2048, in.data(), out.data(), variant));
  CHECK(!run(totals, 64, 0, in.data(), out.data(), 0, 2));
  emulator::options() = emulator::Options();
  const auto count = [](size_t launch, emulator::Kind kind) {
    emulator::Traffic sum = {kind, {0, ""}};
    for (const emulator::Traffic& t : emulator::the_machine->launches[launch].traffic) {
      if (t.kind == kind) sum.requests += t.requests, sum.wavefronts += t.wavefronts, sum.bytes += t.bytes;
    }
    return sum;
  };
  CHECK(emulator::the_machine->launches.size() == 3 && emulator::the_machine->launches[2].blocks_x == 2);
  for (size_t launch : {0, 1}) {
    CHECK(count(launch, emulator::Kind::copy_async).requests == (launch ? 6 : 4));
    CHECK(count(launch, emulator::Kind::copy_async).bytes == 16 * (launch ? 160 : 96));  // the valid ones
    CHECK(count(launch, emulator::Kind::sync_block).requests == (launch ? 2 : 1));
    CHECK(count(launch, emulator::Kind::load_shared).wavefronts == 2 * 4 * 2);
  }
  CHECK(count(2, emulator::Kind::shuffle_xor).requests == 2 * 2 * 3);
  CHECK(count(2, emulator::Kind::ballot).requests == 2 * 2);
  CHECK(count(2, emulator::Kind::load_global).wavefronts == 2 * (4 + 32));  // neighbours, and 128 bytes apart
  CHECK(count(2, emulator::Kind::load_global).bytes == 2 * 64 * 16);
  CHECK(count(2, emulator::Kind::store_global).requests == 2 * 2);
}

// Copies four bytes per thread, of odd threads zeros. Variant 1 does not wait; 2 has a source that is not aligned.
KERNEL(32, 1) word_copies(Arguments arguments) {
  const char* in = static_cast<const char*>(arguments.in) + (arguments.variant == 2 ? 2 : 0);
  char* at = shared_memory() + thread() * 4;
  copy_async_word(at, in + thread() * 4, thread() % 2 == 0);
  commit_copies();
  if (arguments.variant != 1) wait_copies<0>();
  static_cast<uint32_t*>(arguments.out)[thread()] = load_shared_word(at);
}

void test_word_copies() {
  std::vector<uint32_t> in(33), out(32);
  for (uint32_t i = 0; i < 33; i++) in[i] = i + 100;
  CHECK(!run(word_copies, 32, 128, in.data(), out.data()));
  for (uint32_t i = 0; i < 32; i++) CHECK(out[i] == (i % 2 ? 0 : i + 100));
  CHECK(fails_with(run(word_copies, 32, 128, in.data(), out.data(), 1), "a copy_async not waited for"));
  CHECK(fails_with(run(word_copies, 32, 128, in.data(), out.data(), 2), "source not aligned to 4"));
}

// Waits for three copies; a product follows as many of them as the variant says.
KERNEL(32, 1) late_waits(Arguments arguments) {
  for (int i = 0; i < 3; i++) {
    copy_async(shared_memory() + thread() * 16, arguments.in, true);
    commit_copies();
    float c[4] = {};
    const uint32_t a[4] = {};
    if (i < arguments.variant) multiply_add<Float16>(c, a, 0, 0);
    wait_copies<0>();
    wait_copies<0>();
  }
}

void test_late_waits() {
  const Vec16 in = {};
  for (int variant = 0; variant <= 3; variant++) {
    emulator::clear_counts();
    CHECK(!run(late_waits, 32, 512, &in, nullptr, variant, 2));
    CHECK(emulator::the_machine->exposed_waits == 3 - variant && emulator::the_machine->launched == 1);
  }
}

}  // namespace

int main() {
  test_numbers();
  test_exchanges();
  test_copies();
  test_landing();
  test_counts();
  test_word_copies();
  test_late_waits();
  std::puts("ok");
}
