// Executes the instructions of AMX-TILE and AMX-BF16 on processors without them. The processor raises SIGILL at such an
// instruction. The handler here decodes it, executes it on the calling thread's tiles and continues behind it; any other
// illegal instruction goes to the handler that was there before. Loading or linking this file installs the handler.
//
// The process ends with a message where the processor would raise an exception. Instructions that continue in the
// middle of a tile (start_row) are not emulated. Memory is read and written by ordinary accesses, so the sanitizers check
// the kernels' tiles if this file is compiled with their flags.
#include <immintrin.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

enum Kind { ldtilecfg, sttilecfg, tilerelease, tilezero, tileloadd, tileloaddt1, tilestored, tdpbf16ps, kinds };
constexpr const char* kNames[kinds] = {"ldtilecfg", "sttilecfg",   "tilerelease", "tilezero",
                                       "tileloadd", "tileloaddt1", "tilestored",  "tdpbf16ps"};
std::atomic<uint64_t> counts[kinds];

// A message whose end ends the process. It takes no locks, which printf might, because a signal handler must not.
class Fatal {
 public:
  explicit Fatal(Kind kind) { *this << "amx emulator: " << kNames[kind] << " "; }
  [[noreturn]] ~Fatal() {
    text_[length_++] = '\n';
    [[maybe_unused]] const auto written = write(STDERR_FILENO, text_, length_);
    std::abort();
  }
  Fatal& operator<<(const char* text) {
    while (*text && length_ < sizeof(text_) - 1) text_[length_++] = *text++;
    return *this;
  }
  Fatal& operator<<(unsigned number) {
    char digits[11];
    char* first = digits + 10;
    *first = 0;
    do *--first = static_cast<char>('0' + number % 10);
    while (number /= 10);
    return *this << first;
  }

 private:
  char text_[256];
  size_t length_ = 0;
};

// ---- Tiles

constexpr unsigned kTiles = 8, kMostRows = 16, kMostBytes = 64, kMostWords = kMostBytes / 4;

struct Tile {
  unsigned rows, row_bytes;               // 0 if the tile is not in use
  uint32_t words[kMostRows][kMostWords];  // zero beyond rows and row_bytes
};

struct State {
  uint8_t configuration[64];
  Tile tiles[kTiles];
};

// The tiles of a thread; null unless they are configured. A pointer fits into the little room for initial-exec variables
// that loaded libraries share. Other thread-local variables may be allocated at their first use, even in a handler.
thread_local State* state __attribute__((tls_model("initial-exec"))) = nullptr;

void release() {
  if (state) munmap(state, sizeof(State));
  state = nullptr;
}

void configure(const void* from) {
  uint8_t bytes[64];  // palette, start_row, 14 reserved, 8 uint16 of row_bytes, 16 reserved, 8 of rows, 8 reserved
  std::memcpy(bytes, from, sizeof(bytes));
  if (bytes[0] == 0) return release();
  if (bytes[0] != 1) Fatal(ldtilecfg) << "of palette " << bytes[0];
  if (bytes[1] != 0) Fatal(ldtilecfg) << "with start_row " << bytes[1] << ", which is not emulated";
  for (unsigned n = 2; n < 64; ++n) {
    const bool reserved = n < 16 || (n >= 32 && n < 48) || n >= 56;
    if (reserved && bytes[n] != 0) Fatal(ldtilecfg) << "with " << bytes[n] << " in reserved byte " << n;
  }
  State* configured = state;
  if (!configured) {
    void* const memory = mmap(nullptr, sizeof(State), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) Fatal(ldtilecfg) << "has no memory for the tiles";
    configured = static_cast<State*>(memory);
  }
  std::memset(configured, 0, sizeof(State));
  std::memcpy(configured->configuration, bytes, sizeof(bytes));
  for (unsigned n = 0; n < kTiles; ++n) {
    Tile& tile = configured->tiles[n];
    tile.row_bytes = bytes[16 + 2 * n] | bytes[17 + 2 * n] << 8;
    tile.rows = bytes[48 + n];
    if (tile.row_bytes > kMostBytes || tile.rows > kMostRows || (tile.rows == 0) != (tile.row_bytes == 0))
      Fatal(ldtilecfg) << "of tile " << n << " with " << tile.rows << " rows of " << tile.row_bytes << " bytes";
  }
  state = configured;
}

Tile& tile_of(Kind kind, unsigned number) {
  if (!state) Fatal(kind) << "without a configuration";
  Tile& tile = state->tiles[number];
  if (tile.rows == 0) Fatal(kind) << "of tile " << number << ", which the configuration leaves out";
  if (tile.row_bytes % 4 != 0) Fatal(kind) << "of tile " << number << " with rows of " << tile.row_bytes << " bytes";
  return tile;
}

