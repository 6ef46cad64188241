// Latent attention for decode on Hopper: src/tokenspeed/kernels/contract.py says what, this is how.
// Rule: raw PTX, a plain C ABI of pointers and sizes, nothing of torch, nothing of the host's
// state.
//
// One block an SM, for good. A block walks its share of the keys (mla_plan.cuh) page by page:
//   producer    one warp: nine boxes of 64 keys x 64 columns a page, by TMA, two pages ahead
//   scores      one warpgroup: S = Q K^T, the running maximum and sum; P goes where the page's
//   rotary
//               columns were, which nobody reads any more
//   values      two warpgroups: each has half of the columns of O and adds P V to it
// A tile is 64 rows, a row is a query token and a head, so that a key is read once for all of them.
// What is split over blocks they merge in the same launch: each waits for the others of its tile
// and takes a share of the tile. The launch is cooperative, so all of them are running.

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include "hopper.cuh"
#include "mla_plan.cuh"

namespace {

constexpr int kBox = kRows * 128;  // bytes of 64 rows of 64 columns
constexpr int kPage = 9 * kBox;    // bytes of 64 keys, or of a tile of queries
constexpr int kStages = 2;
// A page comes and goes in pieces: two boxes of values each, then the rotary box. The halves of O
// are done with their first pieces, 0 and 1, before they are done with 2 and 3.
constexpr int kPieces = 5;
constexpr int kThreads = 512;
// A maximum may lag behind by 2 before O is rescaled. The more it may, the less the heaviest weight
// is like 1, which alone is not rounded: the error is 1.85e-3 at 2^0, 1.9e-3 at 2^1, 2.1e-3 at 2^8.
constexpr float kLazy = 1.0f;
constexpr int kConsumers = 384;
constexpr int kWarps = kConsumers / 32;  // that merge

// Where one thread of a warp arrives, a product of the warp is done. Where all threads arrive, they
// have read or written shared memory themselves.
struct Shared {
  uint8_t q[kPage];
  uint8_t pages[kStages][kPage];
  float fade[kStages][kRows];
  float inverse[kRows];
  uint64_t q_full, q_empty;
  uint64_t full[kStages][kPieces], empty[kStages][kPieces], p_full[kStages];
  uint64_t sum_full, sum_empty;
};

struct Merging {  // lies where Q was
  float weights[kWarps][kBlocksMax];
  float4 sums[kWarps][32];
};

struct Call {
  Plan plan;
  __nv_bfloat16* out;  // [tokens, heads, 512]
  float* lse;          // [tokens, heads]
  float* part_out;     // [2 * blocks, 64, 512]
  float* part_lse;     // [2 * blocks, 64], in powers of two
  int heads;
  float scale_log2;
};

// The first box of a piece, and how many it has.
__device__ constexpr int box_of(int piece) {
  return piece == 4 ? 8 : piece % 2 * 4 + piece / 2 * 2;
}
__device__ constexpr int boxes_of(int piece) {
  return piece == 4 ? 1 : 2;
}

// --- The roles
// ------------------------------------------------------------------------------------

__device__ void load_page(Shared& shared, const CUtensorMap* map, uint64_t policy, int turn,
                          int page) {
  const int stage = turn % kStages;
  for (int piece = 0; piece < kPieces; ++piece) {
    uint64_t* full = &shared.full[stage][piece];
    wait(&shared.empty[stage][piece], (turn / kStages & 1) ^ 1);
    expect(full, boxes_of(piece) * kBox);
    for (int box = box_of(piece); box < box_of(piece) + boxes_of(piece); ++box)
      load_box(shared.pages[stage] + box * kBox, map, full, policy, box * 64, 0, page);
  }
}

__device__ void load_queries(Shared& shared, const CUtensorMap* map, int row) {
  expect(&shared.q_full, kPage);
  for (int box = 0; box < 9; ++box)
    load_box(shared.q + box * kBox, map, &shared.q_full, evict_normal(), box * 64, row, 0);
}

__device__ void load(const Call& call, Shared& shared, const CUtensorMap* q_map,
                     const CUtensorMap* page_map) {
  const int lane = threadIdx.x % 32;
  // Pages that several tiles read should stay in L2 for the others.
  const uint64_t policy = call.plan.tiles == 1 ? evict_first() : evict_normal();
  // What comes first needs no walking; the queries must not wait behind a second page.
  const int* early = call.plan.early + blockIdx.x * 3;
  const int pages[2] = {early[0], early[1]}, row = early[2];
  if (lane == 0 && pages[0] >= 0) {
    load_page(shared, page_map, policy, 0, pages[0]);
    load_queries(shared, q_map, row);
    if (pages[1] >= 0) load_page(shared, page_map, policy, 1, pages[1]);
  }
  const int ahead_of = (pages[0] >= 0) + (pages[1] >= 0);
  int turn = 0, tiles_loaded = 0, ids = 0;
  for (Walk walk(call.plan, call.heads, blockIdx.x); walk.next();) {
    const int* table = call.plan.page_table + int64_t(walk.row) * call.plan.columns;
    for (int block = walk.first; block < walk.last; ++block, ++turn) {
      const int ahead = (block - walk.first) % 32;
      if (ahead == 0) ids = block + lane < walk.last ? __ldg(table + block + lane) : 0;
      const int page = __shfl_sync(~0u, ids, ahead);
      if (lane == 0) {
        if (turn >= ahead_of) load_page(shared, page_map, policy, turn, page);
        // After the first page, which need not wait for the last tile's queries to be done with.
        if (block == walk.first && turn >= ahead_of) {
          wait(&shared.q_empty, (tiles_loaded & 1) ^ 1);
          load_queries(shared, q_map, walk.first_row);
        }
      }
      __syncwarp();
    }
    tiles_loaded += walk.first < walk.last;
  }
}

// Keys behind the last one may hold anything, NaN too, and 0 * NaN is NaN.
__device__ void clear_keys(uint8_t* page, int from) {
  const int chunks = (kKeys - from) * 8;  // of 16 bytes, in a box
  for (int i = threadIdx.x % 128; i < 8 * chunks; i += 128)
    *reinterpret_cast<uint4*>(page + i / chunks * kBox + from * 128 + i % chunks * 16) = uint4{};
}

__device__ void score(const Call& call, Shared& shared) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int mine[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  int turn = 0, tiles_loaded = 0, tiles = 0;
  for (Walk walk(call.plan, call.heads, blockIdx.x); walk.next(); ++tiles) {
    float best[2] = {-INFINITY, -INFINITY}, total[2] = {};
    int limit[2];
    for (int i = 0; i < 2; ++i) limit[i] = walk.keys_seen(mine[i]);
    if (walk.first < walk.last) wait(&shared.q_full, tiles_loaded++ & 1);
    for (int block = walk.first; block < walk.last; ++block, ++turn) {
      const int stage = turn % kStages;
      uint8_t* page = shared.pages[stage];
      float s[32];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        wait(&shared.full[stage][piece], turn / kStages & 1);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < boxes_of(piece) * 4; ++k) {
          const int at = (box_of(piece) + k / 4) * kBox + k % 4 * 32;
          wgmma_64x64(s, rows_of(shared.q + at), rows_of(page + at), piece + k != 0);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      keep(s);
      if (block + 1 == walk.last && lane == 0) arrive(&shared.q_empty);

      const int key = block * kKeys + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if ((block + 1) * kKeys > limit[i]) {
#pragma unroll
          for (int n = 0; n < 16; ++n)
            if (key + n / 2 * 8 + n % 2 >= limit[i]) s[n / 2 * 4 + i * 2 + n % 2] = -INFINITY;
        }
        float high = -INFINITY;
#pragma unroll
        for (int n = 0; n < 16; ++n) high = fmaxf(high, s[n / 2 * 4 + i * 2 + n % 2]);
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 1));
        high = fmaxf(high, __shfl_xor_sync(~0u, high, 2)) * call.scale_log2;
        float fade = 1.0f;
        if (high > best[i] + kLazy) {
          fade = exp2_fast(best[i] - high);
          best[i] = high;
        }
        const float base = best[i] == -INFINITY ? 0.0f : best[i];
        float sum = 0.0f;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          float& p = s[n / 2 * 4 + i * 2 + n % 2];
          p = exp2_fast(p * call.scale_log2 - base);
          sum += p;
        }
        total[i] = total[i] * fade + sum;
        if (lane % 4 == 0) shared.fade[stage][mine[i]] = fade;
      }
      // Only when all four warps are done with the keys may P take their place.
      sync_group(2, 128);
      uint8_t* p_box = page + 8 * kBox;
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          const __nv_bfloat162 pair = __floats2bfloat162_rn(s[n * 4 + i * 2], s[n * 4 + i * 2 + 1]);
          const int at = mine[i] * 128 + ((n * 16 + lane % 4 * 4) ^ (mine[i] % 8 * 16));
          *reinterpret_cast<__nv_bfloat162*>(p_box + at) = pair;
        }
      if ((block + 1) * kKeys > walk.length) clear_keys(page, walk.length - block * kKeys);
      fence_async();
      arrive(&shared.p_full[stage]);
    }
    wait(&shared.sum_empty, (tiles & 1) ^ 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = total[i] + __shfl_xor_sync(~0u, total[i], 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) {
        shared.inverse[mine[i]] = sum > 0.0f ? 1.0f / sum : 0.0f;
        const float log = sum > 0.0f ? best[i] + log2f(sum) : -INFINITY;
        if (mine[i] < walk.rows) {
          if (walk.slot < 0)
            call.lse[walk.first_row + mine[i]] = log * 0.6931471805599453f;
          else
            call.part_lse[walk.slot * kRows + mine[i]] = log;
        }
      }
    }
    arrive(&shared.sum_full);
  }
}

