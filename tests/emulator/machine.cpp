// Runs the blocks of a launch, one cluster after another in random order, and watches every access to memory.
//
// Threads of CUDA are fibers, which only give way where they wait, or at random in atomics; a seed decides who is next.
// In some blocks, one of them comes last wherever others can go on.
// A block runs on a thread of the operating system of its own, of which one at a time has the baton, so that shared
// memory can be what C++ calls thread-local. Kernels are compiled with -fsanitize=thread, and the calls that the
// compiler then puts before every access are answered here. What is found:
//
//   - accesses outside the buffers of the launch and outside the shared memory that was planned;
//   - shared memory that is read before anybody has written it;
//   - two accesses of different threads to a byte of shared memory, one of them a write, with nothing between them
//     that orders them: no barrier of the block, and of the warp only within one;
//   - barriers, votes and shuffles that not all threads reach, or at different lines; blocks that wait for ever;
//   - messages to blocks of the cluster that have not opened their inbox, or have ended;
//   - barriers of Hopper (mbarrier) that are used before they are open, at which more arrive than they are opened for,
//     which count more bytes than were announced, or of which a thread waits for a phase before the last;
//   - copies into what products still read, products of what copies have yet to bring, and those without a fence.
//
// Copies (cp.async, boxes, st.async) are made some time after they are asked for, the latest when nothing else can run,
// and products (wgmma) when they are waited for. What mbarriers order is not followed from thread to thread: the
// end of a phase counts as a barrier of the block, so that of races around them only some are found.
//
// The first finding ends the launch.
#include <link.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cuda.hpp"

// What kernels declare as `extern __shared__ T memory[]`.
constexpr size_t kMostShared = 256 << 10;
alignas(1024) thread_local unsigned char memory[kMostShared];

namespace {

using std::size_t;
constexpr size_t kStackBytes = 48 << 10;
constexpr unsigned kWarp = 32;

struct Buffer {
  const char* begin;
  const char* end;
};

// ---- fibers -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
)");
constexpr unsigned kSaved = 6;
#elif defined(__aarch64__)
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#else
#error "fibers are written for x86-64 and aarch64"
#endif

struct Stacks {
  std::vector<char*> free;
  ~Stacks() {
    for (char* stack : free) std::free(stack);
  }
  char* take() {
    if (free.empty()) return static_cast<char*>(std::aligned_alloc(64, kStackBytes));
    char* stack = free.back();
    free.pop_back();
    return stack;
  }
} stacks;

// ---- the state of a launch ----------------------------------------------------------------------------------------

struct Block;

enum State { kReady, kAtBarrier, kAtCollective, kAtClusterBarrier, kAtInbox, kAtPhase, kDone };
const char* const kStates[] = {"ready", "at __syncthreads", "at a warp's vote, shuffle or barrier",
                               "at the cluster's barrier", "at its inbox", "at an mbarrier", "done"};

struct Copy {
  char* to;
  const char* from;
  bool exists;
  unsigned size = 16;
};

struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  Block* block = nullptr;
  unsigned index = 0;
  State state = kReady;
  int line = 0;
  uint64_t result = 0;
  bool has_mail = false;         // has waited for what others send
  std::vector<std::vector<Copy>> copies{1};  // asked for, by group; the last group is open
  unsigned cluster_arrivals = 0;
  size_t waits_for = 0;     // where the mbarrier lies
  bool has_fenced = false;  // since it waited, for its products
};

// Of wgmma: 1/16 of the addresses of its operands, and the sums of the lanes of a warp.
struct Product {
  unsigned a, b;
  bool adds;
  unsigned columns;
  float (*to_float)(unsigned short);  // null: of e4m3
  float* sums[kWarp];
};
constexpr unsigned kRowBytes = 128, kRowsA = 64, kMaxColumns = 256;  // of operands

struct Warp {
  int kind = 0, line = 0;
  unsigned mask = 0, arrived = 0;
  uint64_t values[kWarp];
  unsigned arguments[kWarp];
  std::vector<unsigned> gathered, words[kWarp];
  uint64_t epoch = 1;  // of its barriers, and of the block's
  std::vector<std::vector<Product>> products{1};  // asked for, by group; the last group is open
  std::vector<unsigned> multiplied;               // operands of all
  // Of the next product.
  unsigned columns = 0;
  float (*to_float)(unsigned short) = nullptr;
};

// What is remembered of the last access of a kind to a byte: whose, and when in barriers. 0: none.
using Record = uint64_t;
constexpr unsigned kOfWarp = 0x4000, kCopied = 0x7ffd, kOfMany = 0x7ffe, kRemote = 0x7fff;
Record record(unsigned who, uint64_t epoch, uint64_t warp_epoch) {
  return uint64_t(who + 1) << 48 | (epoch & 0xffffff) << 24 | (warp_epoch & 0xffffff);
}
unsigned who(Record r) { return unsigned(r >> 48) - 1; }
uint64_t epoch_of(Record r) { return r >> 24 & 0xffffff; }
uint64_t warp_epoch_of(Record r) { return r & 0xffffff; }

struct Inbox {
  bool is_open = false;
  int64_t expected = -1, received = 0;
};

// An mbarrier. `tx` are bytes that were announced less those that came.
struct Phases {
  unsigned arrivals = 0, pending = 0;  // of a phase
  int64_t tx = 0, ended = 0;
  int64_t mail = -2;           // the last phase in which another block has sent something
  bool is_fenced = false;      // so that other blocks and copies may use it
  std::vector<int64_t> known;  // by each thread: phases that it has waited for
};

struct Block {
  unsigned index = 0, rank = 0, live = 0, at_barrier = 0;
  int barrier_line = 0;
  uint64_t epoch = 1;
  bool has_started = false, is_done = false;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<unsigned> ready;
  unsigned slow = ~0u;  // a thread that goes on when no other does, mostly
  void* scheduler = nullptr;
  char *shared = nullptr, *dynamic = nullptr;  // all that is thread-local here, and `memory` in it
  std::vector<Record> writes, reads, atomics;
  const void* inbox_address = nullptr;
  Inbox inbox;
  std::map<size_t, Phases> phases;  // by where the barrier lies
  std::condition_variable turn;
};

