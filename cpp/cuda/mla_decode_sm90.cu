// Latent attention for decode on Hopper: src/tokenspeed/kernels/contract.py says what, this is how.
// Rule: raw PTX, a plain C ABI of pointers and sizes, nothing of torch, nothing of the host's
// state.
//
// One block an SM, for good. A block walks its share of the keys (mla_plan.cuh) page by page:
//   producers   a warp for pages, by TMA, two pages ahead, and one for queries
//   scores      one warpgroup: S = Q K^T, the running maximum and sum, P
//   values      two warpgroups: each takes P into registers, and adds P V to its half of O, one
//   half
//               of that while the next page is scored and the other while it is weighed
// A tile is 64 rows, a row is a query token and a head, so that a key is read once for all of them.
// What is split over blocks they merge in the same launch (mla_merge.cuh).

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "hopper.cuh"
#include "mla_merge.cuh"
#include "mla_plan.cuh"

namespace {

constexpr int kBox = kRows * 128;  // bytes of 64 rows of 64 columns
constexpr int kPage = 9 * kBox;    // bytes of 64 keys, or of a tile of queries
constexpr int kEight = 9 * 1024;   // bytes of eight rows of a tile of queries: all columns of them
constexpr int kStages = 2;
// A page comes and goes in pieces: the rotary box, which nobody needs once it is scored, then two
// boxes of values each. The halves of O are done with pieces 1 and 2 before they are with 3 and 4.
constexpr int kPieces = 5;
constexpr int kThreads = 512;
// Of a thread; four groups of 128 have 65,536 together.
constexpr int kLoadRegisters = 48, kScoreRegisters = 112, kMixRegisters = 176;
// A maximum may lag behind by 2 before O is rescaled. The more it may, the less the heaviest weight
// is like 1, which alone is not rounded: the error is 1.85e-3 at 2^0, 1.9e-3 at 2^1, 2.1e-3 at 2^8.
// Where keys are few and one weighs much, 2^1 is too much too.
constexpr float kLazy = 1.0f;
constexpr int kExact = 16;  // pages before which no maximum lags

// Where one thread of a warp arrives, a product of the warp is done. Where all threads arrive, they
// have read or written shared memory themselves.
struct alignas(1024) Shared {
  uint8_t q[kPage];
  uint8_t pages[kStages][kPage];
  uint8_t weights[kBox];
  float fade[kRows];
  float inverse[kRows];
  Notes notes;
  uint64_t q_full, q_empty;
  uint64_t full[kStages][kPieces], empty[kStages][kPieces];
  uint64_t scored[2], p_full, p_empty;
  uint64_t sum_full, sum_empty, noted;
};

// The first box of a piece, and how many it has.
__device__ constexpr int box_of(int piece) {
  return piece == 0 ? 8 : (piece - 1) % 2 * 4 + (piece - 1) / 2 * 2;
}
__device__ constexpr int boxes_of(int piece) {
  return piece == 0 ? 1 : 2;
}

struct Maps {
  CUtensorMap queries;  // boxes of 8 rows of queries, all columns
  CUtensorMap values;   // of 64 keys, 2 x 64 columns
  CUtensorMap rotary;   // of 64 keys, 64 columns
};

// --- The roles
// ------------------------------------------------------------------------------------

// One copy a piece: copies and barriers are slow to issue, and the page after waits for them.
__device__ void load_page(Shared& shared, const Maps& maps, uint64_t policy, int turn, int page) {
  const int stage = turn % kStages;
  for (int piece = 0; piece < kPieces; ++piece) {
    uint64_t* full = &shared.full[stage][piece];
    wait(&shared.empty[stage][piece], (turn / kStages & 1) ^ 1);
    expect(full, boxes_of(piece) * kBox);
    load_box(shared.pages[stage] + box_of(piece) * kBox, piece ? &maps.values : &maps.rotary, full,
             policy, 0, box_of(piece), page);
  }
}

__device__ void load_pages(const Call& call, Shared& shared, const Maps& maps) {
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
      if (lane == 0) load_page(shared, maps, policy, turn, page);
      __syncwarp();
    }
  }
}

// As many rows as there are, by eights: the rest of a box outside the tensor comes slower than what
// is inside. Blocks begin with different ones, since they want the same at the same time.
__device__ void load_queries(const Call& call, Shared& shared, const Maps& maps) {
  int loaded = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next();) {
    const Item& item = walk.item;
    if (item.first == item.last) continue;
    const int eights = (item.rows + 7) / 8;
    wait(&shared.q_empty, (loaded++ & 1) ^ 1);
    expect(&shared.q_full, eights * kEight);
    int at = blockIdx.x % eights;
    for (int i = 0; i < eights; ++i, at = at + 1 < eights ? at + 1 : 0)
      load_box(shared.q + at * kEight, &maps.queries, &shared.q_full, evict_normal(),
               item.first_row + at * 8, 0, 0);
  }
}

