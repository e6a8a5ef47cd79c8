// Checks that the emulator finds races, divergence, accesses out of bounds and bank conflicts.
#include "launched.h"

namespace {

// ---- Barriers.

// Reverses its input within warps, then within the block, three times, in the same memory.
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

// Threads access the same bytes or neighbouring ones, or bytes that are out of bounds, unaligned or unwritten.
KERNEL(64, 1) accesses(Arguments arguments) {
  char* shared = shared_memory();
  switch (arguments.variant) {
    case 0:  // Two halves of a word: no race.
      store_shared_half(shared + thread() * 2, 1);
      break;
    case 1:  // The same value, but a race.
      if (thread() % 32 < 2) store_shared_word(shared, 1);
      break;
    case 2:  // All threads read, one of another warp writes.
      load_shared_word(shared);
      if (thread() == 40) store_shared_word(shared, 1);
      break;
    case 3:  // A barrier of a warp does not order accesses of another warp.
      if (warp() == 0) store_shared(shared + lane() * 16, Vec16{{1, 2, 3, 4}});
      sync_warp();
      if (warp() == 1) load_shared(shared + lane() * 16);
      break;
    case 4:  // A collective that is not a barrier orders nothing.
      store_shared_word(shared + thread() * 4, 1);
      ballot(true);
      load_shared_word(shared + (thread() ^ 1) * 4);
      break;
    case 5:  // Each thread uses its own word, and all read all words after a barrier: no race.
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
    case 12:  // Memory that is not yet written holds poison.
      static_cast<uint32_t*>(arguments.out)[thread()] = load_shared_word(shared + thread() * 4);
      break;
    case 13:  // Threads of another warp read between a thread's read and write, or after both.
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
                                  "not aligned",   "not aligned",       "load_global at races_test",
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

// Threads do not meet at the same collective.
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
  // Failures leave the machine intact.
  std::vector<uint32_t> in(128), out(128);
  for (uint32_t i = 0; i < 128; i++) in[i] = i;
  CHECK(!run(reversal, 128, 512, in.data(), out.data()));
  for (uint32_t i = 0; i < 128; i++) CHECK(out[i] == (i ^ 96));
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
    case 10:  // Two predicated accesses: lanes that skip the first are in step again after a collective.
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
    emulator::clear_counts();
    CHECK(!run(banks, 32, 32 * 144, &in, nullptr, variant, 5));
    Expected found = {};
    for (const emulator::Traffic& traffic : emulator::conflicts()) {
      if (emulator::is_collective(traffic.kind)) continue;
      found.requests += traffic.requests;
      found.wavefronts += traffic.wavefronts;
      found.ideal += traffic.ideal;
    }
    const Expected& want = expected[variant];
    CHECK(found.requests == 5 * want.requests && found.ideal == 5 * want.ideal);
    CHECK(found.wavefronts == 5 * want.wavefronts);
  }
  CHECK(emulator::conflict_table().find("races_test.cpp:") != std::string::npos);
  emulator::clear_counts();
  emulator::options() = emulator::Options();
}

}  // namespace

int main() {
  test_barriers();
  test_accesses();
  test_divergence();
  test_banks();
  std::puts("ok");
}