// Something that a thread has asked for, in the shared memory of a block; after it, it arrives there or bytes count.
struct Event {
  Block* block;
  size_t barrier;
  const Thread* thread;
  bool arrives, is_mail;
  unsigned bytes;
  std::vector<Copy> copies;
  unsigned word = 0;               // that is sent
  Buffer to = {nullptr, nullptr};  // from the lowest to the highest byte that it writes
};

struct Launch {
  void (*entry)(const void*) = nullptr;
  const char* arguments = nullptr;
  size_t argument_bytes = 0;
  unsigned grid = 0, block = 0, shared_bytes = 0, cluster = 1;
  std::vector<Buffer> buffers;
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Block>> blocks;  // of the cluster that runs
  std::vector<std::unique_ptr<Event>> events;  // that are to come
  unsigned patience = 1, address = 0;          // with events; of the dynamic shared memory
  uint64_t arrivals = 0;                       // at the cluster's barrier
  size_t shared_size = 0;
  std::mutex baton;
  Block* holder = nullptr;
  bool failed = false;
  std::string finding;
};

Launch* launch = nullptr;
Thread* current = nullptr;
std::vector<Buffer> constants;  // of the kernels' own library

unsigned below(unsigned bound) { return unsigned(launch->random() % bound); }

[[noreturn]] void leave_for_good() {
  emulator_switch(&current->stack_pointer, current->block->scheduler);
  std::abort();
}

void give_way() {
  Thread* self = current;
  emulator_switch(&self->stack_pointer, self->block->scheduler);
  current = self;
}

__attribute__((format(printf, 1, 2))) void found(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  if (!launch->failed) launch->finding = text;
  launch->failed = true;
}

template <typename... Values>
[[noreturn]] void fail(const char* format, Values... values) {
  char text[400];
  if constexpr (sizeof...(values) == 0) {
    snprintf(text, sizeof text, "%s", format);
  } else {
    snprintf(text, sizeof text, format, values...);
  }
  found("thread %u of block %u: %s", current->index, current->block->index, text);
  leave_for_good();
}

// As fail; also for what happens while no thread runs.
template <typename... Values>
void refuse(const Block& block, const char* format, Values... values) {
  if (current != nullptr) fail(format, values...);
  char text[400];
  snprintf(text, sizeof text, format, values...);
  found("block %u: %s", block.index, text);
}

void wake(Thread& thread) {
  thread.state = kReady;
  thread.block->ready.push_back(thread.index);
}

void wait_as(State state, int line) {
  current->state = state;
  current->line = line;
  give_way();
}

// ---- memory -------------------------------------------------------------------------------------------------------

enum Access { kRead, kWrite, kAtomic };
const char* const kAccesses[] = {"reads", "writes", "adds to"};

bool is_before(Record r, const Thread& me) {
  if (r == 0) return true;
  const unsigned other = who(r);
  if (other == kRemote) return me.has_mail;
  if (other == me.index || epoch_of(r) < (me.block->epoch & 0xffffff)) return true;
  if (other == kOfMany || other == kCopied) return false;
  const unsigned warp = other & kOfWarp ? other & ~kOfWarp : other / kWarp;
  return warp == me.index / kWarp && warp_epoch_of(r) < (me.block->warps[warp].epoch & 0xffffff);
}

const char* name_of(Record r, char* text, size_t size) {
  if (who(r) == kRemote) snprintf(text, size, "another block of the cluster");
  else if (who(r) == kOfMany) snprintf(text, size, "threads of several warps");
  else if (who(r) == kCopied) snprintf(text, size, "a copy");
  else if (who(r) & kOfWarp) snprintf(text, size, "threads of warp %u", who(r) & ~kOfWarp);
  else snprintf(text, size, "thread %u", who(r));
  return text;
}

Record merged(Record old, const Thread& me, Record mine) {
  if (is_before(old, me)) return mine;
  const unsigned other = who(old), warp = me.index / kWarp;
  const bool same_warp = other != kOfMany && (other & kOfWarp ? other & ~kOfWarp : other / kWarp) == warp;
  return record(same_warp ? kOfWarp | warp : kOfMany, me.block->epoch, me.block->warps[warp].epoch);
}

void access_shared(Block& block, size_t offset, size_t size, Access access) {
  Thread& me = *current;
  const Record mine = record(me.index, block.epoch, block.warps[me.index / kWarp].epoch);
  size_t num_unwritten = 0;
  char name[64];
  for (size_t byte = offset; byte < offset + size; ++byte) {
    Record &write = block.writes[byte], &read = block.reads[byte], &atomic = block.atomics[byte];
    num_unwritten += write == 0 && atomic == 0;
    const Record* clash = !is_before(write, me)                       ? &write
                          : access != kAtomic && !is_before(atomic, me) ? &atomic
                          : access != kRead && !is_before(read, me)     ? &read
                                                                        : nullptr;
    if (clash != nullptr) {
      fail("race: it %s a byte of shared memory, %zd from the dynamic part on, that %s %s since the last barrier",
           kAccesses[access], block.shared + byte - block.dynamic, name_of(*clash, name, sizeof name),
           clash == &read ? "read" : "wrote");
    }
    if (access == kWrite) write = mine;
    if (access == kRead) read = merged(read, me, mine);
    if (access == kAtomic) atomic = merged(atomic, me, mine);
  }
  // Of a vector, some elements may mean nothing.
  if (access != kWrite && num_unwritten > 0 && (size < 16 || num_unwritten == size)) {
    fail("%s shared memory that nobody has written, %zd bytes from the dynamic part on", kAccesses[access],
         block.shared + offset - block.dynamic);
  }
}

bool is_within(const Buffer& buffer, const char* address, size_t size) {
  return buffer.begin <= address && address + size <= buffer.end;
}