// What lies behind the rows of the first tile is scored too, and costs least as zeros.
__device__ void clear_rows(Shared& shared, int rows) {
  const int from = (rows + 7) / 8 * kEight / 16;
  for (int i = from + threadIdx.x % 128; i < kPage / 16; i += 128)
    reinterpret_cast<uint4*>(shared.q)[i] = uint4{};
  fence_async();
  sync_group(2, 128);
}

// Keys behind the last one may hold anything, NaN too, and 0 * NaN is NaN.
__device__ void clear_keys(uint8_t* page, int from) {
  const int chunks = (kKeys - from) * 8;  // of 16 bytes, in a box
  for (int i = threadIdx.x % 128; i < 8 * chunks; i += 128)
    *reinterpret_cast<uint4*>(page + i / chunks * kBox + from * 128 + i % chunks * 16) = uint4{};
}

// Scores the keys of a page, piece by piece as they come; under way when this returns.
__device__ void score_page(float (&s)[32], Shared& shared, int turn) {
  const int stage = turn % kStages;
  const uint32_t q = rows_of(shared.q), keys = rows_of(shared.pages[stage]);
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    wait(&shared.full[stage][piece], turn / kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < boxes_of(piece) * 4; ++k) {
      const int box = box_of(piece) + k / 4, step = k % 4 * 32;
      wgmma_64x64<kEight>(s, q + bytes_on(box * 1024 + step), keys + bytes_on(box * kBox + step),
                          piece + k != 0);
    }
  }
  wgmma_commit();
}

// Where a lane has 8 weights of a warp's 16 rows, of the columns from 8 n on or the 8 after these.
__device__ uint8_t* place_of_weights(Shared& shared, int n) {
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
  return shared.weights + row * 128 + ((n + lane / 16) ^ (row % 8)) * 16;
}

// Of a thread's two rows of a tile.
struct Rows {
  int mine[2], limit[2];
  float best[2], total[2];
};

// Scores become weights.
__device__ void weigh(const Call& call, Shared& shared, Rows& rows, float (&s)[32], int turn,
                      const Item& item, int block) {
  const int lane = threadIdx.x % 32;
  const int key = block * kKeys + lane % 4 * 2;
  const float lag = block - item.first < kExact ? 0.0f : kLazy;
  float fade[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if ((block + 1) * kKeys > rows.limit[i]) {
#pragma unroll
      for (int n = 0; n < 16; ++n)
        if (key + n / 2 * 8 + n % 2 >= rows.limit[i]) s[n / 2 * 4 + i * 2 + n % 2] = -INFINITY;
    }
    float high[4];
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      const float one = s[n / 2 * 4 + i * 2 + n % 2];
      high[n % 4] = n < 4 ? one : fmaxf(high[n % 4], one);
    }
    high[0] = fmaxf(fmaxf(high[0], high[1]), fmaxf(high[2], high[3]));
    high[0] = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], 1));
    high[0] = fmaxf(high[0], __shfl_xor_sync(~0u, high[0], 2)) * call.scale_log2;
    fade[i] = 1.0f;
    float& best = rows.best[i];
    if (high[0] > best + lag) {
      fade[i] = exp2_fast(best - high[0]);
      best = high[0];
    }
    const float base = best == -INFINITY ? 0.0f : best;
#pragma unroll
    for (int n = 0; n < 16; ++n) {
      float& p = s[n / 2 * 4 + i * 2 + n % 2];
      p = exp2_fast(p * call.scale_log2 - base);
    }
  }
  wait(&shared.p_empty, (turn & 1) ^ 1);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (lane % 4 == 0) shared.fade[rows.mine[i]] = fade[i];
#pragma unroll
  for (int n = 0; n < 8; n += 2) {
    uint32_t pairs[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float* two = s + (n + k / 2) * 4 + k % 2 * 2;
      const __nv_bfloat162 pair = __floats2bfloat162_rn(two[0], two[1]);
      pairs[k] = reinterpret_cast<const uint32_t&>(pair);
    }
    store_matrices(place_of_weights(shared, n), pairs);
  }
  if ((block + 1) * kKeys > item.length) {
    sync_group(2, 128);  // all four warps have scored the keys
    clear_keys(shared.pages[turn % kStages], item.length - block * kKeys);
    fence_async();
  }
  arrive(&shared.p_full);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float sum = 0.0f;
#pragma unroll
    for (int n = 0; n < 16; ++n) sum += s[n / 2 * 4 + i * 2 + n % 2];
    rows.total[i] = rows.total[i] * fade[i] + sum;
  }
}