__device__ void put(const Call& call, const Walk& walk, const float (&o)[128],
                    const float (&inverse)[2], const int (&mine)[2], int column) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (mine[i] >= walk.rows) continue;
    const bool none = walk.first == walk.last;
    if (walk.slot < 0) {
      __nv_bfloat16* to = call.out + int64_t(walk.first_row + mine[i]) * kLatent + column;
#pragma unroll
      for (int n = 0; n < 32; ++n) {
        const float a = none ? 0.0f : o[n * 4 + i * 2] * inverse[i];
        const float b = none ? 0.0f : o[n * 4 + i * 2 + 1] * inverse[i];
        *reinterpret_cast<__nv_bfloat162*>(to + n * 8) = __floats2bfloat162_rn(a, b);
      }
    } else {
      float* to = call.part_out + (int64_t(walk.slot) * kRows + mine[i]) * kLatent + column;
#pragma unroll
      for (int n = 0; n < 32; ++n)
        *reinterpret_cast<float2*>(to + n * 8) =
            float2{o[n * 4 + i * 2] * inverse[i], o[n * 4 + i * 2 + 1] * inverse[i]};
    }
  }
}

__device__ void mix(const Call& call, Shared& shared, int half) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int mine[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
  int turn = 0, tiles = 0;
  for (Walk walk(call.plan, call.heads, blockIdx.x); walk.next(); ++tiles) {
    float o[128];
    for (int block = walk.first; block < walk.last; ++block, ++turn) {
      const int stage = turn % kStages;
      const uint8_t* values = shared.pages[stage] + half * 4 * kBox;
      for (int piece = half; piece < 4; piece += 2)
        wait(&shared.full[stage][piece], turn / kStages & 1);
      wait(&shared.p_full[stage], turn / kStages & 1);
      const bool first = block == walk.first;
      const float fade[2] = {shared.fade[stage][mine[0]], shared.fade[stage][mine[1]]};
      if (!first && __any_sync(~0u, fade[0] != 1.0f || fade[1] != 1.0f)) {
#pragma unroll
        for (int n = 0; n < 128; ++n) o[n] *= fade[n / 2 % 2];
      }
      keep(o);
      wgmma_fence();
      const uint8_t* p = shared.pages[stage] + 8 * kBox;
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_64x128<0>(o, rows_of(p + k * 32), columns_of(values + k * 2048, kBox),
                        !first || k != 0);
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma_64x128<64>(o, rows_of(p + k * 32), columns_of(values + 2 * kBox + k * 2048, kBox),
                         !first || k != 0);
      wgmma_commit();
      wgmma_wait<1>();
      if (lane == 0) arrive(&shared.empty[stage][half]);
      wgmma_wait<0>();
      keep(o);
      if (lane == 0) arrive(&shared.empty[stage][2 + half]);
      arrive(&shared.empty[stage][4]);
    }
    wait(&shared.sum_full, tiles & 1);
    const float inverse[2] = {shared.inverse[mine[0]], shared.inverse[mine[1]]};
    arrive(&shared.sum_empty);
    put(call, walk, o, inverse, mine, half * 256 + lane % 4 * 2);
  }
}

