// The emulator's switches and results, for Python.
#include "emulator.h"

#include <string>

using namespace deberta_fast;

extern "C" {

__attribute__((visibility("default"))) void emulator_options(uint64_t seed, bool check_races, bool count_conflicts,
                                                             int skip_barrier) {
  emulator::Options& options = emulator::options();
  options.seed = seed, options.check_races = check_races, options.count_conflicts = count_conflicts;
  options.skip_barrier = skip_barrier;
}

__attribute__((visibility("default"))) int emulator_barrier_sites() { return emulator::barrier_sites(); }

__attribute__((visibility("default"))) const char* emulator_conflicts() {
  static std::string table;
  table = emulator::conflict_table();
  return table.c_str();
}
}
