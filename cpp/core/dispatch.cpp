// Which kernel table runs: one ordered list, chosen once, forced by POTQAT_ISA or set_isa. Wrong names fail.
#include <atomic>
#include <cstdlib>
#include <string>

#include "kernels/kernel.h"
#include "potqat.h"

namespace potqat {
namespace {

const KernelTable* const kTables[] = {
// best first
#ifdef POTQAT_X86
    &kAmxTable,      &kAvx512VbmiTable, &kAvx512VnniTable, &kAvxVnniTable, &kAvx2Table,
#endif
#ifdef POTQAT_AARCH64
    &kNeonI8mmTable, &kNeonDotTable,
#endif
    &kScalarTable,
};

const KernelTable* find(std::string_view name) {
  for (const KernelTable* table : kTables) {
    if (name == table->name && table->supported()) return table;
  }
  return nullptr;
}

const KernelTable* initial() {
  const char* forced = std::getenv("POTQAT_ISA");
  if (forced && *forced) return find(forced);
  for (const KernelTable* table : kTables) {
    if (table->supported()) return table;
  }
  return nullptr;
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{initial()};
  return table;
}

std::string names(bool only_supported) {
  std::string list;
  for (const KernelTable* table : kTables) {
    if (only_supported && !table->supported()) continue;
    if (!list.empty()) list += ',';
    list += table->name;
  }
  return list;
}

}  // namespace

const KernelTable* active_table() { return active().load(std::memory_order_relaxed); }

const KernelTable& table_or_scalar() {
  const KernelTable* table = active_table();
  return table ? *table : kScalarTable;
}

std::string built_isas() { return names(false); }
std::string available_isas() { return names(true); }
std::string active_isa() { return active_table() ? active_table()->name : ""; }

bool set_isa(std::string_view name) {
  const KernelTable* table = find(name);
  if (table) active().store(table, std::memory_order_relaxed);
  return table != nullptr;
}

bool has_fast_bfloat16() {
#ifdef POTQAT_X86
  return __builtin_cpu_supports("amx-bf16") ||
         (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd"));  // an Intel's without AMX is the slower way
#else
  return false;
#endif
}

int64_t peak(std::string_view isa, int64_t rounds) {
  const KernelTable* table = find(isa);
  return table ? table->peak(rounds) : -1;
}

uint64_t read(const void* data, int64_t bytes) {
  return table_or_scalar().read(static_cast<const uint8_t*>(data), bytes);
}

}  // namespace potqat