// --- Merging what is split
// ------------------------------------------------------------------------

// A warp sums `Wide` float4 of one row over every `groups`th part; groups of warps share a row.
template <int Wide>
__device__ void merge_tile(const Call& call, const Walk& walk, const Split& split, Merging& shared,
                           int groups) {
  const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
  const int group = warp % groups, at_once = kWarps / groups, cuts = 4 / Wide;
  const int units = walk.rows * cuts, step = split.count * at_once;
  for (int base = split.rank * at_once; base < units; base += step) {
    const int unit = base + warp / groups, row = unit / cuts, cut = unit % cuts;
    float4 sum[Wide] = {};
    if (unit < units) {
      float high = -INFINITY, total = 0.0f;
      float* weights = shared.weights[warp];
      __syncwarp();
      for (int part = lane; part < split.count; part += 32) {
        weights[part] = __ldcg(call.part_lse + split.slot(part) * kRows + row);
        high = fmaxf(high, weights[part]);
      }
      for (int i = 16; i; i /= 2) high = fmaxf(high, __shfl_xor_sync(~0u, high, i));
      const float from = high == -INFINITY ? 0.0f : high;
      for (int part = lane; part < split.count; part += 32) {
        weights[part] = exp2_fast(weights[part] - from);
        total += weights[part];
      }
      for (int i = 16; i; i /= 2) total += __shfl_xor_sync(~0u, total, i);
      __syncwarp();
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll(8 / Wide)
      for (int part = group; part < split.count; part += groups) {
        const float weight = weights[part] * inverse;
        const float4* from_part = reinterpret_cast<const float4*>(
            call.part_out + (int64_t(split.slot(part)) * kRows + row) * kLatent + cut * 128);
#pragma unroll
        for (int i = 0; i < Wide; ++i) {
          const float4 value = __ldcg(from_part + i * 32 + lane);
          sum[i].x += weight * value.x, sum[i].y += weight * value.y;
          sum[i].z += weight * value.z, sum[i].w += weight * value.w;
        }
      }
      if (group == 0 && cut == 0 && lane == 0)
        call.lse[walk.first_row + row] =
            total > 0.0f ? (high + log2f(total)) * 0.6931471805599453f : -INFINITY;
    }
    if (groups > 1) {
      shared.sums[warp][lane] = sum[0];
      sync_group(1, kConsumers);
      if (group == 0)
        for (int other = 1; other < groups; ++other) {
          const float4 value = shared.sums[warp + other][lane];
          sum[0].x += value.x, sum[0].y += value.y, sum[0].z += value.z, sum[0].w += value.w;
        }
      sync_group(1, kConsumers);
    }
    if (group == 0 && unit < units) {
      __nv_bfloat16* to = call.out + int64_t(walk.first_row + row) * kLatent + cut * 128;
#pragma unroll
      for (int i = 0; i < Wide; ++i) {
        __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(sum[i].x, sum[i].y),
                                   __floats2bfloat162_rn(sum[i].z, sum[i].w)};
        *reinterpret_cast<uint2*>(to + (i * 32 + lane) * 4) = *reinterpret_cast<uint2*>(pairs);
      }
    }
  }
}