void check_access(const void* pointer, size_t size, Access access) {
  const char* address = static_cast<const char*>(pointer);
  if (current == nullptr || is_within({current->stack, current->stack + kStackBytes}, address, size)) return;
  Block& block = *current->block;
  if (block.shared <= address && address < block.shared + launch->shared_size) {
    const bool is_dynamic = block.dynamic <= address && address < block.dynamic + kMostShared;
    if (is_dynamic && address + size > block.dynamic + launch->shared_bytes) {
      fail("%s %zu bytes of shared memory at %zd, of %u planned", kAccesses[access], size, address - block.dynamic,
           launch->shared_bytes);
    }
    access_shared(block, address - block.shared, size, access);
    return;
  }
  for (const Buffer& buffer : launch->buffers) {
    if (is_within(buffer, address, size)) return;
  }
  if (access == kRead) {
    if (is_within({launch->arguments, launch->arguments + launch->argument_bytes}, address, size)) return;
    for (const Buffer& part : constants) {
      if (is_within(part, address, size)) return;
    }
  }
  const Buffer* near = nullptr;
  for (const Buffer& buffer : launch->buffers) {
    if (address >= buffer.begin && (near == nullptr || buffer.begin > near->begin)) near = &buffer;
  }
  if (near != nullptr && address - near->begin < 1 << 20) {
    fail("%s %zu bytes at %zd of a buffer of %zd", kAccesses[access], size, address - near->begin,
         near->end - near->begin);
  }
  fail("%s %zu bytes outside of all buffers", kAccesses[access], size);
}

// ---- what happens some time later -----------------------------------------------------------------------------------

// Ends the phase, where all is there.
void settle(Block& block, size_t where) {
  Phases& phases = block.phases[where];
  if (phases.pending > 0 || phases.tx > 0) return;
  if (phases.tx < 0) return refuse(block, "a barrier counts %lld bytes more than announced", -(long long)phases.tx);
  ++phases.ended;
  phases.pending = phases.arrivals;
  ++block.epoch;
  for (Thread& thread : block.threads) {
    if (thread.state == kAtPhase && thread.waits_for == where) wake(thread);
  }
}

void arrive(Block& block, size_t where) {
  Phases& phases = block.phases[where];
  if (phases.pending == 0) return refuse(block, "more arrive at a barrier than the %u it has", phases.arrivals);
  --phases.pending;
  settle(block, where);
}

void ask_for(std::unique_ptr<Event> event) {
  Buffer& to = event->to;
  for (const Copy& copy : event->copies) {
    to.begin = to.begin == nullptr ? copy.to : std::min<const char*>(to.begin, copy.to);
    to.end = std::max<const char*>(to.end, copy.to + copy.size);
  }
  launch->events.push_back(std::move(event));
}

bool overlap(const Buffer& a, const Buffer& b) { return a.begin < b.end && b.begin < a.end; }

bool writes_to(const Event& event, const Buffer& buffer) {
  if (!overlap(buffer, event.to)) return false;
  for (const Copy& copy : event.copies) {
    if (overlap(buffer, {copy.to, copy.to + copy.size})) return true;
  }
  return false;
}

// An operand, from the row of 128 bytes where it begins.
Buffer operand(const Block& block, unsigned sixteenths, unsigned rows) {
  const char* begin = block.dynamic + ptrdiff_t(sixteenths * 16 / kRowBytes * kRowBytes) - launch->address;
  return {begin, begin + rows * kRowBytes};
}

void deliver() {
  auto& events = launch->events;
  unsigned chosen = below(unsigned(events.size()));
  for (unsigned i = 0; i < chosen; ++i) {  // copies of a thread that it arrives with: in order
    if (events[i]->arrives && events[chosen]->arrives && events[i]->thread == events[chosen]->thread) chosen = i;
  }
  const std::unique_ptr<Event> event = std::move(events[chosen]);
  events.erase(events.begin() + chosen);
  Block& block = *event->block;
  for (const Warp& warp : block.warps) {
    for (const auto& group : warp.products) {
      for (const Product& product : group) {
        const Buffer a = operand(block, product.a, kRowsA);
        const Buffer b = operand(block, product.b, product.columns);
        if (!writes_to(*event, a) && !writes_to(*event, b)) continue;
        return refuse(block, "a copy of thread %u of block %u writes what products have yet to read",
                      event->thread->index, event->thread->block->index);
      }
    }
  }
  const Record mine = record(kCopied, block.epoch, 0);
  char name[64];
  for (const Copy& copy : event->copies) {
    const size_t begin = copy.to - block.shared;
    for (size_t byte = begin; byte < begin + copy.size; ++byte) {
      for (Record r : {block.writes[byte], block.reads[byte], block.atomics[byte]}) {
        if (r != 0 && who(r) != kRemote && epoch_of(r) >= (block.epoch & 0xffffff)) {
          return refuse(block, "race: a copy of thread %u of block %u writes a byte of shared memory, %zd from the "
                        "dynamic part on, that %s has used since the last barrier", event->thread->index,
                        event->thread->block->index, copy.to - block.dynamic, name_of(r, name, sizeof name));
        }
      }
      block.writes[byte] = mine;
    }
    if (copy.exists) memcpy(copy.to, copy.from, copy.size);
    else memset(copy.to, 0, copy.size);
  }
  if (event->arrives) return arrive(block, event->barrier);
  Phases& phases = block.phases[event->barrier];
  if (event->is_mail) phases.mail = phases.ended;
  phases.tx -= event->bytes;
  settle(block, event->barrier);
}

// All lanes of a warp multiply the same operands, and after them the other warps of their warpgroup.
void begin_product(Warp& warp) {
  const Block& block = *current->block;
  const unsigned arguments = warp.arguments[0];
  Product product = {arguments & 0x3fff, arguments >> 14 & 0x3fff, (arguments >> 28) != 0, warp.columns,
                     warp.to_float, {}};
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (warp.arguments[lane] != arguments) fail("multiplies other operands than lane 0 of its warp");
    product.sums[lane] = reinterpret_cast<float*>(warp.values[lane]);
  }
  const Buffer a = operand(block, product.a, kRowsA);
  const Buffer b = operand(block, product.b, product.columns);
  const Buffer all = {block.dynamic, block.dynamic + launch->shared_bytes};
  if (!is_within(all, a.begin, a.end - a.begin) || !is_within(all, b.begin, b.end - b.begin)) {
    fail("multiplies what is outside of shared memory");
  }
  for (const auto& event : launch->events) {
    if (writes_to(*event, a) || writes_to(*event, b)) fail("multiplies what a copy has yet to bring");
  }
  const size_t number = warp.multiplied.size(), first = (&warp - block.warps.data()) / 4 * 4;
  warp.multiplied.push_back(arguments);
  for (size_t i = first; i < first + 4; ++i) {
    const auto& theirs = block.warps[i].multiplied;
    if (theirs.size() > number && theirs[number] != arguments) fail("multiplies other operands than its warpgroup");
  }
  warp.products.back().push_back(product);
}

