// What a block does around its arithmetic, whatever the pages hold: its loads, its phases and its
// launch.
// Rule: a Kind says what a page is and what is done with it; who waits for whom is said here.
//
// A Kind has: Shared; small for the first group of consumers and large for the two others, and
// registers for those and for loading; load_page for one thread, take_page for those that only wait
// for a page and leave its place; kBeside (mla_merge.cuh); make_barriers and make_maps.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "hopper.cuh"
#include "mla_merge.cuh"
#include "mla_plan.cuh"

namespace {

constexpr int kThreads = 512;
constexpr int kMergeRegisters = 112;    // of a thread; four groups of 128 have 65,536 together
constexpr int kTile = 9 * kRows * 128;  // bytes of a tile of queries
constexpr int kEight = 9 * 1024;        // of eight rows of it: all columns of them

struct Maps {
  CUtensorMap queries;  // boxes of 8 rows of queries, all columns
  CUtensorMap values;   // of 64 keys, as many columns as a piece of a page has
  CUtensorMap rotary;   // of 64 keys, the 64 columns behind the values
};

// Barriers that every Kind has. Where one thread of a warp arrives, a product of the warp is done.
// Where all threads arrive, they have read or written shared memory themselves.
struct Meeting {
  uint64_t q_full, q_empty;
  uint64_t p_full, p_empty;
  uint64_t sum_full, sum_empty, noted;

  __device__ void make() {
    make_barrier(&q_full, 1);
    make_barrier(&q_empty, 4);
    make_barrier(&p_full, 128);
    make_barrier(&p_empty, 256);
    make_barrier(&sum_full, 128);
    make_barrier(&sum_empty, 256);
    make_barrier(&noted, kConsumers);
  }
};

// --- Loads
// ----------------------------------------------------------------------------------------

template <typename Kind>
__device__ void load_pages(const Call& call, typename Kind::Shared& shared, const Maps& maps) {
  const int lane = threadIdx.x % 32;
  // Pages that several tiles read should stay in L2 for the others.
  const uint64_t once = evict_first(), again = evict_normal();
  int turn = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next();) {
    const Item& item = walk.item;
    const int* table = call.plan.page_table + int64_t(item.row) * call.plan.columns;
    const uint64_t policy = call.plan.tiles == 1 && item.phase == kAlone ? once : again;
    const auto look_up = [&](int block) {
      return block + lane < item.last ? __ldg(table + block + lane) : 0;
    };
    int ids = 0, next = look_up(item.first + 2);  // behind the two that the plan names
    for (int block = item.first; block < item.last; ++block, ++turn) {
      const int at = block - item.first, ahead = (at - 2) & 31;
      if (at >= 2 && ahead == 0) ids = next, next = look_up(block + 32);
      const int listed = __shfl_sync(~0u, ids, ahead);
      const int page = at == 0 ? item.pages[0] : at == 1 ? item.pages[1] : listed;
      if (lane == 0) Kind::load_page(shared, maps, policy, turn, page);
      __syncwarp();
    }
  }
}

// As many rows as there are, by eights: the rest of a box outside the tensor comes slower than what
// is inside. Blocks begin with different ones, since they want the same at the same time.
template <typename Shared>
__device__ void load_queries(const Call& call, Shared& shared, const Maps& maps) {
  int loaded = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next();) {
    const Item& item = walk.item;
    if (item.first == item.last) continue;
    const int eights = (item.rows + 7) / 8;
    wait(&shared.meeting.q_empty, (loaded++ & 1) ^ 1);
    expect(&shared.meeting.q_full, eights * kEight);
    int at = blockIdx.x % eights;
    for (int i = 0; i < eights; ++i, at = at + 1 < eights ? at + 1 : 0)
      load_box(shared.q + at * kEight, &maps.queries, &shared.meeting.q_full, evict_normal(),
               item.first_row + at * 8, 0, 0);
  }
}

// What lies behind the rows of the first tile is scored too, and costs least as zeros.
template <typename Shared>
__device__ void clear_rows(Shared& shared, int rows) {
  const int from = (rows + 7) / 8 * kEight / 16;
  for (int i = from + threadIdx.x % 128; i < kTile / 16; i += 128)
    reinterpret_cast<uint4*>(shared.q)[i] = uint4{};
  fence_async();
  sync_group(2, 128);
}