__device__ void merge(const Call& call, Merging& shared) {
  __threadfence();
  sync_group(1, kConsumers);
  const bool speaks = threadIdx.x == 128;
  unsigned target[2] = {};
  int splits = 0;
  for (Walk walk(call.plan, call.heads, blockIdx.x); walk.next();)
    if (walk.slot >= 0) {
      const Split split(call.plan, walk);
      if (speaks) {
        // Every block of the tile comes by once a launch: the count tells which launch this is.
        const unsigned before = atomicAdd(call.plan.arrived + walk.counter(), 1u);
        target[splits] = (before / split.count + 1) * split.count;
      }
      ++splits;
    }
  if (splits == 0) return;
  splits = 0;
  for (Walk walk(call.plan, call.heads, blockIdx.x); walk.next();)
    if (walk.slot >= 0) {
      const Split split(call.plan, walk);
      if (speaks)
        while (int(load_acquire(call.plan.arrived + walk.counter()) - target[splits]) < 0) {
        }
      ++splits;
      sync_group(1, kConsumers);
      const int units = walk.rows * 4;
      if (split.count <= 16)
        merge_tile<4>(call, walk, split, shared, 1);
      else if (split.count >= units)
        merge_tile<1>(call, walk, split, shared, 12);
      else if (split.count * 3 >= units)
        merge_tile<1>(call, walk, split, shared, 4);
      else if (split.count * 6 >= units)
        merge_tile<1>(call, walk, split, shared, 2);
      else
        merge_tile<1>(call, walk, split, shared, 1);
      sync_group(1, kConsumers);
    }
}

