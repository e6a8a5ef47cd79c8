// The emulator's switches and results, for Python.
#include <string>

#include "emulator.h"

using namespace deberta_fast;

#define EXPORTED __attribute__((visibility("default")))

extern "C" {

EXPORTED void emulator_options(uint64_t seed, bool check_races, bool count_conflicts, int skip_barrier) {
  emulator::Options& options = emulator::options();
  options.seed = seed, options.check_races = check_races, options.count_conflicts = count_conflicts;
  options.skip_barrier = skip_barrier;
}

EXPORTED int emulator_barrier_sites() { return emulator::barrier_sites(); }

EXPORTED const char* emulator_barrier_site(int i) {
  static std::string text;
  text = emulator::barrier_site(i);
  return text.c_str();
}

EXPORTED void emulator_clear_conflicts() { emulator::clear_conflicts(); }

EXPORTED const char* emulator_conflicts() {
  static std::string table;
  table = emulator::conflict_table();
  return table.c_str();
}
}