float e4m3_to_float(unsigned char bits) {
  static const std::vector<float> values = [] {
    std::vector<float> found;
    for (int code = 0; code < 256; ++code) {
      const int exponent = code >> 3 & 15, mantissa = code & 7;
      const float magnitude = exponent ? ldexpf(float(8 + mantissa), exponent - 10) : ldexpf(float(mantissa), -9);
      found.push_back(exponent == 15 && mantissa == 7 ? NAN : code & 128 ? -magnitude : magnitude);
    }
    return found;
  }();
  return values[bits];
}

// An element of an operand, whose rows are swizzled by their addresses.
float element(const Block& block, const Product& product, unsigned sixteenths, unsigned row, unsigned k) {
  const unsigned size = product.to_float ? 2 : 1;
  unsigned address = sixteenths * 16 + row * kRowBytes + k * size;
  address ^= (address / kRowBytes % 8) * 16;
  unsigned short bits = 0;
  memcpy(&bits, block.dynamic + ptrdiff_t(address) - launch->address, size);
  return product.to_float ? product.to_float(bits) : e4m3_to_float(static_cast<unsigned char>(bits));
}

// 16 rows of a product: those of the warp.
void multiply(const Block& block, const Warp& warp, const Product& product) {
  constexpr unsigned kRows = 16, kMaxK = 32;
  static float b[kMaxK][kMaxColumns], sums[kMaxColumns];
  const unsigned columns = product.columns, depth = product.to_float ? 16 : 32;
  for (unsigned n = 0; n < columns; ++n) {
    for (unsigned k = 0; k < depth; ++k) b[k][n] = element(block, product, product.b, n, k);
  }
  const unsigned first_row = unsigned(&warp - block.warps.data()) % 4 * kRows;
  for (unsigned row = 0; row < kRows; ++row) {
    // As of mma.sync: lane and place of the sum of each column.
    const auto sum = [&](unsigned n) -> float& {
      return product.sums[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2];
    };
    for (unsigned n = 0; n < columns; ++n) sums[n] = product.adds ? sum(n) : 0.0f;
    for (unsigned k = 0; k < depth; ++k) {
      const float a = element(block, product, product.a, first_row + row, k);
      for (unsigned n = 0; n < columns; ++n) sums[n] += a * b[k][n];
    }
    for (unsigned n = 0; n < columns; ++n) sum(n) = sums[n];
  }
}

void end_products(Warp& warp, unsigned num_groups) {
  while (warp.products.size() > num_groups + 1) {
    for (const Product& product : warp.products.front()) multiply(*current->block, warp, product);
    warp.products.erase(warp.products.begin());
  }
}

// ---- running ------------------------------------------------------------------------------------------------------

void thread_main() {
  launch->entry(launch->arguments);
  Block& block = *current->block;
  if (block.at_barrier > 0) {
    fail("ends while others wait for it at the barrier of line %d", block.barrier_line);
  }
  const Warp& warp = block.warps[current->index / kWarp];
  if (warp.products.size() > 1 || !warp.products[0].empty()) fail("ends before its products");
  current->state = kDone;
  if (--block.live == 0) {
    for (const auto& event : launch->events) {
      if (event->block == &block) fail("ends before copies of thread %u to its block", event->thread->index);
    }
    for (const Warp& other : block.warps) {
      const Warp& first = block.warps[(&other - block.warps.data()) / 4 * 4];
      if (other.multiplied.size() != first.multiplied.size()) fail("a warp has multiplied without its warpgroup");
    }
  }
  leave_for_good();
}

void* new_stack(char* stack) {
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;  // as after a call: 8 past a multiple of 16
  top[0] = reinterpret_cast<void*>(thread_main);
  top[1] = nullptr;
  for (unsigned i = 0; i < kSaved; ++i) *--top = nullptr;
#else
  void** top = reinterpret_cast<void**>(stack + kStackBytes - 160);
  memset(top, 0, 160);
  top[11] = reinterpret_cast<void*>(thread_main);
#endif
  return top;
}

// Where this library's thread-local variables are for the calling thread, and its constants.
int visit(dl_phdr_info* info, size_t, void* data) {
  Block& block = *static_cast<Block*>(data);
  const char* here = reinterpret_cast<const char*>(&visit);
  bool is_ours = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + part.p_vaddr);
    is_ours = is_ours || (part.p_type == PT_LOAD && begin <= here && here < begin + part.p_memsz);
  }
  if (!is_ours) return 0;
  constants.clear();
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    const char* begin = reinterpret_cast<const char*>(info->dlpi_addr + part.p_vaddr);
    if (part.p_type == PT_TLS) {
      block.shared = static_cast<char*>(info->dlpi_tls_data);
      launch->shared_size = part.p_memsz;
    }
    if (part.p_type == PT_LOAD) constants.push_back({begin, begin + part.p_memsz});
  }
  return 1;
}

void start(Block& block) {
  block.dynamic = reinterpret_cast<char*>(memory);
  *const_cast<volatile unsigned char*>(memory) = 0;  // so that there is one for this thread
  dl_iterate_phdr(visit, &block);
  block.writes.assign(launch->shared_size, 0);
  block.reads = block.atomics = block.writes;
  const size_t dynamic = block.dynamic - block.shared;
  for (size_t byte = 0; byte < launch->shared_size; ++byte) {  // as it may be before a block starts
    const bool is_used = byte < dynamic + launch->shared_bytes || byte >= dynamic + kMostShared;
    if (is_used && byte % 8 == 0) {
      const uint64_t garbage = launch->random();
      memcpy(block.shared + byte, &garbage, std::min<size_t>(8, launch->shared_size - byte));
    }
  }
  block.threads.resize(launch->block);
  block.warps.resize((launch->block + kWarp - 1) / kWarp);
  block.live = launch->block;
  if (below(2) == 0) block.slow = below(launch->block);
  for (unsigned i = 0; i < launch->block; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = i;
    thread.stack = stacks.take();
    thread.stack_pointer = new_stack(thread.stack);
    block.ready.push_back(i);
  }
  block.has_started = true;
}