void load(Tile& tile, uintptr_t from, int64_t stride) {
  std::memset(tile.words, 0, sizeof(tile.words));
  for (unsigned row = 0; row < tile.rows; ++row, from += stride)
    std::memcpy(tile.words[row], reinterpret_cast<const void*>(from), tile.row_bytes);
}

void store(const Tile& tile, uintptr_t to, int64_t stride) {
  for (unsigned row = 0; row < tile.rows; ++row, to += stride)
    std::memcpy(reinterpret_cast<void*>(to), tile.words[row], tile.row_bytes);
}

float as_float(uint32_t word) {
  float number;
  std::memcpy(&number, &word, sizeof(number));
  return number;
}

// Adds the product of the two tiles to `sums`. A word of the first tile is a pair of neighbours in a row of the left
// matrix, and one of the second tile is a pair of neighbours in a column of the right matrix; a pair's even number is the
// lower half. Even and odd numbers have separate sums, which begin at zero, round after each product and are added at the
// end, first to each other. The caller sets the rounding.
__attribute__((target("avx2,fma"), noinline)) void multiply(Tile& sums, const Tile& left, const Tile& right) {
  for (unsigned row = 0; row < sums.rows; ++row) {
    float even[kMostWords] = {}, odd[kMostWords] = {};
    for (unsigned k = 0; k < right.rows; ++k) {
      const uint32_t x = left.words[row][k];
      for (unsigned n = 0; n < kMostWords; ++n) {
        const uint32_t y = right.words[k][n];
        even[n] = __builtin_fmaf(as_float(x << 16), as_float(y << 16), even[n]);
        odd[n] = __builtin_fmaf(as_float(x & 0xffff0000), as_float(y & 0xffff0000), odd[n]);
      }
    }
    for (unsigned n = 0; n < sums.row_bytes / 4; ++n) {
      const float sum = as_float(sums.words[row][n]) + (even[n] + odd[n]);
      std::memcpy(&sums.words[row][n], &sum, sizeof(sum));
    }
  }
}

void check_shapes(unsigned sums, unsigned left, unsigned right) {
  if (sums == left || sums == right || left == right)
    Fatal(tdpbf16ps) << "of tiles " << sums << ", " << left << " and " << right << ", which must differ";
  const Tile &s = tile_of(tdpbf16ps, sums), &l = tile_of(tdpbf16ps, left), &r = tile_of(tdpbf16ps, right);
  if (s.rows != l.rows || s.row_bytes != r.row_bytes || l.row_bytes != 4 * r.rows)
    Fatal(tdpbf16ps) << "of " << s.rows << " rows of " << s.row_bytes << " bytes from " << l.rows << " rows of "
                     << l.row_bytes << " bytes and " << r.rows << " rows of " << r.row_bytes << " bytes";
}

// ---- Instructions

struct Instruction {
  Kind kind;
  unsigned tile, left, right;  // the operands in ModRM.reg, ModRM.rm and VEX.vvvv
  uintptr_t address;           // base and displacement
  int64_t index;               // the scaled index, 0 if there is none
  uintptr_t next;
};

// Returns the kind, or `kinds` if it is another instruction.
Kind kind_of(uint8_t opcode, uint8_t prefix, uint8_t modrm) {
  enum { none, x66, xf3, xf2 };  // VEX.pp
  const bool memory = modrm < 0xc0;
  const int reg = modrm >> 3 & 7, rm = modrm & 7;
  if (opcode == 0x49 && memory && reg == 0 && prefix == none) return ldtilecfg;
  if (opcode == 0x49 && memory && reg == 0 && prefix == x66) return sttilecfg;
  if (opcode == 0x49 && modrm == 0xc0 && prefix == none) return tilerelease;
  if (opcode == 0x49 && !memory && rm == 0 && prefix == xf2) return tilezero;
  if (opcode == 0x4b && memory && rm == 4 && prefix == xf2) return tileloadd;  // rm 4: the address has a SIB byte
  if (opcode == 0x4b && memory && rm == 4 && prefix == x66) return tileloaddt1;
  if (opcode == 0x4b && memory && rm == 4 && prefix == xf3) return tilestored;
  if (opcode == 0x5c && !memory && prefix == xf3) return tdpbf16ps;
  return kinds;
}

// The base address of thread-local variables.
uintptr_t fs_base() {
  uintptr_t base = 0;
  syscall(SYS_arch_prctl, 0x1003, &base);  // ARCH_GET_FS
  return base;
}