__device__ void score(const Call& call, Shared& shared) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  int turn = 0, tiles_loaded = 0, tiles = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next(); ++tiles) {
    const Item& item = walk.item;
    Rows rows{.best = {-INFINITY, -INFINITY}, .total = {}};
    for (int i = 0; i < 2; ++i) {
      rows.mine[i] = warp * 16 + lane / 4 + i * 8;
      rows.limit[i] = item.keys_seen(rows.mine[i], call.heads);
    }
    if (item.first < item.last) {
      if (tiles_loaded == 0) clear_rows(shared, item.rows);
      wait(&shared.q_full, tiles_loaded++ & 1);
    }
    for (int block = item.first; block < item.last; ++block, ++turn) {
      float s[32];
      score_page(s, shared, turn);
      if (lane == 0) arrive(&shared.scored[turn % 2]);
      wgmma_wait<0>();
      keep(s);
      if (lane == 0) {
        arrive(&shared.empty[turn % kStages][0]);
        if (block + 1 == item.last) arrive(&shared.q_empty);
      }
      weigh(call, shared, rows, s, turn, item, block);
    }
    wait(&shared.sum_empty, (tiles & 1) ^ 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = rows.total[i] + __shfl_xor_sync(~0u, rows.total[i], 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) {
        shared.inverse[rows.mine[i]] = sum > 0.0f ? 1.0f / sum : 0.0f;
        const float log = sum > 0.0f ? rows.best[i] + log2f(sum) : -INFINITY;
        if (rows.mine[i] < item.rows) {
          if (item.into < 0)
            call.lse[item.first_row + rows.mine[i]] = log * 0.6931471805599453f;
          else
            call.part_lse[(item.into + rows.mine[i]) * 4] = log;
        }
      }
    }
    arrive(&shared.sum_full);
  }
}

__device__ void put(const Call& call, const Item& item, const float (&o)[128],
                    const float (&inverse)[2], const int (&mine)[2], int half) {
  const int column = half * 256 + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool there = mine[i] < item.rows, none = item.first == item.last;
    if (item.into >= 0) {
      pack(call, there ? item.into + mine[i] : -1, half, o, i, inverse[i]);
    } else if (there) {
      __nv_bfloat16* to = call.out + int64_t(item.first_row + mine[i]) * kLatent + column;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const float a = none ? 0.0f : o[n * 4 + i * 2] * inverse[i];
        const float b = none ? 0.0f : o[n * 4 + i * 2 + 1] * inverse[i];
        *reinterpret_cast<__nv_bfloat162*>(to + n * 8) = __floats2bfloat162_rn(a, b);
      }
    }
  }
}

__device__ void mix(const Call& call, Shared& shared, int half) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int mine[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  int turn = 0, tiles = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next(); ++tiles) {
    const Item& item = walk.item;
    float o[128];
    for (int block = item.first; block < item.last; ++block, ++turn) {
      const int stage = turn % kStages;
      const uint8_t* values = shared.pages[stage] + half * 4 * kBox;
      for (int piece = 1 + half; piece < kPieces; piece += 2)
        wait(&shared.full[stage][piece], turn / kStages & 1);
      wait(&shared.p_full, turn & 1);
      const bool first = block == item.first;
      const float fade[2] = {shared.fade[mine[0]], shared.fade[mine[1]]};
      uint32_t weights[4][4];
#pragma unroll
      for (int k = 0; k < 4; ++k) load_matrices(weights[k], place_of_weights(shared, k * 2));
      arrive(&shared.p_empty);
      if (!first && __any_sync(~0u, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < 128; ++n) o[n] *= fade[n / 2 % 2];
      }
      const uint32_t value = columns_of(values, kBox);
      keep(o);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_64x128<0>(o, weights[k], value + bytes_on(k * 2048), !first || k != 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(o);
      if (lane == 0) arrive(&shared.empty[stage][1 + half]);
      // The tensor cores have the next page's scores to do before, and nothing while it is weighed.
      if (block + 1 < item.last) wait(&shared.scored[(turn + 1) % 2], (turn + 1) / 2 & 1);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_64x128<64>(o, weights[k], value + bytes_on(2 * kBox + k * 2048), !first || k != 0);
      wgmma_commit();
      wgmma_wait<0>();
      keep(o);
      if (lane == 0) arrive(&shared.empty[stage][3 + half]);
    }
    wait(&shared.sum_full, tiles & 1);
    const float inverse[2] = {shared.inverse[mine[0]], shared.inverse[mine[1]]};
    arrive(&shared.sum_empty);
    put(call, item, o, inverse, mine, half);
  }
}

// --- Launching
// ------------------------------------------------------------------------------------