void describe_deadlock() {
  std::string text = "deadlock:";
  for (const auto& block : launch->blocks) {
    unsigned counts[kDone + 1] = {};
    int lines[kDone + 1] = {};
    for (const Thread& thread : block->threads) {
      ++counts[thread.state];
      lines[thread.state] = thread.line;
    }
    for (int state = kAtBarrier; state <= kDone; ++state) {
      if (counts[state] == 0 || text.size() > 400) continue;
      text += " " + std::to_string(counts[state]) + " threads of block " + std::to_string(block->index) + " " +
              kStates[state] + (state == kDone ? ";" : " (line " + std::to_string(lines[state]) + ");");
    }
  }
  found("%s", text.c_str());
}

// Hands the baton to a block of the cluster that can go on; to itself, if it is the only one.
void pass(Block& self, std::unique_lock<std::mutex>& lock) {
  std::vector<Block*> able;
  bool all_done = true;
  const auto look = [&] {
    for (const auto& block : launch->blocks) {
      all_done = all_done && block->is_done;
      if (!block->is_done && (!block->has_started || !block->ready.empty())) able.push_back(block.get());
    }
  };
  look();
  while (able.empty() && !launch->events.empty() && !launch->failed) {
    deliver();
    look();
  }
  if (able.empty() && !all_done) describe_deadlock();
  if (launch->failed || all_done) {
    launch->holder = nullptr;
    for (const auto& block : launch->blocks) block->turn.notify_one();
    return;
  }
  launch->holder = able[below(unsigned(able.size()))];
  if (launch->holder == &self) return;
  launch->holder->turn.notify_one();
  if (!self.is_done) self.turn.wait(lock, [&] { return launch->holder == &self || launch->failed; });
}

void run(Block& block) {
  std::unique_lock<std::mutex> lock(launch->baton);
  block.turn.wait(lock, [&] { return launch->holder == &block || launch->failed; });
  if (launch->failed) return;
  start(block);
  while (block.live > 0 && !launch->failed) {
    if (!launch->events.empty() && below(launch->patience) == 0) {
      deliver();
      continue;
    }
    if (block.ready.empty() || (launch->cluster > 1 && below(256) == 0)) {
      pass(block, lock);
      continue;
    }
    unsigned place = below(unsigned(block.ready.size()));
    if (block.ready[place] == block.slow) {
      if (block.ready.size() > 1) {
        place = (place + 1) % unsigned(block.ready.size());
      } else if (below(8) != 0) {
        if (!launch->events.empty()) deliver();
        else pass(block, lock);
        continue;
      }
    }
    std::swap(block.ready[place], block.ready.back());
    current = &block.threads[block.ready.back()];
    block.ready.pop_back();
    emulator_switch(&block.scheduler, current->stack_pointer);
    current = nullptr;
  }
  for (Thread& thread : block.threads) stacks.free.push_back(thread.stack);
  block.is_done = true;
  pass(block, lock);
}

Warp& my_warp() { return current->block->warps[current->index / kWarp]; }

uint64_t result_of(const Warp& warp, unsigned lane) {
  const unsigned argument = warp.arguments[lane];
  uint64_t result = 0;
  unsigned source = lane;
  switch (warp.kind) {
    case emulator::kShuffle: source = argument % kWarp; break;
    case emulator::kShuffleUp: source = argument <= lane ? lane - argument : lane; break;
    case emulator::kShuffleXor: source = lane ^ argument; break;
    case emulator::kBallot:
      for (unsigned i = 0; i < kWarp; ++i) result |= uint64_t((warp.mask >> i & 1) && warp.values[i]) << i;
      return result;
    case emulator::kMatch:
      for (unsigned i = 0; i < kWarp; ++i) {
        result |= uint64_t((warp.mask >> i & 1) && warp.values[i] == warp.values[lane]) << i;
      }
      return result;
    case emulator::kAdd:
      for (unsigned i = 0; i < kWarp; ++i) result += warp.mask >> i & 1 ? warp.values[i] : 0;
      return result & 0xffffffff;
    case emulator::kMax:
      for (unsigned i = 0; i < kWarp; ++i) {
        if (warp.mask >> i & 1) result = std::max(result, warp.values[i]);
      }
      return result;
    default: return 0;
  }
  if (source >= kWarp || !(warp.mask >> source & 1)) fail("shuffles from lane %u, which takes no part", source);
  return warp.values[source];
}

}  // namespace

// ---- what kernels call --------------------------------------------------------------------------------------------

namespace emulator {

uint3 thread_index() { return {current->index, 0, 0}; }
uint3 block_index() { return {current->block->index, 0, 0}; }
uint3 block_size() { return {launch->block, 1, 1}; }
uint3 grid_size() { return {launch->grid, 1, 1}; }

uint64_t collective(Collective kind, unsigned mask, uint64_t value, unsigned argument, int line) {
  Warp& warp = my_warp();
  Thread& self = *current;
  const unsigned lane = self.index % kWarp;
  if (warp.arrived == 0) {
    warp.kind = kind, warp.mask = mask, warp.line = line;
  } else if (warp.kind != kind || warp.mask != mask || warp.line != line) {
    fail("is at the vote, shuffle or barrier of line %d, others of its warp at that of line %d", line, warp.line);
  }
  if (!(mask >> lane & 1)) fail("is not in the mask %#x of line %d", mask, line);
  warp.values[lane] = value;
  warp.arguments[lane] = argument;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    wait_as(kAtCollective, line);
    return self.result;
  }
  Block& block = *self.block;
  const unsigned first = self.index - lane;
  if (kind == kGather) {  // a copy, as lanes that are quick give their next words before others have read these
    warp.gathered.clear();
    for (const auto& words : warp.words) warp.gathered.insert(warp.gathered.end(), words.begin(), words.end());
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    Thread& other = block.threads[first + i];
    other.result = result_of(warp, i);
    if (i != lane) wake(other);
  }
  if (kind == kWarpBarrier) ++warp.epoch;
  if (kind == kMultiply) begin_product(warp);
  if (kind == kCommitProducts) warp.products.emplace_back();
  if (kind == kWaitProducts) end_products(warp, argument);
  warp.arrived = 0;
  return self.result;
}