// Decodes the instruction that the registers point to, and returns whether it is one of ours. It reads no byte before
// the earlier ones have the right values, since the next byte might not be mapped.
bool decode(const greg_t* registers, Instruction& it) {
  constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const bool thread_local_variable = *code == 0x64;  // FS
  code += thread_local_variable;
  // VEX of three bytes: c4, then R, X and B inverted and the opcode's map, then W, vvvv inverted, L and pp
  if (code[0] != 0xc4 || (code[1] & 0x9f) != 0x82 || (code[2] & 0x84) != 0) return false;
  const unsigned high_index = ~code[1] >> 3 & 8, high_base = ~code[1] >> 2 & 8, vvvv = ~code[2] >> 3 & 15;
  const uint8_t modrm = code[4];
  it.kind = kind_of(code[3], code[2] & 3, modrm);
  if (it.kind == kinds || (it.kind == tdpbf16ps ? vvvv >= kTiles : vvvv != 0)) return false;
  it.tile = modrm >> 3 & 7;
  it.left = modrm & 7;
  it.right = vvvv;
  code += 5;
  const unsigned mode = modrm >> 6;
  if (mode == 3) {
    it.next = reinterpret_cast<uintptr_t>(code);
    return high_base == 0;  // there are only eight tiles
  }
  unsigned base = modrm & 7;
  it.index = 0;
  const bool sib = base == 4;
  if (sib) {
    const uint8_t byte = *code++;
    base = byte & 7;
    const unsigned index = (byte >> 3 & 7) | high_index;
    if (index != 4) it.index = registers[kRegisters[index]] * (1 << (byte >> 6));
  }
  const bool no_base = mode == 0 && base == 5;
  int32_t displacement = 0;
  if (mode == 1) {
    displacement = static_cast<int8_t>(*code++);
  } else if (mode == 2 || no_base) {
    std::memcpy(&displacement, code, sizeof(displacement));
    code += sizeof(displacement);
  }
  it.next = reinterpret_cast<uintptr_t>(code);
  it.address = displacement;
  if (!no_base) it.address += registers[kRegisters[base | high_base]];
  if (no_base && !sib) it.address += it.next;
  if (thread_local_variable) it.address += fs_base();
  return true;
}

void execute(const Instruction& it) {
  switch (it.kind) {
    case ldtilecfg:
      return configure(reinterpret_cast<const void*>(it.address + it.index));
    case sttilecfg: {
      constexpr uint8_t zeros[64] = {};
      std::memcpy(reinterpret_cast<void*>(it.address + it.index), state ? state->configuration : zeros, 64);
      return;
    }
    case tilerelease:
      return release();
    case tilezero: {
      Tile& tile = tile_of(it.kind, it.tile);
      std::memset(tile.words, 0, sizeof(tile.words));
      return;
    }
    case tileloadd:
    case tileloaddt1:
      return load(tile_of(it.kind, it.tile), it.address, it.index);
    case tilestored:
      return store(tile_of(it.kind, it.tile), it.address, it.index);
    case tdpbf16ps:
      check_shapes(it.tile, it.left, it.right);
      // Denormal numbers count as zero and become zero; rounding is to nearest, ties to even. The program's own MXCSR comes
      // back with the return from the signal.
      _mm_setcsr(_MM_MASK_MASK | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON | _MM_ROUND_NEAREST);
      return multiply(state->tiles[it.tile], state->tiles[it.left], state->tiles[it.right]);
    case kinds:
      break;
  }
}

// ---- The signal

struct sigaction before;

void handle(int signal, siginfo_t* info, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction it{};
  if (decode(registers, it)) {
    // A signal takes longer than most instructions, so those that follow at once are executed with the first.
    do {
      counts[it.kind].fetch_add(1, std::memory_order_relaxed);
      execute(it);
      registers[REG_RIP] = it.next;
    } while (decode(registers, it));
  } else if (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN) {
    sigaction(SIGILL, &before, nullptr);
    raise(SIGILL);  // It arrives when this handler returns.
  } else {
    // Linux passes these arguments to every handler, with SA_SIGINFO or not.
    before.sa_sigaction(signal, info, context);
  }
}

}  // namespace

// Installs the handler, once. A constructor too, so that a program can be run with this library in LD_PRELOAD.
extern "C" __attribute__((constructor)) void amx_emulator_install() {
  static std::atomic_flag installed = ATOMIC_FLAG_INIT;
  if (installed.test_and_set()) return;
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma"))
    Fatal(tdpbf16ps) << "is emulated with AVX2 and FMA, which this processor lacks";
  struct sigaction action = {};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &before);
}

// Writes how many instructions of each kind, in the order of Kind, all threads have executed.
extern "C" void amx_emulator_counts(uint64_t* eight) {
  for (int kind = 0; kind < kinds; ++kind) eight[kind] = counts[kind].load();
}

// Tells whether the calling thread's tiles are configured.
extern "C" bool amx_emulator_configured() { return state != nullptr; }