// Keys behind the last one may hold anything, NaN too, and 0 * NaN is NaN. The boxes of a page that
// hold values come first; their rows are 128 bytes.
template <int Boxes>
__device__ void clear_keys(uint8_t* page, int from) {
  const int chunks = (kKeys - from) * 8;  // of 16 bytes, in a box
  for (int i = threadIdx.x % 128; i < Boxes * chunks; i += 128)
    *reinterpret_cast<uint4*>(page + i / chunks * kKeys * 128 + from * 128 + i % chunks * 16) =
        uint4{};
}

// --- A block
// ------------------------------------------------------------------------------------------

// Nobody waits for what he does not free: it might have been loaded over twice meanwhile.
template <typename Kind>
__device__ void only_take(const Call& call, typename Kind::Shared& shared) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  int turn = 0, tiles_loaded = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next();) {
    const Item& item = walk.item;
    for (int block = item.first; block < item.last; ++block, ++turn)
      Kind::take_page(shared, turn, group);
    if (group != 1 || item.first == item.last) continue;
    wait(&shared.meeting.q_full, tiles_loaded++ & 1);
    if (lane == 0) arrive(&shared.meeting.q_empty);
  }
}

template <typename Kind, bool OnlyLoad>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ Call call, const __grid_constant__ Maps maps) {
  using Shared = typename Kind::Shared;
  extern __shared__ __align__(1024) uint8_t bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  static_assert(sizeof(Merging) <= offsetof(Shared, notes));
  if (threadIdx.x == 32) prefetch(&call.plan.item(blockIdx.x));
  if (threadIdx.x == 0) {
    shared.meeting.make();
    Kind::make_barriers(shared);
    fence_barriers();
    prefetch_map(&maps.queries);
    prefetch_map(&maps.values);
    prefetch_map(&maps.rotary);
  }
  __syncthreads();
  wait_for_launches();
  let_launch();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    give_registers<Kind::kLoadRegisters>();
    if (threadIdx.x < 32) load_pages<Kind>(call, shared, maps);
    if (threadIdx.x == 32) load_queries(call, shared, maps);
  } else {
    if (group == 1) {
      give_registers<Kind::kSmallRegisters>();
      if constexpr (OnlyLoad) {
        only_take<Kind>(call, shared);
      } else {
        const unsigned launch = launches_before(call);
        Kind::small(call, shared);
        note(call, shared.notes, launch);
      }
    } else {
      take_registers<Kind::kLargeRegisters>();
      if constexpr (OnlyLoad)
        only_take<Kind>(call, shared);
      else
        Kind::large(call, shared, group - 2);
      // What follows is the same code for all: fewer instructions have to be fetched.
      give_registers<kMergeRegisters>();
    }
    if constexpr (!OnlyLoad)
      merge<Kind::kBeside>(call, *reinterpret_cast<Merging*>(&shared), shared.notes,
                           &shared.meeting.noted);
  }
}

// --- Launching
// ------------------------------------------------------------------------------------

// What a call of the C ABI says, as it says it.
struct Given {
  const void *q, *pages;
  int64_t q_stride, page_stride, key_stride;  // in values
  int tokens, pages_count, heads;
};

template <typename Kind, bool OnlyLoad>
int launch(const Call& call, const Maps& maps, cudaStream_t stream) {
  const auto kernel = decode<Kind, OnlyLoad>;
  const int bytes = sizeof(typename Kind::Shared);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(call.plan.grid);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return int(cudaLaunchKernelEx(&config, kernel, call, maps));
}

template <typename Kind>
int launch(const Call& call, const Given& given, bool only_load, cudaStream_t stream) {
  Maps maps;
  const int64_t rows = int64_t(given.tokens) * given.heads;
  const Tensor queries{given.q, {rows, 9, 1}, {given.q_stride, 64, given.q_stride * rows}};
  if (int error = make_map(&maps.queries, queries, 8, 9)) return error;
  if (int error = Kind::make_maps(maps, given)) return error;
  return only_load ? launch<Kind, true>(call, maps, stream)
                   : launch<Kind, false>(call, maps, stream);
}

}  // namespace