void block_barrier(int line) {
  Block& block = *current->block;
  if (block.live < launch->block) fail("waits at line %d for threads that have ended", line);
  if (block.at_barrier > 0 && block.barrier_line != line) {
    fail("is at the barrier of line %d, others of its block at that of line %d", line, block.barrier_line);
  }
  block.barrier_line = line;
  if (++block.at_barrier < launch->block) {
    wait_as(kAtBarrier, line);
    return;
  }
  block.at_barrier = 0;
  ++block.epoch;
  for (Warp& warp : block.warps) ++warp.epoch;
  for (Thread& thread : block.threads) {
    if (&thread != current) wake(thread);
  }
}

unsigned atomic_add(unsigned* address, unsigned value) {
  check_access(address, sizeof(unsigned), kAtomic);
  if (below(16) == 0) {
    wake(*current);
    give_way();
  }
  const unsigned old = *address;
  *address = old + value;
  return old;
}

uint64_t nanoseconds() {
  static uint64_t now = 0;  // blocks take turns
  return now += 1000;
}

void cluster_arrive(int line) {
  Thread& self = *current;
  const uint64_t all = uint64_t(launch->cluster) * launch->block;
  if (self.cluster_arrivals > launch->arrivals / all) fail("arrives twice at the cluster's barrier, line %d", line);
  ++self.cluster_arrivals;
  if (++launch->arrivals % all != 0) return;
  for (const auto& block : launch->blocks) {
    for (Thread& thread : block->threads) {
      if (thread.state == kAtClusterBarrier) wake(thread);
    }
  }
}

void cluster_wait(int line) {
  const uint64_t all = uint64_t(launch->cluster) * launch->block;
  if (current->cluster_arrivals == 0) fail("waits at the cluster's barrier, line %d, without an arrival", line);
  if (launch->arrivals / all < current->cluster_arrivals) wait_as(kAtClusterBarrier, line);
}

void inbox_open(const void* inbox) {
  Block& block = *current->block;
  if (block.inbox.is_open) fail("opens the inbox of its block once more");
  block.inbox.is_open = true;
  block.inbox_address = inbox;
}

void wake_receivers(Block& block) {
  if (block.inbox.received > block.inbox.expected && block.inbox.expected >= 0) {
    fail("block %u gets %lld bytes, and expects %lld", block.index, (long long)block.inbox.received,
         (long long)block.inbox.expected);
  }
  if (block.inbox.received != block.inbox.expected) return;
  for (Thread& thread : block.threads) {
    if (thread.state == kAtInbox) wake(thread);
  }
}

void inbox_expect(const void* inbox, unsigned num_bytes) {
  Block& block = *current->block;
  if (!block.inbox.is_open) fail("expects bytes in an inbox that is not open");
  if (block.inbox.expected >= 0) fail("says twice what its inbox expects");
  block.inbox.expected = num_bytes;
  wake_receivers(block);
}

void inbox_send(const void* inbox, void* mine, unsigned rank, const void* value, unsigned num_bytes) {
  Block& self = *current->block;
  if (rank >= launch->blocks.size()) fail("sends to block %u of a cluster of %zu", rank, launch->blocks.size());
  Block& other = *launch->blocks[rank];
  // A block that has arrived at the barrier may be seen to run; what it did before, by those that waited, too.
  if (launch->arrivals < uint64_t(launch->cluster) * launch->block) fail("sends before all blocks run");
  if (!other.inbox.is_open) fail("sends to block %u, whose inbox is not open", rank);
  if (other.is_done || other.live == 0) fail("sends to block %u, which has ended", rank);
  const ptrdiff_t offset = static_cast<char*>(mine) - self.shared;
  const ptrdiff_t dynamic = static_cast<char*>(mine) - self.dynamic;
  if (dynamic < 0 || dynamic + num_bytes > launch->shared_bytes) fail("sends to byte %zd of shared memory", dynamic);
  for (unsigned byte = 0; byte < num_bytes; ++byte) {
    if (other.writes[offset + byte] != 0 || other.reads[offset + byte] != 0) {
      fail("sends to byte %zd of block %u, which has been used", dynamic + byte, rank);
    }
    other.writes[offset + byte] = record(kRemote, 0, 0);
  }
  memcpy(other.shared + offset, value, num_bytes);
  other.inbox.received += num_bytes;
  wake_receivers(other);
}

void copy_async(void* shared, const void* global, bool exists, unsigned num_bytes) {
  const Block& block = *current->block;
  const char* to = static_cast<char*>(shared);
  if (to < block.dynamic || to + num_bytes > block.dynamic + launch->shared_bytes) {
    fail("copies to outside of shared memory");
  }
  if (exists) check_access(global, num_bytes, kRead);
  if (reinterpret_cast<uintptr_t>(global) % num_bytes != 0) {
    fail("copies from an address that is no multiple of %u", num_bytes);
  }
  current->copies.back().push_back({static_cast<char*>(shared), static_cast<const char*>(global), exists, num_bytes});
}

void commit_copies() { current->copies.emplace_back(); }

void wait_copies(unsigned num_groups) {
  auto& copies = current->copies;
  while (copies.size() > num_groups + 1) {
    for (const Copy& copy : copies.front()) {
      check_access(copy.to, copy.size, kWrite);
      if (copy.exists) memcpy(copy.to, copy.from, copy.size);
      else memset(copy.to, 0, copy.size);
    }
    copies.erase(copies.begin());
  }
}

// The words of all lanes of the warp, [kWarp][count]; they are there until the next call.
static const unsigned* gather(const unsigned* words, unsigned count, int line) {
  Warp& warp = my_warp();
  warp.words[current->index % kWarp].assign(words, words + count);
  collective(kGather, 0xffffffffu, count, 0, line);
  return warp.gathered.data();
}