// --- Launching
// ------------------------------------------------------------------------------------

__device__ void only_take(const Call& call, Shared& shared) {
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32;
  int turn = 0, tiles_loaded = 0;
  for (Walk walk(call.plan, call.heads, blockIdx.x); walk.next();) {
    for (int block = walk.first; block < walk.last; ++block, ++turn) {
      const int stage = turn % kStages;
      for (int piece = 0; piece < kPieces; ++piece) {
        wait(&shared.full[stage][piece], turn / kStages & 1);
        const bool mine = piece == 4 ? group >= 2 : group == 2 + piece % 2 && lane == 0;
        if (mine) arrive(&shared.empty[stage][piece]);
      }
    }
    if (walk.first == walk.last) continue;
    wait(&shared.q_full, tiles_loaded++ & 1);
    if (group == 1 && lane == 0) arrive(&shared.q_empty);
  }
}

template <bool OnlyLoad>
__global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ Call call, const __grid_constant__ CUtensorMap q_map,
           const __grid_constant__ CUtensorMap page_map) {
  extern __shared__ __align__(1024) uint8_t bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  if (threadIdx.x == 0) {
    make_barrier(&shared.q_full, 1);
    make_barrier(&shared.q_empty, 4);
    for (int stage = 0; stage < kStages; ++stage) {
      for (int piece = 0; piece < kPieces; ++piece) {
        make_barrier(&shared.full[stage][piece], 1);
        make_barrier(&shared.empty[stage][piece], piece == 4 ? 256 : 4);
      }
      make_barrier(&shared.p_full[stage], 128);
    }
    make_barrier(&shared.sum_full, 128);
    make_barrier(&shared.sum_empty, 256);
    fence_barriers();
  }
  __syncthreads();
  const int group = threadIdx.x / 128;
  if (group == 0) {
    give_registers<40>();
    if (threadIdx.x < 32) load(call, shared, &q_map, &page_map);
  } else if (group == 1) {
    give_registers<104>();
    if constexpr (OnlyLoad) {
      only_take(call, shared);
    } else {
      score(call, shared);
      merge(call, *reinterpret_cast<Merging*>(shared.q));
    }
  } else {
    take_registers<184>();
    if constexpr (OnlyLoad) {
      only_take(call, shared);
    } else {
      mix(call, shared, group - 2);
      merge(call, *reinterpret_cast<Merging*>(shared.q));
    }
  }
}

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
                                    int heads, int tiles, int blocks, int overhead, int cost_min,
                                    void* stream) {
  const Plan plan(query_start, kv_lens, page_table, space, rows, columns, tiles, blocks);
  make_plan<<<1, kPlanThreads, 0, static_cast<cudaStream_t>(stream)>>>(plan, heads, overhead,
                                                                       cost_min);
  return int(cudaGetLastError());
}

extern "C" int mla_decode_sm90(const void* q, const void* pages, const int* query_start,
                               const int* kv_lens, const int* page_table, int* space, void* out,
                               float* lse, float* part_out, float* part_lse, int64_t q_stride,
                               int64_t page_stride, int64_t key_stride, int tokens, int pages_count,
                               int rows, int columns, int heads, int tiles, int blocks, float scale,
                               int only_load, void* stream) {
  const Call call{Plan(query_start, kv_lens, page_table, space, rows, columns, tiles, blocks),
                  static_cast<__nv_bfloat16*>(out),
                  lse,
                  part_out,
                  part_lse,
                  heads,
                  scale * 1.4426950408889634f};
  CUtensorMap q_map, page_map;
  const int64_t q_sizes[3] = {kWidth, int64_t(tokens) * heads, 1};
  const int64_t q_strides[2] = {q_stride, q_stride * tokens * heads};
  if (int error = make_map(&q_map, q, q_sizes, q_strides)) return error;
  const int64_t page_sizes[3] = {kWidth, kKeys, pages_count};
  const int64_t page_strides[2] = {key_stride, page_stride};
  if (int error = make_map(&page_map, pages, page_sizes, page_strides)) return error;
  const auto kernel = only_load ? decode<true> : decode<false>;
  const int bytes = sizeof(Shared);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return int(error);
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(call.plan.blocks_used());
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &together;
  config.numAttrs = 1;
  error = cudaLaunchKernelEx(&config, kernel, call, q_map, page_map);
  return int(error);
}