__device__ void only_take(const Call& call, Shared& shared) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  int turn = 0, tiles_loaded = 0;
  for (Items walk(call.plan, blockIdx.x); walk.next();) {
    const Item& item = walk.item;
    for (int block = item.first; block < item.last; ++block, ++turn) {
      const int stage = turn % kStages;
      for (int piece = 0; piece < kPieces; ++piece) {
        wait(&shared.full[stage][piece], turn / kStages & 1);
        const int taker = piece == 0 ? 1 : 2 + (piece - 1) % 2;
        if (group == taker && lane == 0) arrive(&shared.empty[stage][piece]);
      }
    }
    if (item.first == item.last) continue;
    wait(&shared.q_full, tiles_loaded++ & 1);
    if (group == 1 && lane == 0) arrive(&shared.q_empty);
  }
}

template <bool OnlyLoad>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ Call call, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 32) prefetch(&call.plan.item(blockIdx.x));
  if (threadIdx.x == 0) {
    make_barrier(&shared.q_full, 1);
    make_barrier(&shared.q_empty, 4);
    for (int stage = 0; stage < kStages; ++stage) {
      for (int piece = 0; piece < kPieces; ++piece) {
        make_barrier(&shared.full[stage][piece], 1);
        make_barrier(&shared.empty[stage][piece], 4);
      }
    }
    for (auto& scored : shared.scored) make_barrier(&scored, 4);
    make_barrier(&shared.p_full, 128);
    make_barrier(&shared.p_empty, 256);
    make_barrier(&shared.sum_full, 128);
    make_barrier(&shared.sum_empty, 256);
    make_barrier(&shared.noted, kConsumers);
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
    give_registers<kLoadRegisters>();
    if (threadIdx.x < 32) load_pages(call, shared, maps);
    if (threadIdx.x == 32) load_queries(call, shared, maps);
  } else {
    if (group == 1) {
      give_registers<kScoreRegisters>();
      if constexpr (OnlyLoad) {
        only_take(call, shared);
      } else {
        const unsigned launch = launches_before(call);
        score(call, shared);
        note(call, shared.notes, launch);
      }
    } else {
      take_registers<kMixRegisters>();
      if constexpr (OnlyLoad)
        only_take(call, shared);
      else
        mix(call, shared, group - 2);
      // What follows is the same code for all: fewer instructions have to be fetched.
      give_registers<kScoreRegisters>();
    }
    if constexpr (!OnlyLoad)
      merge(call, *reinterpret_cast<Merging*>(&shared), shared.notes, &shared.noted);
  }
}

static_assert(sizeof(Merging) <= offsetof(Shared, fade));

}  // namespace

// --- The C ABI: 0, or a cudaError_t
// ---------------------------------------------------------------

extern "C" int mla_decode_sm90_blocks(void) {
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
    return 0;
  return count < kBlocksMax ? count : kBlocksMax;
}

extern "C" int mla_decode_sm90_plan(const int* query_start, const int* kv_lens,
                                    const int* page_table, int* space, int rows, int columns,
                                    int tokens, int heads, int tiles, int blocks, int whole_rows,
                                    int overhead, int cost_min, int saved_min, void* stream) {
  const Plan plan(query_start, kv_lens, page_table, space, rows, columns, tiles, blocks,
                  whole_rows);
  make_plan<<<1, kPlanThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      plan, tokens, heads, overhead, cost_min, saved_min);
  return int(cudaGetLastError());
}

extern "C" int mla_decode_sm90(const void* q, const void* pages, const int* query_start,
                               const int* kv_lens, const int* page_table, int* space, void* out,
                               float* lse, void* part_out, float* part_lse, int64_t q_stride,
                               int64_t page_stride, int64_t key_stride, int tokens, int pages_count,
                               int rows, int columns, int heads, int tiles, int blocks,
                               int whole_rows, float scale, int only_load, void* stream) {
  const Call call{
      Plan(query_start, kv_lens, page_table, space, rows, columns, tiles, blocks, whole_rows),
      static_cast<__nv_bfloat16*>(out),
      lse,
      static_cast<uint4*>(part_out),
      part_lse,
      heads,
      scale * 1.4426950408889634f};
  Maps maps;
  const int64_t q_sizes[3] = {int64_t(tokens) * heads, 9, 1};
  const int64_t q_strides[3] = {q_stride, 64, q_stride * tokens * heads};
  if (int error = make_map(&maps.queries, q, q_sizes, q_strides, 8, 9)) return error;
  const int64_t page_sizes[3] = {kKeys, 9, pages_count};
  const int64_t page_strides[3] = {key_stride, 64, page_stride};
  if (int error = make_map(&maps.values, pages, page_sizes, page_strides, kKeys, 2)) return error;
  if (int error = make_map(&maps.rotary, pages, page_sizes, page_strides, kKeys, 1)) return error;
  const auto kernel = only_load ? decode<true> : decode<false>;
  const int bytes = sizeof(Shared);
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
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  error = cudaLaunchKernelEx(&config, kernel, call, maps);
  return int(error);
}