void load_matrices(unsigned* words, const void* row, int line) {
  check_access(row, 16, kRead);
  const unsigned* all = gather(static_cast<const unsigned*>(row), 4, line);
  const unsigned lane = current->index % kWarp;
  for (unsigned matrix = 0; matrix < 4; ++matrix) words[matrix] = all[(matrix * 8 + lane / 4) * 4 + lane % 4];
}

void store_matrices(void* row, const unsigned* words, int line) {
  check_access(row, 16, kWrite);
  const unsigned* all = gather(words, 4, line);
  const unsigned lane = current->index % kWarp;
  for (unsigned i = 0; i < 4; ++i) static_cast<unsigned*>(row)[i] = all[(lane % 8 * 4 + i) * 4 + lane / 8];
}

void multiply_add(float* sums, const unsigned* a, unsigned b0, unsigned b1, float (*to_float)(unsigned short), int line) {
  const unsigned own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const unsigned* all = gather(own, 6, line);
  const unsigned lane = current->index % kWarp;
  const unsigned per_word = to_float ? 2 : 4, in_quad = 4 * per_word;
  const auto element = [&](unsigned from, unsigned word, unsigned place) {
    const unsigned bits = all[from * 6 + word] >> (32 / per_word * place);
    return to_float ? to_float(static_cast<unsigned short>(bits)) : e4m3_to_float(static_cast<unsigned char>(bits));
  };
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4, column = lane % 4 * 2 + i % 2, lower = i / 2;
    for (unsigned k = 0; k < 2 * in_quad; ++k) {
      const unsigned lane_of_quad = k % in_quad / per_word, upper = k / in_quad, place = k % per_word;
      sums[i] += element(row * 4 + lane_of_quad, upper * 2 + lower, place) *
                 element(column * 4 + lane_of_quad, 4 + upper, place);
    }
  }
}

unsigned shared_address(const void* shared) {
  return unsigned(static_cast<const char*>(shared) - current->block->dynamic + launch->address);
}

// Where a barrier lies, the same in all blocks of the cluster; it has to be open in `block`.
static size_t opened(const void* barrier, const Block& block, bool has_to_be_fenced = false) {
  const size_t where = static_cast<const char*>(barrier) - current->block->shared;
  const auto found = block.phases.find(where);
  if (found == block.phases.end()) fail("uses a barrier of block %u that is not open", block.index);
  if (has_to_be_fenced && !found->second.is_fenced) fail("uses a barrier of block %u without a fence", block.index);
  return where;
}

static Block& block_of_cluster(unsigned rank) {
  if (rank >= launch->blocks.size()) fail("asks for block %u of a cluster of %zu", rank, launch->blocks.size());
  Block& block = *launch->blocks[rank];
  if (launch->arrivals < uint64_t(launch->cluster) * launch->block) fail("asks for block %u before all run", rank);
  if (block.live == 0) fail("asks for block %u, which has ended", rank);
  return block;
}

static void give_way_at_times() {
  if (below(8) != 0) return;
  wake(*current);
  give_way();
}

void barrier_open(void* barrier, unsigned arrivals) {
  Block& block = *current->block;
  const char* place = static_cast<char*>(barrier);
  if (place < block.dynamic || place + 8 > block.dynamic + launch->shared_bytes) fail("opens no shared memory");
  Phases& phases = block.phases[place - block.shared];
  if (phases.arrivals > 0 || arrivals == 0) fail("opens a barrier once more, or for nobody");
  phases.arrivals = phases.pending = arrivals;
  phases.known.assign(launch->block, 0);
}

void fence_open_barriers() {
  for (auto& [where, phases] : current->block->phases) phases.is_fenced = true;
}

void barrier_expect(void* barrier, unsigned num_bytes) {
  current->block->phases[opened(barrier, *current->block)].tx += num_bytes;
}

void barrier_arrive(void* barrier) {
  arrive(*current->block, opened(barrier, *current->block));
  give_way_at_times();
}

void barrier_arrive_in(void* barrier, unsigned rank) {
  Block& block = block_of_cluster(rank);
  arrive(block, opened(barrier, block, true));
  give_way_at_times();
}

void barrier_arrive_with_copies(void* barrier) {
  Block& block = *current->block;
  auto event = std::make_unique<Event>(Event{&block, opened(barrier, block), current, true, false, 0, {}});
  for (const auto& group : current->copies) event->copies.insert(event->copies.end(), group.begin(), group.end());
  current->copies.assign(1, {});
  ask_for(std::move(event));
}

void barrier_send(void* barrier, void* mine, unsigned rank, unsigned value) {
  Block& block = block_of_cluster(rank);
  const ptrdiff_t offset = static_cast<char*>(mine) - current->block->dynamic;
  if (offset < 0 || offset + 4 > launch->shared_bytes) fail("sends to byte %zd of shared memory", offset);
  const bool is_mail = &block != current->block;
  const size_t where = opened(barrier, block, true);
  auto event = std::make_unique<Event>(Event{&block, where, current, false, is_mail, 4, {}, value});
  event->copies.push_back({block.dynamic + offset, reinterpret_cast<const char*>(&event->word), true, 4});
  ask_for(std::move(event));
}

void barrier_wait(void* barrier, unsigned parity, bool of_cluster, int line) {
  Block& block = *current->block;
  const size_t where = opened(barrier, block);
  Phases& phases = block.phases[where];
  give_way_at_times();
  int64_t& known = phases.known[current->index];
  const int64_t phase = known % 2 == parity ? known : known - 1;  // threads wait for one after another, or once more
  if (phases.ended <= phase) {
    current->waits_for = where;
    wait_as(kAtPhase, line);
  }
  if (phases.ended > phase + 1) {
    fail("waits for phase %lld of a barrier, after which another has ended", (long long)phase);
  }
  known = phase + 1;
  if (phases.mail == phase && !of_cluster) fail("waits for what another block has sent as if it were its own");
  current->has_fenced = false;
}

// As the host packs it for us.
struct Map {
  unsigned long long address, sizes[5], strides[4], box[5];
  unsigned swizzle, size;  // of an element
};

void copy_box(void* shared, const unsigned long long* map, void* barrier, const unsigned* at, bool to_both) {
  const Map& of = *reinterpret_cast<const Map*>(map);
  const Block& self = *current->block;
  const unsigned to = shared_address(shared);
  const uint64_t rows = of.box[1] * of.box[2] * of.box[3] * of.box[4], bytes = rows * kRowBytes;
  const unsigned size = of.size, in_chunk = 16 / size;
  if (of.box[0] * size != kRowBytes || of.sizes[0] % in_chunk != 0) fail("copies a box that is not emulated");
  if (to % kRowBytes != 0) fail("copies a box to a place that is no multiple of 128");
  const ptrdiff_t offset = static_cast<char*>(shared) - self.dynamic;
  if (offset < 0 || offset + bytes > launch->shared_bytes) fail("copies a box to outside of shared memory");
  std::vector<Copy> copies;
  for (unsigned row = 0; row < rows; ++row) {
    uint64_t rest = row;
    const char* from = reinterpret_cast<const char*>(of.address);
    bool is_within = true;
    for (unsigned d = 1; d < 5; rest /= of.box[d], ++d) {
      const uint64_t index = at[d] + rest % of.box[d];
      is_within = is_within && index < of.sizes[d];
      from += index * of.strides[d - 1];
    }
    for (unsigned chunk = 0; chunk < kRowBytes / 16; ++chunk) {
      const uint64_t first = at[0] + chunk * in_chunk;
      const bool exists = is_within && first < of.sizes[0];
      if (exists) check_access(from + first * size, 16, kRead);
      unsigned place = row * kRowBytes + chunk * 16;
      if (of.swizzle) place = ((to + place) ^ ((to + place) / kRowBytes % 8 * 16)) - to;
      copies.push_back({static_cast<char*>(shared) + place, exists ? from + first * size : nullptr, exists});
    }
  }
  for (unsigned rank = 0; rank < launch->blocks.size(); ++rank) {
    if (!to_both && rank != self.rank) continue;
    Block& block = to_both ? block_of_cluster(rank) : *current->block;
    const size_t where = opened(barrier, block, true);
    auto event = std::make_unique<Event>(Event{&block, where, current, false, false, unsigned(bytes), copies});
    for (Copy& copy : event->copies) copy.to += block.shared - self.shared;
    ask_for(std::move(event));
  }
}

void begin_products() { current->has_fenced = true; }

void multiply(unsigned columns, float* sums, unsigned a, unsigned b, unsigned adds, float (*to_float)(unsigned short),
              int line) {
  if (!current->has_fenced) fail("multiplies without a fence");
  my_warp().columns = columns;
  my_warp().to_float = to_float;
  const unsigned arguments = (adds != 0) << 28 | b << 14 | a;
  collective(kMultiply, 0xffffffffu, reinterpret_cast<uintptr_t>(sums), arguments, line);
}

void commit_products(int line) {
  collective(kCommitProducts, 0xffffffffu, 0, 0, line);
  current->has_fenced = false;
}

void wait_products(unsigned num_groups, int line) {
  collective(kWaitProducts, 0xffffffffu, 0, num_groups, line);
}

void inbox_wait(const void* inbox, int line) {
  Block& block = *current->block;
  if (!block.inbox.is_open) fail("waits for an inbox that is not open, line %d", line);
  if (block.inbox.received != block.inbox.expected) wait_as(kAtInbox, line);
  current->has_mail = true;
}

}  // namespace emulator

// ---- what the compiler puts before every access -------------------------------------------------------------------

extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
#define ACCESSES(size)                                                                  \
  void __tsan_read##size(void* address) { check_access(address, size, kRead); }         \
  void __tsan_write##size(void* address) { check_access(address, size, kWrite); }       \
  void __tsan_unaligned_read##size(void* address) { check_access(address, size, kRead); }   \
  void __tsan_unaligned_write##size(void* address) { check_access(address, size, kWrite); } \
  void __tsan_volatile_read##size(void* address) { check_access(address, size, kRead); }    \
  void __tsan_volatile_write##size(void* address) { check_access(address, size, kWrite); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)
void __tsan_read_range(void* address, size_t size) { check_access(address, size, kRead); }
void __tsan_write_range(void* address, size_t size) { check_access(address, size, kWrite); }

// What is wrong with a launch; null: nothing. `buffers` are the beginnings and ends of what it may touch.
const char* emulator_launch(void (*entry)(const void*), const void* arguments, size_t argument_bytes, unsigned grid,
                            unsigned block, unsigned shared_bytes, unsigned cluster, uint64_t seed,
                            const Buffer* buffers, size_t num_buffers) {
  static std::string finding;
  Launch now;
  now.entry = entry;
  now.arguments = static_cast<const char*>(arguments);
  now.argument_bytes = argument_bytes;
  now.grid = grid, now.block = block, now.shared_bytes = shared_bytes, now.cluster = cluster;
  now.random.seed(seed);
  now.patience = 1u << (1 + seed % 3 * 4);
  now.address = seed % 4 == 0 ? 1024 : unsigned(seed % 64 * 16);
  now.buffers.assign(buffers, buffers + num_buffers);
  launch = &now;
  std::vector<unsigned> clusters(grid / cluster);
  for (unsigned i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::shuffle(clusters.begin(), clusters.end(), now.random);
  for (unsigned index : clusters) {
    now.blocks.clear();
    now.events.clear();
    now.arrivals = 0;
    for (unsigned rank = 0; rank < cluster; ++rank) {
      now.blocks.push_back(std::make_unique<Block>());
      now.blocks.back()->index = index * cluster + rank;
      now.blocks.back()->rank = rank;
    }
    now.holder = now.blocks[below(cluster)].get();
    if (cluster == 1) {
      run(*now.blocks[0]);
    } else {
      std::vector<std::thread> workers;
      for (const auto& one : now.blocks) workers.emplace_back([&one] { run(*one); });
      for (std::thread& worker : workers) worker.join();
    }
    if (now.failed) break;
  }
  launch = nullptr;
  finding = now.finding;
  return now.failed ? finding.c_str() : nullptr;
}
}
